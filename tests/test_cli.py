import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mtpress import __version__
from mtpress.cli import STAGES, main
from mtpress.errors import FindingError
from mtpress.plan.recipe import shipped
from mtpress.stages import recipes

HEAVY = ("torch", "transformers", "pydantic", "numpy", "rich", "yaml", "huggingface_hub")


def imported(statements: str) -> set[str]:
    """The heavy packages that a fresh interpreter has loaded after these statements."""
    code = f"import sys\n{statements}\nprint(','.join(m for m in {HEAVY!r} if m in sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stderr.strip().split(",")) - {""}


def test_importing_mtpress_loads_nothing_heavy() -> None:
    assert imported("import mtpress, mtpress.cli, mtpress.checkpoint.checkpoint, mtpress.errors") == set()


def test_help_loads_nothing_heavy() -> None:
    call = "from mtpress.cli import main\ntry:\n    main({})\nexcept SystemExit as e:\n    assert not e.code"
    assert imported(call.format(["--help"])) == set()
    assert imported(call.format(["--version"])) == set()


def test_a_stage_loads_only_itself() -> None:
    assert imported("from mtpress.cli import main\nmain(['recipes', '--json'])") == {"yaml", "pydantic"}


def test_help_names_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    for stage in STAGES:
        assert stage.name in shown
        assert (Path(recipes.__file__).parent / f"{stage.name}.py").is_file()


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"mtpress {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "STAGE"),
        (["qantize"], "qantize"),
        (["--json"], "STAGE"),
        (["--bogus", "quantize"], "SRC"),
        (["quantize"], "SRC"),
        (["quantize", "a", "b"], "--recipe"),
        (["quantize", "a", "b", "--recipe", "nvfp4-mtp-vlm", "--device", "tpu"], "tpu"),
        (["quantize", "a", "b", "--recipe", "nvfp4-mtp-vlm", "--weight-only", "much"], "much"),
        (["recipes", "a", "b"], "b"),
        (["recipes", "--nonsense"], "--nonsense"),
        (["recipes", "--js"], "--js"),
    ],
)
def test_a_wrong_call_is_one_line_and_exit_code_2(arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    shown = capsys.readouterr()
    assert left.value.code == 2
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert word in shown.err
    assert "--help" in shown.err


def test_json_prints_one_document_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "--json"]) == 0
    shown = capsys.readouterr()
    assert list(json.loads(shown.out)["summaries"]) == list(shipped())
    assert shown.err == ""


def test_json_tells_of_an_error_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "nvfp4-mtp-vml", "--json"]) == 2
    shown = capsys.readouterr()
    document = json.loads(shown.out)
    assert document["exit_code"] == 2
    assert "did you mean nvfp4-mtp-vlm?" in document["error"]
    assert shown.err == f"mtpress recipes: {document['error']}\n"


def raising(error: BaseException) -> Any:
    def run(options: object) -> tuple[int, dict[str, Any]]:
        raise error

    return run


def test_ctrl_c_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(recipes, "run", raising(KeyboardInterrupt()))
    assert main(["recipes"]) == 130
    assert "ended by SIGINT" in capsys.readouterr().err


def test_a_finding_is_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(recipes, "run", raising(FindingError("it ran\nand is wrong")))
    assert main(["recipes"]) == 1
    assert capsys.readouterr().err == "mtpress recipes: it ran and is wrong\n"


def test_a_bug_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes, "run", raising(AssertionError("a bug")))
    with pytest.raises(AssertionError, match="a bug"):
        main(["recipes"])


def test_a_reader_that_leaves_early_is_no_error() -> None:
    shell = f"{sys.executable} -m mtpress recipes nvfp4-mtp-vlm --json | head -c 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True)
    assert done.stdout == "{0\n"
    assert done.stderr == ""
