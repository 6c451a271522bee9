"""Ways to break a sound checkpoint of a format other than modelopt's, each with exactly the rules of `mtpress check` that must fire.

In: an `Edit` of a checkpoint of checkpoints.SMALL_FORMATS, by its format. Out: the edit, changed; the caller saves it. What breaks in
every format alike (names, files, tokenizer, vision) stands in breaks.py. tests/rules/test_rules.py asks check, tests/engine/
test_refusals.py asks vLLM. It is long because it is a table.
"""

from collections.abc import Callable
from typing import Any

import torch

from breaks import drop, unquantize
from checkpoints import FP8_BLOCK, INT4_GROUP, PREFIX, Edit, in_fp8, in_int4, pack_int4
from mtpress.formats import int4, mixed_precision

L0, L3 = f"{PREFIX}layers.0.", f"{PREFIX}layers.3."
Q, DOWN = f"{L3}self_attn.q_proj", f"{L0}mlp.down_proj"
OUT_PROJ, QKV, Z = f"{L0}linear_attn.out_proj", f"{L0}linear_attn.in_proj_qkv", f"{L0}linear_attn.in_proj_z"
A, B = f"{L0}linear_attn.in_proj_a", f"{L0}linear_attn.in_proj_b"
WHOLE = {"bits": 16, "data_type": "fp"}
MTP_LAYER = tuple(
    f"mtp.layers.0.{name}" for name in (*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down")))
)
Break = Callable[[Edit], object]
CASES: list[tuple[str, str, set[str], Break]] = []


def breaks(kind: str, *expected: str) -> Callable[[Break], Break]:
    """Registers a way to break the sound checkpoint of a format, and exactly the rules that must fire."""

    def register(function: Break) -> Break:
        CASES.append((f"{kind}-{function.__name__.lstrip('_')}", kind, set(expected), function))
        return function

    return register


def group(e: Edit) -> dict[str, Any]:
    """The one config group of compressed-tensors."""
    found: dict[str, Any] = e.quantization["config_groups"]["group_0"]
    return found


def without(e: Edit, dropped: Callable[[str], bool]) -> None:
    e.quantization["ignore"] = [entry for entry in e.quantization["ignore"] if not dropped(entry)]


def beside(e: Edit) -> None:
    """AutoRound's second file says what the first does."""
    e.write("quantization_config.json", e.quantization)


CT, A16, CT4, AR, GPTQ = "compressed-tensors", "compressed-tensors-w4a16", "compressed-tensors-int4", "auto-round", "gptq"
MIXED, FP8, CTM = "modelopt-mixed", "fp8", "compressed-tensors-mixed"


# ---- compressed-tensors NVFP4


@breaks(CT, "mtp-not-ignored")
def draft_head_not_ignored(e: Edit) -> None:
    without(e, lambda name: name.startswith("mtp"))


@breaks(CT, "mtp-not-ignored")
def only_mtp_fc_not_ignored(e: Edit) -> None:
    without(e, lambda name: name == "mtp.fc")


@breaks(CT)
def draft_head_by_an_expression(e: Edit) -> None:
    without(e, lambda name: name.startswith("mtp"))
    e.quantization["ignore"].append("re:^mtp.*")


@breaks(CT, "vision-not-ignored", "ignore-matches-nothing")
def tower_by_an_expression_with_the_checkpoints_prefix(e: Edit) -> None:
    without(e, lambda name: "visual" in name)
    e.quantization["ignore"].append("re:model.visual.*")


@breaks(CT, "vision-not-ignored", "ignore-matches-nothing")
def tower_by_a_glob(e: Edit) -> None:
    without(e, lambda name: "visual" in name)
    e.quantization["ignore"].append("model.visual*")


@breaks(CT)
def lm_head_is_no_linear(e: Edit) -> None:
    without(e, lambda name: name == "lm_head")


@breaks(CT, "ignore-splits-fused")
def half_of_a_fused_pair(e: Edit) -> None:
    without(e, lambda name: name == A)


@breaks(CT, "ignore-too-little")
def in_proj_ab_not_ignored(e: Edit) -> None:
    without(e, lambda name: ".in_proj_" in name)


@breaks(CT, "ignore-too-much")
def an_expression_over_too_many_layers(e: Edit) -> None:
    e.quantization["ignore"].append("re:.*layers.3.*")


@breaks(CT, "ignore-too-much")
def a_target_that_leaves_attention_out(e: Edit) -> None:
    group(e)["targets"] = ["re:.*mlp.*", "re:.*linear_attn.*"]


@breaks(CT, "ignore-matches-nothing")
def a_target_that_is_not_there(e: Edit) -> None:
    group(e)["targets"].append("re:.*experts.*")


@breaks(CT, "ignore-too-much")
def no_groups_at_all(e: Edit) -> None:
    del e.quantization["config_groups"]


@breaks(CT, "ignore-malformed")
def targets_as_a_string(e: Edit) -> None:
    e.quantization["config_groups"]["group_1"] = group(e) | {"targets": "Linear"}


@breaks(CT, "ignore-malformed", "ignore-matches-nothing")
def an_expression_that_is_none(e: Edit) -> None:
    e.quantization["ignore"].append("re:(mtp")


@breaks(CT, "scale-missing")
def no_global_scale(e: Edit) -> None:
    del e.tensors[f"{OUT_PROJ}.weight_global_scale"]


@breaks(CT, "scale-missing")
def no_block_scales(e: Edit) -> None:
    del e.tensors[f"{OUT_PROJ}.weight_scale"]


@breaks(CT, "scale-missing")
def no_input_global_scale(e: Edit) -> None:
    del e.tensors[f"{OUT_PROJ}.input_global_scale"]


@breaks(CT, "scale-orphan")
def a_scale_of_modelopts(e: Edit) -> None:
    e.tensors[f"{OUT_PROJ}.weight_scale_2"] = torch.tensor(0.01)


@breaks(CT, "scale-implausible")
def a_global_scale_that_is_no_reciprocal(e: Edit) -> None:
    e.tensors[f"{OUT_PROJ}.weight_global_scale"] = 1 / e.tensors[f"{OUT_PROJ}.weight_global_scale"]


@breaks(CT, "scale-unsound")
def a_global_scale_of_infinity(e: Edit) -> None:
    e.tensors[f"{OUT_PROJ}.weight_global_scale"] = torch.tensor([float("inf")])


@breaks(CT, "fused-scales-differ")
def own_global_scale_for_in_proj_z(e: Edit) -> None:
    e.tensors[f"{Z}.weight_global_scale"] *= 2


@breaks(CT, "fused-input-scales-differ")
def own_input_scale_for_q(e: Edit) -> None:
    e.tensors[f"{Q}.input_global_scale"] *= 2


@breaks(CT, "fused-formats-differ")
def one_shard_of_q_k_v_in_bf16(e: Edit) -> None:
    unquantize(e, Q, (128, 64))


@breaks(CT, "weight-shape")
def codes_of_another_shape(e: Edit) -> None:
    e.tensors[f"{OUT_PROJ}.weight_packed"] = e.tensors[f"{OUT_PROJ}.weight_packed"][:, :-1].contiguous()


@breaks(CT, "weight-dtype")
def block_scales_in_bf16(e: Edit) -> None:
    e.tensors[f"{OUT_PROJ}.weight_scale"] = e.tensors[f"{OUT_PROJ}.weight_scale"].to(torch.bfloat16)


@breaks(CT, "format-differs", "fused-formats-differ")
def a_linear_in_modelopts_layout(e: Edit) -> None:
    for old, new in {"weight_packed": "weight", "weight_global_scale": "weight_scale_2", "input_global_scale": "input_scale"}.items():
        tensor = e.tensors.pop(f"{Q}.{old}")
        e.tensors[f"{Q}.{new}"] = tensor if old == "weight_packed" else 1 / tensor


@breaks(CT, "format-differs", "hf-quant-config-missing", "ignore-too-much")
def declared_as_modelopt(e: Edit) -> None:
    ignore = e.quantization["ignore"]
    e.config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": [*ignore, "*layers.3.mlp*"]}


@breaks(CT, "quantization-not-stored", "format-not-covered")
def int8_declared(e: Edit) -> None:
    group(e)["weights"] = {"num_bits": 8, "type": "int", "strategy": "channel"}
    for name in [n for n in e.tensors if n.endswith(".weight_packed")]:
        module = name.removesuffix(".weight_packed")
        n, half = e.tensors[name].shape
        unquantize(e, module, (n, 2 * half))


@breaks(CT, "configs-contradict")
def modelopts_file_beside_it(e: Edit) -> None:
    e.write("hf_quant_config.json", {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "exclude_modules": []}})


