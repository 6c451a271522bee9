"""graft: the draft head of a base, bit for bit, into a finished checkpoint of any format.

In: a finished checkpoint (plain, modelopt, compressed-tensors, FP8, AutoRound or GPTQ), a new directory, the base that it was made from.
A head in FP8 goes over as it is where the checkpoint's config can hold it; else it is dequantized to BF16, and that is said.
Out: the directory and a `GraftResult`. Whatever else the checkpoint has of a head leaves: quantized, of another model, or under a
wrong prefix; a head of its own that is whole and finite only where the user says so. Leaves out: how shards are linked and rewritten
(checkpoint/revision.py), how a config says what stays in BF16 (quant_config/ignore_list.py).
"""

import argparse
import copy
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from mtpress import terminal
from mtpress.checkpoint.checkpoint import INDEX_NAME, Checkpoint, resolve, weight_map_of
from mtpress.checkpoint.direct_io import read_pieces
from mtpress.checkpoint.json_files import read_json_object
from mtpress.checkpoint.output_place import refuse_place
from mtpress.checkpoint.safetensors import TensorInfo, read_shard, read_tensor, torch_dtype
from mtpress.comparison.relation import Kind, Relation, add_base_is
from mtpress.comparison.weights import same_bytes
from mtpress.errors import InputError
from mtpress.models import family
from mtpress.models.qwen3_5.names import MTP_PREFIX
from mtpress.progress import human_bytes
from mtpress.quant_config import fp8_head
from mtpress.quant_config.declaration import Declaration
from mtpress.quant_config.matching.matcher import Scheme
from mtpress.quant_config.misnamed import refuse_misnamed
from mtpress.quant_config.stored import PLAIN_DTYPES
from mtpress.quant_config.view import CONFIG, Subject

MOST_UNKNOWN = 1000  # tensors of unknown names in what is still a checkpoint of this family with something left over


@dataclass(frozen=True)
class GraftResult:
    """What graft did. Sizes in bytes, times in seconds.

    replaced: tensors of the head that stood there with other bytes; added: that were not there under their names; kept: whose
    bytes were the base's already; removed: what else there was of a head; dequantized: modules that the base has in FP8, and
    this checkpoint in BF16. own_head: in words, that a whole and finite head was replaced; empty where none was. config_files: those with
    new content. linked, rewritten: shards of the checkpoint; new: shards that it did not have. base_relation: what the base is, by some of
    its matrices; None where it has a head alone. hard_links: files of the output that are the checkpoint's own;
    links_said: that in words, empty where there are none.
    """

    out: str
    base: str
    replaced: tuple[str, ...]
    added: tuple[str, ...]
    kept: tuple[str, ...]
    removed: tuple[str, ...]
    dequantized: tuple[str, ...]
    own_head: str
    config_files: tuple[str, ...]
    linked: tuple[str, ...]
    hard_links: tuple[str, ...]
    links_said: str
    rewritten: tuple[str, ...]
    new: tuple[str, ...]
    warnings: tuple[str, ...]
    base_relation: Relation | None
    bytes_written: int
    bytes_linked: int
    seconds: float
    peak_memory_bytes: int

    @property
    def next(self) -> str:
        return f"mtpress check {self.out}" + (f" --base {self.base}" if self.base_relation is not None else "")

    def as_json(self) -> dict[str, Any]:
        relation = self.base_relation.as_json() if self.base_relation is not None else None
        return {**asdict(self), "base_relation": relation, "next": self.next}


