"""A checkpoint with changes that are not written yet, as the rules can see it: repairs work on it, and `check` judges it.

In: what is stored, by its headers. Out: the same, with tensors renamed, dropped, taken from elsewhere or to be computed, and with other
files; a `Subject` of that state, and a `Revision` that makes it. Leaves out: deciding what to change (the other files here).

No weight is read to change or to judge. New float32 scalars are kept in a scratch file, so that the rules read them as they read
stored ones; a tensor that is yet to be computed is known by its dtype and shape only.
"""

import copy
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from mtpress.checkpoint.checkpoint import SINGLE_NAME, Checkpoint
from mtpress.checkpoint.safetensors import Shard, TensorInfo
from mtpress.checkpoint.shard_writer import OutputTensor
from mtpress.json_files import json_bytes
from mtpress.quant_config.view import CONFIG, Subject
from mtpress.rules.rule import Finding

if TYPE_CHECKING:
    import torch

    from mtpress.checkpoint.revision import Revision

Produce = Callable[[], "torch.Tensor"]


@dataclass(frozen=True)
class Place:
    """Where a tensor of the output comes from: `stored` under that name, computed by `produce`, or else copied from `info`."""

    info: TensorInfo
    stored: str | None = None
    produce: Produce | None = None


class Overlaid(Subject):
    """The subject of an overlay: its files stand in front of those on disk, and no safetensors file is a stray."""

    def __init__(self, checkpoint: Checkpoint, files: dict[str, bytes | None]) -> None:
        super().__init__(checkpoint)
        self.files = files

    def json(self, name: str) -> dict[str, Any] | None:
        if name not in self.files:
            return super().json(name)
        content = self.files[name]
        return None if content is None else json.loads(content)

    def has(self, name: str) -> bool:
        return self.files[name] is not None if name in self.files else super().has(name)

    def text(self, name: str) -> str | None:
        if name not in self.files:
            return super().text(name)
        content = self.files[name]
        return None if content is None else content.decode()

    @cached_property
    def stray_shards(self) -> dict[str, Any]:
        return {}


class Overlay:
    """Changes over `stored`: its tensors shall be in the output, its `unindexed` are put in. Use as a context manager."""

    def __init__(self, stored: Checkpoint, *, config_is_new: bool = False) -> None:
        """config_is_new: the config of `stored` is not what stands in its config.json, so it is written in any case."""
        self.stored = stored
        self.config_is_new = config_is_new
        self.places = {name: Place(info, stored=name) for name, info in stored.tensors.items()}
        self.places |= {name: Place(info) for name, info in stored.unindexed.items()}
        self.config: dict[str, Any] = copy.deepcopy(stored.config)
        self.files: dict[str, bytes | None] = {}
        self._scratch = tempfile.TemporaryDirectory(prefix="mtpress-repair-")
        self._subject: Subject | None = None
        self.found: list[Finding] | None = None  # what the rules say of this state, once somebody has asked

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._scratch.cleanup()

    def _change(self) -> None:
        self._subject = self.found = None

    @cached_property
    def family_names(self) -> dict[str, str]:
        """Name that a tensor is stored under → the one that it has in the family, by which whoever reads the checkpoint knows it."""
        new = Subject(self.stored).names.new_names
        return {name: new.get(name, name) for name in self.stored.tensors}

    # ---- tensors

    def rename(self, old: str, new: str) -> None:
        """Gives a tensor another name; one that has that name already gives way."""
        self._change()
        place = self.places.pop(old)
        self.places[new] = replace(place, info=replace(place.info, name=new))

    def drop(self, name: str) -> None:
        self._change()
        del self.places[name]

    def put(self, name: str, origin: TensorInfo) -> None:
        """Takes a tensor from where it is stored, bit for bit, in place of what has the name."""
        self._change()
        self.places[name] = Place(replace(origin, name=name))

    def compute(self, name: str, dtype: str, shape: tuple[int, ...], produce: Produce) -> None:
        """A tensor to be computed when its turn to be written comes."""
        self._change()
        num_bytes = OutputTensor(name, dtype, shape).num_bytes
        self.places[name] = Place(
            TensorInfo(name, dtype, shape, Path(self._scratch.name) / "not computed yet", 0, num_bytes), None, produce
        )

    def put_scalar(self, name: str, value: bytes, shape: tuple[int, ...] = ()) -> None:
        """A float32 scalar, 4 bytes little-endian, in place of what has the name."""
        self.put_bytes(name, "F32", shape, value)

    def put_bytes(self, name: str, dtype: str, shape: tuple[int, ...], content: bytes) -> None:
        """A small tensor by its bytes, in place of what has the name."""
        self.put(name, self.kept_aside(dtype, shape, content))

    def kept_aside(self, dtype: str, shape: tuple[int, ...], content: bytes) -> TensorInfo:
        """A small tensor in the scratch file, in no place of the checkpoint."""
        path = Path(self._scratch.name) / "scalars"
        with path.open("ab") as file:
            offset = file.tell()
            file.write(content)
        return TensorInfo("", dtype, shape, path, offset, len(content))

    def is_computed(self, name: str) -> bool:
        return name in self.places and self.places[name].produce is not None

    # ---- files

    def set_config(self, config: dict[str, Any]) -> None:
        """Another config.json."""
        self._change()
        self.config = config

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        self.write_file(name, json_bytes(content))

    def write_file(self, name: str, content: bytes) -> None:
        self._change()
        self.files[name] = content

    def drop_file(self, name: str) -> None:
        self._change()
        self.files[name] = None

    # ---- what it makes

    @property
    def subject(self) -> Subject:
        """The checkpoint as it stands with all changes."""
        if self._subject is None:
            self._subject = self.subject_with(self.config)
        return self._subject

    def subject_with(self, config: dict[str, Any]) -> Subject:
        """The checkpoint as it stands, under another config.json."""
        tensors = {name: self.places[name].info for name in self.places}
        index = {
            "metadata": {"total_size": sum(info.num_bytes for info in tensors.values())},
            "weight_map": {name: info.file.name for name, info in tensors.items()},
        }
        shard = Shard(self.stored.path / SINGLE_NAME, tuple(tensors.values()), {})
        copied = copy.deepcopy(config)
        return Overlaid(replace(self.stored, config=copied, shards=(shard,), tensors=tensors, unindexed={}, index=index), self.files)

    @property
    def state(self) -> tuple[Any, ...]:
        """Equal before and after where nothing was changed."""
        places = {name: (place.stored, place.info, place.produce is not None) for name, place in self.places.items()}
        return places, copy.deepcopy(self.config), dict(self.files)

    @property
    def new_tensors(self) -> set[str]:
        """Names of the tensors that are not copies of stored ones of the same name."""
        return {name for name, place in self.places.items() if place.stored != name}

    def put_into(self, revision: "Revision") -> None:
        """Hands every change over to what writes it."""
        used = {place.stored for place in self.places.values()}
        for name in self.stored.tensors:
            if name not in used and (name not in self.places or self.places[name].stored is not None):
                revision.drop(name)
        for name, place in self.places.items():
            tensor = OutputTensor(name, place.info.dtype, place.info.shape)
            if place.produce is not None:
                revision.compute(tensor, place.produce)
            elif place.stored is None:
                revision.put(tensor, place.info)
            elif place.stored != name:
                revision.rename(place.stored, name)
        files = dict(self.files)
        if self.config_is_new or self.config != self.stored.config:
            files[CONFIG] = json_bytes(self.config)
        for name, content in files.items():
            if content is None:
                revision.drop_file(name)
            else:
                revision.write_file(name, content)
