"""The streamed forward equals transformers' whole model, bit for bit on CPU at the same dtype."""

from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from transformers import Qwen3_5ForConditionalGeneration

from mtpress.builtin import BUILTIN_MODEL
from mtpress.chat import ChatEncoder, Sample
from mtpress.checkpoint import Checkpoint, read_rows
from mtpress.errors import InputError
from mtpress.models.qwen3_5_layers import StreamedBody, model_config


@pytest.fixture(scope="module")
def whole() -> Qwen3_5ForConditionalGeneration:
    return Qwen3_5ForConditionalGeneration.from_pretrained(BUILTIN_MODEL, dtype=torch.bfloat16).eval()


def stream(checkpoint: Checkpoint, samples: list[Sample], seen=None) -> list[torch.Tensor]:
    body = StreamedBody(checkpoint.config, torch.device("cpu"))
    body.embed(samples, lambda ids: read_rows(checkpoint.tensors["model.language_model.embed_tokens.weight"], ids))
    if any(s.pixel_values is not None for s in samples):
        body.see({n.removeprefix("model.visual."): checkpoint.read(n) for n in checkpoint.tensors if n.startswith("model.visual.")})
    for i in range(body.text_config.num_hidden_layers):
        start = f"model.language_model.layers.{i}."
        body.layer(i, {n.removeprefix(start): checkpoint.read(n) for n in checkpoint.tensors if n.startswith(start)}, seen)
    return body.final_norm(checkpoint.read("model.language_model.norm.weight"))


def picture(tmp_path: Path, name: str, size: tuple[int, int], color: str) -> dict:
    image = Image.new("RGB", size, (120, 120, 120))
    ImageDraw.Draw(image).ellipse((8, 8, size[0] - 9, size[1] - 9), fill=color)
    image.save(tmp_path / name)
    return {"type": "image_url", "image_url": {"url": str(tmp_path / name)}}


def test_text_states_equal_the_whole_model(whole: Qwen3_5ForConditionalGeneration) -> None:
    encoder = ChatEncoder(BUILTIN_MODEL)
    texts = ["Mia lives in Brook.", "What is 12 + 34? " * 30, "def add(a, b):\n    return a + b\n" * 9]
    samples = [encoder.encode_text(t) for t in texts] + [encoder.encode([{"role": "user", "content": "Hello!"}])]
    assert max(len(s.input_ids) for s in samples) > 128  # several chunks of the delta rule
    for sample, states in zip(samples, stream(Checkpoint.open(BUILTIN_MODEL), samples), strict=True):
        with torch.no_grad():
            expected = whole.model(input_ids=sample.input_ids[None], use_cache=False).last_hidden_state
        assert torch.equal(states, expected)


def test_picture_states_equal_the_whole_model(whole: Qwen3_5ForConditionalGeneration, tmp_path: Path) -> None:
    encoder = ChatEncoder(BUILTIN_MODEL)
    parts = [picture(tmp_path, "a.png", (96, 64), "red"), {"type": "text", "text": "and"}, picture(tmp_path, "b.png", (64, 128), "blue")]
    sample = encoder.encode([{"role": "user", "content": parts}])
    text = encoder.encode([{"role": "user", "content": "Hello!"}])
    states = stream(Checkpoint.open(BUILTIN_MODEL), [sample, text])
    kinds = (sample.input_ids[None] == whole.config.image_token_id).int()
    with torch.no_grad():
        expected = whole.model(
            input_ids=sample.input_ids[None],
            pixel_values=sample.pixel_values.to(torch.bfloat16),
            image_grid_thw=sample.image_grid_thw,
            mm_token_type_ids=kinds,
            use_cache=False,
        ).last_hidden_state
    assert int(kinds.sum()) == 6 + 8
    assert torch.equal(states[0], expected)


def test_linears_are_seen_with_their_real_inputs(whole: Qwen3_5ForConditionalGeneration) -> None:
    sample = ChatEncoder(BUILTIN_MODEL).encode_text("Leo went to the market with the cat.")
    seen: dict[str, list[torch.Tensor]] = {}
    stream(Checkpoint.open(BUILTIN_MODEL), [sample], lambda name, x: seen.setdefault(name, []).append(x))
    expected: list[torch.Tensor] = []
    hook = whole.model.language_model.layers[2].mlp.down_proj.register_forward_pre_hook(lambda _, args: expected.append(args[0]))
    with torch.no_grad():
        whole.model(input_ids=sample.input_ids[None], use_cache=False)
    hook.remove()
    assert torch.equal(seen["mlp.down_proj"][2], expected[0])
    assert len(seen["self_attn.q_proj"]) == 1
    assert len(seen["linear_attn.in_proj_qkv"]) == 3


def test_a_config_transformers_refuses_is_one_line() -> None:
    config = Checkpoint.open(BUILTIN_MODEL).config
    with pytest.raises(InputError, match="transformers does not accept it"):
        model_config({**config, "text_config": {**config["text_config"], "hidden_size": "wide"}})
