"""Runs a plan: read a step, pass the calibration activations through it, choose scales and codes, write, free.

In: a Plan, a CheckpointWriter open for it and, for a calibrated build, the samples. Out: all planned tensors written in
planned order, and `StreamResult`. Leaves out: config files and the record (stages/quantize.py).

Memory holds two steps' weights, the hidden states of all samples, and what waits for the disk; never the model.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from mtpress.calibration import CalibrationSet, InputAmax
from mtpress.checkpoint import TensorInfo, read_rows, read_tensor
from mtpress.checkpoint_writer import CheckpointWriter
from mtpress.errors import InputError
from mtpress.formats import nvfp4
from mtpress.models import family
from mtpress.models.qwen3_5_layers import StreamedBody
from mtpress.plan import Job, Plan, Step
from mtpress.prefetch import Prefetch
from mtpress.progress import Progress
from mtpress.rounding.max import round_group


@dataclass
class StreamResult:
    """What running a plan measured: seconds spent per kind of work, and the input amax of every quantized module."""

    seconds: dict[str, float] = field(default_factory=lambda: {"read": 0.0, "forward": 0.0, "round": 0.0, "write": 0.0})
    input_amax: dict[str, float] = field(default_factory=dict)


def run(
    plan: Plan,
    writer: CheckpointWriter,
    device: torch.device,
    calibration: CalibrationSet | None,
    progress: Progress,
) -> StreamResult:
    """Writes every tensor of the plan. Without calibration, input_scale is the recipe's constant_input_scale."""
    result = StreamResult()
    body = StreamedBody(plan.source.config, device) if calibration else None
    wanted = [_needed(step, calibrated=body is not None) for step in plan.steps]
    clock = time.perf_counter()
    for step, tensors in zip(plan.steps, Prefetch(wanted, device), strict=True):
        clock = _lap(result, "read", clock)
        amax = _forward(plan, step, tensors, body, calibration)
        clock = _lap(result, "forward", clock)
        for job in step.jobs:
            if job.kind == "drop":
                continue
            if job.kind == "quantize":
                rounded = _round(plan, job, tensors, amax, result)
                clock = _lap(result, "round", clock)
                for output in job.outputs:
                    writer.write(output.name, rounded[output.name])
            elif job.sources[0].name in tensors:
                writer.write(job.sources[0].name, tensors[job.sources[0].name])
            else:
                writer.copy(job.sources[0])
            clock = _lap(result, "write", clock)
        progress.advance(step.read_bytes, step.title)
    writer.wait_for_shards()
    _lap(result, "write", clock)
    return result


def _lap(result: StreamResult, kind: str, since: float) -> float:
    now = time.perf_counter()
    result.seconds[kind] += now - since
    return now


def _needed(step: Step, calibrated: bool) -> list[TensorInfo]:
    """What must be in memory: a whole decoder layer where activations pass through it, else only what is quantized."""
    whole = calibrated and step.layer is not None
    return [info for job in step.jobs if job.kind == "quantize" or (whole and job.kind == "keep") for info in job.sources]


def _forward(
    plan: Plan, step: Step, tensors: Mapping[str, torch.Tensor], body: StreamedBody | None, calibration: CalibrationSet | None
) -> InputAmax | None:
    """Moves the samples through this step, if it is one that they pass, and returns what its linears read."""
    if body is None or calibration is None:
        return None
    if step.layer is not None:
        amax = InputAmax()
        start = f"{plan.prefix}layers.{step.layer}."
        body.layer(step.layer, {name.removeprefix(start): tensor for name, tensor in tensors.items()}, amax)
        return amax
    if step.title == "embeddings":
        embeddings = step.jobs[0].sources[0]
        body.embed(calibration.samples, lambda ids: read_rows(embeddings, ids))
    elif step.title == "vision tower" and any(s.pixel_values is not None for s in calibration.samples):
        prefix = family(plan.source.model_type).VISION_PREFIX
        body.see({i.name.removeprefix(prefix): read_tensor(i) for job in step.jobs for i in job.sources})
    return None


def _round(
    plan: Plan, job: Job, tensors: Mapping[str, torch.Tensor], amax: InputAmax | None, result: StreamResult
) -> dict[str, torch.Tensor]:
    """Output name → tensor for the linears of one fused group."""
    modules = [info.name.removesuffix(".weight") for info in job.sources]
    weights = {module: tensors[f"{module}.weight"] for module in modules}
    for module, weight in weights.items():
        if not bool(torch.isfinite(weight.aminmax().max - weight.aminmax().min)):
            raise InputError(f"{module}.weight holds NaN or infinite values; the source is damaged, fetch it again")
    if amax is None:
        assert plan.recipe.constant_input_scale is not None
        input_scale = torch.tensor(plan.recipe.constant_input_scale, dtype=torch.float32)
    else:
        seen = amax.of_group(module.split(".layers.", 1)[1].split(".", 1)[1] for module in modules)
        if not bool(torch.isfinite(seen)):
            raise InputError(f"{modules[0]}: the calibration activations are {float(seen)}; the source weights are damaged")
        # a dead linear reads only zeros: modelopt 0.47 takes the amax 6 for it
        input_scale = nvfp4.global_scale(torch.where(seen == 0, nvfp4.E2M1_MAX, seen))
        result.input_amax |= dict.fromkeys(modules, float(seen))
    rounded = {}
    for module, parts in round_group(weights).items():
        for suffix, tensor in {**parts, nvfp4.INPUT_SCALE: input_scale}.items():
            rounded[f"{module}.{suffix}"] = tensor
    return rounded
