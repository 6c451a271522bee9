"""Repairs of the chat template: mtpress's own, or one in place of two.

In: a `Context`. Out: chat_template.jinja, and no other template in the files beside it. Leaves out: a template that is missing and that the
base has (tokenizer.py).
"""

from collections.abc import Iterator

from mtpress.chat.template import template
from mtpress.chat.template_origin import origin
from mtpress.quant_config.tokenizer_files import HOLD_TEMPLATES, KEY, TEMPLATES, marks, templates
from mtpress.repairs.repair import Context, Fix, Left, Repair
from mtpress.rules.rule import Finding

INSTALLED = "mtpress's template installed: it thinks only when a request or a system message asks for it (docs/chat-template.md)"


def install(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    if ctx.keep_template:
        yield Left("--keep-template", "run it again without, or serve with vLLM's --chat-template FILE")
        return
    for text in templates(ctx.subject).values():
        if origin(text, bool(ctx.subject.stored_vision), marks(ctx.subject)).kind == "own":
            yield Left("it is in a format of its author's own", "serve with vLLM's --chat-template FILE to try another")
            return
    write_only(ctx, template())
    yield Fix(INSTALLED)


def keep_first(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    """The one that transformers and vLLM go by."""
    name, text = next(iter(templates(ctx.subject).items()))
    if text is None:
        yield Left(f"{name} holds no template in UTF-8", "mend or delete it")
        return
    write_only(ctx, text)
    yield Fix(f"the one of {name} kept, which transformers and vLLM read; the others taken out")


def write_only(ctx: Context, text: str) -> None:
    """Makes it the only template of the checkpoint."""
    overlay, subject = ctx.overlay, ctx.subject
    if subject.text(TEMPLATES[0]) != text:
        overlay.write_file(TEMPLATES[0], text.encode())
    for name in TEMPLATES[1:]:
        if subject.has(name):
            overlay.drop_file(name)
    for name in HOLD_TEMPLATES:
        content = subject.json(name) or {}
        if KEY in content:
            overlay.write_json(name, {key: value for key, value in content.items() if key != KEY})


REPAIRS = (
    Repair("template-loses", "mtpress's template is installed, unless `--keep-template` or the author's own serves plain talk", install),
    Repair("template-behaviour", "mtpress's template is installed, unless `--keep-template` or it is the author's own", install),
    Repair("template-choices", "a choice of the build, not a fault"),
    Repair("template-twice", "the one that transformers and vLLM read is kept", keep_first),
)
