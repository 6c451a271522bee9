"""Ways in which a source differs from a release, each with a name; any of them can be put together.

In: `Edit` of a BF16 checkpoint. Out: the same with the trait, before save(). Leaves out: damage (breaks.py).
"""

import json
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import save_file

from checkpoints import PREFIX, Edit
from mtpress.chat.template import template

TRAITS: dict[str, Callable[[Edit], object]] = {}
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
PROMPT = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are Tarn.<|im_end|>\n{% endif %}"
BLOCK = 128


def trait(function: Callable[[Edit], object]) -> Callable[[Edit], object]:
    TRAITS[function.__name__.replace("_", " ")] = function
    return function


def drop(e: Edit, start: str) -> None:
    e.tensors = {name: tensor for name, tensor in e.tensors.items() if not name.startswith(start)}


@trait
def no_tower(e: Edit) -> None:
    drop(e, "model.visual.")


@trait
def no_tower_and_none_declared(e: Edit) -> None:
    drop(e, "model.visual.")
    e.config["language_model_only"] = True


@trait
def no_head(e: Edit) -> None:
    drop(e, "mtp.")


@trait
def no_head_and_none_declared(e: Edit) -> None:
    drop(e, "mtp.")
    for level in (e.config, e.text):
        level.pop("mtp_num_hidden_layers", None)


@trait
def half_a_head(e: Edit) -> None:
    drop(e, "mtp.layers.0.mlp.")


@trait
def a_head_in_a_file_of_its_own(e: Edit) -> None:
    head = {name: tensor for name, tensor in e.tensors.items() if name.startswith("mtp.")}
    drop(e, "mtp.")
    if head:
        e.later(lambda: save_file(head, e.path / "mtp.safetensors", metadata={"format": "pt"}))


def tie(e: Edit) -> None:
    e.config["tie_word_embeddings"] = e.text["tie_word_embeddings"] = True


@trait
def tied(e: Edit) -> None:
    tie(e)
    e.tensors.pop("lm_head.weight", None)


@trait
def tied_with_a_head_stored(e: Edit) -> None:
    tie(e)


@trait
def no_lm_head(e: Edit) -> None:
    e.tensors.pop("lm_head.weight", None)


def cast(e: Edit, dtype: torch.dtype) -> None:
    e.tensors = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in e.tensors.items()}
    for level in (e.config, e.text):
        level["dtype"] = str(dtype).removeprefix("torch.")


@trait
def in_float16(e: Edit) -> None:
    cast(e, torch.float16)


@trait
def in_float32(e: Edit) -> None:
    cast(e, torch.float32)


@trait
def vectors_in_float32(e: Edit) -> None:
    e.tensors = {name: tensor.float() if tensor.dim() == 1 else tensor for name, tensor in e.tensors.items()}


@trait
def in_block_fp8(e: Edit) -> None:
    made: dict[str, torch.Tensor] = {}
    for name, tensor in e.tensors.items():
        if not name.endswith(("proj.weight", "in_proj_qkv.weight", "in_proj_z.weight")) or "visual" in name or tensor.dim() != 2:
            made[name] = tensor
            continue
        made[name], made[f"{name}_scale_inv"] = block_fp8(tensor)
    e.tensors = made
    e.config["quantization_config"] = {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": [],
    }  # fmt: skip


def block_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and BF16 scales, as Qwen releases them."""
    n, k = weight.shape
    down, across = -(-n // BLOCK), -(-k // BLOCK)
    padded = torch.zeros(down * BLOCK, across * BLOCK)
    padded[:n, :k] = weight.float()
    steps = (padded.view(down, BLOCK, across, BLOCK).abs().amax((1, 3)) / 448).clamp(min=1e-12).bfloat16()
    wide = steps.float().repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return (padded / wide).clamp(-448, 448)[:n, :k].to(torch.float8_e4m3fn), steps


@trait
def of_the_text_architecture(e: Edit) -> None:
    text = {**e.text, "architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text"}
    e.config = text
    e.tensors = {name.replace(PREFIX, "model."): tensor for name, tensor in e.tensors.items() if not name.startswith("model.visual.")}


@trait
def the_text_architecture_with_a_tower(e: Edit) -> None:
    e.config["architectures"] = ["Qwen3_5ForCausalLM"]


@trait
def short_names(e: Edit) -> None:
    e.tensors = {name.replace(PREFIX, "model."): tensor for name, tensor in e.tensors.items()}


def processors(e: Edit) -> dict[str, Any]:
    files = {"image_processor": "preprocessor_config.json", "video_processor": "video_preprocessor_config.json"}
    return {key: json.loads((e.path / name).read_text()) for key, name in files.items() if (e.path / name).exists()}


def remove(e: Edit, *names: str) -> None:
    for name in names:
        (e.path / name).unlink(missing_ok=True)


@trait
def processor_config_alone(e: Edit) -> None:
    if found := processors(e):
        e.write("processor_config.json", found | {"processor_class": "Qwen3VLProcessor"})
    remove(e, "preprocessor_config.json", "video_preprocessor_config.json")


@trait
def no_processor_files(e: Edit) -> None:
    remove(e, "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")


@trait
def no_video_processor(e: Edit) -> None:
    remove(e, "video_preprocessor_config.json")


@trait
def no_template(e: Edit) -> None:
    remove(e, "chat_template.jinja")


@trait
def a_template_of_its_own(e: Edit) -> None:
    (e.path / "chat_template.jinja").write_text(PROMPT + CHATML)


@trait
def a_system_prompt_of_its_own(e: Edit) -> None:
    (e.path / "chat_template.jinja").write_text(PROMPT + template())


@trait
def a_template_in_the_tokenizer_config(e: Edit) -> None:
    remove(e, "chat_template.jinja")
    e.change("tokenizer_config.json", chat_template=CHATML)


@trait
def a_template_that_loses_words(e: Edit) -> None:
    (e.path / "chat_template.jinja").write_text("{{ 1 }}")


@trait
def no_generation_config(e: Edit) -> None:
    remove(e, "generation_config.json")


@trait
def transformers_5_tokenizer_config(e: Edit) -> None:
    e.change("tokenizer_config.json", backend="tokenizers", tokenizer_class="TokenizersBackend")


@trait
def no_tokenizer_config(e: Edit) -> None:
    remove(e, "tokenizer_config.json")


@trait
def added_tokens(e: Edit) -> None:
    """64 more rows than the release has, as after resize_token_embeddings."""
    for name in ("lm_head.weight", f"{PREFIX}embed_tokens.weight"):
        if name in e.tensors:
            e.tensors[name] = torch.cat([e.tensors[name], e.tensors[name][:64]])
            e.text["vocab_size"] = len(e.tensors[name])


@trait
def a_matrix_in_float32(e: Edit) -> None:
    name = next((n for n in e.tensors if n.endswith("mlp.down_proj.weight")), None)
    if name is not None and e.tensors[name].dtype == torch.bfloat16:
        e.tensors[name] = e.tensors[name].float()


@trait
def an_infinite_number(e: Edit) -> None:
    name = next(n for n in e.tensors if n.endswith("mlp.down_proj.weight"))
    if e.tensors[name].dtype != torch.float8_e4m3fn:
        e.tensors[name] = e.tensors[name].clone()
        e.tensors[name][0, 0] = float("inf")
