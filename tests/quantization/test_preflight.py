import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from mtpress.builtin import BUILTIN_MODEL
from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.cli import main
from mtpress.errors import ResourceError
from mtpress.models import family
from mtpress.plan.budget import choices
from mtpress.plan.plan import Plan, make_plan
from mtpress.plan.recipe import load_recipe, parse_recipe
from mtpress.quantization import gptq_cost, preflight
from mtpress.quantization.machine import Machine
from mtpress.quantization.preflight import START_SECONDS, promise, refuse, states_bytes, with_measuring
from mtpress.rounding import batches as tuning_batches

CPU = torch.device("cpu")
COMMAND = ("quantize", str(BUILTIN_MODEL), "--recipe", "nvfp4-mtp-vlm")
LOADED = 400_000_000
MACHINE = Machine(read=2e9, write=1e9, hash=5e8, copy=1e10, pack=4e8, matmul=1e11, attention=2e10, delta_rule=1e-5)
FAST = Machine(read=1e18, write=1e18, hash=1e18, copy=1e18, pack=1e18, matmul=1e11, attention=2e10, delta_rule=1e-5)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(Checkpoint.open(BUILTIN_MODEL), load_recipe("nvfp4-mtp-vlm"))


@pytest.mark.parametrize("arguments", [["--weight-only", "0.01"], ["--calibration", "builtin"]])
def test_memory_and_disk_are_as_promised(arguments: list[str], tmp_path: Path) -> None:
    """In a process of its own, whose peak memory is the run's."""
    command = [sys.executable, "-m", "mtpress", *COMMAND, str(tmp_path / "out"), *arguments, "--json"]
    subprocess.run(command, check=True, capture_output=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    told = json.loads((tmp_path / "out" / "mtpress.json").read_text())["preflight"]
    for kind in ("memory_bytes", "disk_bytes"):
        assert told["took"][kind] == pytest.approx(told["promised"][kind], rel=0.2), kind
    assert told["promised"]["seconds"] >= START_SECONDS
    assert told["took"]["seconds"] > 0


def test_a_dry_run_promises_the_same_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    promised = {}
    for kind in ([], ["--dry-run"]):
        assert main([*COMMAND, str(tmp_path / "out"), "--weight-only", "0.01", "--json", *kind]) == 0
        promised[bool(kind)] = json.loads(capsys.readouterr().out)["promised"]
        if (tmp_path / "out").exists():
            (tmp_path / "out").rename(tmp_path / "made")
    assert promised[True]["disk_bytes"] == promised[False]["disk_bytes"]
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def quantized_bytes(plan: Plan, steps: set[str] | None = None) -> int:
    return sum(
        info.num_bytes
        for step in plan.steps
        if steps is None or step.title in steps
        for job in step.jobs
        if job.kind == "quantize"
        for info in job.sources
    )


def test_the_time_of_reading_packing_and_writing(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    read, written, packed = plan.read_bytes, plan.output_bytes, quantized_bytes(plan)
    assert packed > 0
    disk = read / 2e9 + written / 1e9
    processor = (written / 5e8 + 2 * (read + written) / 1e10) / 2 + packed / 4e8
    assert processor > disk
    assert promise(plan, MACHINE, [], LOADED).seconds == pytest.approx(START_SECONDS + processor)
    slow_disk = Machine(**{**vars(MACHINE), "write": 1e8})
    disk = read / 2e9 + written / 1e8
    assert disk > processor
    assert promise(plan, slow_disk, [], LOADED).seconds == pytest.approx(START_SECONDS + disk)


def test_the_time_of_the_forward(plan: Plan) -> None:
    config = plan.source.text_config
    types = list(family(plan.source.model_type).layer_types(plan.source.config))
    assert types == ["linear_attention"] * 3 + ["full_attention"]
    tensors = plan.source.tensors.values()
    params = sum(info.num_params for info in tensors if f"{plan.prefix}layers." in info.name and len(info.shape) == 2)
    pair_work = config["num_attention_heads"] * config["head_dim"]

    def expected(lengths: list[int]) -> float:
        tokens, pairs = sum(lengths), sum(length * length for length in lengths)
        return START_SECONDS + 2 * params * tokens / 1e11 + 3 * tokens * 1e-5 + pairs * pair_work / 2e10

    for lengths in ([100], [100, 100, 100], [3000], [3000, 10_000, 1]):
        assert promise(plan, FAST, lengths, LOADED).seconds == pytest.approx(expected(lengths))
    seconds = [promise(plan, FAST, [length] * count, LOADED).seconds for length, count in ((64, 1), (64, 2), (128, 2), (256, 2))]
    assert seconds == sorted(set(seconds))


def test_a_hessian_takes_time_by_what_is_read_and_memory_for_its_sums(plan: Plan) -> None:
    weighted = make_plan(plan.source, plan.recipe.model_copy(update={"rounding": "hessian"}))
    machine, lengths = replace(FAST, hessian=1e6), [100, 50]
    d = family(plan.source.model_type).sizes(plan.source.config)
    layers = family(plan.source.model_type).layer_types(plan.source.config)
    out = {
        "linear_attention": d["linear_num_value_heads"] * d["linear_value_head_dim"],
        "full_attention": d["num_attention_heads"] * d["head_dim"],
    }
    widths = [2 * d["hidden_size"] + d["intermediate_size"] + out[kind] for kind in layers]
    more = promise(weighted, machine, lengths, LOADED).seconds - promise(plan, FAST, lengths, LOADED).seconds
    assert more == pytest.approx(150 * sum(widths) / 1e6)
    memory = promise(weighted, machine, lengths, LOADED).memory_bytes - promise(plan, FAST, lengths, LOADED).memory_bytes
    assert 2 * 16 * 8 * max(widths) < memory < 8 * 16 * 8 * max(widths)


def test_only_what_is_not_done_takes_time(plan: Plan) -> None:
    titles = [step.title for step in plan.steps]
    lengths, seconds = [500, 700], []
    for done in range(len(titles) + 1):
        seconds.append(promise(plan, MACHINE, lengths, LOADED, steps_done=titles[:done]).seconds)
    assert seconds == sorted(set(seconds), reverse=True)
    assert seconds[-1] == START_SECONDS


def test_hidden_states_are_part_of_the_disk(plan: Plan) -> None:
    hidden = plan.source.text_config["hidden_size"]
    assert states_bytes(plan, [10, 20]) == 3 * 30 * hidden * 2
    without, with_states = (promise(plan, MACHINE, lengths, LOADED, beside_bytes=77).disk_bytes for lengths in ([], [10, 20]))
    assert with_states - without == states_bytes(plan, [10, 20])
    assert without - 77 == promise(plan, MACHINE, [], LOADED).disk_bytes
    assert without > plan.output_bytes + 77


def test_memory_grows_with_the_longest_sample_and_the_workers(plan: Plan) -> None:
    def memory(lengths: list[int], workers: int = 1) -> int:
        return promise(plan, MACHINE, lengths, LOADED, workers=workers).memory_bytes

    assert memory([]) > LOADED
    assert memory([1000]) == memory([1000] * 50) < memory([2000])
    for lengths in ([], [1000]):
        assert memory(lengths, 1) < memory(lengths, 2) < memory(lengths, 3)
        assert memory(lengths, 3) - memory(lengths, 2) >= LOADED


def refused(plan: Plan, lengths: list[int], partial: Path, workers: int = 1) -> str:
    """The line with which a run is refused."""
    promised = promise(plan, MACHINE, lengths, LOADED, workers=workers)
    with pytest.raises(ResourceError) as caught:
        refuse(plan, promised, lengths, partial, LOADED, CPU, workers)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def partial(tmp_path: Path) -> Path:
    (tmp_path / "out.partial").mkdir()
    return tmp_path / "out.partial"


def more(plan: Plan, lengths: list[int], workers: int = 1) -> int:
    """Memory that a run needs on top of what is loaded."""
    return promise(plan, MACHINE, lengths, LOADED, workers=workers).memory_bytes - LOADED


@pytest.mark.parametrize(
    ("lengths", "workers", "enough_for", "fits"),
    [
        ([8000, 100], 1, ([4000], 1), "samples of at most 4000 tokens would fit: set calibration max_seq_len 4000 in the recipe"),
        ([8000], 1, ([1000], 1), "samples of at most 1000 tokens would fit"),
        ([100], 1, ([], 1), "a weight-only run would fit: --weight-only SCALE"),
        ([100], 3, ([100], 1), "one worker would fit: leave --workers out"),
        ([], 2, ([], 1), "one worker would fit: leave --workers out"),
    ],
)
def test_too_little_memory_names_what_would_fit(
    lengths: list[int],
    workers: int,
    enough_for: tuple[list[int], int],
    fits: str,
    plan: Plan,
    partial: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free = more(plan, enough_for[0], enough_for[1])
    assert free < more(plan, lengths, workers)
    monkeypatch.setattr(preflight, "free_memory_bytes", lambda: free)
    line = refused(plan, lengths, partial, workers)
    assert line.startswith("the run needs ") and " more memory, " in line
    assert fits in line
    monkeypatch.setattr(preflight, "free_memory_bytes", lambda: more(plan, lengths, workers))
    refuse(plan, promise(plan, MACHINE, lengths, LOADED, workers=workers), lengths, partial, LOADED, CPU, workers)


def test_memory_for_nothing(plan: Plan, partial: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "free_memory_bytes", lambda: 1_000_000)
    assert refused(plan, [100], partial).endswith("or use a machine with more")


def test_too_small_a_disk_names_what_would_fit(plan: Plan, partial: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def room(free: int) -> None:
        monkeypatch.setattr(psutil, "disk_usage", lambda path: SimpleNamespace(free=free))

    weight_only, long = promise(plan, MACHINE, [], LOADED), [20_000, 20_000]
    calibrated = promise(plan, MACHINE, long, LOADED)
    room(1_000_000)
    line = refused(plan, [], partial)
    assert line.startswith(f"{partial.parent}: 1 MB are free, the output needs ")
    assert line.endswith("; free space or choose another disk")
    line = refused(plan, long, partial)
    assert "; free space, calibrate with fewer tokens (their hidden states take " in line
    assert line.endswith(" or choose another disk")
    for promised, lengths in ((weight_only, []), (calibrated, long)):
        room(promised.disk_bytes + preflight.SPARE_BYTES)
        refuse(plan, promised, lengths, partial, LOADED, CPU)
        room(promised.disk_bytes + preflight.SPARE_BYTES - 100)
        refused(plan, lengths, partial)
        (partial / "begun").write_bytes(bytes(100))  # what an earlier run wrote is room already
        refuse(plan, promised, lengths, partial, LOADED, CPU)
        (partial / "begun").unlink()


@pytest.mark.parametrize("lacking", ["memory", "disk"])
def test_a_refused_run_leaves_nothing(
    lacking: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if lacking == "memory":
        monkeypatch.setattr(preflight, "free_memory_bytes", lambda: 1_000_000)
    else:
        monkeypatch.setattr(psutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    assert main([*COMMAND, str(tmp_path / "out"), "--weight-only", "0.01"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "1 MB are free" in line
    assert line.endswith("; the source is untouched and no unfinished output was left")
    assert list(tmp_path.iterdir()) == []


def test_what_is_free_is_not_more_than_the_machine_has() -> None:
    assert 0 < preflight.free_memory_bytes() <= psutil.virtual_memory().total


@pytest.fixture(scope="module")
def tuned() -> Plan:
    return make_plan(Checkpoint.open(BUILTIN_MODEL), load_recipe("int4-autoround-mtp"))


def test_tuning_takes_time_by_iterations_and_tokens(tuned: Plan) -> None:
    params = sum(
        info.num_params for info in tuned.source.tensors.values() if f"{tuned.prefix}layers." in info.name and len(info.shape) == 2
    )
    weights = quantized_bytes(tuned) // 2
    pair_work = tuned.source.text_config["num_attention_heads"] * tuned.source.text_config["head_dim"]
    fast = Machine(**{**vars(FAST), "copy": 1e10})
    lengths = [60] * 20
    forward = 2 * params * 2 * 1200 / 1e11 + 3 * 2 * 1200 * 1e-5 + 2 * 20 * 3600 * pair_work / 2e10
    batch = 7 * params * 480 / 1e11 + 3 * 9 * 480 * 1e-5 + 3.5 * 8 * 3600 * pair_work / 2e10
    passes = 30 * weights / 1e10 / torch.get_num_threads()
    copied = promise(tuned, fast, [], LOADED).seconds  # that of reading and writing, which the copy rate is part of
    expected = copied + forward + 200 * (batch + passes)
    assert promise(tuned, fast, lengths, LOADED).seconds == pytest.approx(expected)
    uneven = promise(tuned, fast, [60] * 10 + [6] * 10, LOADED).seconds
    assert 0.5 * expected < uneven < expected  # short samples are filled up to the longest beside them


def test_tuning_takes_memory_by_weights_and_batch(tuned: Plan, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def memory(lengths: list[int]) -> int:
        return promise(tuned, FAST, lengths, LOADED).memory_bytes

    kept = tuning_batches.kept_bytes(family(tuned.source.model_type).sizes(tuned.source.config))
    assert memory([100] * 8) - memory([50] * 8) == 400 * kept
    assert memory([100] * 80) == memory([100] * 8)
    assert memory([100] * 4) == memory([100] * 3 + [1]) == memory([100] * 8) - 400 * kept
    weights = max(quantized_bytes(tuned, {step.title}) for step in tuned.steps if step.layer is not None) // 2
    monkeypatch.setattr(tuning_batches, "PIECE_BYTES", 200 * kept)
    assert memory([100] * 8) == pytest.approx(memory([100] * 2) + 2 * weights, abs=2)
    # two streams of hidden states
    assert states_bytes(tuned, [10, 20]) == 2 * states_bytes(plan, [10, 20])


def test_tuning_that_does_not_fit_says_what_would(tuned: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [4000] * 4
    promised = promise(tuned, MACHINE, lengths, 0)
    needed = {count: promise(tuned, MACHINE, [count] * 4, 0).memory_bytes for count in (500, 1000)}
    monkeypatch.setattr(preflight, "free_memory_bytes", lambda: needed[1000] - 1)
    with pytest.raises(ResourceError, match="samples of at most 500 tokens would fit"):
        refuse(tuned, promised, lengths, tmp_path, 0, CPU)
    monkeypatch.setattr(preflight, "free_memory_bytes", lambda: promise(tuned, MACHINE, [], 0).memory_bytes + 1)
    with pytest.raises(ResourceError, match="set rounding search"):
        refuse(tuned, promised, lengths, tmp_path, 0, CPU)


@pytest.fixture(scope="module")
def by_gptq() -> dict[str, Plan]:
    source = Checkpoint.open(BUILTIN_MODEL)
    names = {"nvfp4": "nvfp4-mtp-vlm", "int4": "int4-mtp-vlm"}
    return {
        form: make_plan(source, parse_recipe({**load_recipe(name).canonical(), "rounding": "gptq"}, "a test"))
        for form, name in names.items()
    }


def test_gptq_takes_more_time_than_calibration(by_gptq: dict[str, Plan], plan: Plan) -> None:
    lengths = [100] * 20

    def seconds(of: Plan, **slow: float) -> float:
        return promise(of, Machine(**{**vars(FAST), **slow}), lengths, LOADED).seconds - START_SECONDS

    params = sum(info.num_params for info in plan.source.tensors.values() if f"{plan.prefix}layers." in info.name and len(info.shape) == 2)
    columns = sum(info.shape[1] for job in by_gptq["int4"].jobs if job.kind == "quantize" for info in job.sources)
    groups = [(job.sources[0].shape[1], sum(i.shape[0] for i in job.sources)) for job in by_gptq["int4"].jobs if job.kind == "quantize"]
    never = {"attention": 1e18, "delta_rule": 0.0}
    products = 2 * 3.8 * params * 2000 + sum(k * k * (2000 / 0.45 + n / 0.28) + k**3 / 0.9 for k, n in groups)
    assert seconds(by_gptq["int4"], **never) == pytest.approx(products / 1e11 + 1.5e-4 * columns)
    assert seconds(by_gptq["int4"], **never) < seconds(by_gptq["int4"], **never, copy=1e9) < seconds(by_gptq["nvfp4"], **never, copy=1e9)


def test_gptq_takes_memory_for_the_widest_matrix(by_gptq: dict[str, Plan], plan: Plan) -> None:
    """At the width of 27B: K = 17408 twice, in float32, and 3.2 bytes a weight."""
    more = [promise(of, FAST, [100], LOADED).memory_bytes - promise(plan, FAST, [100], LOADED).memory_bytes for of in by_gptq.values()]
    weights = max(quantized_bytes(plan, {step.title}) for step in plan.steps if step.layer is not None) // 2
    assert more[0] == pytest.approx(3.2 * weights + 8 * 512 * 512, rel=0.3)
    assert states_bytes(by_gptq["nvfp4"], [10, 20]) == 2 * states_bytes(plan, [10, 20])
    k, n = 17408, 5120
    info = SimpleNamespace(shape=(n, k))
    step: Any = SimpleNamespace(jobs=[SimpleNamespace(kind="quantize", sources=[info])])
    assert gptq_cost.memory_bytes(step) == round(3.2 * n * k) + 8 * k * k
    assert 2.4e9 < 8 * k * k < 2.5e9


@pytest.mark.parametrize(("form", "fits"), [("nvfp4", "set rounding max in the recipe"), ("int4", "set rounding rtn in the recipe")])
def test_gptq_that_does_not_fit_says_what_would(
    form: str, fits: str, by_gptq: dict[str, Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, lengths = by_gptq[form], [60] * 4
    monkeypatch.setattr(preflight, "free_memory_bytes", lambda: promise(asked, MACHINE, lengths, 0).memory_bytes - 1)
    with pytest.raises(ResourceError, match=f"another rounding would fit: {fits}"):
        refuse(asked, promise(asked, MACHINE, lengths, 0), lengths, tmp_path, 0, CPU)
    monkeypatch.setattr(preflight, "free_memory_bytes", lambda: 1000)
    with pytest.raises(ResourceError, match=r"free \d.* or use a machine with more"):
        refuse(asked, promise(asked, MACHINE, lengths, 0), lengths, tmp_path, 0, CPU)


def test_a_budget_pays_for_the_pass_that_measures() -> None:
    """Two rounded formats: each linear of a mixer is a forward more for each, of the MLP its share; a fused linear more of memory."""
    source, named = Checkpoint.open(BUILTIN_MODEL), {"name": "mine", "summary": "x", "budget": {"bytes": 7_000_000}}
    found = choices(source, parse_recipe(named, "a test"))
    lengths = [100] * 20
    plain = promise(found.least, MACHINE, lengths, LOADED)
    promised = with_measuring(plain, found, MACHINE, lengths)
    assert promised.disk_bytes - plain.disk_bytes == 7_000_000 - found.least_bytes
    largest = max(info.num_bytes for job in found.least.jobs if job.kind == "quantize" for info in job.sources)
    assert promised.memory_bytes - plain.memory_bytes == 2 * largest
    free = Machine(**{**vars(FAST), "attention": 1e18, "delta_rule": 0.0, "pack": 1e18})
    spent = with_measuring(plain, found, free, lengths).seconds - plain.seconds
    forward = mixer = mlp = 0.0
    for step in (step for step in found.least.steps if step.layer is not None):
        params = {job: sum(i.num_params for i in job.sources if len(i.shape) == 2) for job in step.jobs if job.sources}
        quantized = [job for job in params if job.kind == "quantize"]
        forward += sum(params.values())
        mixer += sum(params.values()) * sum(job.component != "mlp" for job in quantized)
        mlp += sum(n for job, n in params.items() if job in quantized and job.component == "mlp") * 2
    tokens, measured = 2000, 1000  # every second sample, as 20 are more than 16
    assert spent == pytest.approx(2 / free.matmul * (tokens * forward + measured * (forward + 2 * mixer + 2 * mlp)))
