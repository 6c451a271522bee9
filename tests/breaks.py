"""Ways to break a sound NVFP4 checkpoint, each with exactly the rules of `mtpress check` that must fire.

In: an `Edit` of what quantize makes of the small checkpoint by nvfp4-mtp-vlm. Out: the edit, changed; the caller saves it.
tests/rules/test_rules.py asks check about them, tests/engine/test_refusals.py asks vLLM. It is long because it is a table.
"""

from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import save_file

from checkpoints import IDS, PREFIX, Edit
from mtpress.chat.template import template
from mtpress.checkpoint.checkpoint import INDEX_NAME
from mtpress.formats import nvfp4
from mtpress.models.qwen3_5.names import MTP_TENSORS
from mtpress.quant_config.tokenizer_files import CONFIG_IDS, SPECIALS

L0, L3 = f"{PREFIX}layers.0.", f"{PREFIX}layers.3."
Q = f"{L3}self_attn.q_proj"
OUT_PROJ, QKV, IN_A = f"{L0}linear_attn.out_proj", f"{L0}linear_attn.in_proj_qkv", f"{L0}linear_attn.in_proj_a"
CASES: list[tuple[str, set[str], Callable[[Edit], object]]] = []
Break = Callable[[Edit], object]


def breaks(*expected: str) -> Callable[[Break], Break]:
    """Registers a way to break the sound NVFP4 checkpoint, and exactly the rules that must fire."""

    def register(function: Break) -> Break:
        CASES.append((function.__name__, set(expected), function))
        return function

    return register


def rename(e: Edit, old: str, new: str) -> None:
    for name in [n for n in e.tensors if n.startswith(old)]:
        e.tensors[new + name.removeprefix(old)] = e.tensors.pop(name)


def drop(e: Edit, start: str) -> None:
    for name in [n for n in e.tensors if n.startswith(start)]:
        del e.tensors[name]


def unquantize(e: Edit, module: str, shape: tuple[int, ...]) -> None:
    drop(e, f"{module}.")
    e.tensors[f"{module}.weight"] = torch.ones(shape, dtype=torch.bfloat16)


