"""Runs a plan: read a step, pass the calibration activations through it, choose scales and codes, write, free.

In: a Plan, a ShardWriter for all or some of its shards and, for a calibrated build, what moves the samples. Out: the planned
tensors of those shards in planned order, steps that the writer's journal knows left out. Leaves out: config files and the
record (stages/quantize.py), and spreading the work over processes (quantization/worker_pool.py).

Memory holds two groups of tensors (a whole decoder layer each where activations pass through it, else the linears of one
fused group) and what waits for the disk; never the model.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, cast

import torch

from mtpress.calibration import kv_cache
from mtpress.calibration.block_hessian import BLOCK
from mtpress.calibration.input_amax import damaged, group_amax, input_scale, within_layer
from mtpress.calibration.samples import InputAmax
from mtpress.checkpoint.journal import Journal, PartialError
from mtpress.checkpoint.json_files import read_json_object
from mtpress.checkpoint.prefetch import Prefetch
from mtpress.checkpoint.safetensors import TensorInfo
from mtpress.checkpoint.shard_writer import ShardWriter
from mtpress.checkpoint.source_guard import SourceGuard
from mtpress.errors import InputError
from mtpress.formats import fp8, int4, nvfp4
from mtpress.models.hidden_states import NUM_SLOTS
from mtpress.plan.plan import Job, Plan, Step
from mtpress.progress import Progress
from mtpress.rounding import four_over_six, rtn, search, signround_kernel, sweep
from mtpress.rounding import fp8 as rounding_fp8
from mtpress.rounding.hessian import group_scales as group_scales_by_hessian
from mtpress.rounding.max import round_group
from mtpress.rounding.scale_search import GroupScales, nearest_codes

Tensors = Mapping[str, torch.Tensor]
Codes = Mapping[str, tuple[torch.Tensor, torch.Tensor]]  # module → (codes uint8 [N, K], scales fp16 [N, K/128])
Stored = Mapping[str, Mapping[str, torch.Tensor]]  # module → its tensors by suffix
Seen = InputAmax | Codes | Stored | None  # what a forward has learned of a layer


class Forward(Protocol):
    """What moves the samples through the body: CalibrationPass, SignRoundPass or GptqPass here, WorkerPool in other processes."""

    whole_layers: bool

    def layer(self, step: Step, tensors: Tensors) -> InputAmax | Codes | Stored: ...

    def sync(self, step: Step) -> None: ...

    def states_sha256(self) -> dict[str, str]: ...


LOSSES_NAME = "losses.json"


def read_losses(directory: Path) -> dict[int, dict[str, float]]:
    """Layer → losses, of every layer of a run so far; empty where its forward has none. directory: the journal's."""
    path = directory / LOSSES_NAME
    if not path.exists():
        return {}
    try:
        return {int(layer): dict(said) for layer, said in read_json_object(path).items()}
    except (InputError, ValueError, TypeError):
        raise PartialError(f"{path}: is not what mtpress wrote; delete {directory.parent} to start over") from None


def _settle(forward: Forward, step: Step, journal: Journal | None) -> None:
    """What must be on the disk before the journal tells of a layer: its states, and its losses, for the record of a run that goes on."""
    forward.sync(step)
    losses = getattr(forward, "losses", {}).get(step.layer)
    if losses is not None and journal is not None:
        new = journal.directory / f"{LOSSES_NAME}.new"
        new.write_text(json.dumps({**read_losses(journal.directory), step.layer: losses.as_json()}))
        new.replace(journal.directory / LOSSES_NAME)


def unfinished_steps(plan: Plan, writer: ShardWriter) -> list[Step]:
    """The steps of the writer's shards that it has not finished, in order."""
    mine = {tensor.name for tensors in writer.shards.values() for tensor in tensors}
    return [s for s in plan.steps if s.outputs and s.outputs[0].name in mine and s.title not in writer.finished]


