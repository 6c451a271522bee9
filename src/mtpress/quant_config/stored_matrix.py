"""The numbers that a stored matrix stands for, in float32, some rows at a time, whatever form it is stored in.

In: the tensors of one module by the last part of their names, and their form. Out: a `StoredMatrix`, or None where the parts are not of
one matrix. Leaves out: what an engine computes with it (quant_config/emulation.py), and judging.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mtpress.checkpoint.safetensors import TensorInfo, read_tensor
from mtpress.quant_config.stored import (
    GLOBAL_SCALE,
    NVFP4_GROUP_SIZE,
    QWEIGHT,
    QZEROS,
    SCALE,
    SCALE_2,
    SCALES,
    WEIGHT,
    WEIGHT_PACKED,
    ZERO_POINT,
    Form,
    fp8_scheme,
)

if TYPE_CHECKING:
    import torch

PER_WORD = 8  # INT4 codes in an int32
FP8_BLOCK = 128
PIECE_BYTES = 32 << 20  # float32 working set
Parts = Mapping[str, TensorInfo]
Rows = Callable[[int, int], "torch.Tensor"]


@dataclass(frozen=True)
class StoredMatrix:
    """shape [N, K]; infos: what is read for it; load: reads them, returns rows(start, stop) → float32 and the scales [N, groups]
    as float32, with which a block of K / groups numbers is multiplied (None: of one scale for all).
    """

    form: Form
    shape: tuple[int, int]
    infos: tuple[TensorInfo, ...]
    load: Callable[[], tuple[Rows, "torch.Tensor | None"]]

    @property
    def num_bytes(self) -> int:
        return sum(info.num_bytes for info in self.infos)

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Rows, (start, stop), whose float32 numbers take about PIECE_BYTES."""
        return pieces(*self.shape)


