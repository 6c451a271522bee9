"""safetensors files: the header of a shard, and the bytes, rows and pieces of a tensor; as BF16 where a source is stored otherwise.

Every byte of a header is checked before it is believed: a file that lies about its own layout is an InputError.
Format: https://github.com/huggingface/safetensors (8-byte length, JSON header, data; offsets relative to the data).
"""

import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtpress.checkpoint.json_files import no_duplicates
from mtpress.errors import InputError

if TYPE_CHECKING:
    import torch

# Parsed, JSON takes up to thirty times its text in memory. A header of 32 MB names 200,000 tensors, tokenizer.json of the family has
# some 13 MB.
MAX_HEADER_BYTES = 32_000_000
PIECE_BYTES = 16 << 20
DTYPE_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I64": 64, "I32": 32,
    "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor: its safetensors dtype name, its shape, and where its bytes lie.

    stored, scales, block: of one that is read as BF16 and lies in the file otherwise (plan/bf16_source.py). All else is then the
    BF16 tensor's.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    num_bytes: int
    stored: "TensorInfo | None" = None
    scales: "TensorInfo | None" = None
    block: tuple[int, int] | None = None

    @property
    def num_params(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its tensors in file order and its `__metadata__`."""

    path: Path
    tensors: tuple[TensorInfo, ...]
    metadata: Mapping[str, str]


def torch_dtype(name: str) -> "torch.dtype":
    """The torch dtype of a safetensors dtype name."""
    import torch

    return {
        "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
        "U8": torch.uint8, "BOOL": torch.bool, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
        "F8_E8M0": torch.float8_e8m0fnu,
    }[name]  # fmt: skip


def read_shard(path: Path) -> Shard:
    """The header of one safetensors file, checked against the file's own size."""

    def refuse(why: str) -> InputError:
        return InputError(f"{path}: {why}; the file is torn or not safetensors, fetch it again")

    try:
        seen = path.stat()
        if not stat.S_ISREG(seen.st_mode):
            raise InputError(f"{path}: cannot be read (it is not a file)")
        size = seen.st_size
        with path.open("rb") as file:
            head = file.read(8)
            if len(head) < 8:
                raise refuse(f"{size} bytes are too few for a header")
            length = int.from_bytes(head, "little")
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise refuse(f"its header claims {length} bytes of a file of {size}")
            raw = file.read(length)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    try:
        header = json.loads(raw, object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        raise refuse(f"its header is not JSON ({str(error)[:120]})") from None
    if not isinstance(header, dict):
        raise refuse("its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise refuse("its __metadata__ is not a map of strings")
    infos = [_tensor_info(name, entry, path, 8 + length, refuse) for name, entry in header.items()]
    infos.sort(key=lambda t: (t.offset, t.num_bytes))
    end = 8 + length
    for info in infos:
        if info.offset != end:
            raise refuse(f"tensor {info.name[:80]} starts at byte {info.offset}, but the one before it ends at {end}")
        end += info.num_bytes
    if end != size:
        raise refuse(f"its tensors end at byte {end}, the file at {size}")
    return Shard(path, tuple(infos), metadata)


def _tensor_info(name: str, entry: Any, path: Path, data_start: int, refuse: Any) -> TensorInfo:
    shown = name[:80]
    if not name.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in name):
        raise refuse("the name of a tensor is not text")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise refuse(f"tensor {shown}: its entry is not dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise refuse(f"tensor {shown}: unknown dtype {str(dtype)[:40]!r}")

    def counts(values: Any) -> bool:
        return isinstance(values, list) and all(type(v) is int and 0 <= v < 1 << 48 for v in values)

    if not counts(shape) or len(shape) > 16:
        raise refuse(f"tensor {shown}: its shape is not a list of sizes")
    if not counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise refuse(f"tensor {shown}: its data_offsets are not a pair of ascending positions")
    info = TensorInfo(name, dtype, tuple(shape), path, data_start + offsets[0], offsets[1] - offsets[0])
    if info.num_params * DTYPE_BITS[dtype] != info.num_bytes * 8:
        raise refuse(f"tensor {shown}: {dtype} {list(shape)} needs {info.num_params * DTYPE_BITS[dtype] // 8} bytes, has {info.num_bytes}")
    return info


def bytes_of(tensor: "torch.Tensor") -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    import torch

    return memoryview(tensor.view(-1).view(torch.uint8).numpy()) if tensor.numel() else memoryview(b"")  # type: ignore[arg-type]


def _pread(file: int, into: memoryview, position: int, info: TensorInfo) -> int:
    try:
        count = os.preadv(file, [into], position)
    except OSError as error:
        raise InputError(f"{info.file}: cannot be read ({error.strerror or error})") from None
    if count == 0:
        raise InputError(f"{info.file}: ends inside tensor {info.name}; it changed while it was read, start again")
    return count


@contextmanager
def _opened(info: TensorInfo) -> Iterator[int]:
    try:
        file = os.open(info.file, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"{info.file}: cannot be read ({error.strerror or error})") from None
    try:
        yield file
    finally:
        os.close(file)


def read_bytes(info: TensorInfo, into: memoryview) -> None:
    """Fills `into` (num_bytes long) with the stored bytes of a tensor, past the page mapping."""
    if info.stored is not None:
        done = 0
        for piece in pieces(info):
            into[done : done + len(piece)] = piece
            done += len(piece)
        return
    with _opened(info) as file:
        position = 0
        while position < info.num_bytes:
            position += _pread(file, into[position : position + PIECE_BYTES], info.offset + position, info)


def read_rows(info: TensorInfo, rows: "torch.Tensor") -> "torch.Tensor":
    """The given rows (int64 [T]) of a stored matrix [N, K] as [T, K]; each distinct row is read once."""
    import torch

    unique, place = torch.unique(rows, return_inverse=True)
    if len(unique) and int(unique[-1]) >= info.shape[0]:
        raise InputError(f"token id {int(unique[-1])} is outside {info.name} with {info.shape[0]} rows; tokenizer and weights do not match")
    if info.stored is not None:
        return torch.cat([rounded_rows(info, row, 1) for row in unique.tolist()])[place]
    row_bytes = info.num_bytes // info.shape[0]
    found = torch.empty(len(unique), info.shape[1], dtype=torch_dtype(info.dtype))
    view = bytes_of(found)
    with _opened(info) as file:
        for i, row in enumerate(unique.tolist()):
            position = 0
            while position < row_bytes:
                into = view[i * row_bytes + position : (i + 1) * row_bytes]
                position += _pread(file, into, info.offset + row * row_bytes + position, info)
    return found[place]


def read_tensor(info: TensorInfo) -> "torch.Tensor":
    """The tensor itself, in its stored dtype, in memory of its own."""
    import torch

    buffer = bytearray(info.num_bytes)
    if info.num_bytes:
        read_bytes(info, memoryview(buffer))
        return torch.frombuffer(buffer, dtype=torch_dtype(info.dtype)).reshape(info.shape)
    return torch.empty(info.shape, dtype=torch_dtype(info.dtype))


def rounded_rows(info: TensorInfo, first: int, count: int) -> "torch.Tensor":
    """BF16: rows of a tensor that is stored otherwise; of a vector, numbers. first is a multiple of the block's rows, unless count is 1.
    InputError where one does not come out finite."""
    import torch

    stored = info.stored
    assert stored is not None
    height = stored.num_bytes // max(1, _height(info))
    place = replace(stored, shape=(count, *info.shape[1:]), offset=stored.offset + first * height, num_bytes=count * height)
    values = read_tensor(place).float()
    if info.scales is not None and info.block is not None:
        down, across = info.block
        steps = read_rows_of(info.scales, first // down, -(-(first + count) // down)).float()
        steps = steps.repeat_interleave(down, 0)[first % down :][:count].repeat_interleave(across, 1)[:, : info.shape[1]]
        values *= steps
    found = values.to(torch.bfloat16)
    if not bool(torch.isfinite(found).all()):
        raise InputError(f"{stored.file}: {_why(info, values)}")
    return found.reshape(count, *info.shape[1:])


def read_rows_of(info: TensorInfo, first: int, last: int) -> "torch.Tensor":
    height = info.num_bytes // info.shape[0]
    place = replace(info, shape=(last - first, *info.shape[1:]), offset=info.offset + first * height, num_bytes=(last - first) * height)
    return read_tensor(place)


def _why(info: TensorInfo, values: "torch.Tensor") -> str:
    assert info.stored is not None
    if bool(values.isfinite().all()):
        return f"{info.name} holds numbers up to {float(values.abs().max()):.3g}, for which BF16 has none; scale it down before it is saved"
    held = "NaN" if bool(values.isnan().any()) else "infinite values"
    overflowed = "F16 ends at 65504, so it overflowed when it was saved; save it in BF16"
    cause = overflowed if info.stored.dtype == "F16" else "the source is damaged"
    return f"{info.name} holds {held}; {cause}"


def _height(info: TensorInfo) -> int:
    return info.shape[0] if info.shape else 1


def pieces(info: TensorInfo) -> Iterator[memoryview]:
    """The BF16 bytes of a tensor that is stored otherwise, some rows at a time."""
    count = _height(info)
    step = max(1, PIECE_BYTES // max(4, 4 * info.num_params // max(1, count)))
    if info.block is not None:
        step = max(1, step // info.block[0]) * info.block[0]
    for start in range(0, count, step):
        yield bytes_of(rounded_rows(info, start, min(step, count - start)).contiguous())