def graft(
    checkpoint: str | Path,
    out: str | Path,
    base: str | Path,
    *,
    base_is: Kind | None = None,
    replace_head: bool = False,
    copies: bool = False,
    silent: bool = False,
) -> GraftResult:
    """Makes `out` from `checkpoint` with the draft head of `base`; both may be Hub ids. copies: in place of hard links.

    base_is: what the base is to the checkpoint, in place of what some of its matrices say. replace_head: also a head that is whole, finite
    and not the base's, which may have been trained with this body.

    InputError before anything is written where the head does not fit or the base has none that is whole and in BF16, and where
    there is nothing to do; ResourceError where the disk is too small. Nothing that looks finished stays behind.
    """
    from mtpress.checkpoint.revision import Revision  # torch from here on
    from mtpress.checkpoint.shard_writer import OutputTensor
    from mtpress.comparison.weights import sampled_relation
    from mtpress.repairs.bf16 import Dequantized

    target = Path(out)
    refuse_place(target, [checkpoint, base])
    source = Checkpoint.open_stored(checkpoint)
    subject = Subject(source)
    refuse_misnamed(subject, "body", "vision", "lm_head")
    giver = _open_giver(base, source)
    head = _head_of(giver, source, subject.model)
    there = [*subject.names.misnamed("head"), *(name for name in source.tensors if name.startswith(subject.model.MTP_PREFIX))]
    there = list(dict.fromkeys(there))
    strays = _strays(subject)
    relation = sampled_relation(subject, giver, base_is)
    leaves = {*there, *strays}
    stays = {name: info for name, info in source.tensors.items() if name not in leaves}
    matrices = fp8_head.fp8_matrices(giver, subject.model.MTP_PREFIX)
    whole = head | fp8_head.scales_of(giver, tuple(matrices))
    if matrices and fp8_head.can_hold(subject, whole, tuple(matrices), stays | whole):
        head, matrices, in_fp8 = whole, {}, tuple(matrices)
    else:
        head, in_fp8 = fp8_head.in_bf16(head, tuple(matrices)), ()
    revised = Revision(source, MTP_PREFIX)
    kept = tuple(
        name
        for name, info in head.items()
        if name in source.tensors and _module(name) not in matrices and _is_same(source.tensors[name], info)
    )
    own_head = _own_head(subject, head)
    if own_head and not replace_head:
        raise InputError(f"{source.path}: {own_head}; --replace-head puts the base's in its place")
    removed = tuple(name for name in there if name not in head)
    for name in (*removed, *strays):
        revised.drop(name)
    for name, info in head.items():
        if (matrix := matrices.get(_module(name))) is not None:
            revised.compute(OutputTensor(name, info.dtype, info.shape), Dequantized(matrix))
        elif name not in kept:
            revised.put(OutputTensor(name, info.dtype, info.shape), info)
    files = _config_files(subject, giver, stays | head, in_fp8)
    for name, content in files.items():
        revised.write_file(name, content)
    if revised.unchanged and _names_all(source, head):
        raise InputError(f"{source.path}: has this draft head already, bit for bit, and its configs spare it; nothing to graft")
    origin: dict[str, Any] = {"name": giver.path.resolve().name if Path(base).is_dir() else str(base), "identity": giver.identity}
    origin |= {"relation": relation.as_json()} if relation is not None else {}
    how = "the base's, dequantized from FP8 to BF16" if matrices else "the base's, bit for bit"
    entries = {"draft_head": how, "dequantized": tuple(matrices), "base": origin, "removed": removed}
    own_head = f"replaced by the base's: {own_head}" if own_head else ""
    entries |= {"own_head": own_head} if own_head else {}
    done = revised.write(target, "graft", entries, copies=copies, silent=silent)
    return GraftResult(
        out=str(target),
        base=str(base),
        replaced=tuple(name for name in head if name in source.tensors and name not in kept),
        added=tuple(name for name in head if name not in source.tensors),
        kept=kept,
        removed=removed,
        dequantized=tuple(matrices),
        own_head=own_head,
        config_files=tuple(files),
        linked=done.linked,
        hard_links=done.hard_links,
        links_said=done.links_said,
        rewritten=tuple(done.rewritten),
        new=tuple(done.added),
        warnings=tuple(_warnings(subject, giver, strays, relation, tuple(matrices))),
        base_relation=relation,
        bytes_written=done.bytes_written,
        bytes_linked=done.bytes_linked,
        seconds=done.seconds,
        peak_memory_bytes=done.peak_memory_bytes,
    )


# ---- the head, and whether it fits


