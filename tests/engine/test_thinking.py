import json
from pathlib import Path
from typing import Literal

import pytest

from mtpress.chat import conformance as template_trial
from mtpress.chat import template as templating
from mtpress.confined import Confined
from mtpress.engine.launch.thinking import Template, read_template
from mtpress.errors import InputError

OURS = (Path(__file__).parents[2] / "src/mtpress/chat/qwen3_5.jinja").read_text()
LAST = "{% if add_generation_prompt %}<|im_start|>assistant\nLAST{% endif %}"


def last(text: str) -> str:
    return LAST.replace("LAST", text)


def written(folder: Path, source: str) -> Path:
    (folder / "chat_template.jinja").write_text(source)
    return folder


def test_our_template_is_off_by_default_and_knows_the_tags(tmp_path: Path) -> None:
    assert read_template(written(tmp_path, OURS)) == Template("chat_template.jinja", "off", True)
    assert read_template(tmp_path).switches


@pytest.mark.parametrize(("default", "tags"), [("off", False), ("on", True), (None, True), (None, False)])
def test_other_templates_are_switched_by_kwargs_alone(default: Literal["on", "off"] | None, tags: bool) -> None:
    assert not Template("chat_template.jinja", default, tags).switches


@pytest.mark.parametrize(
    ("source", "default"),
    [
        (last("<think>\n"), "on"),
        (last("<think>\n\n</think>\n\n"), "off"),
        (last(""), None),
        (last("{% if enable_thinking is defined and enable_thinking is false %}</think>{% else %}<think>\n{% endif %}"), "on"),
        ("{{ raise_exception('no') }}", None),
        ("{% broken", None),
        ("{{ messages[0].content.__class__.__mro__ }}</think>", None),
        ("{% for m in messages %}{% if m.role == 'x' %}{% continue %}{% endif %}{% endfor %}<think>", "on"),
    ],
)
def test_defaults(tmp_path: Path, source: str, default: str | None) -> None:
    assert read_template(written(tmp_path, source)).default == default


def test_a_template_in_the_tokenizer_config_counts_where_there_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": last("<think>\n")}))
    assert read_template(tmp_path) == Template("tokenizer_config.json", "on", False)
    assert read_template(written(tmp_path, OURS)).file == "chat_template.jinja"


def test_no_template_and_no_readable_one(tmp_path: Path) -> None:
    assert read_template(tmp_path) == Template(None, None, False)
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    assert read_template(tmp_path) == Template(None, None, False)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
            "ran for",
        ),
        ("{{ 9 ** (9 ** 9) }}", "ran for"),
        ("{% set n = namespace(x='ab') %}{% for a in range(36) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}", "wants over 400 MB"),
        ("{{ 'x' * 10 ** 8 }}", "wants over 400 MB"),
        ("x" * 1_000_001, "has 1,000,001 characters"),
    ],
)
def test_a_template_that_would_stop_the_server_stops_nothing_here(
    source: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(templating, "MAX_RENDER_SECONDS", 1.0 if said == "ran for" else 30.0)
    with pytest.raises(InputError, match=said) as raised:
        read_template(written(tmp_path, source))
    assert "chat_template.jinja" in str(raised.value)
    monkeypatch.undo()
    assert read_template(written(tmp_path, last("<think>\n"))).default == "on"


def test_a_module_beside_the_checkpoint_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process of its own starts in the current directory, which may be the checkpoint."""
    for name in ("jinja2", "json", "mtpress"):
        (tmp_path / f"{name}.py").write_text("open('ran', 'w')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(template_trial, "_process", Confined("mtpress.chat.conformance", templating.MAX_RENDER_BYTES))
    assert read_template(written(tmp_path, last("<think>\n"))).default == "on"
    assert not (tmp_path / "ran").exists()
