"""Sources in F16, F32 and block-FP8: what is read of them is what PyTorch rounds, however it is read."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoints import Edit, weight_only
from mtpress.builtin import BUILTIN_MODEL
from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.checkpoint.direct_io import read_pieces
from mtpress.checkpoint.prefetch import Prefetch
from mtpress.checkpoint.record import RECORD_NAME
from mtpress.checkpoint.safetensors import TensorInfo, pieces, read_rows, read_tensor
from mtpress.errors import InputError
from mtpress.plan.bf16_source import bf16_source
from mtpress.stages.quantize import quantize
from source_traits import TRAITS

KINDS = ("in float16", "in float32", "in block fp8")
A_LOG = "model.language_model.layers.0.linear_attn.A_log"
EMBEDDINGS = "model.language_model.embed_tokens.weight"


def written(folder: Path, *traits: str) -> Path:
    folder.mkdir()
    for path in BUILTIN_MODEL.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    edit = Edit(folder)
    for name in traits:
        TRAITS[name](edit)
    edit.save()
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    return {kind: written(folder / kind.replace(" ", "-"), kind) for kind in KINDS}


def as_torch_rounds(path: Path) -> dict[str, torch.Tensor]:
    """In one expression a tensor: BF16 of the stored number, times its block's scale where there is one."""
    stored = load_file(path / "model.safetensors")
    found = {}
    for name, tensor in stored.items():
        if name.endswith("_scale_inv"):
            continue
        if (scales := stored.get(f"{name}_scale_inv")) is not None:
            wide = scales.float().repeat_interleave(128, 0).repeat_interleave(128, 1)
            tensor = tensor.float() * wide[: tensor.shape[0], : tensor.shape[1]]
        found[name] = tensor.to(torch.bfloat16)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_is_what_torch_rounds(kind: str, sources: dict[str, Path]) -> None:
    view, reading = bf16_source(Checkpoint.open(sources[kind]), dequantize=True)
    wanted = as_torch_rounds(sources[kind])
    assert view.tensors.keys() == wanted.keys()
    assert sum(reading.rounded.values()) == sum(info.stored is not None for info in view.tensors.values()) > 0
    groups = [list(view.tensors.values())]
    (loaded,) = list(Prefetch(groups, torch.device("cpu")).load())
    for name, info in view.tensors.items():
        assert info.dtype == "BF16"
        for found in (read_tensor(info), loaded[name], _joined(info)):
            assert torch.equal(found.view(torch.int16), wanted[name].view(torch.int16)), name
    rows = torch.tensor([5, 0, 5, 511])
    assert torch.equal(read_rows(view.tensors[EMBEDDINGS], rows), wanted[EMBEDDINGS][rows])


def _joined(info: TensorInfo) -> torch.Tensor:
    return torch.frombuffer(bytearray(b"".join(bytes(piece) for piece in read_pieces(info))), dtype=torch.bfloat16).view(info.shape)


