"""Repairs of what stands beside the weights and differs from the base's: keys and files are the base's again.

In: the findings of rules/meanings.py. Out: config.json, processor files, tokenizer and generation defaults that mean what the base's do.
Only where the user says that the base is the source; else they are told, but a size of config.json that what is stored refutes.
"""

from collections.abc import Iterator

from mtpress.chat.processor_files import IMAGE_PROCESSOR, PROCESSOR, VIDEO_PROCESSOR
from mtpress.comparison.config import restored
from mtpress.models.qwen3_5 import names as qwen3_5
from mtpress.quant_config.tokenizer_files import GENERATION, TOKENIZER, TOKENIZER_CONFIG
from mtpress.quant_config.view import Subject
from mtpress.repairs.files import copy_files
from mtpress.repairs.repair import RESTORE, STAYS, Context, Fix, Left, Repair, Turn, needs_base, told_unless_source
from mtpress.rules.rule import Finding
from mtpress.rules.tensors import tensor_missing, tensor_unexpected, weight_shape
from mtpress.terminal import count


def config_differs(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    """All keys, or those of sizes where the tensors that are stored have the base's and not those that config.json says."""
    assert ctx.base is not None
    places = [entry.partition(": ")[0] for entry in finding.where]
    if not ctx.restores:
        sizes = [place for place in places if place.rpartition(".")[2] in SIZES]
        right = restored(ctx.overlay.config, ctx.base.config, sizes)
        if not sizes or misfits(ctx.overlay.subject_with(right)) >= misfits(ctx.subject):
            yield Left("keys of config.json differ from the base's and fit what is stored, so they stay as their author set them", RESTORE)
            return
        places = sizes
    ctx.overlay.set_config(restored(ctx.overlay.config, ctx.base.config, places))
    yield Fix(
        f"{count(len(places), 'key')} of config.json set to the base's" + (", which the stored tensors have" if not ctx.restores else "")
    )


def misfits(subject: Subject) -> int:
    """How many tensors are missing, of another shape, or without a place by config.json."""
    return sum(len(problem.where) for find in (tensor_missing, tensor_unexpected, weight_shape) for problem in find(subject))


def processor_differs(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    """The base's files; one that the base lacks would stand before them."""
    assert ctx.base is not None
    there = tuple(name for name in (PROCESSOR, IMAGE_PROCESSOR, VIDEO_PROCESSOR) if (ctx.base.path / name).is_file())
    for name in {entry.partition(": ")[0] for entry in finding.where} - set(there):
        ctx.overlay.drop_file(name)
    yield from copy_files(ctx, there)


def processor_unsound(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    if ctx.base is None:
        yield needs_base(finding.where[0])
    else:
        yield from processor_differs(ctx, finding)


def tokenizer_differs(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    """All the base's tokenizer files: one of another model does not fit beside them."""
    assert ctx.base is not None
    names = (TOKENIZER, TOKENIZER_CONFIG, "vocab.json", "merges.txt")
    yield from copy_files(ctx, tuple(name for name in names if ctx.subject.has(name) and (ctx.base.path / name).is_file()))


def generation_differs(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    assert ctx.base is not None
    content, theirs = dict(ctx.subject.json(GENERATION) or {}), ctx.base.json_file(GENERATION) or {}
    keys = [entry.split(": ")[1] for entry in finding.where]
    for key in keys:
        content.pop(key, None)
    ctx.overlay.write_json(GENERATION, content | {key: theirs[key] for key in keys if key in theirs})
    yield Fix(f"{count(len(keys), 'key')} of {GENERATION} set to the base's")


SIZES = (*qwen3_5.SIZES, *qwen3_5.VISION_SIZES, "num_hidden_layers", "layer_types", "full_attention_interval", "attn_output_gate")
REPAIRS = (
    Repair("processor-unsound", "the base's files (`--base`)", processor_unsound),
    Repair("config-differs", "left as they are, but sizes that what is stored refutes; `--base-is source`: the keys are set to the base's, "
           "those that it lacks are taken out", config_differs, Turn.CONFIG),
    Repair("config-unknown", "nothing is known to read them"),
    Repair("ancestor-settings", "left: what a fine-tune was trained with is its author's"),
    Repair("ancestor-tokenizer", "left: an ancestor's tokenizer would take away what was changed on purpose"),
    Repair("processor-differs", STAYS + "the base's files, byte for byte", told_unless_source(processor_differs, "the processor")),
    Repair("tokenizer-differs", STAYS + "the base's files, byte for byte", told_unless_source(tokenizer_differs, "the tokenizer")),
    Repair("tokenizer-respelled", "nothing is wrong: the tokens are the base's"),
    Repair("generation-differs", STAYS + "the keys are set to the base's",
           told_unless_source(generation_differs, "generation_config.json")),
    Repair("sampling-differs", "a sampling may be chosen"),
    Repair("template-differs", "a template may be chosen; what it does wrong is mended by its own findings"),
)  # fmt: skip
