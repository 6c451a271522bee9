"""check as a command and as a function: verdict, exit codes, JSON, what it reads and what it leaves alone."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from checkpoints import Edit
from full_size import make_full_size
from mtpress.builtin import BUILTIN_MODEL
from mtpress.checkpoint.checkpoint import INDEX_NAME, Checkpoint
from mtpress.checkpoint.shard_writer import shard_header
from mtpress.cli import main
from mtpress.errors import InputError
from mtpress.plan.plan import make_plan
from mtpress.plan.recipe import load_recipe, shipped
from mtpress.quantization.output_files import carried_files, config_files
from mtpress.rules.hashes import RULES as HASH_RULES
from mtpress.rules.registry import BASE_RULES, BOUND_RULES, OPEN_RULES, STATIC_RULES
from mtpress.stages.check import check
from mtpress.stages.quantize import quantize

VLM = "nvfp4-mtp-vlm"


@pytest.fixture
def made(small_nvfp4: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_nvfp4[VLM], tmp_path / "made"))


@pytest.mark.parametrize("recipe", [name for name in shipped() if load_recipe(name).format == "nvfp4"])
def test_what_quantize_makes_is_sound(recipe: str, small_bf16: Path, small_nvfp4: dict[str, Path]) -> None:
    result = check(small_nvfp4[recipe], base=small_bf16, hashes=True, silent=True)
    assert result.sound
    assert {finding.id for finding in result.findings} == ({"vision-stripped"} if load_recipe(recipe).vision == "drop" else set())
    assert result.engine_flags == (("--language-model-only",) if load_recipe(recipe).vision == "drop" else ())
    assert result.format == "modelopt NVFP4 (W4A4)"
    assert result.num_quantized == 25
    assert result.num_rules == len([*OPEN_RULES, *STATIC_RULES, *BASE_RULES, *BOUND_RULES, *HASH_RULES])
    assert result.comparison is not None
    assert 0.08 < min(result.comparison.error.values()) <= max(result.comparison.error.values()) < 0.11


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = main(["check", *arguments, "--json"])
    shown = capsys.readouterr()
    assert shown.err == "" or code == 2
    return code, json.loads(shown.out)


def test_json_of_a_sound_checkpoint(made: Path, small_bf16: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, result = run(capsys, str(made), "--base", str(small_bf16), "--hashes")
    assert code == 0
    assert result["sound"] is True
    assert result["findings"] == []
    assert result["num_findings"] == {"error": 0, "warning": 0, "note": 0}
    assert result["comparison"]["num_quantized"] == 25
    assert result["num_files_hashed"] == 9


def test_json_of_a_broken_checkpoint(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit = Edit(made)
    edit.without(lambda name: name == "lm_head")
    edit.save()
    code, result = run(capsys, str(made))
    assert code == 1
    assert result["sound"] is False
    finding = result["findings"][0]
    assert (finding["id"], finding["severity"], finding["where"]) == ("ignore-too-little", "error", ["lm_head"])
    assert "mtpress repair" in finding["remedy"]


def test_warnings_leave_it_sound(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (made / "generation_config.json").unlink()
    code, result = run(capsys, str(made))
    assert code == 0
    assert result["num_findings"] == {"error": 0, "warning": 1, "note": 0}


def test_the_table_and_the_verdict(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit = Edit(made)
    for name in [n for n in edit.tensors if n.startswith("mtp.")]:
        del edit.tensors[name]
    edit.save()
    assert main(["check", str(made)]) == 1
    shown = capsys.readouterr().out
    assert "mtp-missing" in shown
    assert "mtp.fc.weight" in shown
    assert "… and 12 more" in shown
    assert shown.splitlines()[-1].startswith(f"NOT SOUND: 1 error by {len(OPEN_RULES) + len(STATIC_RULES)} rules in ")


def test_sound_is_the_last_word(made: Path, small_bf16: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(made), "--base", str(small_bf16), "--hashes"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith(f"{made}: modelopt NVFP4 (W4A4), ")
    assert "67 tensors equal to the base bit for bit; 25 quantized" in shown[2]
    assert shown[-1].startswith("sound: nothing found by ")


@pytest.mark.parametrize("damage", ["shard", "index", "config"])
def test_a_checkpoint_that_cannot_be_opened(damage: str, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = {"shard": "model.safetensors", "index": INDEX_NAME, "config": "config.json"}[damage]
    (made / name).write_bytes((made / name).read_bytes()[:-100])
    code, result = run(capsys, str(made))
    assert code == 1
    assert [finding["id"] for finding in result["findings"]] == ["unreadable"]
    assert name in result["findings"][0]["message"]


def test_what_is_no_checkpoint(tmp_path: Path, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([str(tmp_path / "nothing")], [str(tmp_path)], [str(made), "--base", str(tmp_path)]):
        code, result = run(capsys, *arguments)
        assert code == 2
        assert "error" in result
    (made / "mtpress.json").unlink()
    assert run(capsys, str(made), "--hashes")[0] == 2


def test_another_family(made: Path) -> None:
    edit = Edit(made)
    edit.config["model_type"] = "llama"
    edit.save()
    with pytest.raises(InputError, match="model_type 'llama' is not supported"):
        check(made)


def test_a_verdict_says_what_was_not_looked_at(made: Path, small_bf16: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine, files, scales = "not started in an engine (--engine)", "files not hashed (--hashes)", "scales of activations not judged"
    assert check(made, silent=True).not_looked_at == ("weights not read (--values, --base)", scales, files, engine)
    assert check(made, values=True, silent=True).not_looked_at[0] == "weights not compared (--base)"
    assert check(made, base=small_bf16, hashes=True, silent=True).not_looked_at == (engine,)
    assert main(["check", str(made), "--base", str(small_bf16), "--hashes"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"; not looked at: {engine}")


@pytest.mark.parametrize("entries", [{}, {"config.json": ""}])
def test_weights_without_a_hash_are_not_called_unaltered(entries: dict[str, str], made: Path) -> None:
    edit = Edit(made)
    edit.tensors["lm_head.weight"] = -edit.tensors["lm_head.weight"]
    edit.change("mtpress.json", output_sha256=entries)
    edit.save()
    found = {finding.id: finding.where for finding in check(made, hashes=True, silent=True).findings if finding.severity == "error"}
    assert "model.safetensors" in found["file-unverified"]
    edit.change("mtpress.json", stage="repair", output_sha256={"config.json": ""})
    result = check(made, hashes=True, silent=True)
    assert {finding.id: finding.where for finding in result.findings}["weights-unhashed"] == ("model.safetensors",)


def test_code_beside_the_weights_is_told(made: Path) -> None:
    (made / "modeling.py").write_text("raise SystemExit")
    assert [(finding.id, finding.where) for finding in check(made, silent=True).findings] == [("code-beside", ("modeling.py",))]


def test_hashes(made: Path) -> None:
    (made / "chat_template.jinja").write_text("{{ messages }}")
    (made / "tokenizer_config.json").unlink()
    (made / "README.md").write_text("added later")
    result = check(made, hashes=True, silent=True)
    found = {finding.id: finding.where for finding in result.findings}
    assert found["file-changed"] == ("chat_template.jinja",)
    assert found["file-gone"] == ("tokenizer_config.json",)
    assert found["file-unrecorded"] == ("README.md",)


def test_without_base_no_torch_and_no_weights(made: Path) -> None:
    """Only headers and scalars are read: the data of a shard may be holes, and torch stays out."""
    code = "import sys; from mtpress.stages.check import check; assert check(sys.argv[1]).sound; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(made)], check=True)


@pytest.fixture(scope="module")
def headers_27b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3.6-27B in NVFP4 as quantize lays it out: true headers and config files, weights that are holes, scales of 10⁻⁴."""
    folder = tmp_path_factory.mktemp("27b")
    make_full_size(folder / "bf16", sparse=True)
    plan = make_plan(Checkpoint.open(folder / "bf16"), load_recipe(VLM))
    out = folder / "nvfp4"
    out.mkdir()
    for name, tensors in plan.shards.items():
        header = shard_header(tensors, {"format": "pt"})
        with (out / name).open("wb") as file:
            file.write(header)
            file.truncate(len(header) + sum(tensor.num_bytes for tensor in tensors))
            position = len(header)
            for tensor in tensors:
                if tensor.dtype == "F32" and tensor.num_bytes == 4:
                    file.seek(position)
                    file.write(b"\x17\xb7\xd1\x38")
                position += tensor.num_bytes
    weight_map = {tensor.name: name for name, tensors in plan.shards.items() for tensor in tensors}
    (out / INDEX_NAME).write_text(json.dumps({"metadata": {"total_size": plan.output_bytes}, "weight_map": weight_map}))
    for name, content in {**carried_files(plan.source), **config_files(plan)}.items():
        (out / name).write_bytes(content)
    return out


