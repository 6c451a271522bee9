"""What strangers write is shown on a terminal, never obeyed; whatever it is, nothing breaks on it."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table

from mtpress import terminal
from mtpress.cli import main
from mtpress.progress import Progress
from mtpress.terminal import json_text, quoted, say, visible

SOURCES = Path(terminal.__file__).parent
EVIL = "[/x]\x1b]0;PWNED\x07\x1b[2J\u202e\x9b31m[link=file:///x]"
RAW = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@given(st.text())
def test_nothing_invisible_is_left_and_the_rest_stays(text: str) -> None:
    shown = visible(text)
    assert not RAW.search(shown)
    if shown.isprintable() and "\\" not in shown:
        assert shown == text


def test_what_it_looks_like() -> None:
    assert visible("a\x1b[2J\u202e\x9b\nb") == "a\\x1b[2J\\u202e\\x9b\nb"


def test_tables_lines_and_titles(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(title=EVIL)
    table.add_column(EVIL)
    table.add_row(EVIL)
    face = terminal.console()
    face.width = 200
    face.print(table)
    face.print(EVIL, soft_wrap=True)
    say(EVIL + "\nand a line of its own")
    out = capsys.readouterr().out
    assert not RAW.search(out)
    assert out.count("[/x]\\x1b]0;PWNED\\x07\\x1b[2J\\u202e\\x9b31m[link=file:///x]") == 5
    assert "\\nand a line" in out


@pytest.mark.parametrize("columns", ["0", "1"])
def test_a_narrow_terminal_still_shows_words(columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    terminal.console().print("NOT SOUND: 1 error")
    assert capsys.readouterr().out == "NOT SOUND: 1 error\n"


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20))
def test_json_is_the_same_document(text: str) -> None:
    assert not RAW.search(json_text({text: [text]}))
    assert json.loads(json_text({text: [text]})) == {text: [text]}


@pytest.mark.parametrize("token", ["a b", "a\x1b]0;x\x07b", "it's\n\\n\x1b", "\u202e", "$(x)", "--flag"])
def test_a_shell_reads_the_same_word(token: str) -> None:
    assert not RAW.search(quoted(token))
    said = subprocess.run(["bash", "-c", f"printf %s {quoted(token)}"], capture_output=True, check=True, env={"LC_ALL": "C.UTF-8"})
    assert said.stdout.decode() == token


def test_progress_shows_what_it_names(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(EVIL, 2) as progress:
        progress.say(EVIL)
        progress.advance(2, EVIL)
    assert not RAW.search(capsys.readouterr().err)


def test_there_is_no_other_face() -> None:
    for path in SOURCES.rglob("*.py"):
        text = path.read_text()
        assert "rich.console" not in text or path.name == "terminal.py", path
        assert "rich.markup" not in text and "rich import print" not in text, path


def spoiled(source: Path, to: Path) -> Path:
    """A checkpoint in a directory of such a name, with such words wherever a config holds some."""
    shutil.copytree(source, to)
    config = json.loads((to / "config.json").read_text())
    config["architectures"] = [EVIL]
    config.setdefault("quantization_config", {}).update({"quant_algo": EVIL, "ignore": [EVIL]})
    (to / "config.json").write_text(json.dumps(config))
    (to / "chat_template.jinja").write_text("{{ raise_exception('" + EVIL + "') }}")
    (to / "generation_config.json").write_text(json.dumps({"temperature": EVIL, "eos_token_id": EVIL}))
    (to / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": EVIL}))
    return to


@pytest.mark.parametrize("stage", ["check", "inspect", "repair", "graft", "convert", "serve", "quantize", "recipes"])
def test_every_stage_survives_it(
    stage: str, small_bf16: Path, small_nvfp4: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = next(iter(small_nvfp4.values()))
    (tmp_path / "model[").mkdir()
    out = tmp_path / "model[" / EVIL.replace("/", "_")
    bad = spoiled(small_bf16 if stage == "quantize" else made, tmp_path / "model[" / "x]\x1b]0;PWNED\x07\x1b[2J")
    more: dict[str, list[Any]] = {
        "repair": [out], "graft": [out, "--from", small_bf16], "convert": [out, "--to", "compressed-tensors"],
        "serve": ["--dry-run", "--profile", "rtx-5090"], "quantize": [out, "--recipe", "int4-mtp-vlm", "--weight-only", "0.01"],
    }  # fmt: skip
    for arguments in ([stage, bad, *more.get(stage, [])], [stage, bad, *more.get(stage, []), "--json"]):
        assert main([str(argument) for argument in arguments]) in (0, 1, 2)
        said = capsys.readouterr()
        assert not RAW.search(said.out + said.err)
        assert len(said.err.splitlines()) <= 3
        if arguments[-1] == "--json":
            json.loads(said.out)
        shutil.rmtree(out, ignore_errors=True)


@pytest.mark.parametrize("stage", ["quantize", "repair", "convert"])
def test_a_name_with_markup_is_an_output_like_any_other(
    stage: str, small_bf16: Path, small_nvfp4: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The output is made, and told of."""
    made = next(iter(small_nvfp4.values()))
    (tmp_path / "o[").mkdir()
    out = tmp_path / "o[" / "x]"
    calls: dict[str, list[Any]] = {
        "quantize": [small_bf16, out, "--recipe", "nvfp4-mtp-vlm", "--weight-only", "0.01"],
        "repair": [made, out, "--base", small_bf16],
        "convert": [made, out, "--to", "compressed-tensors"],
    }
    code = main([stage, *map(str, calls[stage])])
    said = capsys.readouterr()
    assert code in (0, 1), said.err
    assert out.exists() or stage == "repair"