def test_rows_are_rounded_alike_in_pieces_of_any_size(sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in KINDS:
        view, _ = bf16_source(Checkpoint.open(sources[kind]), dequantize=True)
        infos = [info for info in view.tensors.values() if info.stored is not None][:8]
        whole = [b"".join(map(bytes, pieces(info))) for info in infos]
        monkeypatch.setattr("mtpress.checkpoint.safetensors.PIECE_BYTES", 1000)
        assert [b"".join(map(bytes, pieces(info))) for info in infos] == whole
        monkeypatch.undo()


def test_a_bf16_checkpoint_is_itself() -> None:
    checkpoint = Checkpoint.open(BUILTIN_MODEL)
    view, reading = bf16_source(checkpoint)
    assert view is checkpoint
    assert reading.note is None


def test_a_log_in_float32_stays_what_the_engine_holds(tmp_path: Path) -> None:
    """vLLM keeps it in F32; where BF16 holds it exactly nothing is lost either way."""
    source = written(tmp_path / "source", "in float32")
    edit = Edit(source)
    edit.tensors[A_LOG] = edit.tensors[A_LOG] + 1e-4
    edit.save()
    view, _ = bf16_source(Checkpoint.open(source))
    assert view.tensors[A_LOG].dtype == "F32"
    assert view.tensors[A_LOG.replace("layers.0", "layers.1")].dtype == "BF16"


@pytest.mark.parametrize(
    ("kind", "value", "words"),
    [
        ("in float16", float("inf"), "F16 ends at 65504"),
        ("in float32", 3.4e38, "for which BF16 has none"),
        ("in float32", float("nan"), "NaN"),
    ],
)
def test_what_bf16_cannot_hold_is_named(kind: str, value: float, words: str, tmp_path: Path) -> None:
    source = written(tmp_path / "source", kind)
    edit = Edit(source)
    for name in ("lm_head.weight", "model.language_model.layers.1.mlp.up_proj.weight"):
        changed = dict(edit.tensors)
        edit.tensors = changed | {name: edit.tensors[name].clone()}
        edit.tensors[name][3, 1] = value
        edit.save()
        edit.tensors = changed
        with pytest.raises(InputError, match=words) as raised:
            quantize(source, tmp_path / "out", weight_only("nvfp4-mtp-vlm"), silent=True)
        assert name in str(raised.value)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_block_fp8_is_refused_unless_asked_for(sources: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="128×128 weights; --dequantize"):
        quantize(sources["in block fp8"], tmp_path / "out", weight_only("nvfp4-mtp-vlm"), silent=True)


@pytest.mark.parametrize("how", ["no scales", "other shape", "no weight"])
def test_scales_that_do_not_fit_are_named(how: str, tmp_path: Path) -> None:
    source = written(tmp_path / "source", "in block fp8")
    edit = Edit(source)
    weight = "mtp.layers.0.mlp.down_proj.weight"
    if how == "no weight":
        del edit.tensors[weight]
    elif how == "no scales":
        del edit.tensors[f"{weight}_scale_inv"]
    else:
        edit.tensors[f"{weight}_scale_inv"] = edit.tensors[f"{weight}_scale_inv"][:, :1].repeat(1, 9)
    edit.save()
    with pytest.raises(InputError, match=r"mtp\.layers\.0\.mlp\.down_proj\.weight"):
        bf16_source(Checkpoint.open(source), dequantize=True)


@pytest.mark.parametrize("kind", KINDS)
def test_the_output_is_that_of_the_rounded_source(kind: str, sources: dict[str, Path], tmp_path: Path) -> None:
    """Byte for byte, with two workers too; and the record says what was rounded."""
    plain = written(tmp_path / "plain")
    edit = Edit(plain)
    edit.tensors = as_torch_rounds(sources[kind])
    edit.save()
    recipe = weight_only("nvfp4-mtp-vlm").model_copy(update={"dequantize": True})
    result = quantize(sources[kind], tmp_path / "out", recipe, silent=True)
    quantize(sources[kind], tmp_path / "two", recipe, workers=2, silent=True)
    quantize(plain, tmp_path / "wanted", recipe, silent=True)
    for made in ("out", "two"):
        assert (tmp_path / made / "model.safetensors").read_bytes() == (tmp_path / "wanted/model.safetensors").read_bytes()
        config = json.loads((tmp_path / made / "config.json").read_text())
        assert config["text_config"]["dtype"] == config.get("dtype", "bfloat16") == "bfloat16"
    record = json.loads((tmp_path / "out" / RECORD_NAME).read_text())
    assert record["rounded_to_bf16"] == {{"in float16": "F16", "in float32": "F32"}.get(kind, "F8_E4M3"): 32 if kind == KINDS[2] else 104}
    assert record["draft_head"] == "rounded to BF16 from the source"
    assert result.rounded
    assert "not in BF16" in result.notes[0]
    assert quantize(sources[kind], tmp_path / "out", recipe, resume=True, silent=True).out == str(tmp_path / "out")