def run(
    plan: Plan, writer: ShardWriter, device: torch.device, forward: Forward | None, guard: SourceGuard, progress: Progress
) -> dict[str, float]:
    """Writes every unfinished step; the seconds that this thread spent per kind of work.

    forward: None where the recipe needs no samples.
    """
    steps = unfinished_steps(plan, writer)
    groups = [group for step in steps for group in _groups(step, forward)]
    spent = {"read": 0.0, "forward": 0.0, "round": 0.0, "write": 0.0}
    clock = time.perf_counter()

    def lap(kind: str) -> None:
        nonlocal clock
        now = time.perf_counter()
        spent[kind] += now - clock
        clock = now

    # on a CPU a layer is computed on for so much longer than it is read that reading it ahead is not worth its memory
    ahead = device.type == "cuda" or forward is None or not forward.whole_layers
    prefetch = Prefetch(groups, device, ahead=ahead, sampled={name for step in steps for name in step.quantized})
    with closing(prefetch.load()) as weights:
        for step in steps:
            whole = next(weights) if _in_one_piece(step, forward) else {}
            lap("read")
            seen: Seen = None
            if forward is not None and step.layer is not None:
                if step.layer >= NUM_SLOTS - 1:  # its states take the place of those that this step needs to be done again
                    writer.wait_for_step(_layer_title(plan, step.layer - NUM_SLOTS + 1))
                lap("write")
                seen = forward.layer(step, whole)
                lap("forward")
            for job in step.jobs:
                if job.kind == "keep":
                    writer.copy(job.sources[0], finite=True)
                elif job.kind == "quantize":
                    tensors = whole or next(weights)
                    lap("read")
                    for rounded in round_job(plan, job, tensors, seen):
                        lap("round")
                        for name, tensor in rounded.items():
                            writer.write(name, tensor)
                        lap("write")
                elif job.kind == "measure":
                    for name, tensor in _measured(job, seen).items():
                        writer.write(name, tensor)
                lap("write")
            guard.look({info.file for job in step.jobs for info in job.sources})
            settle = partial(_settle, forward, step, writer.journal) if forward is not None and step.layer is not None else None
            states = forward.states_sha256() if forward is not None and settle is not None else {}
            writer.end_step(step.title, settle, {name: prefetch.digest(name) for name in step.quantized}, states)
            progress.advance(step.effort(forward is not None), step.title)
        assert next(weights, None) is None
    writer.wait()
    lap("write")
    return spent


def _layer_title(plan: Plan, layer: int) -> str:
    return next(step.title for step in plan.steps if step.layer == layer)


def _in_one_piece(step: Step, forward: Forward | None) -> bool:
    return forward is not None and forward.whole_layers and step.layer is not None


def _groups(step: Step, forward: Forward | None) -> Sequence[Sequence[TensorInfo]]:
    """What must be in memory at a time: a whole decoder layer where activations pass through it here, else one fused group."""
    if _in_one_piece(step, forward):
        return [[info for job in step.jobs for info in job.sources]]
    return [job.sources for job in step.jobs if job.kind == "quantize"]


def round_job(plan: Plan, job: Job, tensors: Tensors, seen: Seen) -> Iterator[dict[str, torch.Tensor]]:
    """What a job's linears become, one after another: the recipe's rounding, or that of FP8, which has one; and only what is planned,
    for weight-only NVFP4 has no input_scale."""
    planned = {tensor.name for tensor in job.outputs}
    for made in (FP8 if job.format == "fp8" else rounding(plan)).round(plan, job, tensors, seen):
        yield {name: tensor for name, tensor in made.items() if name in planned}


def _measured(job: Job, seen: Seen) -> dict[str, torch.Tensor]:
    """Output name → what the samples show: the scales of an FP8 cache."""
    names = [output.name for output in job.outputs]
    if isinstance(seen, InputAmax):
        return kv_cache.scales(names, seen)
    assert isinstance(seen, Mapping)
    return {name: cast(Stored, seen)[name.rpartition(".")[0]][name.rpartition(".")[2]] for name in names}


