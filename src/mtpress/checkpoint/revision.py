"""A checkpoint made from another by changing some of its tensors and some of the files beside them.

In: a checkpoint, opened by what is stored (Checkpoint.open_stored), and the changes. Out: a new directory, in which every shard
without a change is a hard link to the source's, and a shard with one is streamed anew. Leaves out: which changes to make
(stages/graft.py, repairs/), and how bytes get to the disk (checkpoint/writer.py).

A changed shard is written whole because engines load every tensor of a file that the index names, whether it names the tensor
or not. Files keep their names; tensors that are new go into shards of their own, and the index names everything.
"""

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtpress.checkpoint.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint
from mtpress.checkpoint.journal import JOURNAL_NAME
from mtpress.checkpoint.json_files import read_json_object
from mtpress.checkpoint.own_files import own_file, refuse_foreign_files
from mtpress.checkpoint.record import RECORD_NAME, peak_memory_bytes, record_bytes
from mtpress.checkpoint.safetensors import TensorInfo
from mtpress.checkpoint.shard_writer import OutputTensor, shard_header
from mtpress.checkpoint.source_guard import SourceGuard
from mtpress.checkpoint.writer import CheckpointWriter, split_into_shards
from mtpress.errors import InputError, ResourceError
from mtpress.progress import Progress, human_bytes

if TYPE_CHECKING:
    import torch

COPIED_BYTES = 32 << 20  # files beside the weights up to this are copied: people edit them in place, and must not edit the source
STEP_BYTES = 512 << 20
MARGIN_BYTES = 1 << 20  # directories, the journal's lock, the record

Produce = Callable[[], "torch.Tensor"]


@dataclass(frozen=True)
class Change:
    """One tensor of the output and where its bytes come from: a stored one, or a function that computes it in its turn."""

    tensor: OutputTensor
    origin: TensorInfo | Produce


@dataclass(frozen=True)
class RevisionPlan:
    """What a revision does, from headers alone. linked: shards that stay; rewritten, added: shard → its tensors in order.

    left_out: shards of the source of which nothing stays. carried: files beside the weights that go over as they are; written:
    those with new content. bytes_written: of shards and files, if every link is possible.
    """

    linked: tuple[str, ...]
    rewritten: dict[str, tuple[str, ...]]
    added: dict[str, tuple[str, ...]]
    left_out: tuple[str, ...]
    carried: tuple[str, ...]
    written: tuple[str, ...]
    bytes_written: int
    bytes_linked: int


@dataclass(frozen=True)
class RevisionResult(RevisionPlan):
    """What a revision did. bytes_written: with the copies of what could not be linked, or was not to be; unlinked: how many files those
    are; hard_links: files of the output that are the source's own, of num_files."""

    unlinked: int
    hard_links: tuple[str, ...]
    num_files: int
    seconds: float
    peak_memory_bytes: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def links_said(self) -> str:
        """What whoever edits the output must know of it; empty where all of its files are its own."""
        return said_of_links(self.hard_links, self.num_files)


def said_of_links(hard_links: Sequence[str], num_files: int) -> str:
    """What stands in the output of each stage that makes hard links."""
    if not hard_links:
        return ""
    return (
        f"{len(hard_links)} of {num_files} files are hard links, the source's own files: to edit one in place edits both; "
        "--copy makes copies"
    )


