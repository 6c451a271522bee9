import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

from full_size import MAX_QUEUED_BYTES, make_full_size
from mtpress.chat.encoder import ChatEncoder
from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.errors import InputError
from mtpress.models.qwen3_5 import names as qwen3_5
from mtpress.plan.plan import make_plan
from mtpress.plan.recipe import load_recipe, shipped
from qwen3_6_files import FIRST_ADDED_ID, TINY, WIDTHS
from random_weights import RandomWeights

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "full_size.py"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    out = tmp_path_factory.mktemp("full_size") / "tiny"
    make_full_size(out, layers=8, width="tiny")
    return Checkpoint.open(out)


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Qwen3.6-27B at full depth and width, as headers."""
    out = tmp_path_factory.mktemp("full_size") / "27b"
    make_full_size(out, sparse=True)
    return Checkpoint.open(out)


def test_names_and_shapes_are_those_transformers_builds(tiny: Checkpoint) -> None:
    with torch.device("meta"):
        model = Qwen3_5ForConditionalGeneration(Qwen3_5Config(**tiny.config))
    built = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    stored = {name: info.shape for name, info in tiny.tensors.items() if not name.startswith("mtp.")}
    assert stored == built
    assert {name: tiny.tensors[name].shape for name in qwen3_5.MTP_TENSORS} == qwen3_5.mtp_shapes(tiny.config)
    assert {info.dtype for info in tiny.tensors.values()} == {"BF16"}


def test_the_27b_layout(headers: Checkpoint) -> None:
    assert sum(info.num_params for info in headers.tensors.values()) == 27_781_427_952
    assert len(headers.tensors) == 1199
    assert sum(name.startswith("model.visual.") for name in headers.tensors) == 333
    assert sum(name.startswith("mtp.") for name in headers.tensors) == 15
    shapes = {name: headers.tensors[name].shape for name, _ in qwen3_5.body_shapes(headers.config, "model.language_model.")}
    assert shapes == dict(qwen3_5.body_shapes(headers.config, "model.language_model."))
    assert shapes["model.language_model.layers.3.self_attn.q_proj.weight"] == (2 * 24 * 256, 5120)
    assert shapes["model.language_model.layers.0.linear_attn.in_proj_qkv.weight"] == (2 * 16 * 128 + 48 * 128, 5120)
    assert [shard.path.name for shard in headers.shards] == [f"model-{i:05d}-of-00012.safetensors" for i in range(1, 13)]
    assert all(shard.path.stat().st_size <= 5.01e9 for shard in headers.shards)
    assert sum(shard.path.stat().st_blocks * 512 for shard in headers.shards) < 1_000_000
    text = headers.text_config
    assert (headers.config["image_token_id"], headers.config["video_token_id"]) == (248056, 248057)
    assert text["rope_parameters"]["mrope_section"] == [11, 11, 10]
    assert [i for i, kind in enumerate(text["layer_types"]) if kind == "full_attention"] == list(range(3, 64, 4))


@pytest.mark.parametrize("name", list(shipped()))
def test_every_recipe_has_a_plan(name: str, headers: Checkpoint, tiny: Checkpoint) -> None:
    assert make_plan(tiny, load_recipe(name)).output_bytes < tiny.num_bytes
    assert make_plan(headers, load_recipe(name)).output_bytes < 0.45 * headers.num_bytes


def test_equal_seeds_give_equal_bytes(tiny: Checkpoint, tmp_path: Path) -> None:
    make_full_size(tmp_path / "same", layers=8, width="tiny")
    make_full_size(tmp_path / "other", layers=8, width="tiny", seed=1)
    for path in tiny.path.iterdir():
        assert (tmp_path / "same" / path.name).read_bytes() == path.read_bytes()
    assert (tmp_path / "other/model.safetensors").read_bytes() != (tiny.path / "model.safetensors").read_bytes()


def test_values_do_not_depend_on_the_order_of_writing(tiny: Checkpoint) -> None:
    weights = RandomWeights(seed=0, num_layers=8)
    for name in sorted(tiny.tensors)[::7]:
        made = torch.cat(list(weights.pieces(name, tiny.tensors[name].shape)))
        assert torch.equal(made, tiny.read(name))


def test_the_spread_is_that_of_trained_weights(tiny: Checkpoint) -> None:
    layer = "model.language_model.layers.0."
    gate, up = tiny.read(f"{layer}mlp.gate_proj.weight").double(), tiny.read(f"{layer}mlp.up_proj.weight").double()
    assert not torch.equal(gate, up)
    assert gate.std() == pytest.approx(256**-0.5, rel=0.1)
    columns = gate.norm(dim=0)
    large = columns > 4 * columns.median()
    assert large.sum() == 4
    usual = gate[:, ~large]
    assert ((usual / usual.std()) ** 4).mean() > 3.5
    for name, info in tiny.tensors.items():
        value = tiny.read(name).float()
        assert value.isfinite().all(), name
        assert value.std() > 0 or info.num_params < 2, name
    assert tiny.read("model.language_model.norm.weight").float().mean() == pytest.approx(0, abs=0.05)
    assert tiny.read(f"{layer}linear_attn.norm.weight").float().mean() == pytest.approx(1, abs=0.05)
    assert 0 <= tiny.read(f"{layer}linear_attn.A_log").float().min() <= tiny.read(f"{layer}linear_attn.A_log").float().max() <= np.log(16)


@torch.no_grad()
def test_activations_neither_overflow_nor_vanish(tmp_path: Path) -> None:
    make_full_size(tmp_path / "deep", layers=24, width="tiny")
    model = Qwen3_5ForConditionalGeneration.from_pretrained(tmp_path / "deep", dtype=torch.bfloat16)
    ids = torch.randint(0, 256, (1, 64), generator=torch.Generator().manual_seed(0))
    states = model(input_ids=ids, output_hidden_states=True).hidden_states
    spread = [float(state.float().std()) for state in states[1:]]
    assert 0.03 < min(spread) < max(spread) < 10
    patches = torch.randn(16, 3 * 2 * 16 * 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    seen = model.model.visual(patches, grid_thw=torch.tensor([[1, 4, 4]])).pooler_output
    assert 0.03 < float(seen.float().std()) < 10


def test_the_tokenizer_has_qwens_ids_where_the_vocabulary_reaches(tiny: Checkpoint, headers: Checkpoint) -> None:
    for checkpoint, first in ((tiny, 512 - 33), (headers, FIRST_ADDED_ID)):
        encoder = ChatEncoder(checkpoint.path)
        sample = encoder.encode([{"role": "user", "content": "Grüße"}])
        assert sample.input_ids[0] == first + 1  # <|im_start|>
        assert encoder.tokenizer.convert_tokens_to_ids("<|image_pad|>") == checkpoint.config["image_token_id"] == first + 12
        assert sample.input_ids.max() < checkpoint.text_config["vocab_size"]
        assert "Grüße" in encoder.tokenizer.decode(sample.input_ids)


def test_memory_is_bounded_at_full_width(tmp_path: Path) -> None:
    """A layer and the draft head at hidden size 5120, a quarter of the MLP for the sake of time: more is written than memory is used."""
    sizes = ["--layers", "1", "--vocab-size", "512", "--vision-depth", "1", "--intermediate-size", "4352", "--json"]
    done = subprocess.run([sys.executable, str(SCRIPT), str(tmp_path / "out"), *sizes], capture_output=True, text=True, check=True)
    made = json.loads(done.stdout)
    assert made["num_bytes"] > 900_000_000
    assert made["peak_memory_bytes"] < 700_000_000
    assert MAX_QUEUED_BYTES < 100_000_000
    (tmp_path / "out/model.safetensors").unlink()


def test_a_tensor_larger_than_a_piece_is_made_in_pieces() -> None:
    pieces = [piece.shape[0] for piece in RandomWeights(0, 1).pieces("lm_head.weight", (5000, 5120))]
    assert len(pieces) > 5
    assert sum(pieces) == 5000


def test_sizes_that_cannot_be_are_refused(tmp_path: Path, tiny: Checkpoint) -> None:
    with pytest.raises(InputError, match="the vocabulary at least 289"):
        make_full_size(tmp_path / "out", width=replace(TINY, vocab_size=288))
    with pytest.raises(InputError, match="sizes are at least 1"):
        make_full_size(tmp_path / "out", width="tiny", layers=0)
    with pytest.raises(InputError, match="exists already"):
        make_full_size(tiny.path, width="tiny")
    assert not (tmp_path / "out").exists()
    assert WIDTHS["27b"].vocab_size == 248320
