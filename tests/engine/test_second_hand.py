"""Checkpoints made by the real auto-round, llm-compressor and modelopt: check names what is wrong with each, mtpress puts it
right, the real vLLM loads what comes out with no tensor missing, and its draft head is accepted as often as the BF16 model's.

Six vLLM starts; the BF16 run is test_acceptance.py's. The whole table, before and after, is benchmarks/second_hand.py's.
"""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from acceptance import BF16, NUM_DRAFT_TOKENS, Added, Runs
from mended import SECOND_HAND, broken_and_repaired, loads
from questions import ANSWERS
from safetensors.torch import load_file, save_file

from breaks import CASES
from mtpress.builtin import BUILTIN_MODEL
from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.formats import int4
from mtpress.models.qwen3_5.names import MTP_TENSORS
from mtpress.stages.check import check
from mtpress.stages.quantize import quantize

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif("MTPRESS_TEST_MODEL" in os.environ, reason="the exports are of the built-in model"),
]

POINTS = 0.03
MAJORITY, MOST = 0.5, 0.7
KERNEL = Path(__file__).with_name("int4_kernel_on_cpu.py")
INT4_RECIPE = "int4-mtp-vlm"  # plain rounding: scales of both signs
# The head is in part missing, quantized, out of the lists, under another name; the lists match nothing.
SAMPLE = ("half_a_draft_head", "mtp_fc_quantized", "draft_head_not_ignored", "draft_head_under_the_body", "globs_on_shards")
PROBED = ("modelopt", "autoround", "autoround-fc", "llmcompressor-gdn")  # these start, which loading is a part of
# W4A16 wants Marlin; a tower that was stripped on purpose wants --language-model-only
NOT_ASKED = {"weight_only_needs_no_input_scale", "weight_only_with_input_scales", "tower_stripped"}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """directories(class): broken and mended, made once."""
    made: dict[str, tuple[Path, Path]] = {}

    def of(name: str) -> tuple[Path, Path]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            broken = SECOND_HAND[name].broken(folder)
            SECOND_HAND[name].mended(broken, folder / name)
            made[name] = broken, folder / name
        return made[name]

    return of


@pytest.fixture(scope="module")
def own_int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("own") / INT4_RECIPE
    quantize(BUILTIN_MODEL, out, INT4_RECIPE, device="cpu", silent=True)
    return out


