"""mtpress eval as it is called: JSON, tables, pictures, one-line refusals."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch

from checkpoints import Edit
from mtpress.builtin import BUILTIN_MODEL, CALIBRATION_FILE
from mtpress.cli import main
from mtpress.errors import InputError
from mtpress.evaluation.plots import draw
from mtpress.evaluation.result import EvalResult, markdown
from mtpress.stages.eval import evaluate

TEXTS = ("A red kite over Brook.", "12 + 30 = 42. 7 + 8 = 15.", "the tools are old, the hands are new", "so it goes, and on")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture(scope="module")
def pair(small_formats: dict[str, Path]) -> list[Path]:
    return [small_formats["compressed-tensors"], small_formats["auto-round"]]


@pytest.fixture(scope="module")
def result(small_bf16: Path, pair: list[Path], data: Path) -> EvalResult:
    return evaluate(pair, small_bf16, [str(data)], resamples=50, silent=True)


def test_the_figures_of_every_checkpoint(result: EvalResult, pair: list[Path]) -> None:
    assert list(result.checkpoints) == [path.name for path in pair]
    for path, found in zip(pair, result.checkpoints.values(), strict=True):
        figures = found.groups["all"]
        assert found.num_bytes < result.base.num_bytes
        assert figures.num_documents == len(TEXTS) and figures.num_tokens == result.data["texts"]["num_tokens"] - len(TEXTS)
        assert 0 < figures.kl_median.value <= figures.kl_p99.value <= figures.kl_p999.value <= figures.kl_max
        assert figures.kl_mean.low is not None and figures.kl_mean.low < figures.kl_mean.value < (figures.kl_mean.high or 0)
        assert figures.perplexity.value == pytest.approx(result.base.perplexity["all"].value * figures.perplexity_ratio.value)
        assert sum(held.num_tokens for held in found.kl_by_position) == figures.num_tokens
        total = sum(held.num_tokens * held.kl_mean for held in found.kl_by_position)
        assert total / figures.num_tokens == pytest.approx(figures.kl_mean.value)
        assert [len(found.layers), found.path] == [4, str(path)]
        assert found.acceptance is not None and len(found.acceptance) == 3
    (two,) = result.pairs
    first, second = (result.checkpoints[name].groups["all"] for name in (two.first, two.second))
    assert two.kl_ratio.value == pytest.approx(second.kl_mean.value / first.kl_mean.value)
    assert two.top1_difference.value == pytest.approx(second.top1_agreement.value - first.top1_agreement.value)


def in_fp8_blocks(folder: Path) -> Path:
    """The built-in model as Qwen releases its own in FP8: codes with a scale for 128×128 of them, the draft head and lm_head in BF16."""
    made = Path(shutil.copytree(BUILTIN_MODEL, folder / "fp8"))
    e = Edit(made)
    kept = ("in_proj_a", "in_proj_b")
    names = [
        name for name, tensor in e.tensors.items() if ".layers." in name and not name.startswith("mtp.") and tensor.ndim == 2
        and not any(f".{module}." in name for module in kept) and "visual" not in name
    ]  # fmt: skip
    for name in names:
        n, k = e.tensors[name].shape
        blocks = e.tensors[name].float().view(n // 128, 128, k // 128, 128)
        scales = blocks.abs().amax((1, 3)) / 448
        codes = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
        e.tensors |= {name: codes.view(n, k), name.removesuffix("weight") + "weight_scale_inv": scales.to(torch.bfloat16)}
    e.config["quantization_config"] = {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head", *kept, "mtp", "visual"],
    }  # fmt: skip
    e.save()
    return made


def test_a_release_in_fp8_blocks_is_measured(tmp_path: Path) -> None:
    found = evaluate([in_fp8_blocks(tmp_path)], BUILTIN_MODEL, limit=4, resamples=2, silent=True).checkpoints["fp8"]
    assert found.forms == {"FP8": 25}
    assert 1e-6 < found.groups["all"].kl_mean.value < 5e-4  # of NVFP4: some 1e-3
    assert all(0.01 < layer.mlp < 0.04 and 0.01 < layer.mixer < 0.06 for layer in found.layers)
    assert found.acceptance is not None


def test_the_command_line(small_bf16: Path, pair: list[Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["eval", *map(str, pair), "--base", str(small_bf16), "--data", str(data), "--limit", "1", "--resamples", "20"]
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    assert main([*arguments, "--markdown", str(tmp_path / "out.md"), "--scratch", str(scratch)]) == 0
    shown = capsys.readouterr()
    assert all(path.name in shown.out for path in pair) and "drafts accepted" in shown.out and "error by layer" in shown.out
    assert "tokens·layers/s" in shown.err and "RAM" in shown.err and "100%" in shown.err
    assert list(scratch.iterdir()) == []
    written = (tmp_path / "out.md").read_text()
    assert written.count("| compressed-tensors |") == 2 and "KL in nats" in written


@pytest.mark.parametrize("name", ["model.language_model.norm.weight", "lm_head.weight"])
def test_nan_behind_the_layers_is_a_finding(
    name: str, small_bf16: Path, pair: list[Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    e = Edit(Path(shutil.copytree(pair[0], tmp_path / "broken")))
    e.tensors[name].view(-1)[0] = float("nan")
    e.save()
    assert main(["eval", str(e.path), "--base", str(small_bf16), "--data", str(data), "--limit", "1", "--resamples", "2", "--json"]) == 1
    said = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["error"]
    assert f"{e.path}: the final norm and lm_head give NaN or infinite values, stored so in {name};" in said


def test_json_is_the_result_and_a_second_run_gives_the_same(
    result: EvalResult, small_bf16: Path, pair: list[Path], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["eval", *map(str, pair), "--base", str(small_bf16), "--data", str(data), "--resamples", "50", "--json"]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert "NaN" not in printed.out and "Infinity" not in printed.out and printed.err == ""
    once, again = json.loads(json.dumps(result.as_json())), json.loads(printed.out)
    for run in (once, again):
        run.pop("seconds"), run.pop("peak_memory_bytes")
    assert again == once


def test_a_document_of_the_calibration_set_is_a_finding(
    small_bf16: Path, pair: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leaked = tmp_path / "leaked.jsonl"
    leaked.write_text("\n".join([*CALIBRATION_FILE.read_text().splitlines()[:1], json.dumps({"text": "a text of its own"})]))
    code = main(["eval", str(pair[0]), "--base", str(small_bf16), "--data", str(leaked), "--max-seq-len", "64", "--resamples", "10"])
    assert code == 1
    assert "1 of 2 documents are in builtin" in capsys.readouterr().out


def test_what_cannot_be_compared_is_one_line_before_weights_are_read(
    small_bf16: Path, small_nvfp4: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], data: Path
) -> None:
    other = Path(shutil.copytree(small_bf16, tmp_path / "other"))
    e = Edit(other)
    e.tensors.pop("lm_head.weight")
    e.save()
    picture = tmp_path / "picture.jsonl"
    uri = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    rows = {"messages": [{"role": "user", "content": [{"type": "image", "image": uri}, {"type": "text", "text": "what?"}]}]}
    picture.write_text(json.dumps(rows))
    base, text_only = str(small_bf16), str(small_nvfp4["nvfp4-mtp-text"])
    cases = {
        "lm_head.weight is missing": [str(other)],
        "no such directory": [str(tmp_path / "nowhere")],
        "has no vision tower": [text_only, "--data", str(picture)],
        "--resamples 1: from 2": [base, "--resamples", "1"],
        "--scratch": [base, "--data", str(data), "--scratch", str(tmp_path / "nowhere")],
        "the directory to write it to does not exist": [base, "--markdown", str(tmp_path / "no" / "where.md")],
    }
    for said, arguments in cases.items():
        assert main(["eval", *arguments, "--base", base]) == 2, said
        err = capsys.readouterr().err
        assert said in err and len(err.splitlines()) == 1, err


def test_a_disk_that_is_too_small_is_refused(small_bf16: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mtpress.errors import ResourceError

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 5))  # type: ignore[attr-defined]
    with pytest.raises(ResourceError, match="--scratch DIR"):
        evaluate([small_bf16], small_bf16, [str(data)], silent=True)
    with pytest.raises(InputError, match="at least one"):
        evaluate([], small_bf16)


def test_the_tables_in_markdown(result: EvalResult) -> None:
    written = markdown(result)
    rows = [line for line in written.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows if line.startswith(("| BF16 |", "| checkpoint | bytes"))}) <= 2
    for name, found in result.checkpoints.items():
        line = next(row for row in rows if row.startswith(f"| {name} |"))
        assert f"{found.groups['all'].kl_mean.value:.4g} [" in line
        assert f"## Error by layer, %: {name}" in written


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is an extra")
def test_three_pictures_are_drawn_and_are_the_same_each_time(result: EvalResult, tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    one, two = (draw(result, tmp_path / folder) for folder in ("one", "two"))
    assert [path.name for path in one] == ["kl-by-position.svg", "error-by-layer.svg", "size-against-kl.svg"]
    for first, second in zip(one, two, strict=True):
        content = first.read_text()
        assert content == second.read_text()
        assert all(f"<!-- {name} -->" in content for name in result.checkpoints)
    assert "<!-- accumulated -->" in one[1].read_text()
