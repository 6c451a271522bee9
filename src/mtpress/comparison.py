"""A finished checkpoint against the BF16 checkpoint it was made from, one tensor at a time.

In: two open checkpoints. Out: a `Comparison`: which kept tensors are equal byte for byte, and how far each quantized
matrix is from its source. Leaves out: judging (rules/base.py). Memory holds one matrix in both forms, never the model.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mtpress.checkpoint import Checkpoint, TensorInfo, read_tensor
from mtpress.disk import read_pieces
from mtpress.meanings.difference import Difference
from mtpress.meanings.files import differences
from mtpress.progress import Progress
from mtpress.rules.stored import GLOBAL_SCALE, QWEIGHT, QZEROS, SCALE, SCALE_2, SCALES, WEIGHT, WEIGHT_PACKED, ZERO_POINT, Form
from mtpress.rules.subject import Subject

if TYPE_CHECKING:
    import torch

ROWS_BYTES = 32 << 20  # float32 working set
# What a quantized matrix is dequantized from; zero points that are not stored are the middle of the range.
PARTS: dict[Form, tuple[str, ...]] = {
    "nvfp4": (WEIGHT, SCALE, SCALE_2),
    "nvfp4-pack-quantized": (WEIGHT_PACKED, SCALE, GLOBAL_SCALE),
    "gptq": (QWEIGHT, SCALES, QZEROS),
    "pack-quantized": (WEIGHT_PACKED, SCALE, ZERO_POINT),
    "fp8": (WEIGHT, SCALE),
}
PER_WORD = 8
Job = tuple[str | None, Form, tuple[TensorInfo, ...]]


@dataclass
class Comparison:
    """What was measured.

    error: module → ‖w − ŵ‖ / ‖w‖. int4, fp8: those of these modules that are INT4, and FP8. broken_blocks: module → how many block
    scales are NaN, negative (of NVFP4; INT4's may be), or zero over weights. differences: what the files beside the weights say otherwise.
    """

    num_equal: int = 0
    differing: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    error: dict[str, float] = field(default_factory=dict)
    int4: set[str] = field(default_factory=set)
    fp8: set[str] = field(default_factory=set)
    broken_blocks: dict[str, int] = field(default_factory=dict)
    not_compared: list[str] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        errors = sorted(self.error.values())
        return {
            "num_equal": self.num_equal,
            "num_quantized": len(errors),
            "median_error": errors[len(errors) // 2] if errors else None,
            "largest_error": errors[-1] if errors else None,
            "error": self.error,
        }


def compare(subject: Subject, base: Checkpoint, *, silent: bool = False) -> Comparison:
    """Compares everything stored; a tensor without a counterpart of equal dtype and shape is listed as absent."""
    found = Comparison(differences=differences(subject, base))
    jobs = list(_jobs(subject, base, found))
    total = sum(info.num_bytes for _, _, infos in jobs for info in infos)
    with Progress("compare", total, silent=silent) as progress:
        for module, form, infos in jobs:
            if module is None:
                name = infos[0].name
                if same_bytes(infos[0], infos[1]):
                    found.num_equal += 1
                else:
                    found.differing.append(name)
            else:
                name = module
                found.error[module], broken = _error(form, infos)
                if form in ("gptq", "pack-quantized"):
                    found.int4.add(module)
                if form == "fp8":
                    found.fp8.add(module)
                if broken:
                    found.broken_blocks[module] = broken
            progress.advance(sum(info.num_bytes for info in infos), ".".join(name.split(".")[-4:])[:24])
    return found


def _jobs(subject: Subject, base: Checkpoint, found: Comparison) -> Iterator[Job]:
    """(None, …, the tensor here and there) to be compared byte for byte, or (module, its form, its source and its parts)."""
    for module, tensors in subject.modules.items():
        form = subject.form(module)
        if form in ("plain", "none", "unknown"):
            for info in tensors.values():
                there = base.tensors.get(info.name)
                if there is None or (there.dtype, there.shape) != (info.dtype, info.shape):
                    found.absent.append(info.name)
                else:
                    yield None, form, (info, there)
            continue
        there = base.tensors.get(f"{module}.{WEIGHT}")
        parts = {suffix: tensors[suffix] for suffix in PARTS.get(form, ()) if suffix in tensors}
        codes = next(iter(parts.values()), None)
        if codes is None or len(parts) < (2 if form in ("pack-quantized", "fp8") else 3) or len(codes.shape) != 2:
            found.not_compared.append(module)
        elif there is None or len(there.shape) != 2 or _size(form, codes) != there.shape:
            found.absent.append(f"{module}.{WEIGHT}")
        elif not _fit(subject, module, parts, there.shape):
            found.not_compared.append(module)
        else:
            yield module, form, (there, *parts.values())


def _size(form: Form, codes: TensorInfo) -> tuple[int, int]:
    """[N, K] of a matrix of 4 bits, or of FP8, by the shape of its codes."""
    n, packed = codes.shape
    if form == "fp8":
        return n, packed
    if form == "gptq":
        return packed, n * PER_WORD
    return n, packed * (PER_WORD if form == "pack-quantized" else 2)


def _fit(subject: Subject, module: str, parts: Mapping[str, TensorInfo], shape: tuple[int, ...]) -> bool:
    """Whether the scales are what 4-bit codes, or modelopt's FP8, of a matrix [N, K] can have."""
    n, k = shape
    form, scheme = subject.form(module), subject.schemes.get(module)
    if form == "fp8":
        return parts[WEIGHT].dtype == "F8_E4M3" and parts[SCALE].dtype == "F32" and parts[SCALE].num_bytes == 4
    if form in ("nvfp4", "nvfp4-pack-quantized"):
        _, blocks, shared = parts.values()
        return blocks.shape == (n, k // 16) and blocks.dtype == "F8_E4M3" and shared.dtype == "F32" and shared.num_bytes == 4
    scales, zeros = parts[SCALES if form == "gptq" else SCALE], parts.get(QZEROS if form == "gptq" else ZERO_POINT)
    if (scheme is not None and scheme.bits != 4) or scales.dtype not in ("F16", "BF16", "F32") or len(scales.shape) != 2:
        return False
    groups, rows = scales.shape if form == "gptq" else scales.shape[::-1]
    packed = (groups, n // PER_WORD) if form == "gptq" else (n // PER_WORD, groups)
    return bool(groups) and k % groups == 0 and rows == n and n % PER_WORD == 0 and (zeros is None or zeros.shape == packed)


def same_bytes(one: TensorInfo, other: TensorInfo) -> bool:
    """Whether two stored tensors are equal byte for byte."""
    if one.num_bytes != other.num_bytes:
        return False
    pieces, others = read_pieces(one), read_pieces(other)
    here = there = memoryview(b"")
    done = 0
    while done < one.num_bytes:
        here = here if len(here) else next(pieces)
        there = there if len(there) else next(others)
        count = min(len(here), len(there))
        if here[:count].tobytes() != there[:count].tobytes():
            return False
        here, there = here[count:], there[count:]
        done += count
    return True


def _error(form: Form, infos: tuple[TensorInfo, ...]) -> tuple[float, int]:
    source, codes, scales, *third = infos
    if form == "fp8":
        return fp8_error(codes, scales, source), 0
    if form == "nvfp4":
        return relative_error(codes, scales, third[0], source)
    if form == "nvfp4-pack-quantized":
        return relative_error(codes, scales, third[0], source, reciprocal=True)
    return int4_error(form, codes, scales, third[0] if third else None, source)


def relative_error(
    packed: TensorInfo, scales: TensorInfo, scale_2: TensorInfo, source: TensorInfo, *, reciprocal: bool = False
) -> tuple[float, int]:
    """(‖w − ŵ‖ / ‖w‖, block scales that are NaN, negative, or zero over weights that are not) of an NVFP4 matrix [N, K].

    reciprocal: scale_2 is compressed-tensors' weight_global_scale; vLLM takes 1 / it in float32, and so is it here.
    """
    from mtpress.formats import nvfp4

    weight, codes, blocks, shared = (read_tensor(info) for info in (source, packed, scales, scale_2))
    shared = (1.0 / shared if reciprocal else shared).reshape(())
    n, k = weight.shape
    distance = norm = 0.0
    broken = 0
    rows = max(1, ROWS_BYTES // (4 * k))
    for start in range(0, n, rows):
        piece = weight[start : start + rows].float()
        scale = blocks[start : start + rows]
        broken += _broken(piece, scale)
        norm += _squares(piece)
        piece.sub_(nvfp4.dequantize(codes[start : start + rows], scale, shared))
        distance += _squares(piece)
    return _quotient(distance, norm), broken


def fp8_error(codes: TensorInfo, scale: TensorInfo, source: TensorInfo) -> float:
    """‖w − ŵ‖ / ‖w‖ of a matrix in modelopt's FP8."""
    from mtpress.formats import fp8

    weight, stored, shared = (read_tensor(info) for info in (source, codes, scale))
    distance = norm = 0.0
    rows = max(1, ROWS_BYTES // (4 * weight.shape[1]))
    for start in range(0, len(weight), rows):
        piece = weight[start : start + rows].float()
        norm += _squares(piece)
        distance += _squares(piece.sub_(fp8.dequantize(stored[start : start + rows], shared.reshape(()))))
    return _quotient(distance, norm)


def int4_error(form: Form, packed: TensorInfo, scales: TensorInfo, zeros: TensorInfo | None, source: TensorInfo) -> tuple[float, int]:
    """(‖w − ŵ‖ / ‖w‖, scales that are not finite, or zero over weights that are not) of an INT4 matrix [N, K], in GPTQ's layout or
    that of compressed-tensors, which is its transpose and stores zero points as they are.
    """
    import torch

    from mtpress.formats import int4

    weight, codes, scale = (read_tensor(info) for info in (source, packed, scales))
    zero = read_tensor(zeros) if zeros is not None else None
    if form == "pack-quantized":
        codes, scale = codes.t(), scale.t()
    groups, n = scale.shape
    if zero is None:
        points = torch.full((groups, n), int4.ZERO, dtype=torch.uint8)
    elif form == "gptq":
        points = int4.zero_points(zero)
    else:
        points = int4.unpack(zero)  # packed along N, as the codes of GPTQ are along K
    k = weight.shape[1]
    distance = norm = 0.0
    broken = 0
    rows = max(1, ROWS_BYTES // (4 * k))
    for start in range(0, n, rows):
        piece = weight[start : start + rows].float()
        norm += _squares(piece)
        part = scale[:, start : start + rows].t().float()
        empty = part == 0
        broken += int((~part.isfinite() | (empty & (piece.view(*part.shape, -1).abs().amax(-1) > 0))).sum())
        whole = int4.unpack(codes[:, start : start + rows].contiguous()).float().view(*part.shape, -1)
        whole.sub_(points[:, start : start + rows].t().float().unsqueeze(-1)).mul_(part.unsqueeze(-1))
        distance += _squares(piece.sub_(whole.view(-1, k)))
    return _quotient(distance, norm), broken


def _quotient(distance: float, norm: float) -> float:
    if norm == 0.0:
        return 0.0 if distance == 0.0 else math.inf
    return math.sqrt(distance / norm)


def _squares(matrix: "torch.Tensor") -> float:
    """Σ x², float32 within a row and float64 over the rows."""
    import torch

    return float(torch.linalg.vector_norm(matrix, dim=1).double().square().sum())


def _broken(weight: "torch.Tensor", scale: "torch.Tensor") -> int:
    import torch

    raw = scale.contiguous().view(torch.uint8)
    wrong = raw >= 0x7F  # E4M3: 0x7F is NaN, above it the sign is set
    empty = raw == 0
    if bool(empty.any()):
        wrong |= empty & (weight.view(*raw.shape, -1).abs().amax(-1) > 0)
    return int(wrong.sum())