def quantize(e: Edit, module: str) -> None:
    n, k = e.tensors[f"{module}.weight"].shape
    e.tensors[f"{module}.weight"] = torch.zeros(n, k // 2, dtype=torch.uint8)
    e.tensors[f"{module}.weight_scale"] = torch.ones(n, k // 16).to(torch.float8_e4m3fn)
    for scale in ("weight_scale_2", "input_scale"):
        e.tensors[f"{module}.{scale}"] = torch.tensor(0.01)


def write_index(e: Edit, change: Callable[[dict[str, Any]], object]) -> None:
    def action() -> None:
        index = e.read(INDEX_NAME)
        change(index)
        e.write(INDEX_NAME, index)

    e.later(action)


# ---- files


@breaks("code-beside")
def code_of_its_own(e: Edit) -> None:
    (e.path / "modeling.py").write_text("raise SystemExit")


@breaks("json-unreadable")
def torn_generation_config(e: Edit) -> None:
    (e.path / "generation_config.json").write_text('{"eos_token_id": ')


@breaks("tensor-unindexed")
def a_tensor_left_out_of_the_index(e: Edit) -> None:
    e.tensors[f"{OUT_PROJ}.bias"] = torch.zeros(64, dtype=torch.bfloat16)
    write_index(e, lambda index: index["weight_map"].pop(f"{OUT_PROJ}.bias"))


@breaks("tensor-unindexed")
def a_norm_left_out_of_the_index(e: Edit) -> None:
    write_index(e, lambda index: index["weight_map"].pop(f"{L0}input_layernorm.weight"))


@breaks("shard-unindexed")
def a_shard_beside_the_index(e: Edit) -> None:
    save_file({"x": torch.zeros(1)}, e.path / "extra.safetensors")


@breaks("index-missing", "tensor-unexpected")
def a_shard_without_any_index(e: Edit) -> None:
    save_file({"x": torch.zeros(1)}, e.path / "extra.safetensors")
    e.later((e.path / INDEX_NAME).unlink)


@breaks("shard-unindexed")
def a_torn_shard_beside_the_index(e: Edit) -> None:
    (e.path / "extra.safetensors").write_bytes(b"torn")


@breaks("shard-leftover")
def shards_of_an_earlier_save(e: Edit) -> None:
    save_file(
        {name: tensor.clone() for name, tensor in e.tensors.items() if "layers.1." in name}, e.path / "model-00009-of-00009.safetensors"
    )


@breaks("index-spelling")
def files_spelled_as_paths(e: Edit) -> None:
    write_index(e, lambda index: index.update(weight_map={name: f"./{file}" for name, file in index["weight_map"].items()}))


@breaks("index-total-size")
def a_wrong_total_size(e: Edit) -> None:
    write_index(e, lambda index: index["metadata"].update(total_size=1))


@breaks("index-total-size")
def no_total_size(e: Edit) -> None:
    write_index(e, lambda index: index.pop("metadata"))


# ---- config.json


@breaks("config-incomplete")
def no_hidden_size(e: Edit) -> None:
    del e.text["hidden_size"]


@breaks("architecture")
def an_unknown_architecture(e: Edit) -> None:
    e.config["architectures"] = ["Qwen3VLForConditionalGeneration"]


@breaks("architecture")
def no_architecture(e: Edit) -> None:
    del e.config["architectures"]


@breaks("text-model-type")
def a_text_config_of_another_family(e: Edit) -> None:
    e.text["model_type"] = "qwen3_vl_text"


@breaks("dtype")
def float16_declared(e: Edit) -> None:
    e.text["dtype"] = "float16"


@breaks("config-incomplete")
def no_head_dim(e: Edit) -> None:
    del e.text["head_dim"]


@breaks("config-incomplete")
def rope_parameters_by_layer_type(e: Edit) -> None:
    e.text["rope_parameters"] = {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}


@breaks("rope-yarn")
def yarn_beside_mrope(e: Edit) -> None:
    e.text["rope_parameters"] = {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096, "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
        "mrope_section": [3, 3, 2],
    }  # fmt: skip


@breaks("torch-dtype")
def the_old_dtype_key(e: Edit) -> None:
    e.config["torch_dtype"] = e.text.pop("dtype")


# ---- names, dtypes, shapes


@breaks("body-prefix")
def body_without_language_model(e: Edit) -> None:
    rename(e, PREFIX, "model.")


@breaks("names-of-the-engine")
def body_under_the_engines_prefix(e: Edit) -> None:
    rename(e, PREFIX, "language_model.model.")


@breaks("body-prefix")
def all_under_the_engines_names(e: Edit) -> None:
    rename(e, PREFIX, "language_model.model.")
    rename(e, "model.visual.", "visual.")
    rename(e, "lm_head.", "language_model.lm_head.")


@breaks("body-prefix")
def all_of_it_wrapped(e: Edit) -> None:
    rename(e, "", "module._orig_mod.")


@breaks("body-prefix")
def layers_wrapped_one_by_one(e: Edit) -> None:
    for name in [n for n in e.tensors if ".mlp." in n and n.startswith(PREFIX)]:
        e.tensors[name.replace(".mlp.", "._checkpoint_wrapped_module.mlp.")] = e.tensors.pop(name)


@breaks("names-wrapped")
def tower_under_the_language_model(e: Edit) -> None:
    rename(e, "model.visual.", f"{PREFIX}visual.")


@breaks("body-prefix")
def body_and_tower_as_transformers_once_saved_them(e: Edit) -> None:
    rename(e, "model.visual.", f"{PREFIX}visual.")
    for name in [n for n in e.tensors if n.startswith(PREFIX) and "visual" not in n]:
        e.tensors[name.replace(PREFIX, PREFIX + "language_model.language_model.")] = e.tensors.pop(name)


@breaks("names-wrapped")
def an_lm_head_below_the_model(e: Edit) -> None:
    rename(e, "lm_head.", "model.lm_head.")


@breaks("head-alone")
def a_draft_head_alone(e: Edit) -> None:
    for name in [n for n in e.tensors if not n.startswith("mtp.")]:
        del e.tensors[name]


@breaks("tensor-missing")
def a_norm_missing(e: Edit) -> None:
    del e.tensors[f"{L0}input_layernorm.weight"]


@breaks("tensor-missing")
def a_quantized_linear_missing(e: Edit) -> None:
    drop(e, f"{OUT_PROJ}.")


@breaks("tensor-missing")
def a_vision_tensor_missing(e: Edit) -> None:
    del e.tensors["model.visual.blocks.0.norm1.bias"]


@breaks("tensor-unexpected")
def a_tensor_too_many(e: Edit) -> None:
    e.tensors[f"{L0}extra.weight"] = torch.zeros(2, 2, dtype=torch.bfloat16)


@breaks("tensor-unexpected")
def a_fifth_layer(e: Edit) -> None:
    e.tensors[f"{PREFIX}layers.4.mlp.down_proj.weight"] = torch.zeros(64, 96, dtype=torch.bfloat16)


@breaks()
def tensors_that_the_engine_passes_over(e: Edit) -> None:
    e.tensors[f"{OUT_PROJ}.bias"] = torch.zeros(64, dtype=torch.bfloat16)
    e.tensors[f"{L3}self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    e.tensors[f"{L3}self_attn.k_proj.k_scale"] = torch.tensor(1.0)


@breaks("weight-dtype", "tensor-unexpected")
def quantized_embeddings(e: Edit) -> None:
    e.tensors[f"{PREFIX}embed_tokens.weight"] = torch.zeros(288, 64, dtype=torch.int8)
    e.tensors[f"{PREFIX}embed_tokens.zeros"] = torch.zeros(288)


@breaks("weight-dtype")
def embeddings_in_nvfp4(e: Edit) -> None:
    module = f"{PREFIX}embed_tokens"
    scale_2 = nvfp4.global_scale(nvfp4.amax(e.tensors[f"{module}.weight"]))
    codes, scales = nvfp4.quantize(e.tensors[f"{module}.weight"], scale_2)
    e.tensors |= {f"{module}.weight": codes, f"{module}.weight_scale": scales, f"{module}.weight_scale_2": scale_2}


@breaks("weight-dtype")
def conv1d_in_int8(e: Edit) -> None:
    name = f"{L0}linear_attn.conv1d.weight"
    e.tensors[name] = e.tensors[name].to(torch.int8)


@breaks("weight-dtype")
def block_scales_in_bf16(e: Edit) -> None:
    name = f"{OUT_PROJ}.weight_scale"
    e.tensors[name] = e.tensors[name].to(torch.bfloat16)


@breaks("weight-dtype")
def global_scale_in_bf16(e: Edit) -> None:
    e.tensors[f"{OUT_PROJ}.weight_scale_2"] = torch.tensor(0.01, dtype=torch.bfloat16)


@breaks("weight-precision")
def lm_head_in_float32(e: Edit) -> None:
    e.tensors["lm_head.weight"] = e.tensors["lm_head.weight"].float()


@breaks()
def small_vectors_in_float32(e: Edit) -> None:
    e.tensors[f"{L0}linear_attn.A_log"] = e.tensors[f"{L0}linear_attn.A_log"].float()


@breaks("weight-shape")
def codes_of_another_shape(e: Edit) -> None:
    e.tensors[f"{OUT_PROJ}.weight"] = e.tensors[f"{OUT_PROJ}.weight"][:, :-1].contiguous()


@breaks("weight-shape")
def embeddings_shorter_than_the_vocabulary(e: Edit) -> None:
    e.tensors[f"{PREFIX}embed_tokens.weight"] = e.tensors[f"{PREFIX}embed_tokens.weight"][:280].contiguous()


@breaks("k-not-divisible", "weight-shape")
def an_input_size_of_no_whole_blocks(e: Edit) -> None:
    e.text["intermediate_size"] = 88
    for layer in range(4):
        for name in ("gate_proj", "up_proj"):
            module = f"{PREFIX}layers.{layer}.mlp.{name}"
            for suffix in ("weight", "weight_scale"):
                e.tensors[f"{module}.{suffix}"] = e.tensors[f"{module}.{suffix}"].view(torch.uint8)[:88].contiguous()
            e.tensors[f"{module}.weight_scale"] = e.tensors[f"{module}.weight_scale"].view(torch.float8_e4m3fn)
        down = f"{PREFIX}layers.{layer}.mlp.down_proj"
        e.tensors[f"{down}.weight"] = e.tensors[f"{down}.weight"][:, :44].contiguous()


# ---- what is declared


@breaks("quant-method")
def no_quant_method(e: Edit) -> None:
    del e.quantization["quant_method"]


@breaks("quant-method")
def an_unknown_quant_method(e: Edit) -> None:
    e.quantization["quant_method"] = "nvfp4"


@breaks("quant-algo")
def no_quant_algo(e: Edit) -> None:
    del e.quantization["quant_algo"]


@breaks("group-size")
def group_size_32(e: Edit) -> None:
    e.quantization["group_size"] = 32
    assert e.hf is not None
    e.hf["quantization"]["group_size"] = 32
    e.quantization["config_groups"]["group_0"]["weights"]["group_size"] = 32


@breaks("kv-cache-scheme")
def a_dynamic_kv_scheme(e: Edit) -> None:
    e.quantization["kv_cache_scheme"] = {"dynamic": True, "num_bits": 8, "type": "float"}
    assert e.hf is not None
    e.hf["quantization"]["kv_cache_quant_algo"] = "FP6"


@breaks("quantization-undeclared")
def no_declaration_at_all(e: Edit) -> None:
    del e.config["quantization_config"]
    e.hf = None
    (e.path / "hf_quant_config.json").unlink()


@breaks("quantization-undeclared")
def declared_only_where_no_engine_takes_it_from(e: Edit) -> None:
    del e.config["quantization_config"]
    assert e.hf is not None
    e.hf["producer"]["name"] = "someone"


@breaks()
def declared_in_the_old_file_only(e: Edit) -> None:
    del e.config["quantization_config"]
    assert e.hf is not None
    assert e.hf["producer"]["name"] == "modelopt"


@breaks("quantization-not-stored")
def nothing_is_quantized(e: Edit) -> None:
    for name in [n for n in e.tensors if n.endswith(".weight_scale")]:
        module = name.removesuffix(".weight_scale")
        n, half = e.tensors[f"{module}.weight"].shape
        unquantize(e, module, (n, 2 * half))


@breaks("format-differs", "fused-formats-differ")
def one_linear_in_gptq(e: Edit) -> None:
    drop(e, f"{Q}.")
    e.tensors[f"{Q}.qweight"] = torch.zeros(8, 128, dtype=torch.int32)
    e.tensors[f"{Q}.qzeros"] = torch.zeros(1, 16, dtype=torch.int32)
    e.tensors[f"{Q}.scales"] = torch.zeros(1, 128, dtype=torch.float16)


@breaks("configs-contradict")
def another_algo_in_the_other_file(e: Edit) -> None:
    assert e.hf is not None
    e.hf["quantization"]["quant_algo"] = "W4A16_NVFP4"


@breaks("configs-contradict")
def draft_head_ignored_in_one_file_only(e: Edit) -> None:
    assert e.hf is not None
    e.hf["quantization"]["exclude_modules"] = [n for n in e.quantization["ignore"] if not n.startswith("mtp")]


@breaks("configs-contradict")
def fp8_kv_in_one_file_only(e: Edit) -> None:
    e.quantization["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}


@breaks("kv-cache-in-one-file")
def fp8_kv_in_the_other_file_only(e: Edit) -> None:
    """As modelopt's own exports have it."""
    assert e.hf is not None
    e.hf["quantization"]["kv_cache_quant_algo"] = "FP8"


@breaks()
def the_same_modules_in_other_words(e: Edit) -> None:
    assert e.hf is not None
    blocks = [f"{PREFIX}layers.{i}.linear_attn.in_proj_{x}" for i in range(3) for x in "ab"]
    e.hf["quantization"]["exclude_modules"] = ["lm_head", "model.visual*", "mtp*", "*linear_attn.conv1d*", *blocks]


@breaks("hf-quant-config-missing")
def no_hf_quant_config(e: Edit) -> None:
    e.hf = None
    (e.path / "hf_quant_config.json").unlink()


# ---- ignore lists


@breaks("ignore-malformed", "ignore-too-little", "vision-not-ignored", "mtp-not-ignored", "mtp-fc-not-ignored", "configs-contradict")
def ignore_is_a_string(e: Edit) -> None:
    e.quantization["ignore"] = "lm_head"


@breaks("ignore-called-otherwise", "ignore-too-little", "vision-not-ignored", "mtp-not-ignored", "mtp-fc-not-ignored", "configs-contradict")
def the_other_files_name_of_the_list(e: Edit) -> None:
    e.quantization["exclude_modules"] = e.quantization.pop("ignore")


@breaks("ignore-splits-fused")
def half_of_a_fused_pair(e: Edit) -> None:
    e.without(lambda name: name.endswith("layers.0.linear_attn.in_proj_a"))


@breaks("ignore-too-little")
def lm_head_not_ignored(e: Edit) -> None:
    e.without(lambda name: name == "lm_head")


@breaks("ignore-too-little")
def a_bf16_linear_not_ignored(e: Edit) -> None:
    unquantize(e, OUT_PROJ, (64, 64))


@breaks("ignore-too-little", "ignore-matches-nothing")
def globs_on_shards(e: Edit) -> None:
    e.ignore([n for n in e.quantization["ignore"] if "in_proj" not in n] + ["*in_proj_a*", "*in_proj_b*"])


@breaks("vision-not-ignored", "ignore-matches-nothing")
def a_vision_glob_that_matches_nothing(e: Edit) -> None:
    e.ignore([n for n in e.quantization["ignore"] if "visual" not in n] + ["*model.visual*"])


@breaks("vision-not-ignored", "ignore-matches-nothing")
def the_bare_name_of_the_tower(e: Edit) -> None:
    e.ignore([n for n in e.quantization["ignore"] if "visual" not in n] + ["model.visual"])


@breaks()
def the_tower_by_a_glob(e: Edit) -> None:
    e.ignore([n for n in e.quantization["ignore"] if "visual" not in n] + ["model.visual*"])


@breaks("ignore-too-much")
def a_glob_over_too_many_layers(e: Edit) -> None:
    e.ignore([*e.quantization["ignore"], f"{PREFIX}layers.3*"])


@breaks("ignore-too-much")
def a_quantized_lm_head_that_is_ignored(e: Edit) -> None:
    quantize(e, "lm_head")


@breaks()
def a_quantized_lm_head(e: Edit) -> None:
    quantize(e, "lm_head")
    e.without(lambda name: name == "lm_head")


@breaks("ignore-matches-nothing")
def a_regular_expression(e: Edit) -> None:
    e.ignore([*e.quantization["ignore"], "re:.*mtp.*"])


# ---- scales


@breaks("scale-missing")
def no_block_scales(e: Edit) -> None:
    del e.tensors[f"{OUT_PROJ}.weight_scale"]


@breaks("scale-missing")
def no_global_scale(e: Edit) -> None:
    del e.tensors[f"{OUT_PROJ}.weight_scale_2"]


@breaks("scale-missing")
def no_input_scale(e: Edit) -> None:
    del e.tensors[f"{OUT_PROJ}.input_scale"]


@breaks()
def weight_only_needs_no_input_scale(e: Edit) -> None:
    e.quantization["config_groups"]["group_0"]["input_activations"] = None
    for name in [n for n in e.tensors if n.endswith("input_scale")]:
        del e.tensors[name]


@breaks("input-scales-unused")
def weight_only_with_input_scales(e: Edit) -> None:
    e.quantization["config_groups"]["group_0"]["input_activations"] = None


@breaks("scale-orphan")
def a_scale_beside_a_bf16_weight(e: Edit) -> None:
    e.tensors[f"{IN_A}.weight_scale"] = torch.ones(2, 4).to(torch.float8_e4m3fn)


@breaks("scale-unsound")
def a_global_scale_of_zero(e: Edit) -> None:
    e.tensors[f"{OUT_PROJ}.weight_scale_2"] = torch.tensor(0.0)


@breaks("scale-unsound")
def an_input_scale_of_nan(e: Edit) -> None:
    e.tensors[f"{OUT_PROJ}.input_scale"] = torch.tensor(float("nan"))


@breaks("scale-implausible")
def a_reciprocal_global_scale(e: Edit) -> None:
    e.tensors[f"{OUT_PROJ}.weight_scale_2"] = 1 / e.tensors[f"{OUT_PROJ}.weight_scale_2"]


@breaks("fused-formats-differ")
def one_shard_of_q_k_v_in_bf16(e: Edit) -> None:
    unquantize(e, Q, (128, 64))


@breaks("fused-scales-differ")
def own_global_scale_for_in_proj_qkv(e: Edit) -> None:
    e.tensors[f"{QKV}.weight_scale_2"] = e.tensors[f"{QKV}.weight_scale_2"] / 2


@breaks("fused-input-scales-differ")
def own_input_scale_for_q(e: Edit) -> None:
    e.tensors[f"{Q}.input_scale"] = e.tensors[f"{Q}.input_scale"] / 2


@breaks("in-proj-ab-quantized")
def in_proj_ab_in_nvfp4(e: Edit) -> None:
    for layer in range(3):
        for name in "ab":
            quantize(e, f"{PREFIX}layers.{layer}.linear_attn.in_proj_{name}")
    e.without(lambda name: "in_proj_" in name)


FP8_KV = {"dynamic": False, "num_bits": 8, "type": "float"}


def declare_fp8_kv(e: Edit, **scales: float) -> None:
    """Declares an FP8 KV cache, with these scales of the full-attention layer."""
    e.quantization["kv_cache_scheme"] = FP8_KV
    assert e.hf is not None
    e.hf["quantization"]["kv_cache_quant_algo"] = "FP8"
    e.tensors |= {f"{L3}self_attn.{name[0]}_proj.{name}": torch.tensor(value) for name, value in scales.items()}


@breaks()
def an_fp8_kv_cache_with_scales(e: Edit) -> None:
    declare_fp8_kv(e, k_scale=0.02, v_scale=0.06)


@breaks("kv-scale-missing")
def a_k_scale_without_its_v_scale(e: Edit) -> None:
    declare_fp8_kv(e, k_scale=0.02)


@breaks("kv-scale-missing")
def a_draft_head_with_half_of_its_kv_scales(e: Edit) -> None:
    declare_fp8_kv(e, k_scale=0.02, v_scale=0.06)
    e.tensors["mtp.layers.0.self_attn.v_proj.v_scale"] = torch.tensor(0.5)


@breaks("kv-scale-misplaced")
def kv_scales_of_a_gdn_layer(e: Edit) -> None:
    declare_fp8_kv(e, k_scale=0.02, v_scale=0.06)
    e.tensors[f"{L0}linear_attn.k_scale"] = torch.tensor(0.5)


@breaks("scale-unsound")
def a_kv_scale_of_nan(e: Edit) -> None:
    declare_fp8_kv(e, k_scale=float("nan"), v_scale=0.06)


# ---- draft head


@breaks("mtp-missing")
def no_draft_head(e: Edit) -> None:
    drop(e, "mtp.")


@breaks("mtp-missing")
def half_a_draft_head(e: Edit) -> None:
    drop(e, "mtp.layers.0.mlp.")


@breaks("mtp-none")
def no_draft_head_and_none_promised(e: Edit) -> None:
    drop(e, "mtp.")
    del e.text["mtp_num_hidden_layers"]


@breaks("mtp-misplaced")
def draft_head_under_the_body(e: Edit) -> None:
    rename(e, "mtp.", "model.language_model.mtp.")


@breaks("mtp-misplaced")
def draft_head_under_model(e: Edit) -> None:
    rename(e, "mtp.", "model.mtp.")


@breaks("mtp-misplaced")
def draft_head_after_the_last_layer(e: Edit) -> None:
    words = {"fc": "eh_proj", "norm": "shared_head.norm", "pre_fc_norm_embedding": "enorm", "pre_fc_norm_hidden": "hnorm"}
    for word, other in words.items():
        rename(e, f"mtp.{word}.", f"{PREFIX}layers.4.{other}.")
    rename(e, "mtp.layers.0.", f"{PREFIX}layers.4.")


@breaks("mtp-unindexed")
def draft_head_in_a_folder_below(e: Edit) -> None:
    (e.path / "mtp").mkdir()
    head = {name.removeprefix("mtp."): e.tensors.pop(name) for name in MTP_TENSORS}
    save_file(head, e.path / "mtp" / "weights.safetensors")


@breaks("mtp-unindexed")
def draft_head_in_a_shard_of_its_own(e: Edit) -> None:
    save_file({name: e.tensors.pop(name) for name in MTP_TENSORS}, e.path / "mtp.safetensors")


@breaks("mtp-unindexed")
def draft_head_left_out_of_the_index(e: Edit) -> None:
    write_index(e, lambda index: [index["weight_map"].pop(name) for name in MTP_TENSORS])


@breaks("index-missing")
def draft_head_in_a_second_shard_without_any_index(e: Edit) -> None:
    save_file({name: e.tensors.pop(name) for name in MTP_TENSORS}, e.path / "mtp.safetensors")
    e.later((e.path / INDEX_NAME).unlink)


@breaks("mtp-quantized")
def mtp_fc_quantized(e: Edit) -> None:
    quantize(e, "mtp.fc")


@breaks("mtp-not-ignored", "mtp-fc-not-ignored")
def draft_head_not_ignored(e: Edit) -> None:
    e.without(lambda name: name.startswith("mtp"))


@breaks("mtp-not-ignored", "mtp-fc-not-ignored", "ignore-matches-nothing")
def draft_head_ignored_under_another_prefix(e: Edit) -> None:
    e.ignore([*(n for n in e.quantization["ignore"] if not n.startswith("mtp")), "model.mtp*"])


@breaks("mtp-fc-not-ignored")
def only_the_layer_ignored(e: Edit) -> None:
    e.ignore([*(n for n in e.quantization["ignore"] if not n.startswith("mtp")), "mtp.layers.0*"])


@breaks()
def draft_head_by_a_glob(e: Edit) -> None:
    e.ignore([*(n for n in e.quantization["ignore"] if not n.startswith("mtp")), "*mtp*"])


@breaks("mtp-not-ignored")
def lm_head_ignored_for_the_target_only(e: Edit) -> None:
    e.ignore(["language_model.lm_head", *(n for n in e.quantization["ignore"] if n != "lm_head")])


@breaks("mtp-not-declared")
def no_mtp_num_hidden_layers(e: Edit) -> None:
    del e.text["mtp_num_hidden_layers"]


@breaks("mtp-layer-count")
def mtp_num_hidden_layers_zero(e: Edit) -> None:
    e.text["mtp_num_hidden_layers"] = 0


@breaks("mtp-layer-count")
def mtp_num_hidden_layers_two(e: Edit) -> None:
    e.config["mtp_num_hidden_layers"] = 2


@breaks("mtp-not-declared")
def num_nextn_predict_layers_only(e: Edit) -> None:
    e.text["num_nextn_predict_layers"] = e.text.pop("mtp_num_hidden_layers")


@breaks()
def mtp_num_hidden_layers_null_at_the_top(e: Edit) -> None:
    e.config["mtp_num_hidden_layers"] = None


# ---- vision


@breaks("vision-stripped")
def tower_stripped(e: Edit) -> None:
    drop(e, "model.visual.")
    e.config["language_model_only"] = True


@breaks("vision-missing")
def tower_lost(e: Edit) -> None:
    drop(e, "model.visual.")


@breaks("vision-called-stripped")
def tower_kept_but_called_stripped(e: Edit) -> None:
    e.config["language_model_only"] = True


@breaks("vision-in-text-model")
def tower_in_a_text_model(e: Edit) -> None:
    inner = e.config.pop("text_config")
    quantization = e.quantization
    e.config = inner | {"architectures": ["Qwen3_5ForCausalLM"], "quantization_config": quantization}


@breaks("processor-missing")
def no_video_processor(e: Edit) -> None:
    (e.path / "video_preprocessor_config.json").unlink()


@breaks("processor-unsound")
def pictures_divided_by_nothing(e: Edit) -> None:
    e.change("preprocessor_config.json", image_std=[0.5, 0, 0.5])


@breaks()
def both_processors_in_one_file(e: Edit) -> None:
    e.write("processor_config.json", {"image_processor": {}, "video_processor": {}})
    for name in ("video_preprocessor_config.json", "preprocessor_config.json"):
        (e.path / name).unlink()


# ---- tokenizer


@breaks("tokenizer-missing")
def no_tokenizer(e: Edit) -> None:
    (e.path / "tokenizer.json").unlink()


@breaks("tokenizer-config-missing")
def no_tokenizer_config(e: Edit) -> None:
    (e.path / "tokenizer_config.json").unlink()


@breaks("tokenizer-backend")
def the_backend_key(e: Edit) -> None:
    e.change("tokenizer_config.json", backend="tokenizers")


@breaks("tokenizer-backend")
def the_class_of_transformers_5(e: Edit) -> None:
    e.change("tokenizer_config.json", tokenizer_class="TokenizersBackend")


@breaks("template-missing")
def no_template(e: Edit) -> None:
    (e.path / "chat_template.jinja").unlink()


@breaks()
def template_inside_tokenizer_config(e: Edit) -> None:
    (e.path / "chat_template.jinja").unlink()
    e.change("tokenizer_config.json", chat_template=template())


@breaks("template-loses")
def a_template_that_shows_no_tools(e: Edit) -> None:
    roles = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    (e.path / "chat_template.jinja").write_text(roles + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


@breaks("template-loses")
def a_template_that_calls_itself_for_ever(e: Edit) -> None:
    (e.path / "chat_template.jinja").write_text("{% macro more() %}{{ more() }}{% endmacro %}{{ more() }}")


@breaks("template-loses")
def a_template_in_latin_1(e: Edit) -> None:
    (e.path / "chat_template.jinja").write_bytes(b"{# \xe9 #}" + template().encode())


@breaks("template-behaviour")
def a_template_that_trims_answers(e: Edit) -> None:
    text = template().replace(
        "set text = turn.text if show_thought or show_none else turn.text.lstrip('\\n')", "set text = turn.text | trim"
    )
    (e.path / "chat_template.jinja").write_text(text)


@breaks("template-choices")
def a_template_without_a_handoff(e: Edit) -> None:
    changed = template().replace("if thinking -%}\n  {%- set lead.text", "if false -%}\n  {%- set lead.text")
    (e.path / "chat_template.jinja").write_text(changed)


@breaks("template-twice")
def another_template_in_tokenizer_config(e: Edit) -> None:
    e.change("tokenizer_config.json", chat_template="{{ messages }}")


@breaks()
def the_same_template_in_tokenizer_config(e: Edit) -> None:
    e.change("tokenizer_config.json", chat_template=template())


@breaks("generation-config-missing")
def no_generation_config(e: Edit) -> None:
    (e.path / "generation_config.json").unlink()


@breaks("token-id-outside")
def an_end_token_outside(e: Edit) -> None:
    e.change("generation_config.json", eos_token_id=[288])


@breaks("token-id-outside")
def a_tokenizer_larger_than_the_embedding(e: Edit) -> None:
    tokenizer = e.read("tokenizer.json")
    tokenizer["model"]["vocab"]["xx"] = 300
    e.write("tokenizer.json", tokenizer)


@breaks("special-tokens")
def think_tags_that_are_no_tokens(e: Edit) -> None:
    added = [{"id": IDS["<|endoftext|>"] + i, "content": token} for i, token in enumerate(SPECIALS[:32]) if "think" not in token]
    e.change("tokenizer.json", added_tokens=added)
    e.config |= {key: IDS["<|endoftext|>"] + SPECIALS.index(token) for key, token in CONFIG_IDS.items()}


@breaks("generation-ids")
def answers_that_do_not_end(e: Edit) -> None:
    e.change("generation_config.json", eos_token_id=IDS["<|endoftext|>"])


@breaks("generation-ids")
def another_padding(e: Edit) -> None:
    e.change("generation_config.json", pad_token_id=IDS["<|im_start|>"])


@breaks("generation-greedy")
def greedy_by_default(e: Edit) -> None:
    e.change("generation_config.json", do_sample=False, temperature=0)


@breaks("token-id-differs")
def another_image_token(e: Edit) -> None:
    e.config["image_token_id"] -= 1