def test_a_27b_takes_a_second(headers_27b: Path) -> None:
    started = time.process_time()
    result = check(headers_27b)
    spent = time.process_time() - started
    assert result.findings == ()
    assert result.num_quantized == 400
    assert result.num_bytes > 20e9
    assert spent < 2


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--engine", "nowhere"], "nowhere"),
        (["--engine", "--mtp", "0"], "--mtp"),
        (["--engine", "--acceptance-floor", "1.5"], "--acceptance-floor"),
    ],
)
def test_what_the_engine_cannot_be_asked_is_one_line(
    arguments: list[str], word: str, small_nvfp4: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(small_nvfp4["nvfp4-mtp-vlm"]), *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert word in shown.err
    assert shown.err.count("\n") == 1


def test_what_quantize_makes_in_int4_is_sound(tmp_path: Path) -> None:
    tiny = BUILTIN_MODEL
    quantize(tiny, tmp_path / "int4", load_recipe("int4-mtp-vlm"), silent=True)
    result = check(tmp_path / "int4", base=tiny, hashes=True, silent=True)
    assert result.findings == ()
    assert (result.format, result.num_quantized) == ("AutoRound INT4 g128", 25)
    assert result.comparison is not None
    assert len(result.comparison.int4) == 25
    assert 0.07 < min(result.comparison.error.values()) <= max(result.comparison.error.values()) < 0.15
