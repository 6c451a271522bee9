"""Repairs of the vision tower: its tensors, its processor files and the config, from the base."""

from collections.abc import Iterator

from mtpress.repairs.files import copy_files
from mtpress.repairs.from_source import base_tensor, not_there, vision_config
from mtpress.repairs.repair import OTHER_BASE, Context, Fix, Left, Repair, Turn, needs_base
from mtpress.repairs.unplaced import may_be, told
from mtpress.rules.rule import Finding
from mtpress.terminal import count


def vision_missing(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    shapes = ctx.subject.model.vision_shapes(ctx.subject.config)
    if own := may_be(ctx.subject, shapes):
        yield told(own)
        return
    if ctx.base is None:
        yield Left(
            "the vision tower can only come from the source",
            'run it again with --base SRC; if it was taken out on purpose, "language_model_only": true in config.json says so',
        )
        return
    found = {name: base_tensor(ctx, name, shape) for name, shape in shapes.items()}
    if lacking := [name for name, info in found.items() if info is None]:
        yield not_there(ctx, lacking[0], f"the base has no vision tower that fits ({lacking[0]}, …)")
        return
    for name, info in found.items():
        assert info is not None
        ctx.overlay.put(name, info)
    yield Fix(f"{count(len(found), 'tensor')} of the tower put from the base, bit for bit")


def vision_called_stripped(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    ctx.overlay.set_config(ctx.overlay.config | {"language_model_only": False})
    yield Fix("language_model_only set to false")


def vision_in_text_model(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    """The config was rewritten to a text-only form; sizes of a tower stand in no tensor, so only a source has them."""
    if ctx.base is None:
        yield needs_base("the vision_config of a config.json that was rewritten to text only")
        return
    if "vision_config" not in ctx.base.config:
        yield Left("the base has no vision_config either", OTHER_BASE)
        return
    ctx.overlay.set_config(vision_config(ctx))
    yield Fix("config.json has the base's vision_config and frame again, its own text keys stay")


def processor_missing(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    if ctx.base is None:
        yield needs_base(" and ".join(finding.where))
        return
    there = tuple(name for name in finding.where if (ctx.base.path / name).is_file())
    whole = "processor_config.json"
    if len(there) < len(finding.where) and (ctx.base.path / whole).is_file():
        there = (*there, whole)
    yield from copy_files(ctx, there or finding.where)


REPAIRS = (
    Repair("vision-stripped", "nothing is wrong: the tower was taken out on purpose"),
    Repair("vision-missing", "the tower is put from the base (`--base`), bit for bit", vision_missing),
    Repair("vision-called-stripped", "set to false", vision_called_stripped, Turn.CONFIG),
    Repair(
        "vision-in-text-model",
        "config.json gets the base's vision_config and frame (`--base`), its own text keys stay",
        vision_in_text_model,
        Turn.CONFIG,
    ),
    Repair("processor-missing", "copied from the base (`--base`)", processor_missing),
)