RoundGroup = Callable[[Tensors, torch.Tensor | None], dict[str, dict[str, torch.Tensor]]]


def _by_scales(group_scales: Callable[[Tensors], GroupScales]) -> RoundGroup:
    return lambda weights, hessian: nearest_codes(weights, group_scales(weights))


def _by_hessian(weights: Tensors, hessian: torch.Tensor | None) -> dict[str, dict[str, torch.Tensor]]:
    # lm_head, which no sample passes in this forward, has none
    return nearest_codes(weights, sweep.group_scales(weights) if hessian is None else group_scales_by_hessian(weights, hessian))


def _hessian(job: Job, seen: Seen) -> torch.Tensor | None:
    """Of what the linears of a job have read, float64 [K/16, 16, 16]; None where the rounding wants none."""
    if not isinstance(seen, InputAmax) or seen.hessian is None:
        return None
    return seen.hessian.total(within_layer(_modules(job)[0]))


def _round_nvfp4(round_group: RoundGroup, plan: Plan, job: Job, tensors: Tensors, seen: Seen) -> Iterator[dict[str, torch.Tensor]]:
    """Output name → tensor for the linears of one group that share their global scales, in planned order."""
    modules = _modules(job)
    weights = {module: tensors[f"{module}.weight"] for module in modules}
    if seen is None:
        assert plan.recipe.constant_input_scale is not None or job.format == "nvfp4_w4a16"  # whose input_scale is not written
        scale = torch.tensor(plan.recipe.constant_input_scale or 1.0, dtype=torch.float32)
    else:
        assert isinstance(seen, InputAmax)
        scale = input_scale(seen, list(map(within_layer, modules)))
    for module, parts in round_group(weights, _hessian(job, seen)).items():
        if not bool(torch.isfinite(parts[nvfp4.SCALE_2])):
            raise damaged(next(name for name, weight in weights.items() if not bool(torch.isfinite(weight).all())))
        yield {f"{module}.{suffix}": tensor for suffix, tensor in {**parts, nvfp4.INPUT_SCALE: scale}.items()}


def _round_fp8(plan: Plan, job: Job, tensors: Tensors, seen: Seen) -> Iterator[dict[str, torch.Tensor]]:
    """The same for FP8, whose linears of one group share one scale too."""
    assert isinstance(seen, InputAmax)
    modules = _modules(job)
    input_scale = fp8.scale(group_amax(seen, list(map(within_layer, modules))))
    for module, parts in rounding_fp8.round_group({module: tensors[f"{module}.weight"] for module in modules}).items():
        if not bool(torch.isfinite(parts[fp8.SCALE])):
            raise damaged(next(m for m in modules if not bool(torch.isfinite(tensors[f"{m}.weight"]).all())))
        yield {f"{module}.{suffix}": tensor for suffix, tensor in {**parts, fp8.INPUT_SCALE: input_scale}.items()}


RoundMatrix = Callable[[torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]]


def _round_int4(round_matrix: RoundMatrix | None, plan: Plan, job: Job, tensors: Tensors, seen: Seen) -> Iterator[dict[str, torch.Tensor]]:
    """The same for INT4, one linear at a time: no scale is shared. round_matrix: None where the forward has rounded already."""
    for module in _modules(job):
        yield _int4_tensors(module, tensors[f"{module}.weight"], round_matrix, seen, _hessian(job, seen))


