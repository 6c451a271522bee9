"""demo: the line as a user types it, on the model that ships."""

import json
from pathlib import Path

import pytest

from mtpress.cli import main


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict, str]:
    out = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        from io import StringIO

        stdout = StringIO()
        patch.setattr("sys.stdout", stdout)
        code = main(["demo", "--json", "--out", str(out)])
    assert (out / "model.safetensors").is_file()
    return code, json.loads(stdout.getvalue()), stdout.getvalue()


def test_it_is_sound_and_says_so_in_json_only(result: tuple[int, dict, str]) -> None:
    code, content, text = result
    assert code == 0
    assert text.lstrip().startswith("{")
    assert len(content["answers"]) >= 8


def test_speculation_changes_nothing_but_the_number_of_steps(result: tuple[int, dict, str]) -> None:
    content = result[1]
    assert all(all(answer["same_text"].values()) for answer in content["answers"])
    for build in ("BF16", "NVFP4"):
        assert content["acceptance"][build][0] >= 0.7
        assert content["tokens_per_step"][build] > 2


def test_the_quantized_build_is_smaller_and_close(result: tuple[int, dict, str]) -> None:
    content = result[1]
    assert content["bytes"]["NVFP4"] < 0.65 * content["bytes"]["BF16"]
    assert 0 < content["kl"] < 0.1
    assert content["top1_agreement"] > 0.9


def test_an_existing_out_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--json", "--out", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err
