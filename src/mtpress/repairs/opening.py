"""How a checkpoint that is to be repaired is opened: what `check` says of it, and everything that is stored and has a place.

In: a directory and, where one is given, the base. Out: `Opened`. Leaves out: repairing. Tensors count by the headers of the files, not
by the index; files that cannot be read, and files of which no tensor has a place in the model, are left out and named.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtpress.checkpoint.checkpoint import INDEX_NAME, Checkpoint, resolve, shard_files, tensors_that_count, weight_map_of
from mtpress.checkpoint.json_files import read_json_object
from mtpress.checkpoint.safetensors import Shard, TensorInfo, read_shard
from mtpress.errors import InputError
from mtpress.models import family
from mtpress.models.qwen3_5.names import component
from mtpress.quant_config.misnamed import refuse_head_alone
from mtpress.quant_config.view import CONFIG, Subject
from mtpress.repairs.from_source import undeclared
from mtpress.rules.config import not_treated
from mtpress.rules.registry import OPEN_RULES, STATIC_RULES
from mtpress.rules.rule import Finding, apply

PARTS = ("layers.", "visual.", "blocks.", "embed_tokens.", "lm_head.", "mtp.")  # of the family's names, under whatever prefix


@dataclass(frozen=True)
class Opened:
    """findings: what check says. stored: every tensor that has a place, and as `unindexed` a head to be taken in from elsewhere.

    left_out: files → why. config_is_new: config.json is the base's.
    """

    findings: tuple[Finding, ...]
    stored: Checkpoint
    left_out: Mapping[str, str]
    config_is_new: bool


def open_broken(path_or_id: str | Path, base: Checkpoint | None) -> Opened:
    """Opens what can be opened. InputError where nothing can be repaired: no safetensors file, or a config.json that only a base mends."""
    path = resolve(path_or_id)
    config, problem = _config(path, base)
    opened = None
    try:
        opened = Checkpoint.open(path)
        if problem is not None:
            raise problem
        findings = tuple(apply(STATIC_RULES, Subject(opened)))
    except InputError as error:
        findings = tuple(apply(OPEN_RULES, error))
    shards, left_out = _shards(path, opened)
    subject = Subject(opened) if opened is not None and problem is None else None
    leftovers = {name: f"holds {why}" for name, why in subject.leftovers.items()} if subject is not None else {}
    stored = _tensors(path, shards, _weight_map(path), leftovers)
    shards, foreign = _with_a_place(shards, stored, set(_weight_map(path).values()))
    kept = {shard.path for shard in shards}
    tensors = {name: info for name, info in stored.items() if info.file in kept}
    index = opened.index if opened is not None else None
    beside = _heads_beside(subject, leftovers) if subject is not None else {}
    found = Checkpoint(path, config, shards, tensors, beside, index)
    refuse_head_alone(Subject(found))
    return Opened(findings, found, left_out | foreign | leftovers, problem is not None)


def refuse_other_tasks(checkpoint: Checkpoint) -> None:
    """InputError for what is no language model of the family in a form that is known: repair would take from it what makes it so."""
    said = not_treated(checkpoint)
    if said is not None:
        raise InputError(f"{checkpoint.path}: {said}; repair leaves it alone")


def _config(path: Path, base: Checkpoint | None) -> tuple[dict[str, Any], InputError | None]:
    """config.json or, where it cannot be read or is of no known family, the base's, and why."""
    try:
        config = read_json_object(path / CONFIG)
        family(str(config.get("model_type", "")))
        return config, None
    except InputError as error:
        if base is None:
            raise InputError(f"{error}; with --base SRC the source's config.json takes its place") from None
        return undeclared(base.config), error


def _shards(path: Path, opened: Checkpoint | None) -> tuple[tuple[Shard, ...], dict[str, str]]:
    """Every safetensors file, and those that cannot be read. One that the engine would read is not passed over: InputError."""
    known = {shard.path: shard for shard in opened.shards} if opened is not None else {}
    named = set(_weight_map(path).values()) | ({"model.safetensors"} if not (path / INDEX_NAME).exists() else set())
    shards, left_out = [], {}
    for file in shard_files(path):
        try:
            shards.append(known.get(file) or read_shard(file))
        except InputError as error:
            if file.name in named or opened is None:
                raise InputError(f"{error}; repair cannot bring back what is in it") from None
            left_out[file.name] = "cannot be read"
    if not shards:
        raise InputError(f"{path}: no *.safetensors file; only safetensors checkpoints are read")
    return tuple(shards), left_out


def _weight_map(path: Path) -> dict[str, str]:
    try:
        return weight_map_of(read_json_object(path / INDEX_NAME))
    except InputError:
        return {}


def _tensors(path: Path, shards: tuple[Shard, ...], weight_map: Mapping[str, str], leftovers: Mapping[str, str]) -> dict[str, TensorInfo]:
    """Name → the tensor that counts: of two the one that the index names, and of a leftover none."""
    return tensors_that_count(path, (shard for shard in shards if shard.path.name not in leftovers), weight_map)


def _heads_beside(subject: Subject, leftovers: Mapping[str, str]) -> dict[str, TensorInfo]:
    """The draft head of a leftover or of a folder below, where there is no other."""
    found = subject.unindexed_mtp.items()
    return {name: info for name, (file, info) in found if file in leftovers or file in subject.heads_in_folders}


def _with_a_place(
    shards: tuple[Shard, ...], stored: Mapping[str, TensorInfo], indexed: set[str]
) -> tuple[tuple[Shard, ...], dict[str, str]]:
    """The shards of which some tensor counts and is called as in a model of the family, or that engines load; the others by name.

    indexed: the files that the index names; none where there is no index, and then engines load all.
    """

    def has_a_place(info: TensorInfo) -> bool:
        return component(info.name) != "other" or any(part in info.name for part in PARTS)

    loaded = {shard.path.name for shard in shards if not indexed or shard.path.name in indexed}
    kept = tuple(s for s in shards if any(stored.get(i.name) == i for i in s.tensors if s.path.name in loaded or has_a_place(i)))
    others = {shard.path.name for shard in shards} - {shard.path.name for shard in kept}
    return kept, dict.fromkeys(sorted(others), "holds no tensor that has a place in the model")
