"""The samples on their way through a body that is rounded by GPTQ, one decoder layer at a time.

In: the samples, a place for their hidden states, each layer's weights. Out: the stored tensors of the layer's linears that the plan
quantizes, and the layer's output error with GPTQ's codes and with the nearest. Leaves out: the rounding itself (rounding/gptq.py).

Within a layer the linears that read one input are rounded together, in the order of computation (in_proj_* or q/k/v, then out_proj or
o_proj, gate/up, down), each for what the rounded ones before make of the samples. Where the server rounds activations too (NVFP4),
so do all of these forwards, and H is that of the rounded inputs: what the kernel multiplies with.

One sample of eight is held out of H. The layer's output on the held-out samples, from the stored weights of all layers before, is compared
with what the BF16 weights make of their own stream: GPTQ's codes stay only if they are closer to it than the nearest codes under the
same scales are; if not, the layer is stored with those.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtpress.calibration import kv_cache
from mtpress.calibration.block_hessian import BLOCK
from mtpress.calibration.full_hessian import FullHessian
from mtpress.calibration.input_amax import damaged, input_scale
from mtpress.calibration.kv_cache import SeenCache
from mtpress.calibration.samples import InputAmax
from mtpress.calibration.two_streams import TwoStreams
from mtpress.chat.sample import Sample
from mtpress.errors import InputError
from mtpress.formats import nvfp4
from mtpress.models.qwen3_5.layers import reading
from mtpress.plan.plan import Plan, Step
from mtpress.rounding import gptq
from mtpress.rounding.gptq import Stored

HELD_OUT_EVERY = 8


@dataclass(frozen=True)
class Settings:
    """scales: a name of gptq.SCALES. damping: of the mean diagonal of H."""

    scales: str
    damping: float = gptq.DAMPING


@dataclass(frozen=True)
class Losses:
    """Squared error of a layer's output on the held-out samples, over the squares of BF16's output."""

    nearest: float
    gptq: float

    @property
    def kept_gptq(self) -> bool:
        return self.gptq < self.nearest

    def as_json(self) -> dict[str, float]:
        return {"nearest": self.nearest, "gptq": self.gptq, "kept_gptq": self.kept_gptq}


def held_out(num_samples: int) -> list[int]:
    """Every eighth sample, the last one where there are fewer."""
    return list(range(HELD_OUT_EVERY - 1, num_samples, HELD_OUT_EVERY)) or [num_samples - 1]


class GptqPass(TwoStreams):
    """layer() for every decoder layer from `first_layer` on, in order; close() at the end. `losses` has those of each layer.

    InputError where there is no sample beside the one that is held out.
    """

    def __init__(
        self, plan: Plan, samples: Sequence[Sample], device: torch.device, directory: Path, settings: Settings, *, first_layer: int = 0
    ) -> None:
        if len(samples) < 2:
            raise InputError("rounding gptq needs at least two calibration samples: one is held out, to see whether it helps")
        self.settings, self.form = settings, gptq.FORMATS[plan.recipe.format]
        self.choose_scales = gptq.SCALES[plan.recipe.format][settings.scales]
        self.losses: dict[int, Losses] = {}
        self.held_out = held_out(len(samples))
        self.fitted = [i for i in range(len(samples)) if i not in self.held_out]
        super().__init__(plan, samples, device, directory, first_layer)

    @torch.no_grad()
    def layer(self, step: Step, tensors: Mapping[str, Tensor]) -> dict[str, Stored]:
        """Name of a quantized module → its tensors by suffix, on the CPU; input_scale among them where the format has one, and the scales
        of an FP8 cache, where one is calibrated.

        InputError names a matrix that is not finite.
        """
        assert step.layer is not None
        for name in step.quantized:
            if not bool(torch.isfinite(tensors[name]).all()):
                raise damaged(name.removesuffix(".weight"))
        start = f"{self.plan.prefix}layers.{step.layer}."
        module = self.body.decoder_layer(step.layer, {name.removeprefix(start): tensor for name, tensor in tensors.items()})
        seen = InputAmax()
        cached = [output.name for job in step.jobs if job.kind == "measure" for output in job.outputs]
        with reading(module, seen):
            self.move(module, self.exact, SeenCache(seen) if cached else None)
        linears = {name: linear for name, linear in module.named_modules() if isinstance(linear, nn.Linear)}
        nearest: dict[str, Stored] = {}
        found: dict[str, Stored] = {}
        for group in in_order(step, start, list(seen.amax)):
            kernel = self._kernel(seen, group)
            try:
                self._round(module, {name: linears[name] for name in group}, kernel, nearest, found)
            except InputError as error:
                raise InputError(f"layer {step.layer}: {error}") from None
            install(linears, {name: found[name] for name in group}, self.form)
            for name in group:
                linears[name].register_forward_pre_hook(kernel)
                for rounded in (nearest, found):
                    rounded[name] |= kernel.stored
        with_gptq = self._error(module)
        install(linears, nearest, self.form)
        losses = self.losses[step.layer] = Losses(self._error(module), with_gptq)
        if not losses.nearest < float("inf"):
            raise InputError(f"layer {step.layer}: the output error is {losses.nearest}; the source weights are damaged")
        chosen = nearest
        if losses.kept_gptq:
            chosen = found
            install(linears, found, self.form)
        self.move(module, self.rounded)
        made = {f"{start}{name}": {suffix: tensor.cpu() for suffix, tensor in stored.items()} for name, stored in chosen.items()}
        for name, scale in kv_cache.scales(cached, seen).items():
            linear, _, suffix = name.rpartition(".")
            made.setdefault(linear, {})[suffix] = scale
        return made

    def _kernel(self, seen: InputAmax, group: Sequence[str]) -> "Kernel":
        return Kernel(input_scale(seen, group) if self.plan.recipe.format == "nvfp4" else None)

    def _round(
        self,
        module: nn.Module,
        linears: Mapping[str, nn.Linear],
        kernel: "Kernel",
        nearest: dict[str, Stored],
        found: dict[str, Stored],
    ) -> None:
        """Both kinds of codes of linears that read the same input."""
        hessian = self._hessian(module, next(iter(linears.values())).in_features, list(linears), kernel)
        k = len(hessian)
        blocks = torch.stack([hessian[i : i + BLOCK, i : i + BLOCK] for i in range(0, k, BLOCK)]).double()
        scales = self.choose_scales({name: linear.weight for name, linear in linears.items()}, blocks)
        factor = gptq.factorize(hessian, self.settings.damping)
        del hessian
        for name, linear in linears.items():
            if not all(bool(torch.isfinite(part.float()).all()) for part in scales[name]):
                raise InputError(f"{name} holds numbers up to {float(linear.weight.abs().max()):.3g}; no scale is so large")
            nearest[name] = self.form.store(gptq.nearest(linear.weight, scales[name], self.form), scales[name])
            found[name] = self.form.store(gptq.round_matrix(linear.weight, scales[name], factor, self.form), scales[name])

    def _hessian(self, module: nn.Module, size: int, names: Sequence[str], kernel: "Kernel") -> Tensor:
        """H of what the linears of these names read of the samples that are not held out."""
        total = FullHessian(size, self.fitted, self.body.device)
        for sample in self.fitted:
            total.add(sample, kernel.rounds(self._input(module, sample, names)))
        return total.total()

    def _input(self, module: nn.Module, sample: int, names: Sequence[str]) -> Tensor:
        """[1, T, K]: what linears that read the same input read of a sample of the rounded stream. The forward ends there."""

        def reached(name: str, inputs: Tensor) -> None:
            if name in names:
                raise _Reached(inputs)

        try:
            with reading(module, reached):
                self._through(module, sample)
        except _Reached as found:
            return found.inputs
        raise AssertionError(f"{names[0]} is not computed")

    def _through(self, module: nn.Module, sample: int) -> Tensor:
        with self.body.delta_rule(module):
            return self.body.through(module, self.rounded.peek(sample).to(self.body.device), self.body.positions[sample])

    def _error(self, module: nn.Module) -> float:
        """Of the rounded stream behind the layer against the exact one, over the held-out samples."""
        errors, squares = 0.0, 0.0
        for sample in self.held_out:
            exact = self.exact.peek(sample).to(self.body.device).double()
            errors += float((self._through(module, sample).double() - exact).square().sum())
            squares += float(exact.square().sum())
        return errors / squares if squares else errors


class _Reached(Exception):  # noqa: N818  it is no error
    """Ends a forward where the inputs of a linear are known."""

    def __init__(self, inputs: Tensor) -> None:
        super().__init__()
        self.inputs = inputs


class Kernel:
    """What the server does to the inputs of linears before it multiplies: rounds them to NVFP4, or nothing. A forward pre-hook."""

    def __init__(self, scale: Tensor | None) -> None:
        self.scale = scale
        self.stored: Stored = {} if scale is None else {nvfp4.INPUT_SCALE: scale}
        self._last: tuple[Tensor, Tensor] | None = None

    def rounds(self, inputs: Tensor) -> Tensor:
        if self.scale is None:
            return inputs
        if self._last is None or self._last[0] is not inputs:  # fused linears read the same tensor one after the other
            self._last = inputs, nvfp4.round_activations(inputs, self.scale.to(inputs.device))
        return self._last[1]

    def __call__(self, _: nn.Module, args: Any) -> Any:
        return (self.rounds(args[0]),)


def in_order(step: Step, start: str, computed: Sequence[str]) -> list[list[str]]:
    """Names within the layer of the linears that are quantized, those that read the same input together, as a forward meets them."""
    jobs = [job for job in step.jobs if job.kind == "quantize"]
    groups = [[info.name.removeprefix(start).removesuffix(".weight") for info in job.sources] for job in jobs]
    return sorted(groups, key=lambda group: min(computed.index(name) for name in group))


def install(linears: Mapping[str, nn.Linear], rounded: Mapping[str, Stored], form: gptq.Format) -> None:
    """Gives linears the BF16 weights that the server multiplies with."""
    for name, stored in rounded.items():
        linear = linears[name]
        linear.weight = nn.Parameter(form.dequantize(stored).to(linear.weight.dtype), requires_grad=False)
