"""Runs a plan: read a step, pass the calibration activations through it, choose scales and codes, write, free.

In: a Plan, a ShardWriter for all or some of its shards and, for a calibrated build, what moves the samples. Out: the planned
tensors of those shards in planned order, steps that the writer's journal knows left out. Leaves out: config files and the
record (stages/quantize.py), and spreading the work over processes (workers.py).

Memory holds two groups of tensors (a whole decoder layer each where activations pass through it, else the linears of one
fused group) and what waits for the disk; never the model.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Protocol

import torch

from mtpress.calibration import InputAmax
from mtpress.checkpoint import TensorInfo
from mtpress.errors import InputError
from mtpress.formats import nvfp4
from mtpress.hidden_states import NUM_SLOTS
from mtpress.plan import Job, Plan, Step
from mtpress.prefetch import Prefetch
from mtpress.progress import Progress
from mtpress.rounding.max import round_group
from mtpress.shard_writer import ShardWriter
from mtpress.source_guard import SourceGuard

Tensors = Mapping[str, torch.Tensor]


class Forward(Protocol):
    """What moves the samples through the body: CalibrationPass here, WorkerPool in other processes."""

    whole_layers: bool

    def layer(self, step: Step, tensors: Tensors) -> InputAmax: ...

    def sync(self, step: Step) -> None: ...


def unfinished_steps(plan: Plan, writer: ShardWriter) -> list[Step]:
    """The steps of the writer's shards that it has not finished, in order."""
    mine = {tensor.name for tensors in writer.shards.values() for tensor in tensors}
    return [s for s in plan.steps if s.outputs and s.outputs[0].name in mine and s.title not in writer.finished]


def run(
    plan: Plan, writer: ShardWriter, device: torch.device, forward: Forward | None, guard: SourceGuard, progress: Progress
) -> dict[str, float]:
    """Writes every unfinished step; the seconds that this thread spent per kind of work.

    Without `forward`, input_scale is the recipe's constant_input_scale.
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
    prefetch = Prefetch(groups, device, ahead=ahead, hashed={name for step in steps for name in step.quantized})
    with closing(prefetch.load()) as weights:
        for step in steps:
            whole = next(weights) if _in_one_piece(step, forward) else {}
            lap("read")
            amax = None
            if forward is not None and step.layer is not None:
                if step.layer >= NUM_SLOTS - 1:  # its states take the place of those that this step needs to be done again
                    writer.wait_for_step(_layer_title(plan, step.layer - NUM_SLOTS + 1))
                lap("write")
                amax = forward.layer(step, whole)
                lap("forward")
            for job in step.jobs:
                if job.kind == "keep":
                    writer.copy(job.sources[0])
                elif job.kind == "quantize":
                    tensors = whole or next(weights)
                    lap("read")
                    rounded = _round(plan, job, tensors, amax)
                    lap("round")
                    for output in job.outputs:
                        writer.write(output.name, rounded[output.name])
                lap("write")
            guard.look({info.file for job in step.jobs for info in job.sources})
            settle = partial(forward.sync, step) if forward is not None and step.layer is not None else None
            writer.end_step(step.title, settle, {name: prefetch.digest(name) for name in step.quantized})
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


def _round(plan: Plan, job: Job, tensors: Tensors, amax: InputAmax | None) -> dict[str, torch.Tensor]:
    """Output name → tensor for the linears of one fused group."""
    modules = [info.name.removesuffix(".weight") for info in job.sources]
    weights = {module: tensors[f"{module}.weight"] for module in modules}
    if amax is None:
        assert plan.recipe.constant_input_scale is not None
        input_scale = torch.tensor(plan.recipe.constant_input_scale, dtype=torch.float32)
    else:
        seen = amax.of_group(module.split(".layers.", 1)[1].split(".", 1)[1] for module in modules)
        if not bool(torch.isfinite(seen)):
            raise InputError(f"{modules[0]}: the calibration activations are {float(seen)}; the source weights are damaged")
        # a dead linear reads only zeros: modelopt 0.47 takes the amax 6 for it
        input_scale = nvfp4.global_scale(torch.where(seen == 0, nvfp4.E2M1_MAX, seen))
    rounded = {}
    for module, parts in round_group(weights).items():
        if not bool(torch.isfinite(parts[nvfp4.SCALE_2])):
            damaged = next(name for name, weight in weights.items() if not bool(torch.isfinite(weight).all()))
            raise InputError(f"{damaged}.weight holds NaN or infinite values; the source is damaged, fetch it again")
        for suffix, tensor in {**parts, nvfp4.INPUT_SCALE: input_scale}.items():
            rounded[f"{module}.{suffix}"] = tensor
    return rounded
