"""What `check` would find wrong with an output because the source has it already: refused before anything is written.

In: the source as BF16, and the recipe. Out: InputError with the first such error, or what is to be said of a source that is less than its
config.json calls for. Leaves out: shapes and names, which plan/plan.py refuses in words of its own.
"""

from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.errors import InputError
from mtpress.models import family
from mtpress.plan.recipe import Recipe
from mtpress.quant_config.view import Subject
from mtpress.rules.files import shard_unindexed
from mtpress.rules.registry import STATIC_RULES
from mtpress.rules.rule import apply

# Errors of a source that its output does not have: quantize writes both configs and the index anew and chooses the template.
MENDED = frozenset({"vision-missing", "template-loses", "shard-unindexed"})
OF_THE_TOWER = frozenset({"vision-in-text-model", "processor-missing"})  # gone with `vision: drop`


def refuse_faults(source: Checkpoint, recipe: Recipe) -> None:
    """InputError with the first error that an output would inherit."""
    mended = MENDED | (OF_THE_TOWER if recipe.vision == "drop" else frozenset())
    for finding in apply(STATIC_RULES, Subject(source)):
        if finding.severity == "error" and finding.id not in mended:
            drop = "; or leave the tower out, with vision: drop in the recipe" if finding.id in OF_THE_TOWER else ""
            remedy = finding.remedy.replace("--base SRC", "--base BASE").replace("CKPT", "SRC")
            raise InputError(f"{source.path}: {finding.message} ({finding.id}); {remedy}{drop}")


def lacks_tower(source: Checkpoint) -> bool:
    """Whether config.json calls for a vision tower and none is stored."""
    subject = Subject(source)
    return subject.is_vl and not subject.stored_vision


def without_head(source: Checkpoint) -> bool:
    return not any(name.startswith(family(source.model_type).MTP_PREFIX) for name in source.tensors)


def notes(source: Checkpoint, recipe: Recipe) -> list[str]:
    """What an output will lack because the source does, or because no index names it, with the remedy."""
    subject = Subject(source)
    said = [
        f"LEFT OUT: {problem.message}; mtpress repair SRC NEW takes in what has a place, an adapter must be merged first"
        for problem in shard_unindexed(subject)
        if problem.where[0] not in subject.leftovers
    ]
    if without_head(source):
        said.append(
            "WITHOUT DRAFT HEAD: the source declares none and holds none, so the output cannot draft; "
            "mtpress graft SRC NEW --from BASE puts the base model's in first"
        )
    if recipe.vision == "keep" and lacks_tower(source) and source.config.get("language_model_only") is not True:
        said.append(
            "WITHOUT VISION TOWER: the source has none though its config.json calls for one; the output is declared text-only "
            "(language_model_only); mtpress repair SRC NEW --base BASE puts the base model's in first"
        )
    return said
