"""The command line of tasks: what is refused before anything starts, and what requests will carry."""

import sys
from pathlib import Path

import pytest

from mtpress.builtin import BUILTIN_MODEL
from mtpress.cli import main
from mtpress.evaluation.tasks.run import Asked, find_harness, targets_of

TINY = str(BUILTIN_MODEL)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["eval", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    return shown.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tasks", "gsm8k", "--data", "x.jsonl"], "--data is for documents, not for --tasks"),
        (["--tasks", "gsm8k", "--plots", "p"], "--plots is for documents"),
        (["--tasks", "gsm8k", "--gen-kwargs", "temperature=1"], "no JSON object"),
        (["--tasks", "gsm8k", "--gen-kwargs", "[1]"], "no JSON object"),
        (["--tasks", "gsm8k", "--streams", "0"], "--streams 0: from 1"),
        (["--tasks", "gsm8k", "--num-fewshot", "-1"], "--num-fewshot -1: from 0"),
        (["--tasks", "gsm8k", "--limit", "0"], "--limit 0: from 1"),
        (["--tasks", " , "], "--tasks names no task"),
        (["--tasks", "gsm8k", "--markdown", "none/x.md"], "none/x.md: the directory to write it to does not exist"),
        (["--tasks", "gsm8k", "--include-path", "none"], "--include-path none: no such directory"),
        (["--tasks", "gsm8k", "--lm-eval", "none"], "none: does not exist; pip install 'mtpress[lm-eval]'"),
        (["--tasks", "gsm8k", "--lm-eval", sys.executable, "--mtp", "-1"], "--mtp -1"),
        (["--base", TINY, "--num-fewshot", "3"], "--num-fewshot is for --tasks"),
        (["--base", TINY, "--", "--enforce-eager"], "-- is for --tasks"),
        ([], "--base, or --tasks"),
    ],
)  # fmt: skip
def test_a_call_that_cannot_work_is_told_in_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in refused(capsys, TINY, *arguments)


def test_without_lm_eval_it_is_told_how_to_get_it(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "lm-eval is not installed beside mtpress; pip install 'mtpress[lm-eval]'" in refused(capsys, TINY, "--tasks", "gsm8k")


def test_the_environment_that_is_named_is_used(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    assert find_harness(str(tmp_path)) == tmp_path / "bin" / "python"


def test_a_server_has_no_weights_to_compare(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "http://127.0.0.1:9", "--base", TINY]) == 2
    assert "http://127.0.0.1:9: a running server is asked --tasks" in capsys.readouterr().err


def test_a_server_that_does_not_answer_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "http://127.0.0.1:9", "--tasks", "gsm8k", "--lm-eval", sys.executable]) == 2
    assert "http://127.0.0.1:9" in capsys.readouterr().err


def test_a_checkpoint_named_twice_is_told_apart_by_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert "named twice" in refused(capsys, TINY, "--base", TINY, "--tasks", "gsm8k", "--lm-eval", sys.executable)


def test_checkpoints_of_one_name_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / BUILTIN_MODEL.name).symlink_to(BUILTIN_MODEL)
    names = [target.name for target in targets_of([TINY, str(tmp_path / BUILTIN_MODEL.name)], None)]
    assert len(set(names)) == 2
    assert all(name.startswith(BUILTIN_MODEL.name) for name in names)


def test_answers_come_without_thoughts_unless_they_are_asked_for() -> None:
    assert Asked(("gsm8k",)).generation() == {"chat_template_kwargs": {"enable_thinking": False}}
    thinking = Asked(("gsm8k",), thinking=True).generation()
    assert thinking["chat_template_kwargs"] == {"enable_thinking": True}
    assert thinking["until"] == [] and thinking["max_gen_toks"] == 32768
    assert Asked(("gsm8k",), thinking=True, max_gen_toks=99).generation()["max_gen_toks"] == 99
    assert Asked(("gsm8k",), gen_kwargs={"temperature": 1.0}).generation()["temperature"] == 1.0
