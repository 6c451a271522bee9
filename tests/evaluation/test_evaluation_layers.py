"""Streamed bodies against transformers' whole model, quantized or not; KL against its definition; where an error comes from."""

import base64
import io
import json
import shutil
from contextlib import closing
from pathlib import Path

import pytest
import torch
from PIL import Image
from runs import SILENT, Ran, run
from torch import Tensor, nn
from transformers import Qwen3_5ForConditionalGeneration

from checkpoints import PREFIX, Edit
from mtpress.builtin import BUILTIN_MODEL
from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.errors import FindingError
from mtpress.evaluation import vocabulary
from mtpress.evaluation.bodies import Body
from mtpress.evaluation.drafts import draft
from mtpress.models.hidden_states import DiskStates
from mtpress.quant_config.emulation import EMULATIONS
from mtpress.stages.quantize import quantize


def whole_model(path: Path, bf16: Path) -> nn.Module:
    """transformers' model of the small checkpoint, its quantized linears replaced one by one, with scales of their own."""
    model = Qwen3_5ForConditionalGeneration.from_pretrained(bf16, dtype=torch.bfloat16, attn_implementation="sdpa", local_files_only=True)
    if path != bf16:
        stored = Checkpoint.open(path)
        for module in [name.removesuffix(".weight_scale_2") for name in stored.tensors if name.endswith(".weight_scale_2")]:
            parts = {key.removeprefix(f"{module}."): stored.read(key) for key in stored.tensors if key.startswith(f"{module}.")}
            model.set_submodule(module, EMULATIONS["nvfp4"].make(parts, [parts], True, torch.bfloat16))
    return model.eval()


@torch.no_grad()
def logits_of(path: Path, bf16: Path, ran: Ran) -> list[Tensor]:
    model = whole_model(path, bf16)
    pictures: dict[int, dict[str, Tensor]] = {}
    for i, sample in enumerate(ran.documents.samples):
        if sample.pixel_values is not None and sample.image_grid_thw is not None:
            kinds = (sample.input_ids == ran.streams[0].mover.config.image_token_id).int().unsqueeze(0)
            pixels = sample.pixel_values.to(torch.bfloat16)
            pictures[i] = {"pixel_values": pixels, "image_grid_thw": sample.image_grid_thw, "mm_token_type_ids": kinds}
    samples = enumerate(ran.documents.samples)
    return [model(input_ids=sample.input_ids.unsqueeze(0), **pictures.get(i, {})).logits[0].double() for i, sample in samples]


def test_likelihoods_and_kl_are_those_of_the_whole_models(
    small_bf16: Path, small_nvfp4: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocabulary, "LM_HEAD_BYTES", 2 * 64 * 2 * 128)  # three pieces of 128, 128 and 32 rows
    monkeypatch.setattr(vocabulary, "LOGITS_BYTES", 4 * 128 * 7)
    made = small_nvfp4["nvfp4-mtp-vlm"]
    with run(small_bf16, [made], tmp_path / "run") as ran:
        assert list(vocabulary._pieces([stream.body for stream in ran.streams])) == [(0, 128), (128, 256), (256, 288)]
        base, ours = (logits_of(path, small_bf16, ran) for path in (small_bf16, made))
    for found, logits in zip(ran.figures, (base, ours), strict=True):
        assert torch.equal(found.top1, torch.cat(logits).argmax(-1))
        nll = [
            -of.log_softmax(-1)[:-1].gather(-1, sample.input_ids[1:, None]).squeeze(-1)
            for of, sample in zip(logits, ran.documents.samples, strict=True)
        ]
        got = torch.cat([part[:-1] for part in found.nll.split(ran.documents.lengths)])
        assert torch.allclose(got, torch.cat(nll), atol=1e-6, rtol=0)
    p, q = (torch.cat(logits).log_softmax(-1) for logits in (base, ours))
    expected = (p.exp() * (p - q)).sum(-1)
    assert expected.max() > 1e-4
    assert torch.allclose(ran.figures[1].kl, expected, atol=1e-7, rtol=1e-3)


def test_bf16_against_itself_is_exactly_nothing(small_bf16: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(small_bf16, tmp_path / "copy"))
    with run(small_bf16, [copy], tmp_path / "run") as ran:
        base, same = ran.figures
        assert bool((same.kl == 0).all()) and len(same.kl) == ran.documents.num_tokens > 50
        assert torch.equal(same.nll.nan_to_num(), base.nll.nan_to_num()) and torch.equal(same.top1, base.top1)
        assert all((e.mixer, e.mlp, e.layer_output, e.accumulated) == (0, 0, 0, 0) for e in ran.errors["copy"])


