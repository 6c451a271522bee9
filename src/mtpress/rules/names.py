"""Rules on names: tensors of the family that stand under other names are misnamed, not missing, and are said once.

Every other rule goes by the family's names (`Subject.tensors`), so what is found here is not found again as missing or unexpected.
"""

from collections.abc import Iterator

from mtpress.models.qwen3_5.renames import TITLES, Kind, engine_reads
from mtpress.quant_config.view import Subject
from mtpress.rules.rule import Problem, Rule
from mtpress.terminal import count

RENAME = "rename them: mtpress repair CKPT OUT"


def head_alone(subject: Subject) -> Iterator[Problem]:
    if subject.is_head_alone:
        remedy = f"mtpress graft CKPT OUT --from {subject.path}"
        yield Problem(f"a draft head alone ({count(len(subject.stored_mtp), 'tensor')}), no body", subject.stored_mtp, remedy)


def _read_by_engine(subject: Subject) -> bool:
    """Whether vLLM loads all of it as it stands. Its draft reads lm_head under one name alone."""
    names = subject.names
    draft_stops = bool(subject.stored_mtp) and bool(names.misnamed("lm_head"))
    return bool(names) and not names.rivals and not draft_stops and engine_reads(names.new_names.items(), subject.architecture)


def _problem(subject: Subject, kinds: tuple[Kind, ...]) -> Problem:
    names = subject.names
    stored = names.misnamed()
    what = " and ".join(TITLES[kind] for kind in kinds)
    message = f"{count(len(stored), 'tensor')} of {what} under other names: {names.told()}"
    if names.rivals:
        message += f"; {count(len(names.rivals), 'tensor')} of them under a name that another tensor has or claims"
    return Problem(message, tuple(stored))


def _kinds(subject: Subject) -> tuple[Kind, ...]:
    """What has tensors under other names, in an order of reading."""
    found = {subject.names.kinds[name] for name in subject.names.misnamed()}
    return tuple(kind for kind in TITLES if kind in found)


def body_prefix(subject: Subject) -> Iterator[Problem]:
    kinds = _kinds(subject)
    if "body" in kinds and not _read_by_engine(subject):
        yield _problem(subject, kinds)
    elif subject.prefix is None and not subject.is_head_alone:
        some = tuple(name for name in subject.tensors if "layers." in name and not name.startswith(subject.model.MTP_PREFIX))[:3]
        yield Problem("no decoder layers under model.language_model.layers (or, text only, model.layers); nothing in them is checked", some)


def names_wrapped(subject: Subject) -> Iterator[Problem]:
    kinds = _kinds(subject)
    if kinds and "body" not in kinds and kinds != ("head",) and not _read_by_engine(subject):
        yield _problem(subject, kinds)


def names_of_the_engine(subject: Subject) -> Iterator[Problem]:
    if _read_by_engine(subject):
        yield _problem(subject, _kinds(subject))


def mtp_misplaced(subject: Subject) -> Iterator[Problem]:
    if _kinds(subject) == ("head",) and not subject.is_head_alone:
        yield _problem(subject, ("head",))


RULES = (
    Rule(
        "head-alone",
        "error",
        "A draft head and nothing else of a model: it cannot be served, it can be put into a checkpoint that has a body.",
        "put it into a checkpoint that has a body: mtpress graft CKPT OUT --from it",
        head_alone,
    ),
    Rule(
        "body-prefix",
        "error",
        "The decoder layers, and perhaps more, stand under names that the architecture does not read: a trainer's wrapper (module., "
        "_orig_mod., base_model.model.), a doubled or a missing prefix. Nothing is missing; vLLM stops with a ValueError.",
        RENAME,
        body_prefix,
    ),
    Rule(
        "names-wrapped",
        "error",
        "The vision tower or lm_head stands under names that the architecture does not read (transformers 5.4 to 5.5.3 saved "
        "model.language_model.visual.*). Nothing is missing; vLLM stops with a ValueError.",
        RENAME,
        names_wrapped,
    ),
    Rule(
        "names-of-the-engine",
        "warning",
        "Tensors stand under vLLM's own names (language_model.model.*, visual.*). vLLM loads them, transformers and other engines do not.",
        RENAME,
        names_of_the_engine,
    ),
    Rule(
        "mtp-misplaced",
        "error",
        "The draft head stands under another prefix, after the body's last layer, or under words of another family. The draft reads only "
        "names that start with `mtp.`, and the target refuses the others.",
        RENAME,
        mtp_misplaced,
    ),
)
