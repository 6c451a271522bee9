"""Refuses a checkpoint whose tensors stand under other names, for stages that go by the family's."""

from mtpress.errors import InputError
from mtpress.models.qwen3_5.renames import Kind
from mtpress.quant_config.view import Subject
from mtpress.terminal import count


def refuse_head_alone(subject: Subject) -> None:
    """InputError for what has a draft head and no body: there is one thing to be done with it."""
    if subject.is_head_alone:
        where = subject.path
        raise InputError(
            f"{where}: holds a draft head and no body; mtpress graft CKPT OUT --from {where} puts it into a checkpoint that has one"
        )


def refuse_misnamed(subject: Subject, *kinds: Kind) -> None:
    """For stages that go by stored names: InputError where tensors of these parts, or of any, stand under other names."""
    refuse_head_alone(subject)
    if stored := subject.names.misnamed(*kinds):
        raise InputError(
            f"{subject.path}: {count(len(stored), 'tensor')} under other names ({subject.names.told(*kinds)}); rename them first: "
            f"mtpress repair {subject.path} OUT"
        )
