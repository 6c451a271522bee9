"""A checkpoint directory, read by its headers: what tensors it holds, where their bytes lie, what its config files say.

In: a directory of safetensors files with an index (or one model.safetensors). Out: `Checkpoint`, whose opening reads
headers only; tensors are read one by one, straight from the file, without mapping it. Leaves out: writing
(checkpoint_writer.py), and what the tensors mean (models/).

Every byte of a header is checked before it is believed: a file that lies about its own layout is an InputError.
Format: https://github.com/huggingface/safetensors (8-byte length, JSON header, data; offsets relative to the data).
"""

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtpress.errors import InputError

if TYPE_CHECKING:
    import torch

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# Parsed, JSON takes up to thirty times its text in memory. A header of 32 MB names 200,000 tensors, tokenizer.json of the family has
# some 13 MB.
MAX_HEADER_BYTES = 32_000_000
MAX_JSON_BYTES = 25_000_000
MAX_TEXT_BYTES = 8_000_000  # of a chat template; merges.txt of the family has 2 MB
PIECE_BYTES = 16 << 20

DTYPE_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I64": 64, "I32": 32,
    "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor: its safetensors dtype name, its shape, and where its bytes lie.

    stored, scales, block: of one that is read as BF16 and lies in the file otherwise (bf16_source.py). All else is then the BF16 tensor's.
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


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!r} stands twice")
    return found


def read_json(path: Path) -> Any:
    """The content of a JSON file; InputError if it is missing, too large, not UTF-8, or not JSON without repeated keys."""
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: cannot be read (it is not a file)")
        if path.stat().st_size > MAX_JSON_BYTES:
            raise InputError(f"{path}: larger than {MAX_JSON_BYTES // 1_000_000} MB, which no config or index is; is it the right file?")
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({str(error)[:120]}); restore it from the source checkpoint") from None


def read_text(path: Path, max_bytes: int = MAX_TEXT_BYTES) -> str | None:
    """The content of a text file; None where it is not UTF-8. InputError if it is too large, a pipe or a device, or cannot be read."""
    try:
        if not path.is_file():
            raise InputError(f"{path}: cannot be read (it is not a file)")
        if path.stat().st_size > max_bytes:
            raise InputError(
                f"{path}: larger than {max_bytes // 1_000_000} MB, which no such file is; restore it from the source checkpoint"
            )
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError:
        return None