@pytest.fixture(scope="module")
def cases(small_nvfp4: dict[str, Path], small_bf16: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Case of tests/breaks.py → the small checkpoint after repair: the sample, all of them with MTPRESS_SOAK=1."""
    folder = tmp_path_factory.mktemp("cases")
    repaired = {}
    for name, _, break_it in CASES:
        if name in SAMPLE or (os.environ.get("MTPRESS_SOAK") == "1" and name not in NOT_ASKED):
            (folder / name).mkdir()
            _, repaired[name] = broken_and_repaired(break_it, small_nvfp4["nvfp4-mtp-vlm"], small_bf16, folder / name)
    assert set(SAMPLE) <= set(repaired)
    return repaired


@pytest.fixture(scope="module")
def loaded(
    engine_python: Path, directories: Callable[[str], tuple[Path, Path]], cases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str | None]:
    """What vLLM says to every class before ("name, broken"), after where it is not started, and to every repaired case."""
    paths = {f"{name}, broken": directories(name)[0] for name in SECOND_HAND}
    paths |= {name: directories(name)[1] for name in SECOND_HAND if name not in PROBED}
    return loads(engine_python, paths | cases, tmp_path_factory.mktemp("loaded") / "found.json", track=True)


@pytest.mark.parametrize("name", SECOND_HAND)
def test_check_names_what_is_wrong_and_nothing_is_left(name: str, directories: Callable[[str], tuple[Path, Path]]) -> None:
    broken, mended = directories(name)
    assert SECOND_HAND[name].rules <= {finding.id for finding in check(broken, silent=True).findings}
    left = {finding.id for finding in check(mended, silent=True).findings}
    assert left <= {"tokenizer-backend"}  # a warning on a key for transformers 4, which convert and graft do not touch


@pytest.mark.parametrize("name", [name for name in SECOND_HAND if name != "autoround-fc"])
def test_the_head_is_the_base_s_bit_for_bit(name: str, directories: Callable[[str], tuple[Path, Path]]) -> None:
    base, made = Checkpoint.open(BUILTIN_MODEL), Checkpoint.open(directories(name)[1])
    for tensor in MTP_TENSORS:
        assert torch.equal(made.read(tensor).view(torch.uint8), base.read(tensor).view(torch.uint8)), tensor


@pytest.mark.parametrize("name", SECOND_HAND)
def test_vllm_loads_it_with_every_tensor(name: str, loaded: dict[str, str | None]) -> None:
    assert (loaded[f"{name}, broken"] is None) == SECOND_HAND[name].loads, loaded[f"{name}, broken"]
    assert name in PROBED or loaded[name] is None


def test_vllm_loads_every_repaired_case(cases: dict[str, Path], loaded: dict[str, str | None]) -> None:
    assert {name: loaded[name] for name in cases if loaded[name]} == {}


def test_a_head_that_is_missing_is_never_accepted(runs: Runs, directories: Callable[[str], tuple[Path, Path]]) -> None:
    """What people get who make the engine start without it: no error, and no draft that is right."""
    runs.added["modelopt-broken"] = Added(directories("modelopt-ignored")[0], tracked=False, groups=(ANSWERS,))
    assert runs.acceptance_rate("modelopt-broken") < 0.01
    assert runs.result("modelopt-broken", NUM_DRAFT_TOKENS)["metrics"][ANSWERS]["drafts"] > 50


@pytest.mark.parametrize("name", PROBED)
def test_its_drafts_are_accepted_as_often_as_in_bf16(name: str, runs: Runs, directories: Callable[[str], tuple[Path, Path]]) -> None:
    runs.added[name] = Added(directories(name)[1])
    assert runs.acceptance_rate(BF16) > 0.5
    assert runs.acceptance_rate(name) == pytest.approx(runs.acceptance_rate(BF16), abs=POINTS)
    assert runs.right(name, ANSWERS) > MAJORITY


def test_our_int4_answers_as_bf16_does_and_its_head_works(runs: Runs, own_int4: Path) -> None:
    runs.added[INT4_RECIPE] = Added(own_int4)
    assert runs.acceptance_rate(INT4_RECIPE) == pytest.approx(runs.acceptance_rate(BF16), abs=POINTS)
    pairs = list(zip(runs.texts(INT4_RECIPE, ANSWERS), runs.texts(BF16, ANSWERS), strict=True))
    assert sum(ours == bf16 for ours, bf16 in pairs) / len(pairs) >= MOST
    linears = runs.result(INT4_RECIPE, NUM_DRAFT_TOKENS)["linears"]
    assert {"mtp.fc", "mtp.layers.0.self_attn.qkv_proj", "mtp.layers.0.mlp.down_proj"} <= set(linears["draft"])
    assert set(linears["draft"].values()) <= {"UnquantizedLinearMethod", "UnquantizedEmbeddingMethod"}


def test_vllm_s_cpu_kernel_takes_negative_scales_exactly(own_int4: Path, engine_python: Path, tmp_path: Path) -> None:
    """The kernel applied to the identity is the matrix: (code − 8) · scale, rounded once to the dtype of the activations."""
    checkpoint = Checkpoint.open(own_int4)
    module = next(name for name in checkpoint.tensors if name.endswith(f"mlp.down_proj.{int4.SCALES}")).removesuffix(f".{int4.SCALES}")
    stored = {part: checkpoint.read(f"{module}.{part}") for part in (int4.QWEIGHT, int4.QZEROS, int4.SCALES)}
    negative = float((stored[int4.SCALES] < 0).float().mean())
    assert 0.2 < negative < 0.8, "the largest weight of a group is as often positive as negative"
    save_file(stored, tmp_path / "in.safetensors")
    command = [str(engine_python), str(KERNEL), str(tmp_path / "in.safetensors"), str(tmp_path / "out.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    applied = load_file(tmp_path / "out.safetensors")
    for dtype in (torch.bfloat16, torch.float16):
        scales = stored[int4.SCALES].to(dtype)  # vLLM keeps them in the dtype of the activations
        expected = int4.dequantize(stored[int4.QWEIGHT], stored[int4.QZEROS], scales.float()).to(dtype)
        assert torch.equal(applied[str(dtype).removeprefix("torch.")], expected), dtype
