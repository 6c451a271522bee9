"""A checkpoint directory, read by its headers: what tensors it holds, where their bytes lie, what its config files say.

In: a directory of safetensors files with an index (or one model.safetensors). Out: `Checkpoint`, whose opening reads
headers only; tensors are read one by one, straight from the file, without mapping it. Leaves out: writing
(checkpoint/writer.py), and what the tensors mean (models/).
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtpress.checkpoint.json_files import read_json_object
from mtpress.checkpoint.safetensors import Shard, TensorInfo, read_shard, read_tensor
from mtpress.errors import InputError

if TYPE_CHECKING:
    import torch

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


def shard_files(path: Path) -> list[Path]:
    """The safetensors files of a directory, in order of name, whether an index names them or not."""
    return sorted(file for file in path.iterdir() if file.name.endswith(".safetensors") and not file.is_dir())


def tensors_that_count(path: Path, shards: Iterable[Shard], weight_map: Mapping[str, str]) -> dict[str, TensorInfo]:
    """Name → tensor; of two with one name that which the index names, InputError where it names neither."""
    stored: dict[str, TensorInfo] = {}
    for info in (info for shard in shards for info in shard.tensors):
        other = stored.get(info.name)
        if other is not None and weight_map.get(info.name) not in (other.file.name, info.file.name):
            raise InputError(
                f"{path}: tensor {info.name[:120]} is stored in {other.file.name} and in {info.file.name}, and no index says which "
                "counts; move one of the files away"
            )
        if other is None or weight_map[info.name] == info.file.name:
            stored[info.name] = info
    return stored


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
        files = shard_files(path)
        if not files:
            raise InputError(f"{path}: no *.safetensors file; only safetensors checkpoints are read")
        try:
            index = read_json_object(path / INDEX_NAME)
        except InputError:
            index = None
        weight_map = weight_map_of(index)
        shards = tuple(read_shard(file) for file in files)
        return cls(path, config, shards, tensors_that_count(path, shards, weight_map), {}, index)

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