@breaks(CT, "mtp-rounded")
def a_quantized_draft_layer(e: Edit) -> None:
    for module in MTP_LAYER:
        n, k = e.tensors.pop(f"{module}.weight").shape
        e.tensors[f"{module}.weight_packed"] = torch.zeros(n, k // 2, dtype=torch.uint8)
        e.tensors[f"{module}.weight_scale"] = torch.ones(n, k // 16).to(torch.float8_e4m3fn)
        e.tensors |= {f"{module}.{scale}": torch.tensor([100.0]) for scale in ("weight_global_scale", "input_global_scale")}
    without(e, lambda name: name.startswith("mtp.layers"))


@breaks(CT, "mtp-quantized")
def a_quantized_draft_layer_that_is_ignored(e: Edit) -> None:
    module = MTP_LAYER[-1]
    n, k = e.tensors.pop(f"{module}.weight").shape
    e.tensors[f"{module}.weight_packed"] = torch.zeros(n, k // 2, dtype=torch.uint8)
    e.tensors[f"{module}.weight_scale"] = torch.ones(n, k // 16).to(torch.float8_e4m3fn)
    e.tensors |= {f"{module}.{scale}": torch.tensor([100.0]) for scale in ("weight_global_scale", "input_global_scale")}


@breaks(CT, "mtp-missing")
def no_draft_head(e: Edit) -> None:
    drop(e, "mtp.")


@breaks(A16, "scale-orphan")
def weight_only_with_input_global_scales(e: Edit) -> None:
    e.tensors[f"{OUT_PROJ}.input_global_scale"] = torch.tensor([100.0])


@breaks(A16, "scale-missing")
def weight_only_declared_with_activations(e: Edit) -> None:
    group(e)["input_activations"] = dict(group(e)["weights"], dynamic="local")


# ---- compressed-tensors INT4


@breaks(CT4, "scale-missing")
def no_weight_shape(e: Edit) -> None:
    del e.tensors[f"{OUT_PROJ}.weight_shape"]


@breaks(CT4, "weight-shape")
def another_weight_shape(e: Edit) -> None:
    e.tensors[f"{OUT_PROJ}.weight_shape"] = torch.tensor([64, 128])


@breaks(CT4, "scale-missing")
def asymmetric_without_zero_points(e: Edit) -> None:
    group(e)["weights"]["symmetric"] = False


@breaks(CT4)
def asymmetric_with_zero_points(e: Edit) -> None:
    group(e)["weights"]["symmetric"] = False
    for name in [n for n in e.tensors if n.endswith(".weight_scale")]:
        n, groups = e.tensors[name].shape
        e.tensors[name.replace(".weight_scale", ".weight_zero_point")] = int4.zeros(n, groups, 8).t().contiguous()


@breaks(CT4, "scale-orphan")
def zero_points_of_symmetric_codes(e: Edit) -> None:
    n, groups = e.tensors[f"{OUT_PROJ}.weight_scale"].shape
    e.tensors[f"{OUT_PROJ}.weight_zero_point"] = int4.zeros(n, groups, 8).t().contiguous()


@breaks(CT4, "group-size")
def scales_for_groups_of_32_declared_64(e: Edit) -> None:
    group(e)["weights"]["group_size"] = 64
    for name in [n for n in e.tensors if n.startswith(tuple(f"{PREFIX}layers.{i}.mlp.down_proj" for i in range(4)))]:
        e.tensors.pop(name)
    for i in range(4):
        e.tensors[f"{PREFIX}layers.{i}.mlp.down_proj.weight"] = torch.ones(64, 96, dtype=torch.bfloat16)
    e.quantization["ignore"].append("re:.*mlp.down_proj")


@breaks(CT4, "no-kernel")
def activations_in_an_order_of_their_own(e: Edit) -> None:
    group(e)["weights"]["actorder"] = "group"


@breaks(CT4, "ignore-malformed", "format-not-covered")
def int4_under_the_format_of_nvfp4(e: Edit) -> None:
    group(e)["format"] = "nvfp4-pack-quantized"


@breaks(CT4, "weight-shape")
def eight_bits_declared(e: Edit) -> None:
    group(e)["weights"]["num_bits"] = 8


# ---- AutoRound


@breaks(AR, "mtp-not-ignored", "vision-not-ignored")
def no_block_names(e: Edit) -> None:
    del e.quantization["block_name_to_quantize"]
    beside(e)


@breaks(AR)
def no_block_names_and_everything_else_spared(e: Edit) -> None:
    del e.quantization["block_name_to_quantize"]
    e.quantization["extra_config"] |= {".*visual.*": WHOLE, ".*mtp.*": WHOLE}
    beside(e)


@breaks(AR, "mtp-not-ignored")
def a_bf16_draft_layer_in_the_block_names(e: Edit) -> None:
    e.quantization["block_name_to_quantize"] += ",mtp.layers"
    beside(e)


@breaks(AR)
def block_names_as_a_list(e: Edit) -> None:
    e.quantization["block_name_to_quantize"] = [f"{PREFIX}layers"]
    beside(e)


@breaks(AR, "ignore-matches-nothing")
def a_block_name_that_begins_nothing(e: Edit) -> None:
    e.quantization["block_name_to_quantize"] += ", mtp.layers"
    beside(e)


@breaks(AR, "ignore-too-much", "ignore-matches-nothing")
def block_names_without_their_dot(e: Edit) -> None:
    e.quantization["block_name_to_quantize"] = PREFIX.removesuffix(".")
    beside(e)


@breaks(AR, "ignore-too-little")
def in_proj_ab_without_an_entry(e: Edit) -> None:
    e.quantization["extra_config"] = {}
    beside(e)


@breaks(AR, "ignore-splits-fused")
def an_entry_for_one_of_a_fused_pair(e: Edit) -> None:
    del e.quantization["extra_config"][A]
    beside(e)


@breaks(AR, "ignore-too-much")
def an_entry_for_what_is_packed(e: Edit) -> None:
    e.quantization["extra_config"][DOWN] = WHOLE
    beside(e)


@breaks(AR, "ignore-matches-nothing")
def an_entry_under_another_prefix(e: Edit) -> None:
    e.quantization["extra_config"]["model.language_model.mtp.fc"] = WHOLE
    beside(e)


@breaks(AR, "ignore-malformed")
def an_entry_that_is_a_number(e: Edit) -> None:
    e.quantization["extra_config"]["mtp.fc"] = 16
    beside(e)


@breaks(AR, "packing-format")
def auto_rounds_own_packing(e: Edit) -> None:
    e.quantization["packing_format"] = "auto_round"
    for name in [n for n in e.tensors if n.endswith(".qzeros")]:
        e.tensors[name] = torch.full_like(e.tensors[name], int4.zeros(8, 1, 8).item())
    beside(e)


@breaks(AR, "packing-format")
def an_unknown_backend(e: Edit) -> None:
    e.quantization["backend"] = "exllama"
    beside(e)


@breaks(AR, "zeros-convention")
def zero_points_as_they_are(e: Edit) -> None:
    e.tensors[f"{DOWN}.qzeros"] = torch.full_like(e.tensors[f"{DOWN}.qzeros"], int4.zeros(8, 1, 8).item())


@breaks(AR, "zeros-asymmetric")
def zero_points_that_are_not_the_middle(e: Edit) -> None:
    e.tensors[f"{DOWN}.qzeros"] = torch.full_like(e.tensors[f"{DOWN}.qzeros"], 0x33333333)


@breaks(AR, "no-kernel")
def asymmetric_codes(e: Edit) -> None:
    e.quantization["sym"] = False
    beside(e)


@breaks(AR, "no-kernel", "group-size")
def a_group_size_without_a_kernel(e: Edit) -> None:
    e.quantization["group_size"] = 16
    beside(e)


@breaks(AR, "no-kernel", "weight-shape")
def three_bits_declared(e: Edit) -> None:
    e.quantization["bits"] = 3
    beside(e)


@breaks(AR, "group-size")
def scales_for_groups_of_64_in_one_linear(e: Edit) -> None:
    drop(e, f"{OUT_PROJ}.")
    codes, scales = in_int4(torch.ones(64, 64), 2 * INT4_GROUP)
    e.tensors |= {f"{OUT_PROJ}.{suffix}": tensor for suffix, tensor in int4.tensors(codes, scales).items()}


@breaks(AR, "k-not-divisible", "group-size")
def groups_that_do_not_divide_the_input(e: Edit) -> None:
    e.quantization["group_size"] = 64
    e.quantization["extra_config"] |= {f".*{name}": {"group_size": INT4_GROUP} for name in ("_attn", "gate_proj", "up_proj")}
    beside(e)
    e.quantization["extra_config"] |= {A: WHOLE, B: WHOLE}


@breaks(AR, "weight-shape")
def codes_that_lack_a_word(e: Edit) -> None:
    e.tensors[f"{OUT_PROJ}.qweight"] = e.tensors[f"{OUT_PROJ}.qweight"][:-1].contiguous()


@breaks(AR, "weight-dtype")
def scales_in_int8(e: Edit) -> None:
    e.tensors[f"{OUT_PROJ}.scales"] = e.tensors[f"{OUT_PROJ}.scales"].to(torch.int8)


@breaks(AR, "scale-missing")
def no_scales(e: Edit) -> None:
    del e.tensors[f"{OUT_PROJ}.scales"]


@breaks(AR, "scale-missing")
def no_zero_points(e: Edit) -> None:
    del e.tensors[f"{OUT_PROJ}.qzeros"]


@breaks(AR, "fused-formats-differ")
def one_packed_shard_of_gate_up_in_bf16(e: Edit) -> None:
    unquantize(e, f"{L0}mlp.gate_proj", (96, 64))


@breaks(AR, "n-not-divisible", "in-proj-ab-quantized")
def in_proj_ab_in_int4(e: Edit) -> None:
    for name in (A, B):
        drop(e, f"{name}.")
        packed = int4.tensors(*in_int4(torch.ones(8, 64)))  # 2 rows fill no word
        for suffix, tensor in packed.items():
            e.tensors[f"{name}.{suffix}"] = tensor[..., : 1 if suffix == "qzeros" else 2].contiguous()
        del e.quantization["extra_config"][name]
    beside(e)


@breaks(AR, "mtp-rounded")
def the_draft_layer_rounded_as_auto_round_does(e: Edit) -> None:
    pack_int4(e, *MTP_LAYER)
    e.quantization["block_name_to_quantize"] += ",mtp.layers"
    beside(e)


@breaks(AR, "mtp-quantized")
def the_draft_layer_rounded_and_not_declared(e: Edit) -> None:
    pack_int4(e, *MTP_LAYER)


@breaks(AR, "mtp-quantized")
def mtp_fc_packed(e: Edit) -> None:
    pack_int4(e, "mtp.fc")


@breaks(AR, "mtp-quantized")
def mtp_fc_packed_and_declared(e: Edit) -> None:
    pack_int4(e, "mtp.fc")
    e.quantization["block_name_to_quantize"] += ",mtp.fc"
    beside(e)


@breaks(AR, "configs-differ")
def draft_head_in_one_file_only(e: Edit) -> None:
    beside(e)
    e.write("quantization_config.json", e.quantization | {"block_name_to_quantize": f"{PREFIX}layers,mtp.layers"})


@breaks(AR, "configs-differ")
def another_group_size_in_the_other_file(e: Edit) -> None:
    e.write("quantization_config.json", e.quantization | {"group_size": 128})


@breaks(AR)
def one_file_is_enough(e: Edit) -> None:
    (e.path / "quantization_config.json").unlink()


@breaks(AR)
def a_quantized_lm_head(e: Edit) -> None:
    pack_int4(e, "lm_head")
    e.quantization["extra_config"]["lm_head"] = {"bits": 4}
    beside(e)


@breaks(AR, "ignore-too-much")
def a_quantized_lm_head_without_an_entry(e: Edit) -> None:
    pack_int4(e, "lm_head")


# ---- GPTQ


@breaks(GPTQ, "ignore-malformed")
def dynamic_as_null(e: Edit) -> None:
    e.quantization["dynamic"] = None


@breaks(GPTQ)
def the_draft_head_by_dynamic(e: Edit) -> None:
    e.quantization["dynamic"] = {"-:.*mtp.*": {}, "-:.*visual.*": {}}


@breaks(GPTQ, "ignore-matches-nothing")
def dynamic_without_a_beginning(e: Edit) -> None:
    e.quantization["dynamic"] = {"-:visual\\.blocks\\.9": {}}


@breaks(GPTQ, "ignore-too-much")
def dynamic_over_too_much(e: Edit) -> None:
    e.quantization["dynamic"] = {"-:.*layers.3.*": {}}


@breaks(GPTQ, "mtp-not-ignored", "vision-not-ignored")
def parts_of_names_that_the_draft_has_too(e: Edit) -> None:
    e.quantization["modules_in_block_to_quantize"] = [["self_attn.", "mlp."], ["in_proj_qkv", "in_proj_z", "out_proj"]]


@breaks(GPTQ, "ignore-too-much")
def a_list_that_forgets_out_proj(e: Edit) -> None:
    names = ["language_model.model.layers.3.", ".linear_attn.in_proj_qkv", ".linear_attn.in_proj_z", "model.layers.0.mlp"]
    e.quantization["modules_in_block_to_quantize"] = [*names, "model.layers.1.mlp", "model.layers.2.mlp"]


@breaks(GPTQ, "ignore-splits-fused")
def a_list_with_one_of_gate_and_up(e: Edit) -> None:
    names = [
        f"{PREFIX}layers.3.self_attn",
        *(f"{PREFIX}layers.{i}.linear_attn.{x}" for i in range(3) for x in ("in_proj_qkv", "in_proj_z", "out_proj")),
    ]
    names += [f"{PREFIX}layers.{i}.mlp.{x}_proj" for i in range(4) for x in ("gate", "up", "down")]
    names.remove(f"{L0}mlp.up_proj")
    e.quantization["modules_in_block_to_quantize"] = names


@breaks(GPTQ, "mtp-quantized")
def a_packed_mtp_fc(e: Edit) -> None:
    pack_int4(e, "mtp.fc")


@breaks(GPTQ, "mtp-rounded")
def a_packed_draft_layer(e: Edit) -> None:
    pack_int4(e, *MTP_LAYER)


@breaks(GPTQ, "no-kernel")
def desc_act_with_groups(e: Edit) -> None:
    e.quantization["desc_act"] = True


@breaks(GPTQ, "no-kernel")
def asymmetric_gptq(e: Edit) -> None:
    e.quantization["sym"] = False


@breaks(GPTQ, "zeros-convention")
def version_two_with_zero_points_of_version_one(e: Edit) -> None:
    e.quantization["checkpoint_format"] = "gptq_v2"


@breaks(GPTQ)
def version_two(e: Edit) -> None:
    e.quantization["checkpoint_format"] = "gptq_v2"
    for name in [n for n in e.tensors if n.endswith(".qzeros")]:
        e.tensors[name] = torch.full_like(e.tensors[name], int4.zeros(8, 1, 8).item())


@breaks(GPTQ, "ignore-too-much")
def a_packed_lm_head_that_is_not_said(e: Edit) -> None:
    pack_int4(e, "lm_head")


# ---- modelopt's mixed precision


def entries(e: Edit) -> list[dict[str, Any]]:
    """quantized_layers of config.json and of hf_quant_config.json."""
    assert e.hf is not None
    return [e.quantization["quantized_layers"], e.hf["quantization"]["quantized_layers"]]


def enter(e: Edit, module: str, format_: str | None) -> None:
    """Gives a module another format in both files; None takes its entry out."""
    for layers in entries(e):
        layers.pop(module, None)
        if format_ is not None:
            layers[module] = mixed_precision.layer(format_)


@breaks(MIXED, "format-differs")
def another_format_in_an_entry(e: Edit) -> None:
    enter(e, OUT_PROJ, "nvfp4")


@breaks(MIXED, "ignore-too-much")
def an_entry_missing(e: Edit) -> None:
    enter(e, OUT_PROJ, None)


@breaks(MIXED)
def an_entry_missing_of_a_fused_linear(e: Edit) -> None:
    enter(e, Q, None)


@breaks(MIXED, "ignore-splits-fused")
def two_formats_in_a_fused_linear(e: Edit) -> None:
    enter(e, Q, "nvfp4")


@breaks(MIXED, "ignore-malformed", "ignore-too-much")
def an_entry_without_its_format(e: Edit) -> None:
    for layers in entries(e):
        layers[OUT_PROJ] = {"group_size": 16}


@breaks(MIXED, "ignore-malformed", "format-not-covered")
def no_entries(e: Edit) -> None:
    for layers in entries(e):
        layers.clear()


@breaks(MIXED, "ignore-matches-nothing")
def an_entry_of_a_module_that_is_not_there(e: Edit) -> None:
    enter(e, f"{L0}mlp.experts", "fp8")


@breaks(MIXED, "configs-contradict")
def entries_that_differ_between_the_files(e: Edit) -> None:
    entries(e)[1][OUT_PROJ] = mixed_precision.layer("nvfp4")


@breaks(MIXED, "group-size")
def a_group_size_of_32(e: Edit) -> None:
    for layers in entries(e):
        layers[DOWN] = layers[DOWN] | {"group_size": 32}


@breaks(MIXED, "mtp-not-ignored")
def the_draft_layer_among_the_entries(e: Edit) -> None:
    e.without(lambda name: name.startswith("mtp."))
    for module in MTP_LAYER:
        enter(e, module, "fp8")


@breaks(MIXED, "mtp-not-ignored")
def mtp_fc_among_the_entries(e: Edit) -> None:
    e.without(lambda name: name == "mtp.fc")
    enter(e, "mtp.fc", "nvfp4")


@breaks(MIXED)
def no_list_of_what_is_spared(e: Edit) -> None:
    """As modelopt itself writes it: what has no entry is in 16 bits."""
    assert e.hf is not None
    e.quantization["ignore"] = []
    del e.hf["quantization"]["exclude_modules"]


@breaks(MIXED, "ignore-too-little")
def a_bf16_linear_among_the_entries(e: Edit) -> None:
    unquantize(e, OUT_PROJ, (64, 64))


@breaks(MIXED, "scale-missing")
def no_input_scale_of_fp8(e: Edit) -> None:
    del e.tensors[f"{OUT_PROJ}.input_scale"]


@breaks(MIXED, "scale-missing")
def no_weight_scale_of_fp8(e: Edit) -> None:
    del e.tensors[f"{OUT_PROJ}.weight_scale"]


@breaks(MIXED, "scale-missing")
def no_input_scale_of_nvfp4(e: Edit) -> None:
    del e.tensors[f"{DOWN}.input_scale"]


@breaks(MIXED, "scale-unsound")
def a_weight_scale_of_fp8_that_is_nan(e: Edit) -> None:
    e.tensors[f"{OUT_PROJ}.weight_scale"] = torch.tensor(float("nan"))


@breaks(MIXED, "fused-input-scales-differ")
def own_input_scale_for_a_shard_of_fp8(e: Edit) -> None:
    e.tensors[f"{Q}.input_scale"] = 2 * e.tensors[f"{Q}.input_scale"]


@breaks(MIXED, "weight-dtype")
def a_scale_of_fp8_in_bf16(e: Edit) -> None:
    e.tensors[f"{OUT_PROJ}.weight_scale"] = e.tensors[f"{OUT_PROJ}.weight_scale"].to(torch.bfloat16)


@breaks(MIXED, "format-differs")
def a_scale_a_row(e: Edit) -> None:
    e.tensors[f"{OUT_PROJ}.weight_scale"] = e.tensors[f"{OUT_PROJ}.weight_scale"].expand(64).contiguous()


@breaks(MIXED, "scale-orphan")
def a_global_scale_of_fp8(e: Edit) -> None:
    e.tensors[f"{OUT_PROJ}.weight_scale_2"] = torch.tensor(0.01)


@breaks(MIXED, "input-scales-unused")
def a_linear_without_activations_that_has_an_input_scale(e: Edit) -> None:
    enter(e, DOWN, "nvfp4_w4a16")


# ---- FP8 by quant_method fp8, in blocks


def spared(e: Edit) -> list[str]:
    found: list[str] = e.quantization["modules_to_not_convert"]
    return found


@breaks(FP8, "mtp-fp8")
def the_draft_layer_in_fp8_as_qwen_releases_it(e: Edit) -> None:
    in_fp8(e, *MTP_LAYER, block=FP8_BLOCK)
    e.quantization["modules_to_not_convert"] = [name for name in spared(e) if name not in MTP_LAYER]


@breaks(FP8, "mtp-quantized")
def a_draft_layer_in_fp8_that_is_spared(e: Edit) -> None:
    in_fp8(e, *MTP_LAYER, block=FP8_BLOCK)


@breaks(FP8, "mtp-not-ignored")
def a_bf16_draft_layer_that_is_not_spared(e: Edit) -> None:
    e.quantization["modules_to_not_convert"] = [name for name in spared(e) if name not in MTP_LAYER]


@breaks(FP8, "ignore-too-little", "ignore-matches-nothing")
def spared_by_expressions(e: Edit) -> None:
    """quant_method fp8 compares names whole."""
    ours = [name for name in spared(e) if not name.endswith(("in_proj_a", "in_proj_b"))]
    e.quantization["modules_to_not_convert"] = [*ours, "re:.*in_proj_[ab]$"]


@breaks(FP8, "ignore-splits-fused")
def half_of_a_fused_pair_is_spared(e: Edit) -> None:
    e.quantization["modules_to_not_convert"] = [name for name in spared(e) if name != A]


@breaks(FP8, "ignore-too-much")
def an_fp8_linear_that_is_spared(e: Edit) -> None:
    spared(e).append(OUT_PROJ)


@breaks(FP8, "ignore-too-much")
def an_lm_head_in_fp8(e: Edit) -> None:
    """Fp8Config has no method for it, whatever the list says."""
    in_fp8(e, "lm_head", block=FP8_BLOCK)
    spared(e).remove("lm_head")


@breaks(FP8)
def an_older_key_for_the_list(e: Edit) -> None:
    e.quantization["ignored_layers"] = e.quantization.pop("modules_to_not_convert")


@breaks(FP8, "ignore-malformed")
def no_activation_scheme(e: Edit) -> None:
    del e.quantization["activation_scheme"]


@breaks(FP8, "format-differs")
def a_scale_a_tensor_declared(e: Edit) -> None:
    del e.quantization["weight_block_size"]


@breaks(FP8, "format-differs")
def one_linear_with_a_scale_a_row(e: Edit) -> None:
    codes = e.tensors[f"{OUT_PROJ}.weight"].float()
    scales = e.tensors.pop(f"{OUT_PROJ}.weight_scale_inv").float()
    spread = scales.repeat_interleave(FP8_BLOCK, 0).repeat_interleave(FP8_BLOCK, 1)
    e.tensors[f"{OUT_PROJ}.weight"] = (codes * spread).bfloat16()
    in_fp8(e, OUT_PROJ)


@breaks(FP8, "scale-missing")
def no_scales_of_a_block(e: Edit) -> None:
    del e.tensors[f"{OUT_PROJ}.weight_scale_inv"]


@breaks(FP8, "scale-orphan")
def an_input_scale_that_nothing_reads(e: Edit) -> None:
    e.tensors[f"{OUT_PROJ}.input_scale"] = torch.tensor(0.1)


@breaks(FP8, "weight-shape")
def scales_of_another_shape(e: Edit) -> None:
    name = f"{OUT_PROJ}.weight_scale_inv"
    e.tensors[name] = torch.cat([e.tensors[name], e.tensors[name]])


@breaks(FP8, "weight-dtype")
def embeddings_in_fp8(e: Edit) -> None:
    in_fp8(e, f"{PREFIX}embed_tokens", block=FP8_BLOCK)


@breaks(FP8, "blocks-across-shards", "in-proj-ab-quantized")
def in_proj_ab_in_fp8(e: Edit) -> None:
    for module in [f"{PREFIX}layers.{i}.linear_attn.in_proj_{x}" for i in range(3) for x in "ab"]:
        in_fp8(e, module, block=FP8_BLOCK)
        spared(e).remove(module)


@breaks(FP8, "quantization-undeclared")
def fp8_that_nothing_declares(e: Edit) -> None:
    del e.config["quantization_config"]


# ---- compressed-tensors in mixed precision


def targets(e: Edit, number: int) -> list[str]:
    """The targets of a group: 0 is NVFP4, 1 is FP8."""
    found: list[str] = e.quantization["config_groups"][f"group_{number}"]["targets"]
    return found


def with_lm_head(e: Edit, target: str) -> None:
    in_fp8(e, "lm_head")
    without(e, lambda name: name == "lm_head")
    targets(e, 1).append(target)


@breaks(CTM, "ignore-too-much")
def an_fp8_lm_head_by_its_bare_name(e: Edit) -> None:
    with_lm_head(e, "lm_head")


@breaks(CTM)
def an_fp8_lm_head_by_an_expression(e: Edit) -> None:
    with_lm_head(e, "re:.*lm_head$")


@breaks(CTM)
def targets_by_expressions(e: Edit) -> None:
    targets(e, 0)[:] = [r"re:.*layers\.\d+\.mlp\.(gate|up|down)_proj$"]
    targets(e, 1)[:] = [r"re:.*(self_attn|linear_attn)\.(q_proj|k_proj|v_proj|o_proj|in_proj_qkv|in_proj_z|out_proj)$"]


@breaks(CTM, "mtp-not-ignored")
def a_draft_head_that_expressions_match(e: Edit) -> None:
    targets(e, 0)[:] = ["re:.*mlp.*_proj$"]
    without(e, lambda name: name.startswith("mtp."))


@breaks(CTM)
def a_draft_head_that_no_target_names(e: Edit) -> None:
    without(e, lambda name: name.startswith("mtp."))


@breaks(CTM, "ignore-too-much")
def an_fp8_linear_that_no_target_names(e: Edit) -> None:
    targets(e, 1).remove(OUT_PROJ)


@breaks(CTM, "format-differs")
def an_fp8_linear_among_the_targets_of_nvfp4(e: Edit) -> None:
    targets(e, 1).remove(OUT_PROJ)
    targets(e, 0).append(OUT_PROJ)


@breaks(CTM, "ignore-splits-fused")
def half_of_a_fused_linear_is_ignored(e: Edit) -> None:
    e.quantization["ignore"].append(QKV)


@breaks(CTM, "format-differs")
def a_scale_a_tensor_is_declared(e: Edit) -> None:
    e.quantization["config_groups"]["group_1"]["weights"]["strategy"] = "tensor"


@breaks(CTM, "scale-missing")
def no_scales_of_the_rows(e: Edit) -> None:
    del e.tensors[f"{OUT_PROJ}.weight_scale"]


@breaks(CTM, "weight-shape")
def scales_of_the_rows_without_their_second_dimension(e: Edit) -> None:
    e.tensors[f"{OUT_PROJ}.weight_scale"] = e.tensors[f"{OUT_PROJ}.weight_scale"].reshape(-1)


@breaks(CTM, "scale-orphan")
def a_static_scale_beside_dynamic_activations(e: Edit) -> None:
    e.tensors[f"{OUT_PROJ}.input_scale"] = torch.tensor([0.1])


@breaks(CTM, "mtp-fp8")
def a_draft_layer_in_fp8(e: Edit) -> None:
    in_fp8(e, *MTP_LAYER)
    without(e, lambda name: name in MTP_LAYER)
    targets(e, 1).extend(MTP_LAYER)


@breaks(CTM, "mtp-quantized")
def a_draft_layer_in_fp8_that_no_target_names(e: Edit) -> None:
    in_fp8(e, *MTP_LAYER)
    without(e, lambda name: name in MTP_LAYER)
