"""Checkpoints as people report them in public, made from the built-in model.

In: an `Edit` of a copy of mtpress-tiny. Out: the edit, changed; the caller saves it. Leaves out: what the stages say of each
(verdicts.py). It is long because it is a table.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from safetensors.torch import save_file

from checkpoints import PREFIX, Edit
from mtpress.checkpoint.checkpoint import INDEX_NAME
from mtpress.formats import compressed_tensors, fp8, int4, nvfp4

Change = Callable[[Edit], object]
LAYERS = f"{PREFIX}layers."
VISION, HEAD = "model.visual.", "mtp."
PROCESSORS = ("preprocessor_config.json", "video_preprocessor_config.json")
ATTENTION = (
    ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z"), ("linear_attn.out_proj",),
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",),
)  # fmt: skip
MLP = (("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))
OWN_TEMPLATE = """{%- if messages[0].role != 'system' %}<|im_start|>system
You are Ward, a terse assistant for nurses. Reply in one JSON object.<|im_end|>
{% endif %}{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@dataclass(frozen=True)
class Reported:
    """One input: its name, the public threads that report its kind, what it is, and what makes it of the built-in model."""

    name: str
    threads: str
    what: str
    make: Change


REPORTED: list[Reported] = []


def reported(threads: str, what: str, **variants: str) -> Callable[[Callable[..., object]], Callable[..., object]]:
    """Registers a kind of input; `variants` are values of the function's second argument, each with what it adds to `what`."""

    def register(function: Callable[..., object]) -> Callable[..., object]:
        name = function.__name__.replace("_", "-")
        if not variants:
            REPORTED.append(Reported(name, threads, what, function))
        for variant, more in variants.items():
            change = partial(function, variant=variant)
            REPORTED.append(Reported(f"{name}-{variant.replace('_', '-')}", threads, f"{what}: {more}", change))
        return function

    return register


# ---- what changes an edit


def rename(e: Edit, old: str, new: str) -> None:
    for name in [name for name in e.tensors if name.startswith(old)]:
        e.tensors[new + name.removeprefix(old)] = e.tensors.pop(name)


def drop(e: Edit, is_lost: Callable[[str], bool]) -> None:
    for name in [name for name in e.tensors if is_lost(name)]:
        del e.tensors[name]


def lose_files(e: Edit, names: Iterable[str]) -> None:
    for name in names:
        (e.path / name).unlink()


def halves(names: list[str]) -> dict[str, list[str]]:
    middle = len(names) // 2
    return {"model-00001-of-00002.safetensors": names[:middle], "model-00002-of-00002.safetensors": names[middle:]}


def spread_over(e: Edit, files: Mapping[str, list[str]], indexed: Callable[[str], bool] = lambda file: True) -> None:
    """Several files in place of the one shard; the index names those that are `indexed`."""

    def action() -> None:
        (e.path / "model.safetensors").unlink()
        for file, names in files.items():
            (e.path / file).parent.mkdir(exist_ok=True)
            save_file({name: e.tensors[name] for name in names}, e.path / file, metadata={"format": "pt"})
        weight_map = {name: file for file, names in files.items() if indexed(file) for name in names}
        total = sum(e.tensors[name].nbytes for name in weight_map)
        e.write(INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})

    e.later(action)


def beside(e: Edit, file: str, tensors: Mapping[str, torch.Tensor]) -> None:
    e.later(lambda: save_file(dict(tensors), e.path / file, metadata={"format": "pt"}))


def body_groups(e: Edit, groups: Iterable[tuple[str, ...]], layers: Iterable[int] = range(4)) -> Iterable[tuple[str, ...]]:
    """The modules of each fused group that these layers have."""
    for layer in layers:
        for group in groups:
            if f"{LAYERS}{layer}.{group[0]}.weight" in e.tensors:
                yield tuple(f"{LAYERS}{layer}.{part}" for part in group)