class Revision:
    """Collects changes, then plan() or write(). Names are asserted to fit together: choosing them is the caller's work.

    New tensors of the draft head, whose names begin with `head_prefix`, go into a shard of their own.
    """

    def __init__(self, source: Checkpoint, head_prefix: str) -> None:
        self.source = source
        self._head_prefix = head_prefix
        self._renamed: dict[str, str | None] = {}  # stored name → new name, or None for one that leaves
        self._new: dict[str, Change] = {}
        self._instead: dict[str, Change] = {}  # stored name → what stands in its place
        self._files: dict[str, bytes | None] = {}

    def drop(self, name: str) -> None:
        """The stored tensor leaves the output."""
        assert name in self.source.tensors, f"{name} is not stored"
        self._renamed[name] = None

    def rename(self, old: str, new: str) -> None:
        """The stored tensor is called otherwise; its bytes stay."""
        assert old in self.source.tensors, f"{old} is not stored"
        self._renamed[old] = new

    def put(self, tensor: OutputTensor, origin: TensorInfo) -> None:
        """A tensor with the bytes of a stored one, of any checkpoint and under any name. It replaces one of its name where that stands."""
        assert (tensor.dtype, tensor.shape) == (origin.dtype, origin.shape), f"{tensor.name}: another layout than {origin.name}"
        self._new[tensor.name] = Change(tensor, origin)

    def compute(self, tensor: OutputTensor, produce: Produce) -> None:
        """A tensor that `produce` makes when its turn comes (on the CPU, in the dtype and shape of `tensor`). It replaces as put() does."""
        self._new[tensor.name] = Change(tensor, produce)

    def replace(self, old: str, tensor: OutputTensor, produce: Produce) -> None:
        """`tensor`, which `produce` makes in its turn, where `old` is stored: under another name no shard is added for it."""
        assert old in self.source.tensors, f"{old} is not stored"
        self._instead[old] = Change(tensor, produce)

    def write_file(self, name: str, content: bytes) -> None:
        """New content of a file beside the weights."""
        assert name not in (INDEX_NAME, RECORD_NAME), f"{name} is always written anew"
        self._files[name] = content

    def drop_file(self, name: str) -> None:
        """A file beside the weights leaves the output."""
        self._files[name] = None

    # ---- the plan

    @property
    def unchanged(self) -> bool:
        """Whether nothing would differ: no tensor changed, and every file of write_file() holds that content already."""
        plan = self.plan()
        same = all(content is not None and self._is_content(name, content) for name, content in self._files.items())
        return same and not (plan.rewritten or plan.added or plan.left_out)

    def _is_content(self, name: str, content: bytes) -> bool:
        path = self.source.path / name
        return path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content

    def plan(self) -> RevisionPlan:
        """The whole output from headers and file sizes; no weight is read."""
        return self._plan(*self._shards())

    def _plan(self, kept: set[str], rewritten: dict[str, list[Change]], added: dict[str, list[Change]]) -> RevisionPlan:
        linked = [path for path in self.source_shards if path.name in kept]
        carried = self._carried()
        shards = rewritten | added
        sizes = [len(shard_header([c.tensor for c in shard], self.metadata)) + _num_bytes(shard) for shard in shards.values()]
        small = {name: path.stat().st_size for name, path in carried.items() if path.stat().st_size <= COPIED_BYTES}
        written = {name: content for name, content in self._files.items() if content is not None}
        return RevisionPlan(
            linked=tuple(path.name for path in linked),
            rewritten={file: tuple(c.tensor.name for c in shard) for file, shard in rewritten.items()},
            added={file: tuple(c.tensor.name for c in shard) for file, shard in added.items()},
            left_out=tuple(path.name for path in self.source_shards if path.name not in kept | rewritten.keys()),
            carried=tuple(carried),
            written=tuple(written),
            bytes_written=sum(sizes) + sum(small.values()) + sum(map(len, written.values())),
            bytes_linked=sum(path.stat().st_size for path in [*linked, *(p for n, p in carried.items() if n not in small)]),
        )

    @property
    def source_shards(self) -> Iterator[Path]:
        return (shard.path for shard in self.source.shards)

    @property
    def metadata(self) -> dict[str, str]:
        """`__metadata__` of what is written: that of the source."""
        return next((dict(shard.metadata) for shard in self.source.shards if shard.metadata), {"format": "pt"})

    def _shards(self) -> tuple[set[str], dict[str, list[Change]], dict[str, list[Change]]]:
        """Names of the shards that stay; content of the rewritten and of the added ones."""
        kept: set[str] = set()
        rewritten: dict[str, list[Change]] = {}
        placed: list[str] = []
        touched = self._renamed.keys() | self._new.keys() | self._instead.keys()
        for shard in self.source.shards:
            if all(info.name not in touched and self._counts(info) for info in shard.tensors):
                placed += [info.name for info in shard.tensors]
                kept.add(shard.path.name)
                continue
            changes = [change for info in shard.tensors if (change := self._of(info)) is not None]
            placed += [change.tensor.name for change in changes]
            if changes:
                rewritten[shard.path.name] = changes
        there = set(placed)
        assert len(placed) == len(there), "two tensors of one name"
        new = [change for name, change in self._new.items() if name not in there]
        heads = [change for change in new if change.tensor.name.startswith(self._head_prefix)]
        others = [change for change in new if change not in heads]
        if others and [shard.path.name for shard in self.source.shards] == [SINGLE_NAME] and (kept or rewritten):
            # transformers reads model.safetensors alone where there is one, whatever the index says; heads it passes over anyway
            whole = rewritten.setdefault(SINGLE_NAME, [Change(stored(info), info) for info in self.source.shards[0].tensors])
            whole += others
            kept.clear()
            others = []
        added: dict[str, list[Change]] = {}
        for group, stem in ((heads, "model-mtp"), (others, "model-revised")):
            for number, changes in enumerate(_in_shards(group), 1):
                taken = kept | rewritten.keys() | added.keys()
                added[_free_name(stem, number, stem == "model-mtp", taken)] = changes
        return kept, rewritten, added

    def _counts(self, info: TensorInfo) -> bool:
        """Whether a stored tensor is the one of its name; one that is stored twice counts once."""
        return (self.source.tensors.get(info.name) or self.source.unindexed.get(info.name)) is info

    def _of(self, info: TensorInfo) -> Change | None:
        """What stands in the place of a stored tensor; nothing where it leaves."""
        if not self._counts(info):
            return None
        if (instead := self._instead.get(info.name)) is not None:
            assert info.name not in self._renamed and info.name not in self._new, f"{info.name}: replaced twice"
            return instead
        if (change := self._new.get(info.name)) is not None:
            assert self._renamed.get(info.name) is None, f"{info.name}: renamed and replaced"
            return change
        name = self._renamed.get(info.name, info.name)
        assert name == info.name or name not in self._new, f"{name}: put where another is renamed to it"
        return None if name is None else Change(stored(info, name), info)

    def _carried(self) -> dict[str, Path]:
        """Files beside the weights that go over as they are, folders of them too; not what belongs to a tool, such as .cache."""
        found = {path.name: path for path in self.source.other_files()}
        for top in sorted(self.source.path.iterdir()):
            if top.is_dir() and not top.is_symlink() and not top.name.startswith(".") and not (top / JOURNAL_NAME).exists():
                for folder, _, files in os.walk(top):
                    paths = [Path(folder) / name for name in sorted(files)]
                    found |= {str(path.relative_to(self.source.path)): path for path in paths if path.is_file()}
        return {name: path for name, path in found.items() if name != RECORD_NAME and name not in self._files}

    # ---- the work

    def write(
        self, out: Path, stage: str, entries: Mapping[str, Any], *, copies: bool = False, hashing: bool = False, silent: bool = False
    ) -> RevisionResult:
        """Makes `out`, which must not exist. entries: what the stage adds to the record. copies: in place of hard links. hashing: shards
        that stay and of which the source's record has no hash are read for it.

        InputError where `out` exists or lies in the source, a file of the source is a link that leaves it, or one changes while it is
        read; ResourceError where the disk is too small or cannot be written. Nothing that looks finished stays behind, and the source
        is never opened for writing.
        """
        started = time.perf_counter()
        refuse_foreign_files(self.source.path)
        kept, rewritten, added = self._shards()
        shards, plan, carried = rewritten | added, self._plan(kept, rewritten, added), self._carried()
        guard, origins = SourceGuard(self.source), _fingerprints(shards)
        layout = {file: [change.tensor for change in changes] for file, changes in shards.items()}
        linked = [shard for shard in self.source.shards if shard.path.name in kept]
        large = [name for name, path in carried.items() if path.stat().st_size > COPIED_BYTES]
        for origin in origins:
            own_file(origin.parent, origin)
        made_from = {self.source.path, *(origin.parent for origin in origins)}
        with (
            CheckpointWriter(out, layout, self.metadata, made_from=made_from, linked=linked, copies=copies) as writer,
            Progress(stage, plan.bytes_written, silent=silent) as progress,
        ):
            for name in large:
                writer.link(name, carried[name], self.source.path)
            num_unlinked, copied = len(writer.unlinked), sum(path.stat().st_size for path in writer.unlinked.values())
            hard_links = tuple(sorted({*plan.linked, *large} - writer.unlinked.keys()))
            _refuse_full(out, plan.bytes_written + copied)
            progress.total += copied
            for file, changes in shards.items():
                _write_shard(writer, file, changes, progress)
            writer.wait()
            writer.copy_unlinked(lambda count: progress.advance(count, "copied, not linked"))
            self._write_files(writer, carried)
            progress.advance(progress.total - progress.done, "files beside the weights")
            guard.look_closely()
            if _fingerprints(shards) != origins:
                raise InputError("a file that tensors were taken from changed while it was read; start over from one that stays as it is")
            hashes = {**self._recorded_hashes((*plan.linked, *plan.carried)), **writer.sha256}
            for shard in linked if hashing else ():
                if shard.path.name not in hashes:
                    with shard.path.open("rb") as weights:
                        hashes[shard.path.name] = hashlib.file_digest(weights, "sha256").hexdigest()
            facts = {
                "source": self._source_entry(),
                "seconds": {"total": round(time.perf_counter() - started, 3)},
                "peak_memory_bytes": peak_memory_bytes(),
                "hard_links": hard_links,
                "output_sha256": {name: digest for name, digest in sorted(hashes.items()) if "/" not in name},
            }
            writer.write_file(RECORD_NAME, record_bytes(stage, **{**entries, **facts}))
            writer.finish()
        return RevisionResult(
            **{
                **vars(plan),
                "bytes_written": plan.bytes_written + copied,
                "bytes_linked": plan.bytes_linked - copied,
                "unlinked": num_unlinked,
                "hard_links": hard_links,
                "num_files": len({*plan.linked, *shards, *plan.carried, *plan.written, RECORD_NAME, INDEX_NAME}),
                "seconds": time.perf_counter() - started,
                "peak_memory_bytes": peak_memory_bytes(),
            }
        )

    def _write_files(self, writer: CheckpointWriter, carried: Mapping[str, Path]) -> None:
        """The small files beside the weights: those that go over, and those with new content."""
        for name, path in carried.items():
            if path.stat().st_size <= COPIED_BYTES:
                (writer.partial / name).parent.mkdir(parents=True, exist_ok=True)
                writer.write_file(name, _content(path))
        for name, content in self._files.items():
            if content is not None:
                writer.write_file(name, content)

    def _old_record(self) -> dict[str, Any]:
        """The source's own mtpress.json; empty where it has none that can be read."""
        try:
            return read_json_object(self.source.path / RECORD_NAME)
        except InputError:
            return {}

    def _source_entry(self) -> dict[str, Any]:
        """What the record says of the source, and of what that was made from."""
        old = self._old_record()
        made_from = {key: old[key] for key in ("stage", "recipe", "calibration", "source") if key in old}
        return {
            "name": self.source.path.resolve().name,
            "identity": self.source.identity,
            **({"made_from": made_from} if made_from else {}),
        }

    def _recorded_hashes(self, names: tuple[str, ...]) -> dict[str, str]:
        """SHA-256 of files that go over unread, as far as the source's own record has it."""
        hashes = self._old_record().get("output_sha256")
        known = hashes if isinstance(hashes, dict) else {}
        return {name: digest for name in names if isinstance(digest := known.get(name), str)}


