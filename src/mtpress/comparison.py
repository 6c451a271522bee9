"""A finished checkpoint against the BF16 checkpoint it was made from, one tensor at a time.

In: two open checkpoints. Out: a `Comparison`: which kept tensors are equal byte for byte, and how far each quantized
matrix is from its source. Leaves out: judging (rules/base.py). Memory holds one matrix in both forms, never the model.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mtpress.checkpoint import Checkpoint, TensorInfo, read_tensor
from mtpress.disk import read_pieces
from mtpress.progress import Progress
from mtpress.rules.stored import SCALE, SCALE_2, WEIGHT
from mtpress.rules.subject import Subject

if TYPE_CHECKING:
    import torch

ROWS_BYTES = 32 << 20  # float32 working set
COMPARED_CONFIGS = ("text_config", "vision_config")
# Keys that a build may change: how it is stored, and what it does not hold.
FREE_KEYS = {"model_type", "dtype", "torch_dtype", "transformers_version", "quantization_config", "_name_or_path"}
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt")


@dataclass
class Comparison:
    """What was measured.

    error: module → ‖w − ŵ‖ / ‖w‖. broken_blocks: module → how many block scales are NaN, negative, or zero over weights.
    """

    num_equal: int = 0
    differing: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    error: dict[str, float] = field(default_factory=dict)
    broken_blocks: dict[str, int] = field(default_factory=dict)
    not_compared: list[str] = field(default_factory=list)
    config_keys: list[str] = field(default_factory=list)
    tokenizer_files: list[str] = field(default_factory=list)

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
    found = Comparison(config_keys=list(_config_keys(subject.config, base.config)), tokenizer_files=_tokenizer_files(subject, base))
    jobs = list(_jobs(subject, base, found))
    total = sum(info.num_bytes for _, infos in jobs for info in infos)
    with Progress("compare", total, silent=silent) as progress:
        for module, infos in jobs:
            if module is None:
                name = infos[0].name
                if same_bytes(infos[0], infos[1]):
                    found.num_equal += 1
                else:
                    found.differing.append(name)
            else:
                name = module
                found.error[module], broken = relative_error(*infos)
                if broken:
                    found.broken_blocks[module] = broken
            progress.advance(sum(info.num_bytes for info in infos), ".".join(name.split(".")[-4:])[:24])
    return found


def _jobs(subject: Subject, base: Checkpoint, found: Comparison) -> Iterator[tuple[str | None, tuple[TensorInfo, ...]]]:
    """(None, the tensor here and there) to be compared byte for byte, or (module, its weight, scales and source)."""
    for module, tensors in subject.modules.items():
        form = subject.form(module)
        if form in ("plain", "none", "unknown"):
            for info in tensors.values():
                there = base.tensors.get(info.name)
                if there is None or (there.dtype, there.shape) != (info.dtype, info.shape):
                    found.absent.append(info.name)
                else:
                    yield None, (info, there)
            continue
        there = base.tensors.get(f"{module}.{WEIGHT}")
        parts = tuple(tensors[suffix] for suffix in (WEIGHT, SCALE, SCALE_2) if suffix in tensors)
        if form != "nvfp4" or len(parts) < 3:
            found.not_compared.append(module)
        elif there is None or len(there.shape) != 2 or parts[0].shape != (there.shape[0], there.shape[1] // 2):
            found.absent.append(f"{module}.{WEIGHT}")
        elif parts[1].shape != (there.shape[0], there.shape[1] // 16) or parts[1].dtype != "F8_E4M3" or parts[2].num_bytes != 4:
            found.not_compared.append(module)
        else:
            yield module, (*parts, there)


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


def relative_error(packed: TensorInfo, scales: TensorInfo, scale_2: TensorInfo, source: TensorInfo) -> tuple[float, int]:
    """(‖w − ŵ‖ / ‖w‖, block scales that are NaN, negative, or zero over weights that are not) of a matrix [N, K]."""

    from mtpress.formats import nvfp4

    weight, codes, blocks, shared = (read_tensor(info) for info in (source, packed, scales, scale_2))
    n, k = weight.shape
    distance = norm = 0.0
    broken = 0
    rows = max(1, ROWS_BYTES // (4 * k))
    for start in range(0, n, rows):
        piece = weight[start : start + rows].float()
        scale = blocks[start : start + rows]
        broken += _broken(piece, scale)
        norm += _squares(piece)
        piece.sub_(nvfp4.dequantize(codes[start : start + rows], scale, shared.reshape(())))
        distance += _squares(piece)
    if norm == 0.0:
        return (0.0 if distance == 0.0 else math.inf), broken
    return math.sqrt(distance / norm), broken


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


def _config_keys(config: Mapping[str, Any], base: Mapping[str, Any]) -> Iterator[str]:
    """Keys of config.json that decide the computation and differ from the source's; a text-only config is its own text_config."""
    flat = config.get("model_type") == "qwen3_5_text"
    for section in COMPARED_CONFIGS:
        here = config if flat and section == "text_config" else config.get(section)
        there = base.get(section, base if base.get("model_type") == "qwen3_5_text" and section == "text_config" else None)
        if not isinstance(here, Mapping) or not isinstance(there, Mapping):
            continue
        for key in sorted({*here, *there} - FREE_KEYS):
            if key in there and here.get(key) != there[key] and not isinstance(there[key], Mapping):
                said = json.dumps(here.get(key)) if key in here else "nothing"
                yield f"{section}.{key}: {said[:60]}, the source has {json.dumps(there[key])[:60]}"
            elif isinstance(there.get(key), Mapping) and here.get(key) != there[key]:
                yield f"{section}.{key}"


def _tokenizer_files(subject: Subject, base: Checkpoint) -> list[str]:
    """Tokenizer files that both have and whose bytes differ."""
    both = [name for name in TOKENIZER_FILES if subject.has(name) and (base.path / name).is_file()]
    return [name for name in both if (subject.path / name).read_bytes() != (base.path / name).read_bytes()]