def _open_giver(base: str | Path, source: Checkpoint) -> Checkpoint:
    """What gives the head, by the family's names. One that holds a head alone needs no config.json: the checkpoint's says what fits."""
    path = resolve(base)
    files = sorted(path.glob("*.safetensors"))
    if not (path / CONFIG).exists() and files:
        shards = tuple(read_shard(file) for file in files)
        giver = Checkpoint(path, source.config, shards, {info.name: info for shard in shards for info in shard.tensors})
        if not Subject(giver).is_head_alone:
            raise InputError(f"{path}: no config.json; name the directory of a whole checkpoint, or of a draft head alone")
    else:
        giver = Checkpoint.open_stored(path)
    subject = Subject(giver)
    beside = {name: info for name, (_, info) in subject.unindexed_mtp.items()}
    return replace(giver, tensors={**beside, **subject.tensors})


def _head_of(giver: Checkpoint, source: Checkpoint, model: ModuleType) -> dict[str, TensorInfo]:
    """The tensors of the base's head; InputError where it is not whole and in BF16, or not of a model like this one."""
    if giver.path.resolve() == source.path.resolve():
        raise InputError(f"{giver.path}: is the checkpoint itself; --from names the BF16 release that it was made from")
    if family(giver.model_type) is not model:
        raise InputError(
            f"{giver.path}: is a {giver.model_type}, the checkpoint a {source.model_type}; --from names the model it was made from"
        )
    mine, theirs = model.sizes(source.config), model.sizes(giver.config)
    if mine["hidden_size"] != theirs["hidden_size"]:
        raise InputError(
            f"{giver.path}: its hidden_size is {theirs['hidden_size']}, the checkpoint's {mine['hidden_size']}; --from names the model "
            "that it was made from"
        )
    model.body_prefix(source.tensors)  # there is a body to draft for
    stored = [name for name in giver.tensors if name.startswith(model.MTP_PREFIX)]
    head = {name: giver.tensors[name] for name in model.MTP_TENSORS if name in giver.tensors}
    in_fp8 = tuple(fp8_head.fp8_matrices(giver, model.MTP_PREFIX))
    scales = fp8_head.scales_of(giver, in_fp8)
    others = [name for name in stored if name not in head and name not in scales]
    packed = [n for n in others if n.rpartition(".")[2] in ("qweight", "weight_packed")] + [n for n, i in head.items() if i.dtype == "U8"]
    if packed:
        raise InputError(f"{giver.path}: its own draft head is quantized ({packed[0]}); --from names the BF16 release")
    if not stored:
        raise InputError(f"{giver.path}: has no draft head (no tensor mtp.*); --from names a release that ships it")
    missing = [name for name in model.MTP_TENSORS if name not in head]
    if missing:
        raise InputError(
            f"{giver.path}: its draft head lacks {len(missing)} of {len(model.MTP_TENSORS)} tensors ({missing[0]}, …); "
            "fetch the release again"
        )
    if others:
        raise InputError(
            f"{giver.path}: its draft head has {len(others)} tensors that mtpress does not know ({others[0]}, …); "
            "it knows heads of one layer"
        )
    for name, shape in model.mtp_shapes(source.config).items():
        if head[name].dtype != "BF16" and _module(name) not in in_fp8:
            raise InputError(f"{giver.path}: {name} is {head[name].dtype}, not BF16 or whole FP8; --from names the BF16 release")
        if head[name].shape != shape:
            raise InputError(
                f"{giver.path}: {name} is {list(head[name].shape)}, the checkpoint's body calls for {list(shape)}; "
                "the head is of another model"
            )
    return head


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _is_same(one: TensorInfo, other: TensorInfo) -> bool:
    return (one.dtype, one.shape) == (other.dtype, other.shape) and same_bytes(one, other)