def test_an_error_is_found_in_the_component_it_comes_from(small_bf16: Path, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(small_bf16, tmp_path / "changed"))
    e = Edit(changed)
    e.tensors[f"{PREFIX}layers.1.mlp.down_proj.weight"] *= 1.25
    e.save()
    with run(small_bf16, [changed], tmp_path / "run") as ran:
        errors = ran.errors["changed"]
    assert [error.component for error in errors] == ["gdn", "gdn", "gdn", "attention"]
    assert [error.mixer for error in errors] == [0, 0, 0, 0]
    assert [error.mlp for error in errors] == [0, pytest.approx(0.25, rel=0.01), 0, 0]
    assert [error.layer_output > 0 for error in errors] == [False, True, False, False]
    assert [error.accumulated > 0 for error in errors] == [False, True, True, True]
    assert ran.figures[1].kl.max() > 0


def test_a_checkpoint_that_computes_nan_is_a_finding(small_bf16: Path, small_nvfp4: dict[str, Path], tmp_path: Path) -> None:
    broken = Path(shutil.copytree(small_nvfp4["nvfp4-mtp-vlm"], tmp_path / "broken"))
    e = Edit(broken)
    e.tensors[f"{PREFIX}layers.2.mlp.up_proj.weight_scale"].view(torch.uint8)[0, 0] = 0x7F
    e.save()
    with (
        pytest.raises(FindingError, match=r"broken: layer 2 gives NaN .* stored so in .*layers.2.mlp.up_proj;"),
        run(small_bf16, [broken], tmp_path / "run"),
    ):
        pass


def test_an_fp8_cache_changes_attention_alone(small_bf16: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(small_bf16, tmp_path / "copy"))
    with run(small_bf16, [copy], tmp_path / "run", kv_cache="fp8") as ran:
        assert [error.mixer > 0 for error in ran.errors["copy"]] == [False, False, False, True]
        assert {error.mlp for error in ran.errors["copy"]} == {0}
        assert not ran.streams[0].body.kv_cache_fp8


def test_several_checkpoints_in_one_pass_are_what_each_is_alone(small_bf16: Path, small_formats: dict[str, Path], tmp_path: Path) -> None:
    paths = [small_formats[kind] for kind in ("auto-round", "compressed-tensors")]
    with run(small_bf16, paths, tmp_path / "both") as both:
        assert isinstance(both.streams[1].body, Body)
        for path, figures in zip(paths, both.figures[1:], strict=True):
            with run(small_bf16, [path], tmp_path / path.name) as alone:
                assert torch.equal(alone.figures[1].kl, figures.kl)
                assert alone.errors[path.name] == both.errors[path.name]
                assert figures.kl.max() > 0


def test_pictures_are_seen_and_their_placeholders_not_predicted(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (96, 64), "red").save(buffer, "PNG")
    uri = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    asked = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": "What is in the image?"}]
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": "A red square."}]
    data = tmp_path / "picture.jsonl"
    data.write_text(json.dumps({"messages": turns}) + "\n" + json.dumps({"text": "85 + 33 = 118."}) + "\n")
    made = tmp_path / "made"
    quantize(BUILTIN_MODEL, made, "nvfp4-mtp-vlm", calibration=["builtin"], silent=True)
    with run(BUILTIN_MODEL, [made], tmp_path / "run", data=data) as ran:
        base, ours = (logits_of(path, BUILTIN_MODEL, ran) for path in (BUILTIN_MODEL, made))
        (tmp_path / "drafts").mkdir()
        with closing(DiskStates(tmp_path / "drafts", ran.documents.lengths, 256, stream="hidden-drafts")) as states:
            found = draft(ran.streams[1], ran.figures[1].top1, states, SILENT)
    p, q = (torch.cat(logits).log_softmax(-1) for logits in (base, ours))
    expected = (p.exp() * (p - q)).sum(-1)
    assert torch.equal(ran.figures[0].top1, torch.cat(base).argmax(-1))
    assert torch.allclose(ran.figures[1].kl, expected, atol=1e-7, rtol=1e-3) and expected.max() > 1e-4
    ids, counted = ran.documents.samples[0].input_ids, ran.documents.counted[0]
    placeholders = ids[1:] == ran.streams[0].mover.config.image_token_id
    assert int(placeholders.sum()) > 1 and torch.equal(counted, ~placeholders)
    assert not bool((found.counted[0][0] & placeholders).any()) and bool(found.counted[0][0].any())