def stored(info: TensorInfo, name: str | None = None) -> OutputTensor:
    """A stored tensor as one of the output, under its own name or another."""
    return OutputTensor(name or info.name, info.dtype, info.shape)


def _num_bytes(changes: list[Change]) -> int:
    return sum(change.tensor.num_bytes for change in changes)


def _in_shards(changes: list[Change]) -> list[list[Change]]:
    """New tensors together, in files of at most 5 GB."""
    of = {change.tensor.name: change for change in changes}
    groups = split_into_shards([[change.tensor] for change in changes]).values() if changes else ()
    return [[of[tensor.name] for tensor in group] for group in groups]


def _free_name(stem: str, number: int, plain_first: bool, taken: set[str]) -> str:
    """A shard's name that no other shard of the output has."""
    while True:
        name = f"{stem}.safetensors" if plain_first and number == 1 else f"{stem}-{number:05d}.safetensors"
        if name not in taken:
            return name
        number += 1


def _fingerprints(shards: Mapping[str, list[Change]]) -> dict[Path, tuple[int, int]]:
    """Size and modification time of every file that tensors are copied from."""
    files = {change.origin.file for changes in shards.values() for change in changes if isinstance(change.origin, TensorInfo)}
    try:
        return {file: (file.stat().st_size, file.stat().st_mtime_ns) for file in files}
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror or error})") from None


def _refuse_full(out: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(out.parent).free
    if num_bytes + MARGIN_BYTES > free:
        raise ResourceError(
            f"{out.parent}: {human_bytes(num_bytes)} are to be written and {human_bytes(free)} are free; free space or choose another disk"
        )


def _write_shard(writer: CheckpointWriter, file: str, changes: list[Change], progress: Progress) -> None:
    """One shard, a step at a time, so that the progress tells what is on the disk."""
    waiting = 0
    for place, change in enumerate(changes):
        if isinstance(change.origin, TensorInfo):
            writer.copy(change.origin, change.tensor.name)
        else:
            writer.write(change.tensor.name, change.origin())
        waiting += change.tensor.num_bytes
        if waiting >= STEP_BYTES or place == len(changes) - 1:
            step = f"{file}/{place}"
            writer.end_step(step)
            writer.wait_for_step(step)
            progress.advance(waiting, file)
            waiting = 0


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
