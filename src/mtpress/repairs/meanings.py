"""Repairs of what stands beside the weights and differs from the base's: keys and files are the base's again.

In: the findings of rules/meanings.py. Out: config.json, processor files, tokenizer and generation defaults that mean what the base's do.
Leaves out: whether the base may say so (opening.py finds out what it is to the checkpoint).
"""

from collections.abc import Iterator

from mtpress.meanings.config import restored
from mtpress.repairs.files import copy_files
from mtpress.repairs.repair import Context, Fix, Left, Repair, Turn
from mtpress.rules.rule import Finding, count
from mtpress.rules.tokenizer import GENERATION, TOKENIZER, TOKENIZER_CONFIG
from mtpress.rules.vision import IMAGE_PROCESSOR, PROCESSOR, VIDEO_PROCESSOR


def config_differs(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    assert ctx.base is not None
    places = [entry.partition(": ")[0] for entry in finding.where]
    ctx.overlay.set_config(restored(ctx.overlay.config, ctx.base.config, places))
    yield Fix(f"{count(len(places), 'key')} of config.json set to the base's")


def processor_differs(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    """The base's files; one that the base lacks would stand before them."""
    assert ctx.base is not None
    there = tuple(name for name in (PROCESSOR, IMAGE_PROCESSOR, VIDEO_PROCESSOR) if (ctx.base.path / name).is_file())
    for name in {entry.partition(": ")[0] for entry in finding.where} - set(there):
        ctx.overlay.drop_file(name)
    yield from copy_files(ctx, there)


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


REPAIRS = (
    Repair("config-differs", "the keys are set to the base's, those that it lacks are taken out", config_differs, Turn.CONFIG),
    Repair("config-unknown", "left: nothing is known to read them"),
    Repair("processor-differs", "the base's files, byte for byte", processor_differs),
    Repair("tokenizer-differs", "the base's files, byte for byte", tokenizer_differs),
    Repair("tokenizer-respelled", "nothing is wrong: the tokens are the base's"),
    Repair("generation-differs", "the keys are set to the base's", generation_differs),
    Repair("sampling-differs", "left: a sampling may be chosen"),
    Repair("template-differs", "left: a template may be chosen; what it does wrong is mended by its own findings"),
)
