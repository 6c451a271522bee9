"""Repairs of the files: the index is always written anew, JSON that cannot be read comes from the base."""

from collections.abc import Iterator

from mtpress.checkpoint.json_files import read_json_object
from mtpress.errors import InputError
from mtpress.quant_config.view import HF_QUANT_CONFIG
from mtpress.repairs.declaration import declare
from mtpress.repairs.repair import Context, Fix, Left, Repair, Turn, needs_base
from mtpress.rules.rule import Finding

REINDEXED = "the index is written anew from what is stored"


def reindexed(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    """Opening the checkpoint by what is stored has done it (opening.py)."""
    left_out = [f"{name} left out: it {ctx.left_out[name]}" for name in finding.where if name in ctx.left_out]
    yield Fix("; ".join(left_out) or REINDEXED)


def json_unreadable(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    name = finding.where[0]
    if name == HF_QUANT_CONFIG:
        ctx.overlay.drop_file(name)
        yield from declare(ctx)
    elif ctx.base is None:
        yield needs_base(name)
    else:
        yield from copy_files(ctx, (name,))


def copy_files(ctx: Context, names: tuple[str, ...]) -> Iterator[Fix | Left]:
    """Puts the base's files in place of these, byte for byte."""
    assert ctx.base is not None
    found, missing = {}, {}
    for name in names:
        path = ctx.base.path / name
        try:
            if name.endswith(".json"):
                read_json_object(path)
            found[name] = path.read_bytes()
        except InputError as error:
            missing[name] = str(error) if path.exists() else "the base has none"
        except OSError:
            missing[name] = "the base has none"
    for name, content in found.items():
        ctx.overlay.write_file(name, content)
    if found:
        yield Fix(f"{' and '.join(found)} copied from the base")
    for name, why in missing.items():
        yield Left(f"{name}: {why}", "fetch the release of the base whole, then repair again")


REPAIRS = (
    Repair(
        "unreadable", "an index that is wrong or missing is written anew; with `--base`, an unreadable config.json is the base's", reindexed
    ),
    Repair(
        "json-unreadable",
        "hf_quant_config.json is written anew from what is stored; other files are the base's (`--base`)",
        json_unreadable,
        Turn.CONFIG,
    ),
    Repair("tensor-unindexed", "the index names everything that is stored", reindexed),
    Repair("index-missing", "an index is written", reindexed),
    Repair(
        "shard-unindexed",
        "the index names everything that is stored and has a place; a file without a tensor of the model, or torn, is left out",
        reindexed,
    ),
    Repair("shard-leftover", "left out", reindexed),
    Repair("index-spelling", "the index is written anew", reindexed),
    Repair("index-total-size", "the index is written anew", reindexed),
)
