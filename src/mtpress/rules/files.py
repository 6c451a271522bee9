"""Rules on the files: JSON that can be read, shards that the index names, sizes that add up."""

from collections.abc import Iterator

from mtpress.checkpoint.checkpoint import INDEX_NAME, SINGLE_NAME, weight_map_of
from mtpress.errors import InputError
from mtpress.quant_config.view import CONFIG, HF_QUANT_CONFIG, Subject
from mtpress.rules.rule import Problem, Rule
from mtpress.terminal import count

JSON_FILES = (
    "generation_config.json", HF_QUANT_CONFIG, "preprocessor_config.json", "processor_config.json", "tokenizer.json",
    "tokenizer_config.json", "video_preprocessor_config.json",
)  # fmt: skip

DELETE = "delete it; mtpress repair CKPT OUT leaves it out"


def unreadable(error: InputError) -> Iterator[Problem]:
    yield Problem(str(error))


def json_unreadable(subject: Subject) -> Iterator[Problem]:
    for name in JSON_FILES:
        subject.json(name)
    for name, why in subject.unreadable.items():
        yield Problem(why, (name,))


def index_spelling(subject: Subject) -> Iterator[Problem]:
    said = (subject.checkpoint.index or {}).get("weight_map", {})
    other = sorted({file for name, file in said.items() if weight_map_of({"weight_map": {name: file}}).get(name) != file})
    if other:
        yield Problem(f"{INDEX_NAME} spells {count(len(other), 'file')} otherwise than they are called ({other[0][:80]})", tuple(other))


def tensor_unindexed(subject: Subject) -> Iterator[Problem]:
    names = tuple(name for name in subject.unindexed if name not in subject.unindexed_mtp)
    if names:
        yield Problem(f"{count(len(names), 'tensor')} stored in an indexed file, but not in {INDEX_NAME}", names)


def index_missing(subject: Subject) -> Iterator[Problem]:
    if subject.checkpoint.index is None and subject.stray_shards:
        names = tuple(subject.stray_shards)
        yield Problem(f"no {INDEX_NAME}, and {count(len(names), 'safetensors file')} beside {SINGLE_NAME}", names)


def shard_unindexed(subject: Subject) -> Iterator[Problem]:
    if subject.checkpoint.index is None:
        return  # index-missing says it
    heads = {file for file, _ in subject.unindexed_mtp.values()}
    for name, shard in subject.stray_shards.items():
        if name == SINGLE_NAME:
            said = subject.leftovers.get(name)
            holds = f"which holds {said}" if said else "which it does not name"
            message = f"{name} stands beside {INDEX_NAME}, {holds}; vLLM reads what the index names, transformers {name} in its place"
            yield Problem(message, (name,), DELETE)
        elif name not in heads and name not in subject.leftovers:  # mtp-unindexed and shard-leftover say it
            holds = "which cannot be read" if shard is None else f"which holds {count(len(shard.tensors), 'tensor')}"
            yield Problem(f"{INDEX_NAME} does not name {name}, {holds}; engines skip it", (name,))


def shard_leftover(subject: Subject) -> Iterator[Problem]:
    files = {name: said for name, said in subject.leftovers.items() if name != SINGLE_NAME}
    if files:
        first, said = next(iter(files.items()))
        yield Problem(
            f"{count(len(files), 'safetensors file')} of another save: {first} holds {said}; engines go by the index", tuple(files)
        )


def index_total_size(subject: Subject) -> Iterator[Problem]:
    index = subject.checkpoint.index
    if index is None:
        return
    metadata = index.get("metadata")
    said = metadata.get("total_size") if isinstance(metadata, dict) else None
    indexed = subject.checkpoint.num_bytes
    stored = indexed + sum(info.num_bytes for info in subject.checkpoint.unindexed.values())
    with_head = indexed + sum(info.num_bytes for _, info in subject.unindexed_mtp.values())
    if said not in (indexed, stored, with_head):
        yield Problem(f"{INDEX_NAME} says total_size {said}, the tensors it names hold {indexed} bytes", (INDEX_NAME,))


OPEN_RULES = (
    Rule(
        "unreadable",
        "error",
        "config.json, the index or a shard cannot be read, or they do not fit each other; nothing else is checked.",
        "fetch or make the checkpoint again; if only the index is wrong: mtpress repair CKPT OUT",
        unreadable,
    ),
)


def code_beside(subject: Subject) -> Iterator[Problem]:
    files = sorted(path.name for path in subject.path.glob("*.py"))
    named = [name for name in JSON_FILES if "auto_map" in (subject.json(name) or {})]
    where = (*files, *([CONFIG] if "auto_map" in subject.config else []), *named)
    if where:
        yield Problem(f"code of the checkpoint's own: {', '.join(where)}", where)


RULES = (
    Rule(
        "index-spelling",
        "error",
        "The index names a file by a path (./x) and not as it is called. It is the file of the directory, but vLLM compares the letters, "
        "finds none and stops (FileNotFoundError).",
        "write the index anew: mtpress repair CKPT OUT",
        index_spelling,
    ),
    Rule(
        "json-unreadable",
        "error",
        "A file beside the weights is not a JSON object; the engine stops on it, or goes on without it.",
        "restore it from the source checkpoint: mtpress repair CKPT OUT --base SRC",
        json_unreadable,
    ),
    Rule(
        "tensor-unindexed",
        "warning",
        "A tensor lies in an indexed file, but the index does not name it: vLLM loads it, transformers and others do not.",
        "rebuild the index: mtpress repair CKPT OUT",
        tensor_unindexed,
    ),
    Rule(
        "index-missing",
        "warning",
        "Several safetensors files and no index: vLLM loads all of them, transformers and others only model.safetensors.",
        "write an index: mtpress repair CKPT OUT",
        index_missing,
    ),
    Rule(
        "shard-unindexed",
        "error",
        "A safetensors file stands beside the weights and no index names it: engines skip it without a word. A "
        "model.safetensors transformers loads before it looks for an index.",
        "move it away, or rebuild the index: mtpress repair CKPT OUT",
        shard_unindexed,
    ),
    Rule(
        "shard-leftover",
        "warning",
        "A safetensors file beside the weights holds what the index names in other files: the shards of an earlier save, or a "
        "consolidated copy. vLLM and transformers go by the index and pass over it.",
        DELETE,
        shard_leftover,
    ),
    Rule(
        "index-total-size",
        "warning",
        "metadata.total_size of the index is not the number of bytes of the tensors; loaders that plan memory by it are misled.",
        "rebuild the index: mtpress repair CKPT OUT",
        index_total_size,
    ),
    Rule(
        "code-beside",
        "warning",
        "Python files, or an auto_map that names some: no engine needs code for this family, and one that is told to trust the checkpoint "
        "runs it. mtpress never does.",
        "read it before you serve it, or take the files and the keys out",
        code_beside,
    ),
)