def pieces(n: int, columns: int) -> Iterator[tuple[int, int]]:
    rows = max(1, PIECE_BYTES // (4 * max(columns, 1)))
    rows += -rows % FP8_BLOCK
    return ((start, min(start + rows, n)) for start in range(0, n, rows))


def stored_matrix(form: Form, parts: Parts) -> StoredMatrix | None:
    """The matrix of a module of two dimensions; None where parts are missing, or are not of one matrix. INT codes are taken for 4 bits."""
    make = MAKERS.get(form)
    return make(parts) if make is not None else None


def _has(parts: Parts, *suffixes: str) -> bool:
    return all(suffix in parts and len(parts[suffix].shape) <= 2 for suffix in suffixes)


def _plain(parts: Parts) -> StoredMatrix | None:
    if not _has(parts, WEIGHT) or len(parts[WEIGHT].shape) != 2:
        return None
    info = parts[WEIGHT]

    def load() -> tuple[Rows, None]:
        weight = read_tensor(info)
        return lambda start, stop: weight[start:stop].float(), None

    return StoredMatrix("plain", (info.shape[0], info.shape[1]), (info,), load)


def _nvfp4(codes: str, shared: str, form: Form) -> Callable[[Parts], StoredMatrix | None]:
    def make(parts: Parts) -> StoredMatrix | None:
        if not _has(parts, codes, SCALE, shared) or len(parts[codes].shape) != 2:
            return None
        infos = parts[codes], parts[SCALE], parts[shared]
        n, k = infos[0].shape[0], 2 * infos[0].shape[1]
        if (
            infos[1].shape != (n, k // NVFP4_GROUP_SIZE)
            or infos[1].dtype != "F8_E4M3"
            or (infos[2].dtype, infos[2].num_bytes) != ("F32", 4)
        ):
            return None

        def load() -> "tuple[Rows, torch.Tensor]":
            from mtpress.formats import compressed_tensors, nvfp4

            packed, blocks, scale = (read_tensor(info) for info in infos)
            scale_2 = (compressed_tensors.reciprocal(scale) if shared == GLOBAL_SCALE else scale).reshape(())
            return lambda start, stop: nvfp4.dequantize(packed[start:stop], blocks[start:stop], scale_2), blocks

        return StoredMatrix(form, (n, k), infos, load)

    return make


def _gptq(parts: Parts) -> StoredMatrix | None:
    if not _has(parts, QWEIGHT, QZEROS, SCALES) or len(parts[QWEIGHT].shape) != 2:
        return None
    words, n = parts[QWEIGHT].shape
    return _int4("gptq", (n, words * PER_WORD), parts[QWEIGHT], parts[SCALES], parts[QZEROS], parts.get("g_idx"))


def _pack_quantized(parts: Parts) -> StoredMatrix | None:
    if not _has(parts, WEIGHT_PACKED, SCALE) or len(parts[WEIGHT_PACKED].shape) != 2:
        return None
    n, words = parts[WEIGHT_PACKED].shape
    size = (n, words * PER_WORD)
    return _int4("pack-quantized", size, parts[WEIGHT_PACKED], parts[SCALE], parts.get(ZERO_POINT), parts.get("weight_g_idx"))


def _int4(
    form: Form, shape: tuple[int, int], packed: TensorInfo, scales: TensorInfo, zeros: TensorInfo | None, order: TensorInfo | None
) -> StoredMatrix | None:
    """INT4 in GPTQ's layout or that of compressed-tensors, which is its transpose and stores zero points as they are.

    order: the group of each column, where columns were moved (g_idx).
    """
    n, k = shape
    if scales.dtype not in ("F16", "BF16", "F32") or len(scales.shape) != 2:
        return None
    groups, rows = scales.shape if form == "gptq" else scales.shape[::-1]
    points_shape = (groups, n // PER_WORD) if form == "gptq" else (n // PER_WORD, groups)
    if not groups or k % groups or rows != n or n % PER_WORD or (zeros is not None and zeros.shape != points_shape):
        return None
    if order is not None and order.shape != (k,):
        return None

    def load() -> "tuple[Rows, torch.Tensor]":
        import torch

        from mtpress.formats import int4

        codes, scale = read_tensor(packed), read_tensor(scales)
        if form == "pack-quantized":
            codes, scale = codes.t(), scale.t()
        if zeros is None:
            points = torch.full((groups, n), int4.ZERO, dtype=torch.uint8)
        elif form == "gptq":
            points = int4.zero_points(read_tensor(zeros))
        else:
            points = int4.unpack(read_tensor(zeros))  # packed along N, as the codes of GPTQ are along K
        group = torch.arange(k) // (k // groups) if order is None else read_tensor(order).long().clamp(0, groups - 1)

        def read(start: int, stop: int) -> torch.Tensor:
            whole = int4.unpack(codes[:, start:stop].contiguous()).float()
            whole.sub_(points[:, start:stop].t().float()[:, group])
            return whole.mul_(scale[:, start:stop].t().float()[:, group])

        return read, scale.t()

    infos = (packed, scales, *(info for info in (zeros, order) if info is not None))
    return StoredMatrix(form, shape, infos, load)


def _fp8(parts: Parts) -> StoredMatrix | None:
    """One scale for all, one a row, or one a block, as Qwen releases it (weight_scale_inv, which is multiplied too)."""
    scheme = fp8_scheme(parts)
    if scheme is None or parts[WEIGHT].dtype != "F8_E4M3" or parts[scheme.scale_name].dtype not in ("F32", "BF16", "F16"):
        return None
    infos = parts[WEIGHT], parts[scheme.scale_name]
    n, k = infos[0].shape

    def load() -> "tuple[Rows, torch.Tensor | None]":
        from mtpress.formats import fp8

        codes, scale = read_tensor(infos[0]), read_tensor(infos[1]).float()
        height = {"tensor": n, "channel": 1, "block": scheme.block[0]}[scheme.scale_of]

        def read(start: int, stop: int) -> "torch.Tensor":
            part = scale if scale.numel() == 1 else scale[start // height : -(-stop // height)]
            return fp8.dequantize(codes[start:stop], part, scheme.block)

        return read, None

    return StoredMatrix("fp8", (n, k), infos, load)


MAKERS: dict[Form, Callable[[Parts], StoredMatrix | None]] = {
    "plain": _plain,
    "nvfp4": _nvfp4(WEIGHT, SCALE_2, "nvfp4"),
    "nvfp4-pack-quantized": _nvfp4(WEIGHT_PACKED, GLOBAL_SCALE, "nvfp4-pack-quantized"),
    "gptq": _gptq,
    "pack-quantized": _pack_quantized,
    "fp8": _fp8,
}