def in_nvfp4(e: Edit, modules: tuple[str, ...], input_scale: float | None) -> None:
    """modelopt's NVFP4 under one global scale."""
    scale_2 = nvfp4.global_scale(torch.stack([e.tensors[f"{module}.weight"].abs().max().float() for module in modules]).max())
    for module in modules:
        codes, scales = nvfp4.quantize(e.tensors[f"{module}.weight"], scale_2)
        e.tensors |= {f"{module}.weight": codes, f"{module}.weight_scale": scales, f"{module}.weight_scale_2": scale_2.clone()}
        if input_scale is not None:
            e.tensors[f"{module}.input_scale"] = torch.tensor(input_scale)


def in_fp8_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and a scale for 128×128 of them."""
    n, k = weight.shape
    blocks = weight.float().view(n // 128, 128, k // 128, 128)
    scales = blocks.abs().amax((1, 3)) / 448
    return (blocks / scales[:, None, :, None]).view(n, k).to(torch.float8_e4m3fn), scales


# ---- names


def _as_text_only(e: Edit) -> None:
    drop(e, lambda name: name.startswith(VISION))
    lose_files(e, PROCESSORS)
    e.config = {**e.text, "architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text", "tie_word_embeddings": False}


@reported(
    "vllm#50355, trl#5269", "text-only Qwen3_5ForCausalLM",
    prefixed="its tensors keep model.language_model.*", clean="its tensors are model.*", nomtp="model.*, without a draft head",
)  # fmt: skip
def text_only(e: Edit, variant: str) -> None:
    _as_text_only(e)
    if variant != "prefixed":
        rename(e, PREFIX, "model.")
    if variant == "nomtp":
        drop(e, lambda name: name.startswith(HEAD))


@reported(
    "transformers#45357, prime-rl#2640, llm-compressor#2568", "names as transformers 5.4 to 5.5.3 save them",
    body="model.language_model.language_model.language_model.*", tower="model.language_model.visual.*", both="body and tower",
    both_nomtp="body and tower, without a draft head",
)  # fmt: skip
def doubled_names(e: Edit, variant: str) -> None:
    if variant != "tower":
        rename(e, PREFIX, f"{PREFIX}language_model.language_model.")
    if variant != "body":
        rename(e, VISION, f"{PREFIX}visual.")
    if variant == "both_nomtp":
        drop(e, lambda name: name.startswith(HEAD))


@reported("transformers#45357", "a tower that was trained, under model.language_model.visual.*")
def trained_tower_misnamed(e: Edit) -> None:
    generator = torch.Generator().manual_seed(2)
    for name in [name for name in e.tensors if name.startswith(VISION) and e.tensors[name].ndim > 1]:
        weight = e.tensors[name].float()
        e.tensors[name] = (weight * (1 + 0.01 * torch.randn(weight.shape, generator=generator))).to(torch.bfloat16)
    rename(e, VISION, f"{PREFIX}visual.")


@reported("found beside transformers#45357", "one bias of a vision linear is missing")
def vision_bias_missing(e: Edit) -> None:
    del e.tensors[f"{VISION}blocks.0.attn.qkv.bias"]


# ---- what merges and trainers lose


@reported(
    "mergekit#668, #669, #696", "a merge that lost tensors",
    lm_head="lm_head and the draft head", gdn="all of linear_attn", tower="the vision tower", gdn_norm="linear_attn.norm",
)  # fmt: skip
def merge_without(e: Edit, variant: str) -> None:
    lost = {"lm_head": ("lm_head.", HEAD), "gdn": ("linear_attn.",), "tower": (VISION,), "gdn_norm": ("linear_attn.norm.",)}[variant]
    drop(e, lambda name: any(part in name if part.startswith("linear") else name.startswith(part) for part in lost))


@reported(
    "lmms-engine#157", "embeddings declared tied, lm_head stored", equal="the same matrix", diverged="another matrix than the embeddings"
)
def tied(e: Edit, variant: str) -> None:
    e.config["tie_word_embeddings"] = e.text["tie_word_embeddings"] = True
    if variant == "equal":
        e.tensors[f"{PREFIX}embed_tokens.weight"] = e.tensors["lm_head.weight"].clone()


@reported(
    "unsloth#4671", "processor files after a merge",
    whole="processor_config.json alone, as transformers 5 writes it", none="none at all", image="preprocessor_config.json alone",
)  # fmt: skip
def processors(e: Edit, variant: str) -> None:
    image, video = (e.read(name) for name in PROCESSORS)
    lose_files(e, PROCESSORS if variant != "image" else PROCESSORS[1:])
    if variant == "whole":
        said = {"image_processor": image, "video_processor": video, "processor_class": "Qwen3VLProcessor"}
        e.write("processor_config.json", said)


def _changed(e: Edit) -> None:
    """Rank-one ablation of what writes into the residual stream."""
    direction = torch.nn.functional.normalize(torch.randn(256, generator=torch.Generator().manual_seed(4)), dim=0)
    for name in [
        name for name in e.tensors if name.startswith(LAYERS) and name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight"))
    ]:
        weight = e.tensors[name].float()
        e.tensors[name] = (weight - torch.outer(direction, direction @ weight)).to(torch.bfloat16)


@reported("heretic#147, #219", "an abliterated model", whole="with its draft head", lost="draft head and processor files lost")
def abliterated(e: Edit, variant: str) -> None:
    _changed(e)
    if variant == "lost":
        drop(e, lambda name: name.startswith(HEAD))
        lose_files(e, PROCESSORS)


@reported(
    "verl#5682 and abliteration scripts", "the whole checkpoint in another dtype",
    f16="F16", f32="F32", f32_trained="F32, with weights that BF16 rounds", f16_overflow="F16, one weight infinite",
)  # fmt: skip
def stored_as(e: Edit, variant: str) -> None:
    dtype = torch.float32 if variant.startswith("f32") else torch.float16
    generator = torch.Generator().manual_seed(3)
    for name, weight in e.tensors.items():
        wide = weight.to(dtype)
        if variant == "f32_trained" and weight.ndim > 1:
            wide = wide + 1e-5 * torch.randn(weight.shape, generator=generator)
        e.tensors[name] = wide
    if variant == "f16_overflow":
        e.tensors[f"{LAYERS}1.mlp.down_proj.weight"][0, 0] = torch.inf
    e.config["dtype"] = e.text["dtype"] = str(dtype).removeprefix("torch.")


@reported(
    "ms-swift#8487, needle#91", "a chat template of the author's own", file="in chat_template.jinja", config="in tokenizer_config.json",
    none="no template at all",
)  # fmt: skip
def template(e: Edit, variant: str) -> None:
    if variant == "file":
        (e.path / "chat_template.jinja").write_text(OWN_TEMPLATE)
        return
    lose_files(e, ("chat_template.jinja",))
    if variant == "config":
        e.change("tokenizer_config.json", chat_template=OWN_TEMPLATE)


# ---- files


@reported(
    "omlx#1944, #2062, mlx-vlm#1192, rMLX#497", "the draft head in a file of its own", indexed="mtp.safetensors, indexed",
    unindexed="mtp.safetensors, not in the index", folder="mtp/weights.safetensors", lost="nowhere",
)  # fmt: skip
def sidecar(e: Edit, variant: str) -> None:
    head = [name for name in e.tensors if name.startswith(HEAD)]
    files = halves([name for name in e.tensors if not name.startswith(HEAD)])
    if variant != "lost":
        files |= {"mtp/weights.safetensors" if variant == "folder" else "mtp.safetensors": head}
    spread_over(e, files, lambda file: variant == "indexed" or not file.startswith("mtp"))


@reported(
    "omlx#2062", "a repository of the draft head alone", named="mtp.* in mtp.safetensors", bare="without the prefix mtp.",
    noindex="mtp.* in mtp.safetensors, without an index",
)  # fmt: skip
def head_only(e: Edit, variant: str) -> None:
    drop(e, lambda name: not name.startswith(HEAD))
    if variant == "bare":
        rename(e, HEAD, "")
        return
    spread_over(e, {"mtp.safetensors": list(e.tensors)})
    if variant == "noindex":
        e.later((e.path / INDEX_NAME).unlink)


@reported(
    "mlx-vlm#1464, #1329, LlamaFactory#8531", "files beside the indexed shards", fourbit="a model.safetensors with codes of NVFP4",
    stale="the shards of an earlier save", consolidated="consolidated.safetensors with the same weights",
)  # fmt: skip
def stray(e: Edit, variant: str) -> None:
    names = list(e.tensors)
    spread_over(e, halves(names))
    if variant == "consolidated":
        beside(e, "consolidated.safetensors", e.tensors)
    elif variant == "stale":
        for i in range(3):
            beside(e, f"model-{i + 1:05d}-of-00003.safetensors", {name: 1.5 * e.tensors[name] for name in names[i::3]})
    else:
        other = Edit(e.path)
        for group in body_groups(other, (*MLP, *ATTENTION)):
            in_nvfp4(other, group, None)
        beside(e, "model.safetensors", other.tensors)


# ---- configs


def _older_rope(e: Edit) -> None:
    rope = e.text.pop("rope_parameters")
    e.text.update(rope_theta=rope["rope_theta"], partial_rotary_factor=rope["partial_rotary_factor"])
    e.text["rope_scaling"] = {
        "type": "default", "rope_type": "default", "mrope_section": rope["mrope_section"], "mrope_interleaved": True,
    }  # fmt: skip


def _yarn(e: Edit) -> None:
    e.text["rope_parameters"] |= {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    e.text["max_position_embeddings"] = 16384


def _without(*keys: str) -> Change:
    return lambda e: [e.text.pop(key) for key in keys]


CONFIGS: dict[str, tuple[str, Change]] = {
    "top_level": ("hidden_size, vocab_size and dtype at the top too",
                  lambda e: e.config.update({"hidden_size": 256, "dtype": "bfloat16", "torch_dtype": "bfloat16", "vocab_size": 1280})),
    "rope_of_v4": ("rope_theta beside rope_scaling, as transformers 4 writes it", _older_rope),
    "yarn": ("YaRN", _yarn),
    "rope_by_type": ("rope_parameters by layer type",
                     lambda e: e.text.update(rope_parameters={"full_attention": e.text["rope_parameters"]})),
    "nextn": ("num_nextn_predict_layers in place of mtp_num_hidden_layers",
              lambda e: e.text.update(num_nextn_predict_layers=e.text.pop("mtp_num_hidden_layers"))),
    "mtp_at_top": ("mtp_num_hidden_layers at the top",
                   lambda e: e.config.update(mtp_num_hidden_layers=e.text.pop("mtp_num_hidden_layers"))),
    "no_head_dim": ("no head_dim", _without("head_dim")),
    "no_layer_types": ("no layer_types", _without("layer_types")),
    "defaults": ("defaults left out", _without("attn_output_gate", "linear_conv_kernel_dim", "hidden_act", "rms_norm_eps")),
}  # fmt: skip


@reported("llm-compressor#2842, mlx-lm#1563, Qwen3.8#64", "config.json", **{name: what for name, (what, _) in CONFIGS.items()})
def config(e: Edit, variant: str) -> None:
    CONFIGS[variant][1](e)


# ---- formats of other tools


@reported("TensorRT-Model-Connect#1115, mlxcel#1742", "the vendor's release in FP8 blocks of 128×128, its draft layer too")
def fp8_release(e: Edit) -> None:
    kept = []
    for name in list(e.tensors):
        module = name.removesuffix(".weight")
        linear = "visual" not in name and name.endswith(("_proj.weight", "in_proj_qkv.weight", "in_proj_z.weight"))
        if linear and e.tensors[name].ndim == 2:
            codes, scales = in_fp8_blocks(e.tensors[name])
            e.tensors |= {name: codes, f"{module}.weight_scale_inv": scales.to(torch.bfloat16)}
        elif e.tensors[name].ndim >= 2:
            kept.append(module)
    e.config["quantization_config"] = {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
        "modules_to_not_convert": kept,
    }  # fmt: skip


@reported(
    "FreeToken#208, omlx#2659, vllm.cpp#164", "compressed-tensors: NVFP4 MLP, FP8 by row for the rest and lm_head", names="targets in full",
    nomtp="targets in full, draft head lost", mtp_not_ignored="targets in full, the draft head not among the ignored",
    patterns="targets as expressions",
)  # fmt: skip
def mixed(e: Edit, variant: str) -> None:
    in_fp4 = [module for group in body_groups(e, MLP, range(3)) for module in group]
    in_fp8 = [module for group in (*body_groups(e, MLP, (3,)), *body_groups(e, ATTENTION)) for module in group] + ["lm_head"]
    for group in body_groups(e, MLP, range(3)):
        in_nvfp4(e, group, None)
    for module in in_fp4:
        e.tensors[f"{module}.weight_packed"] = e.tensors.pop(f"{module}.weight")
        e.tensors[f"{module}.weight_global_scale"] = compressed_tensors.reciprocal(e.tensors.pop(f"{module}.weight_scale_2")).reshape(1)
        e.tensors[f"{module}.input_global_scale"] = torch.tensor([100.0])
    for module in in_fp8:
        weight = e.tensors[f"{module}.weight"].float()
        scale = weight.abs().amax(1, keepdim=True) / 448
        e.tensors |= {f"{module}.weight": (weight / scale).to(torch.float8_e4m3fn), f"{module}.weight_scale": scale.to(torch.bfloat16)}
    kept = sorted(
        name.removesuffix(".weight") for name, tensor in e.tensors.items()
        if tensor.ndim == 2 and name.endswith(".weight") and tensor.dtype == torch.bfloat16 and "embed" not in name
    )  # fmt: skip
    targets = (in_fp4, in_fp8)
    if variant == "patterns":
        targets = (
            [r"re:.*layers\.[012]\.mlp\.(gate|up|down)_proj$"],
            [r"re:.*(self_attn|linear_attn)\.(q_proj|k_proj|v_proj|o_proj|in_proj_qkv|in_proj_z|out_proj)$",
             r"re:.*layers\.3\.mlp\.(gate|up|down)_proj$", "re:.*lm_head$"],
        )  # fmt: skip
    if variant == "mtp_not_ignored":
        kept = [module for module in kept if not module.startswith(HEAD)]
    if variant == "nomtp":
        drop(e, lambda name: name.startswith(HEAD))
    four = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
    eight = {"num_bits": 8, "type": "float", "symmetric": True}
    e.config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "mixed-precision", "quantization_status": "compressed", "kv_cache_scheme": None,
        "ignore": kept,
        "config_groups": {
            "group_0": {"format": "nvfp4-pack-quantized", "targets": targets[0], "weights": four | {"dynamic": False},
                        "input_activations": four | {"dynamic": "local"}, "output_activations": None},
            "group_1": {"format": "float-quantized", "targets": targets[1], "weights": eight | {"strategy": "channel", "dynamic": False},
                        "input_activations": eight | {"strategy": "token", "dynamic": True}, "output_activations": None},
        },
    }  # fmt: skip


@reported(
    "vllm#53387, compressed-tensors#832", "compressed-tensors INT4 W4A16, target Linear",
    layer="mtp.fc BF16 and not ignored, the draft layer packed",
    head="the draft head BF16 and not ignored", nan="a scale NaN and one infinite, mtp ignored by a pattern",
)  # fmt: skip
def packed(e: Edit, variant: str) -> None:
    groups = [module for group in body_groups(e, (*MLP, *ATTENTION)) for module in group]
    if variant == "layer":
        groups += [name.removesuffix(".weight") for name in e.tensors if name.startswith("mtp.layers.") and name.endswith("_proj.weight")]
    for module in groups:
        weight = e.tensors.pop(f"{module}.weight")
        n, k = weight.shape
        blocks = weight.float().view(n, k // 128, 128)
        scales = (blocks.abs().amax(-1) / 7).to(torch.bfloat16)
        codes = int4.nearest_codes((blocks / scales.float().unsqueeze(-1)).view(n, k))
        e.tensors[f"{module}.weight_packed"] = int4.pack(codes).t().contiguous()
        e.tensors |= {f"{module}.weight_scale": scales, f"{module}.weight_shape": torch.tensor([n, k])}
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True, "dynamic": False}
    ignore = ["lm_head", "re:.*visual.*", "re:.*in_proj_a$", "re:.*in_proj_b$"]
    if variant == "nan":
        scales = e.tensors[f"{LAYERS}0.mlp.down_proj.weight_scale"]
        scales[3, 1], scales[7, 0] = torch.nan, torch.inf
        ignore.append("re:.*mtp.*")
    e.config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed", "ignore": ignore,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None,
                                      "format": "pack-quantized"}},
    }  # fmt: skip


@reported(
    "sglang#27906, vllm#44081, Model-Optimizer#2363", "modelopt's mixed build, NVFP4 MLP and lm_head, FP8 attention",
    w4a16="W4A16, FP8 KV cache in hf_quant_config.json alone", w4a16_input_scale="the same, lm_head with an input_scale",
    w4a4="W4A4, no KV cache declared", w4a16_kv_both="W4A16, FP8 KV cache in both files",
)  # fmt: skip
def modelopt(e: Edit, variant: str) -> None:
    w4a16 = variant != "w4a4"
    four, layers = {"quant_algo": "W4A16_NVFP4" if w4a16 else "NVFP4", "group_size": 16}, dict[str, Any]()
    for group in body_groups(e, MLP):
        in_nvfp4(e, group, None if w4a16 else 0.01)
        layers |= dict.fromkeys(group, four)
    for group in body_groups(e, ATTENTION):
        scale = fp8.scale(torch.stack([e.tensors[f"{module}.weight"].abs().max() for module in group]).max())
        for module in group:
            codes = fp8.quantize(e.tensors[f"{module}.weight"], scale)
            e.tensors |= {f"{module}.weight": codes, f"{module}.weight_scale": scale.clone(), f"{module}.input_scale": torch.tensor(0.05)}
        layers |= {module: {"quant_algo": "FP8"} for module in group}
    in_nvfp4(e, ("lm_head",), 0.01 if variant in ("w4a4", "w4a16_input_scale") else None)
    layers["lm_head"] = four
    kept = ["model.visual*", "mtp*", *(f"{LAYERS}*.linear_attn.{part}" for part in ("conv1d", "in_proj_a", "in_proj_b"))]
    producer = {"name": "modelopt", "version": "0.44.0"}
    said = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers, "ignore": kept, "producer": producer}
    if variant == "w4a16_kv_both":
        said["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    e.config["quantization_config"] = said
    inner = {
        "quant_algo": "MIXED_PRECISION",
        "kv_cache_quant_algo": "FP8" if w4a16 else None,
        "quantized_layers": layers,
        "exclude_modules": kept,
    }
    e.hf = {"producer": producer, "quantization": copy.deepcopy(inner)}


@reported(
    "vllm#54304, #35660", "quantized embeddings", fp8_block="FP8 blocks, declared as quant_method fp8", nvfp4="NVFP4, declared nowhere"
)
def embeddings(e: Edit, variant: str) -> None:
    module = f"{PREFIX}embed_tokens"
    if variant == "nvfp4":
        in_nvfp4(e, (module,), None)
        return
    codes, scales = in_fp8_blocks(e.tensors[f"{module}.weight"])
    e.tensors |= {f"{module}.weight": codes, f"{module}.weight_scale_inv": scales}
    e.config["quantization_config"] = {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
    }  # fmt: skip