def read_json_object(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: must hold a JSON object, holds a {type(content).__name__}")
    return content


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
        header = json.loads(raw, object_pairs_hook=_no_duplicates)
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
        from mtpress.bf16_source import pieces

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
        from mtpress.bf16_source import rows as rounded

        return torch.cat([rounded(info, row, 1) for row in unique.tolist()])[place]
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


def weight_map_of(index: Mapping[str, Any] | None) -> dict[str, str]:
    """Tensor name → file of an index, as far as it has them; `./x` is the file x of the directory."""
    said = index.get("weight_map") if index is not None else None
    return {name: _spelled(file) for name, file in said.items() if isinstance(file, str)} if isinstance(said, dict) else {}


def _spelled(file: str) -> str:
    """A file's plain name where a path says no more than that; a path that leaves the directory, or goes below it, as it is."""
    parts = [part for part in file.split("/") if part not in ("", ".")]
    return parts[0] if len(parts) == 1 and parts[0] != ".." and not file.startswith("/") and not file.endswith("/") else file


def resolve(path_or_id: str | Path) -> Path:
    """The directory that a path names or, for a Hub id such as Qwen/Qwen3.6-27B, the local snapshot of it."""
    path = Path(path_or_id)
    if path.is_dir():
        return path
    text = str(path_or_id)
    if path.exists():
        raise InputError(f"{text}: is a file; name the directory that holds config.json and the safetensors files")
    if text.count("/") != 1 or text.startswith((".", "/", "~")) or text.endswith("/"):
        raise InputError(f"{text}: no such directory")
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(text))
    except (OSError, HfHubHTTPError, HFValidationError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:160]
        raise InputError(f"{text}: neither a directory nor a Hub model that can be fetched ({reason})") from None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint by its headers. `tensors` maps every stored name to its place; `unindexed` are stored but not in the index."""

    path: Path
    config: dict[str, Any]
    shards: tuple[Shard, ...]
    tensors: Mapping[str, TensorInfo]
    unindexed: Mapping[str, TensorInfo] = field(default_factory=dict)
    index: dict[str, Any] | None = None

    @classmethod
    def open(cls, path_or_id: str | Path) -> "Checkpoint":
        """Reads config.json, the index and every header; InputError says what is missing or wrong."""
        path, config = cls._config(path_or_id)
        index = read_json_object(path / INDEX_NAME) if (path / INDEX_NAME).exists() else None
        if index is None and not (path / SINGLE_NAME).is_file():
            others = sorted(file.name for file in path.glob("*.safetensors"))
            if others:
                raise InputError(
                    f"{path}: neither {INDEX_NAME} nor {SINGLE_NAME}, but {others[0][:80]}{', …' if len(others) > 1 else ''}; mtpress "
                    "repair gives shards an index, mtpress graft --from puts a draft head alone into a checkpoint"
                )
            raise InputError(f"{path}: neither {INDEX_NAME} nor {SINGLE_NAME}; only safetensors checkpoints are read")
        weight_map = cls._weight_map(path, index)
        files = sorted(set(weight_map.values())) if weight_map is not None else [SINGLE_NAME]
        shards = tuple(read_shard(path / file) for file in files)
        stored: dict[str, TensorInfo] = {}
        for shard in shards:
            for info in shard.tensors:
                if info.name in stored:
                    raise InputError(f"{path}: tensor {info.name} is stored in {stored[info.name].file.name} and in {shard.path.name}")
                stored[info.name] = info
        if weight_map is None:
            return cls(path, config, shards, stored)
        for name, file in weight_map.items():
            if name not in stored or stored[name].file.name != file:
                raise InputError(f"{path / INDEX_NAME}: says that {name[:120]} is in {file}, which does not hold it; rebuild the index")
        unindexed = {name: info for name, info in stored.items() if name not in weight_map}
        return cls(path, config, shards, {n: i for n, i in stored.items() if n in weight_map}, unindexed, index)

    @classmethod
    def open_stored(cls, path_or_id: str | Path) -> "Checkpoint":
        """The same by what is on disk: every *.safetensors file in the directory, whatever the index says or lacks.

        `tensors` has all that is stored, `unindexed` nothing; `index` is None where it is missing or no JSON object. Where a tensor
        is stored twice the index decides, the other one is in `shards` alone; InputError where it does not, and for torn files.
        """
        path, config = cls._config(path_or_id)
        files = sorted(file for file in path.iterdir() if file.name.endswith(".safetensors") and not file.is_dir())
        if not files:
            raise InputError(f"{path}: no *.safetensors file; only safetensors checkpoints are read")
        try:
            index = read_json_object(path / INDEX_NAME)
        except InputError:
            index = None
        weight_map = weight_map_of(index)
        shards = tuple(read_shard(file) for file in files)
        stored: dict[str, TensorInfo] = {}
        for shard in shards:
            for info in shard.tensors:
                other = stored.get(info.name)
                if other is not None and weight_map.get(info.name) not in (other.file.name, info.file.name):
                    raise InputError(
                        f"{path}: tensor {info.name[:120]} is stored in {other.file.name} and in {info.file.name}, and no index says which "
                        "counts; move one of the files away"
                    )
                if other is None or weight_map[info.name] == info.file.name:
                    stored[info.name] = info
        return cls(path, config, shards, stored, {}, index)

    @staticmethod
    def _config(path_or_id: str | Path) -> tuple[Path, dict[str, Any]]:
        path = resolve(path_or_id)
        if not (path / "config.json").is_file():
            raise InputError(f"{path}: no config.json; name the directory of a whole checkpoint")
        return path, read_json_object(path / "config.json")

    @staticmethod
    def _weight_map(path: Path, index: dict[str, Any] | None) -> dict[str, str] | None:
        if index is None:
            return None
        said = index.get("weight_map")
        if not isinstance(said, dict) or not said or not all(isinstance(f, str) for f in said.values()):
            raise InputError(f"{path / INDEX_NAME}: has no weight_map from tensor names to files; rebuild the index")
        weight_map = weight_map_of(index)
        for file in sorted(set(weight_map.values())):
            if Path(file).is_absolute() or ".." in file.split("/") or file in ("", ".") or "\0" in file:
                raise InputError(f"{path / INDEX_NAME}: names a file outside the directory: {file[:120]!r}")
            if "/" in file:
                raise InputError(
                    f"{path / INDEX_NAME}: names {file[:120]!r}, in a folder below, where engines do not look; move it beside the index"
                )
            if not file.endswith(".safetensors"):
                raise InputError(f"{path / INDEX_NAME}: names {file[:120]!r}, which is not a safetensors file")
            if not (path / file).is_file():
                raise InputError(f"{path}: {file} is in the index but not on disk; fetch the checkpoint again")
        return weight_map

    def read(self, name: str) -> "torch.Tensor":
        return read_tensor(self.tensors[name])

    def json_file(self, name: str) -> dict[str, Any] | None:
        """A JSON file beside the weights, or None where there is none."""
        path = self.path / name
        return read_json_object(path) if path.exists() else None

    @cached_property
    def text_config(self) -> dict[str, Any]:
        """The config of the language model: `text_config` where there is one, else the config itself."""
        inner = self.config.get("text_config", self.config)
        if not isinstance(inner, dict):
            raise InputError(f"{self.path / 'config.json'}: text_config is not an object")
        return inner

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type", ""))

    @property
    def num_bytes(self) -> int:
        """Of all tensors, as they are stored."""
        return sum((info.stored or info).num_bytes + (info.scales.num_bytes if info.scales else 0) for info in self.tensors.values())

    def other_files(self) -> Iterator[Path]:
        """Plain files beside the weights, in order of name, without shards and index."""
        for path in sorted(self.path.iterdir()):
            if path.is_file() and path.suffix != ".safetensors" and path.name != INDEX_NAME:
                yield path

    @cached_property
    def identity(self) -> str:
        """SHA-256 over config.json and all headers: names a checkpoint without reading its weights."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for info in sorted(self.tensors.values(), key=lambda t: t.name):
            digest.update(f"{info.name} {info.dtype} {info.shape} {info.file.name} {info.offset}\n".encode())
        return digest.hexdigest()