def _own_head(subject: Subject, head: Mapping[str, TensorInfo]) -> str:
    """In words, that the checkpoint has all tensors of a head, under whatever prefix and file, finite, and not the base's; else empty."""
    beside = {name: info for name, (_, info) in subject.unindexed_mtp.items()}
    mine = {name: info for name, info in (beside | dict(subject.tensors)).items() if name in subject.model.MTP_TENSORS}
    shapes = subject.model.mtp_shapes(subject.config)
    if any(name not in mine or mine[name].dtype not in PLAIN_DTYPES or mine[name].shape != shape for name, shape in shapes.items()):
        return ""
    others = [name for name in shapes if not _is_same(mine[name], head[name])]
    others = [name for name in others if not _has_values_of(mine[name], head[name])]
    if not others or not all(_is_finite(mine[name]) for name in shapes):
        return ""
    return f"a draft head of its own, whole and finite, {len(others)} of {len(shapes)} tensors not the base's"


def _has_values_of(one: TensorInfo, other: TensorInfo) -> bool:
    """Whether the numbers are equal, each in its dtype of 16 or 32 bits."""
    if one.dtype == other.dtype or other.dtype not in PLAIN_DTYPES:
        return False
    return bool((read_tensor(one).float() == read_tensor(other).float()).all())


def _is_finite(info: TensorInfo) -> bool:
    import torch

    return all(bool(torch.frombuffer(piece, dtype=torch_dtype(info.dtype)).isfinite().all()) for piece in read_pieces(info))


def _strays(subject: Subject) -> tuple[str, ...]:
    """Tensors of unknown names in files that the index left out: engines skipped them, and would refuse them once they are indexed.

    InputError where there are too many unknown names for a checkpoint of this family.
    """
    source = subject.checkpoint
    unknown = [name for name in source.tensors if subject.model.component(name) == "other" and name not in subject.names.kinds]
    if len(unknown) > MOST_UNKNOWN:
        raise InputError(
            f"{source.path}: {len(unknown)} tensors belong to no known component ({unknown[0][:80]}, …); it is of another family"
        )
    files = set(weight_map_of(source.index).values())
    if not files:
        return ()
    return tuple(name for name in unknown if source.tensors[name].file.name not in files)


def _names_all(source: Checkpoint, head: Mapping[str, TensorInfo]) -> bool:
    """Whether an engine that goes by the index finds the head: it is named, or there is one file and no index."""
    if weight_map := weight_map_of(source.index):
        return all(weight_map.get(name) == source.tensors[name].file.name for name in head)
    return not (source.path / INDEX_NAME).exists() and len(source.shards) == 1


# ---- the config files


def _config_files(subject: Subject, giver: Checkpoint, tensors: Mapping[str, TensorInfo], in_fp8: tuple[str, ...]) -> dict[str, bytes]:
    """Config files to be written anew, so that one draft layer is declared and every declaration spares it, but for what is in_fp8; those
    that do stay."""
    from mtpress.quant_config.ignore_list import config_contents

    model, config = subject.model, copy.deepcopy(subject.config)
    text, theirs = config.get("text_config", config), model.text_config(giver.config)
    for key, value in theirs.items():
        if key.startswith("mtp_"):
            text.setdefault(key, value)
    text["mtp_num_hidden_layers"] = 1
    if config.get("mtp_num_hidden_layers") is not None:
        config["mtp_num_hidden_layers"] = 1  # vLLM looks there first
    kept = model.kept_modules(tensors, subject.prefix)
    stored = [module for module in subject.quantized if module not in kept and any(name.startswith(f"{module}.") for name in tensors)]
    quantized = list(dict.fromkeys([*stored, *in_fp8]))
    schemes = fp8_head.schemes_of(tensors, in_fp8)
    contents = config_contents(subject, kept, quantized, config, leave=lambda declared: _takes_head(subject, declared, tensors, schemes))
    return {name: content for name, content in contents.items() if json.loads(content) != read_json_object(subject.path / name)}


def _takes_head(subject: Subject, declared: Declaration, tensors: Mapping[str, TensorInfo], schemes: Mapping[str, Scheme]) -> bool:
    """Whether the engine takes the head by this declaration as it is stored: in BF16, but for the modules that have a scheme."""
    from mtpress.quant_config.matching import matcher_of

    matcher = matcher_of(declared, subject.architecture, {name: info.dtype for name, info in tensors.items()})
    return matcher is not None and fp8_head.takes(subject, matcher, schemes)