def _int4_tensors(
    module: str, weight: torch.Tensor, round_matrix: RoundMatrix | None, seen: Seen, hessian: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """A function of its own, so that no codes stay in memory while what is made of them is written."""
    if round_matrix is not None:
        codes, scales = round_matrix(weight, hessian)
    else:
        assert isinstance(seen, Mapping)
        codes, scales = cast(Codes, seen)[module]
    if not bool(torch.isfinite(scales).all()):
        if not bool(torch.isfinite(weight).all()):
            raise damaged(module)
        raise InputError(f"{module}.weight holds numbers up to {float(weight.abs().max()):.3g}; FP16 has no scale for so large ones")
    return {f"{module}.{suffix}": tensor for suffix, tensor in int4.tensors(codes, scales).items()}


def _stored(plan: Plan, job: Job, tensors: Tensors, seen: Seen) -> Iterator[dict[str, torch.Tensor]]:
    """What the forward has made of each linear, in planned order."""
    assert isinstance(seen, Mapping)
    for module in _modules(job):
        yield {f"{module}.{suffix}": tensor for suffix, tensor in cast(Stored, seen)[module].items()}


def _modules(job: Job) -> list[str]:
    return [info.name.removesuffix(".weight") for info in job.sources]


@dataclass(frozen=True)
class Rounding:
    """How a job's tensors are made, by which compiled kernel on a CPU, and the same for one matrix, for measuring how long it takes."""

    round: Callable[[Plan, Job, Tensors, Seen], Iterator[dict[str, torch.Tensor]]]
    kernel: Callable[[], str]
    matrix: Callable[[torch.Tensor], object]


def _nvfp4(round_group: RoundGroup) -> Rounding:
    return Rounding(
        partial(_round_nvfp4, round_group), nvfp4.kernel, lambda weight: round_group({"weight": weight}, _probe_hessian(weight))
    )


def _int4(round_matrix: RoundMatrix) -> Rounding:
    return Rounding(
        partial(_round_int4, round_matrix), int4.kernel, lambda weight: int4.tensors(*round_matrix(weight, _probe_hessian(weight)))
    )


def _probe_hessian(weight: torch.Tensor) -> torch.Tensor:
    return torch.eye(BLOCK).expand(weight.shape[1] // BLOCK, BLOCK, BLOCK)


NVFP4_ROUNDINGS: dict[str, RoundGroup] = {
    "max": lambda weights, hessian: round_group(weights),
    "four-over-six": _by_scales(four_over_six.group_scales),
    "sweep": _by_scales(sweep.group_scales),
    "hessian": _by_hessian,
}
ROUNDINGS = {
    "nvfp4": {
        **{name: _nvfp4(by) for name, by in NVFP4_ROUNDINGS.items()},
        # by the forward, which is measured on its own; what is left is packing
        "gptq": Rounding(_stored, lambda: nvfp4.EAGER, lambda weight: round_group({"weight": weight})),
    },
    "int4": {
        "rtn": _int4(lambda weight, hessian: rtn.round_matrix(weight)),
        "search": _int4(lambda weight, hessian: search.round_matrix(weight)),
        "hessian": _int4(lambda weight, hessian: search.round_matrix(weight, hessian=hessian)),
        "gptq": Rounding(_stored, lambda: nvfp4.EAGER, lambda weight: int4.tensors(*rtn.round_matrix(weight))),
        "signround": Rounding(  # by the forward too
            partial(_round_int4, None), lambda: (*signround_kernel.KERNELS, nvfp4.EAGER)[0], lambda w: int4.tensors(*rtn.round_matrix(w))
        ),
    },
}


FP8 = Rounding(_round_fp8, nvfp4.kernel, lambda weight: rounding_fp8.round_group({"weight": weight}))


def rounding(plan: Plan) -> Rounding:
    """Of the recipe; what it has in FP8 goes by FP8's own."""
    return ROUNDINGS["int4" if plan.recipe.format == "int4" else "nvfp4"][plan.recipe.rounding]


def kernel(plan: Plan, device: torch.device) -> str:
    """What chooses scales and codes: a kernel's name, "eager" for PyTorch."""
    return rounding(plan).kernel() if device.type == "cpu" else nvfp4.EAGER
