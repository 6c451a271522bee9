import pytest
from launches import NVFP4, card, machine, model
from pydantic import ValidationError

from mtpress.engine.launch import profiles
from mtpress.engine.launch.known_issues import known_issues
from mtpress.engine.launch.profiles import Profile, choose, described, mismatch, named
from mtpress.errors import InputError, ResourceError
from serve_profiles import seeds

AUTOROUND = {"format": "AutoRound", "quant_method": "inc"}


@pytest.mark.parametrize(
    ("hardware", "name"),
    [
        (card("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 95.6, (12, 0)), "rtx-pro-6000-256k"),
        (card("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", 95.6, (12, 0), count=2), "rtx-pro-6000-256k"),
        (card("NVIDIA GeForce RTX 5090", 31.8, (12, 0)), "rtx-5090"),
        (card("NVIDIA GeForce RTX 5090", 31.8, (12, 0), count=2), "two-gpus"),
        (card("NVIDIA GeForce RTX 3090", 24.0, (8, 6), count=4), "two-gpus"),
        (card("NVIDIA GB10", 119.7, (12, 1), unified=True), "gb10"),
        (card("NVIDIA H100 80GB HBM3", 79.6, (9, 0)), "hopper"),
        (card("NVIDIA H200", 140.4, (9, 0), count=8), "hopper"),
        (card("NVIDIA B200", 178.4, (10, 0)), "gpu-80gb"),
        (card("NVIDIA A100-SXM4-80GB", 79.6, (8, 0)), "gpu-80gb"),
        (card("NVIDIA L40S", 45.0, (8, 9)), "gpu-48gb"),
        (card("NVIDIA A100-PCIE-40GB", 39.6, (8, 0)), "gpu-32gb"),
        (card("NVIDIA GeForce RTX 4090", 24.0, (8, 9)), "gpu-24gb"),
        (card("NVIDIA GeForce RTX 5070 Ti", 15.9, (12, 0)), "gpu-24gb"),
        (card("NVIDIA Thor", 122.8, (11, 0), unified=True), "unified-memory"),
    ],
)
def test_the_machine_chooses(hardware: profiles.Hardware, name: str) -> None:
    assert choose(hardware, "cuda", model(**NVFP4)).name == name


def test_the_checkpoint_chooses_too() -> None:
    assert choose(machine("rtx-5090"), "cuda", model(**AUTOROUND)).name == "int4-rtx-5090"
    assert choose(card("NVIDIA L40S", 45.0, (8, 9)), "cuda", model(**AUTOROUND)).name == "gpu-48gb"


def test_a_cpu_build_gets_the_cpu_profile_even_beside_a_gpu() -> None:
    for hardware in (machine("cpu"), machine("rtx-5090")):
        assert choose(hardware, "cpu", model()).name == "cpu"


def test_a_cuda_build_without_a_gpu_is_refused() -> None:
    with pytest.raises(ResourceError, match=r"no NVIDIA GPU is visible here.*--engine"):
        choose(machine("cpu"), "cuda", model())


@pytest.mark.parametrize("name", list(profiles.profiles()))
def test_every_profile_matches_the_hardware_that_it_names(name: str) -> None:
    profile = named(name)
    assert mismatch(profile, machine(name), profile.match.platform, None) is None
    if not profile.by_name_only:
        served = model(**AUTOROUND) if profile.match.quant_methods else model(**NVFP4)
        assert choose(machine(name), profile.match.platform, served).name == name


@pytest.mark.parametrize(
    ("name", "hardware", "said"),
    [
        ("gb10", card("NVIDIA GeForce RTX 4090", 24, (8, 9)), "for GB10, this is NVIDIA GeForce RTX 4090"),
        ("gb10", card("NVIDIA GB10", 119.7, (12, 1)), "memory that host and GPU share"),
        ("hopper", card("NVIDIA A100-SXM4-80GB", 79.6, (8, 0)), "compute capability 9.0, this GPU has 8.0"),
        ("hopper", card("NVIDIA H100 MIG 1g.20gb", 19.9, (9, 0)), "75 GiB or more, this GPU has 19.9"),
        ("two-gpus", card("NVIDIA GeForce RTX 5090", 31.8, (12, 0)), "for 2 GPUs, 1 visible here"),
        ("two-gpus", card("NVIDIA H200", 140, (9, 0), count=2), "22 GiB to 50, this GPU has 140.0"),
        ("cpu", card("NVIDIA H200", 140, (9, 0)), "built for the CPU, this one is built for CUDA"),
    ],
)
def test_why_a_profile_does_not_match(name: str, hardware: profiles.Hardware, said: str) -> None:
    reason = mismatch(named(name), hardware, "cuda", None)
    assert reason is not None
    assert said in reason


def test_a_build_that_a_profile_is_not_for() -> None:
    assert "this checkpoint is BF16" in (mismatch(named("int4-rtx-5090"), machine("rtx-5090"), "cuda", model()) or "")


def test_hardware_in_words() -> None:
    assert described(machine("two-gpus")) == "2 × NVIDIA GeForce RTX 5090 (12.0, 31.8 GiB)"
    assert described(machine("gb10")) == "NVIDIA GB10 (12.1, 119.7 GiB, shared with the host)"
    assert described(machine("cpu")) == "no GPU, 16 cores, 64.0 GiB"


def test_an_unknown_name_lists_them_all() -> None:
    with pytest.raises(InputError, match="did you mean hopper") as caught:
        named("hoper")
    assert all(name in str(caught.value) for name in profiles.profiles())


@pytest.mark.parametrize(
    "change",
    [
        {"speed": 1},
        {"match": {"platform": "cuda", "gpus": 2}},
        {"match": {"platform": "rocm"}},
        {"flags": {"max-num-seqs": {"value": 1, "reason": "r", "source": "s"}}},
        {"flags": {"--max-num-seqs": {"value": 1, "source": "s"}}},
        {"environment": {"lower": {"value": "1", "reason": "r", "source": "s"}}},
        {"num_speculative_tokens": 3},
        {"name": "Two Words"},
    ],
)
def test_a_profile_that_says_what_is_not_known_is_refused(change: dict[str, object]) -> None:
    sound = named("rtx-5090").model_dump()
    assert Profile.model_validate(sound).name == "rtx-5090"
    with pytest.raises(ValidationError):
        Profile.model_validate(sound | change)


def test_sources_are_those_that_docs_explain() -> None:
    known = {"mtpress", "vLLM 0.32 on CPU", *(seed["seed"] for seed in seeds())}
    issues = {source for issue in known_issues() for source in issue.sources}
    for profile in profiles.profiles().values():
        values = [profile.num_speculative_tokens, *profile.flags.values(), *profile.environment.values()]
        for value in (*values, *([profile.min_available_gib] if profile.min_available_gib else [])):
            assert value.source in known | issues, value


def test_the_watchdogs_of_shared_memory_and_the_cpu() -> None:
    watched = {name for name, profile in profiles.profiles().items() if profile.min_available_bytes}
    assert watched == {"gb10", "unified-memory", "cpu"}
    assert named("gb10").min_available_bytes == 6 << 30