def _warnings(
    subject: Subject, giver: Checkpoint, strays: tuple[str, ...], relation: Relation | None, dequantized: tuple[str, ...]
) -> list[str]:
    found = []
    if dequantized:
        found.append(
            f"{len(dequantized)} matrices of the base's head are in FP8, which this config cannot hold: they are dequantized to BF16, the "
            "value that the codes stand for; the BF16 release has what they were rounded from"
        )
    if relation is not None and relation.kind == "ancestor":
        found.append(
            "the head was trained with the ancestor's body: fewer of its drafts may be accepted; mtpress bench --mtp off,1 measures it"
        )
    if relation is not None and relation.kind == "stranger":
        found.append("the head is of another model: hardly a draft of it will be accepted")
    shapes = [
        next((info.shape for name, info in c.tensors.items() if name.endswith("embed_tokens.weight")), None)
        for c in (subject.checkpoint, giver)
    ]
    if shapes[0] is not None and shapes[1] is not None and shapes[0] != shapes[1]:
        found.append(
            f"embed_tokens is {list(shapes[0])} here and {list(shapes[1])} in the base: the head drafts with the checkpoint's embeddings, "
            "which it was not trained with"
        )
    if strays:
        found.append(f"{len(strays)} tensors of unknown names that no index named are left out ({strays[0]}, …)")
    return found


# ---- the command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CKPT", help="a finished checkpoint of any format: a directory or a Hub id")
    parser.add_argument("out", metavar="OUT", help="the directory to make; it must not exist")
    parser.add_argument("--from", required=True, dest="base", metavar="BASE", help="the BF16 release whose draft head it gets")
    add_base_is(parser)
    parser.add_argument(
        "--replace-head",
        action="store_true",
        help="replace a draft head too that is whole, finite and not the base's: it may have been trained with this body",
    )
    parser.add_argument("--copy", action="store_true", help="copy the files that do not change, in place of hard links to CKPT's own")


def run(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """The stage as the command line calls it: (exit code, result for --json)."""
    result = graft(
        options.checkpoint,
        options.out,
        options.base,
        base_is=options.base_is,
        replace_head=options.replace_head,
        copies=options.copy,
        silent=options.json,
    )
    if not options.json:
        show(result)
    return 0, result.as_json()


def show(result: GraftResult) -> None:
    """The result as one screen on stdout."""
    from rich.table import Table

    console = terminal.console()
    table = Table(title=f"the draft head of {result.base} → {result.out}", show_header=False)
    rows = {
        "replaced": _listed(result.replaced),
        "added": _listed(result.added),
        "the base's already": _listed(result.kept),
        "removed": _listed(result.removed),
        "dequantized from FP8": _listed(result.dequantized),
        "configs changed": ", ".join(result.config_files),
        "shards linked" if result.hard_links else "shards copied": (
            f"{len(result.linked)}, {human_bytes(result.bytes_linked)}" if result.linked else ""
        ),
        "shards rewritten": ", ".join(result.rewritten),
        "shards added": ", ".join(result.new),
        "written": f"{human_bytes(result.bytes_written)} in {result.seconds:.1f} s, peak memory {human_bytes(result.peak_memory_bytes)}",
    }
    for what, said in rows.items():
        if said:
            table.add_row(what, said)
    console.print(table)
    if result.own_head:
        console.print(result.own_head, soft_wrap=True)
    for warning in result.warnings:
        console.print(f"warning: {warning}")
    if result.links_said:
        console.print(result.links_said, soft_wrap=True)
    if result.base_relation is not None:
        console.print(result.base_relation.line, soft_wrap=True)
    console.print(f"next: {result.next}", soft_wrap=True)


def _listed(names: tuple[str, ...]) -> str:
    shown = "\n".join(names[:3])
    return (
        f"{len(names)} tensors\n{shown}" + (f"\n… and {len(names) - 3} more (--json lists them)" if len(names) > 3 else "") if names else ""
    )
