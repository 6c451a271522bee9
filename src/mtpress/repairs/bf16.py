"""Modules in BF16 again: what their codes stand for where codes and scales are whole, the base's matrix where they are not.

In: a `Context` and modules that cannot stay quantized. Out: BF16 matrices in their place, and in that of the modules that the engine fuses
them with. Leaves out: why they cannot stay.

Codes whose scales are sound are their author's work, so they are never replaced by a base's: dequantized in float32 and rounded to BF16
they keep their values to 2⁻⁸. That is how a published AutoRound build of Qwen3.6-27B brought mtp.fc back.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mtpress.quant_config.stored import SCALAR_SCALES, SCALE_SUFFIXES, WEIGHT
from mtpress.quant_config.stored_matrix import StoredMatrix, stored_matrix
from mtpress.quant_config.view import Subject
from mtpress.repairs.from_source import base_tensor, quantized_there
from mtpress.repairs.overlay import Overlay
from mtpress.repairs.repair import Context, Fix, Left
from mtpress.terminal import count

if TYPE_CHECKING:
    import torch


@dataclass
class InBF16:
    """Modules by what became of them; missing: neither their codes nor the base have them. quantized: what is to be told of those that the
    base has, but quantized."""

    put: list[str] = field(default_factory=list)
    dequantized: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    quantized: list[Left] = field(default_factory=list)

    def told(self, ctx: Context, why: str = "") -> Iterator[Fix | Left]:
        if self.put:
            yield Fix(f"{count(len(self.put), 'module')} put from {ctx.whose} in BF16, bit for bit{why}")
        if self.dequantized:
            yield Fix(f"{count(len(self.dequantized), 'module')} dequantized to BF16, the value that its codes stand for{why}")
        yield from self.quantized


def in_bf16(ctx: Context, modules: Iterable[str], *, damaged: bool) -> InBF16:
    """damaged: no number can be had from what is stored of these modules; of those that they are fused with, it can.

    The engine fuses linears, and all shards of one must be in one format: where a module leaves it, the others that are quantized do.
    """
    subject, made = ctx.subject, InBF16()
    asked = list(dict.fromkeys(modules))
    for module in asked:
        if module in made.put or module in made.dequantized:
            continue
        group = [m for m in group_of(subject, module) if m == module or subject.form(m) != "plain"]
        whole = {m: None if damaged and m in asked else whole_matrix(ctx, m) for m in group}
        wanted = [m for m, matrix in whole.items() if matrix is None]
        origins = {m: base_tensor(ctx, f"{m}.{WEIGHT}", subject.called_for.get(f"{m}.{WEIGHT}")) for m in wanted}
        if lacking := [m for m, origin in origins.items() if origin is None or origin.dtype != "BF16"]:
            if (there := quantized_there(ctx, f"{lacking[0]}.{WEIGHT}")) is not None:
                made.quantized += [there] if not made.quantized else []
            else:
                made.missing.append(module)
            continue
        for member, matrix in whole.items():
            drop_scales(ctx.overlay, subject, member)
            if matrix is None:
                origin = origins[member]
                assert origin is not None
                ctx.overlay.put(f"{member}.{WEIGHT}", origin)
                made.put.append(member)
            else:
                ctx.overlay.compute(f"{member}.{WEIGHT}", "BF16", matrix.shape, Dequantized(matrix))
                made.dequantized.append(member)
    return made


def whole_matrix(ctx: Context, module: str) -> StoredMatrix | None:
    """What is stored of a quantized module, where a number of every weight can be had from it; reads no block scale."""
    subject = ctx.subject
    form, tensors = subject.form(module), subject.modules.get(module, {})
    if form in ("plain", "none", "unknown") or (ctx.comparison is not None and module in ctx.comparison.broken_blocks):
        return None
    matrix = stored_matrix(form, tensors)
    if matrix is None or matrix.shape != subject.called_for.get(f"{module}.{WEIGHT}"):
        return None
    scalars = [subject.scalars.get(f"{module}.{suffix}", 1.0) for suffix in SCALAR_SCALES if suffix in tensors]
    sound = all(math.isfinite(value) and value > 0 for value in scalars)
    return matrix if sound and not any(ctx.overlay.is_computed(info.name) for info in matrix.infos) else None


@dataclass(frozen=True)
class Dequantized:
    """BF16 [N, K] of a stored matrix: the product of codes and scales in float32, rounded to nearest."""

    matrix: StoredMatrix

    def __call__(self) -> "torch.Tensor":
        import torch

        rows, _ = self.matrix.load()
        n, k = self.matrix.shape
        made = torch.empty(n, k, dtype=torch.bfloat16)
        for start, stop in self.matrix.pieces():
            made[start:stop] = rows(start, stop)
        return made


def is_bf16(matrix: StoredMatrix) -> bool:
    """Whether BF16 holds every number of a stored matrix; reads it."""
    rows, _ = matrix.load()
    return all(bool((piece.bfloat16().float() == piece).all()) for piece in (rows(*bounds) for bounds in matrix.pieces()))


def group_of(subject: Subject, module: str) -> tuple[str, ...]:
    """The modules that the engine fuses with one, itself among them; those that are stored in no form too."""
    return next((linear.modules for linear in subject.linears if module in linear.modules), (module,))


def drop_scales(overlay: Overlay, subject: Subject, module: str) -> None:
    """Takes away every tensor of a quantized form that a module has; a bias and the scales of the KV cache stay."""
    for suffix in subject.modules.get(module, {}):
        if suffix in SCALE_SUFFIXES or suffix in ("weight_packed", "qweight"):
            overlay.drop(f"{module}.{suffix}")
