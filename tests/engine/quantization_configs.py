"""Quantization configs for asking vLLM's matchers: some written by hand, many drawn, always the same.

In: the checkpoint's names of some linears. Out: for each format a list of contents of `quantization_config`.
"""

import os
import random
import re
from typing import Any

from checkpoints import PREFIX

NUM_RANDOM = 400 if os.environ.get("MTPRESS_SOAK") else 60  # of each format and build
A, B = f"{PREFIX}layers.0.linear_attn.in_proj_a", f"{PREFIX}layers.0.linear_attn.in_proj_b"
BY_HAND = [
    ["lm_head"], ["lm_head.weight"], ["language_model.lm_head"], ["*lm_head*"], ["*"], [""], ["**"], [],
    ["mtp*"], ["mtp.*"], ["*mtp*"], ["mtp"], ["mtp.layers.0*"], ["model.mtp*"], ["re:.*mtp.*"], ["mtp.fc"],
    ["mtp.layers.0.mlp.gate_proj"], ["mtp.layers.0.mlp.gate_proj", "mtp.layers.0.mlp.up_proj"], ["mtp.layers.0.mlp.gate_up_proj"],
    ["model.visual"], ["model.visual*"], ["model.visual.*"], ["*visual*"], ["visual"], ["*model.visual*"], ["visual.*"],
    [A], ["*in_proj_a*", "*in_proj_b*"], ["*in_proj_ba*"], ["in_proj_b"], [A, B], [A, "*in_proj*"],
    [f"{PREFIX}layers.1*"], [f"{PREFIX}layers.1.*"], [f"{PREFIX}layers.1"], ["layers.1"], ["model.layers.1*"],
    ["*self_attn.q_proj"], ["q_proj"], ["*qkv_proj"], ["qkv"], ["*.mlp.*"], ["*mlp.gate.*"], ["mlp"], ["*layers.[02].*"],
    ["*layers.?.mlp.*"], ["model.language_model*"], ["model*"], ["language_model*"], ["model.language_model.model*"],
    ["re:.*lm_head"], ["re:.*visual.*"], ["re:model.visual.*"], ["re:^mtp.*"], ["re:.*in_proj_[ab]$"], ["re:.*in_proj_a$"],
    [".*in_proj_qkv.*"], [".*in_proj_qkv$"], [".*in_proj_qkvz"], [".*qkv"], [".*qkv_proj"], [".*mtp.*"], ["^mtp"], [".*lm_head"],
]  # fmt: skip

MIXED_ALGOS = ["FP8", "NVFP4", "W4A16_NVFP4", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "MXFP8"]
NVFP4 = {"num_bits": 4, "type": "float", "group_size": 16, "strategy": "tensor_group", "symmetric": True}
INT4 = {"num_bits": 4, "type": "int", "group_size": 128, "strategy": "group", "symmetric": True}
FP8: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
TOKEN = FP8 | {"strategy": "token", "dynamic": True}
GROUPS: list[dict[str, Any]] = [
    {"weights": NVFP4, "input_activations": NVFP4 | {"dynamic": "local"}, "format": "nvfp4-pack-quantized"},
    {"weights": NVFP4, "input_activations": None},
    {"weights": INT4, "input_activations": None, "format": "pack-quantized"},
    {"weights": INT4 | {"symmetric": False, "group_size": 32}},
    {"weights": {"num_bits": 8, "type": "int", "group_size": -1}, "format": "pack-quantized"},
    {"weights": FP8 | {"strategy": "channel"}, "format": "float-quantized"},
    {"weights": FP8 | {"strategy": "channel"}, "input_activations": TOKEN, "format": "float-quantized"},
    {"weights": FP8, "input_activations": FP8 | {"strategy": "tensor"}, "format": "float-quantized"},
    {"weights": FP8 | {"strategy": "tensor"}, "input_activations": TOKEN, "format": "naive-quantized"},
    {"weights": FP8 | {"strategy": "block", "block_structure": [128, 128]}, "input_activations": TOKEN, "format": "float-quantized"},
    {"weights": FP8 | {"strategy": "channel"}, "input_activations": TOKEN},
]
FP8_LISTS = ("ignored_layers", "modules_to_not_convert")
TARGETS = ["Linear", "Linear", "Linear", "ParallelLMHead", "QKVParallelLinear", "re:.*mlp.*", "re:.*Row.*", "lm_head", "re:.*self_attn.*"]


def entries_over(names: list[str], draw: random.Random) -> list[str]:
    """Whole names, cut names, and globs and expressions over them."""

    def entry() -> str:
        name = draw.choice(names)
        parts = name.split(".")
        start, end = sorted((draw.randint(0, len(parts)), draw.randint(0, len(parts))))
        piece, last = ".".join(parts[start:end]), parts[-1]
        wild = "".join(draw.choice("?*") if draw.random() < 0.05 else c for c in name)
        chosen = draw.choice(
            [
                name, name, name, piece, f"{piece}*", f"*{piece}", f"*{piece}*", f"{piece}.*", ".".join(parts[:end]) + "*", wild,
                name[:-1], f".*{last}", f".*{last}$", last, f".*{piece}.*", name.replace(".", r"\."), f"{name.rpartition('.')[0]}.*",
            ]
        )  # fmt: skip
        return draw.choice([chosen, chosen, chosen, chosen.replace("language_model.", ""), f"re:{chosen}", f"re:.*{last}"])

    return [entry() for _ in range(draw.randint(1, 6))]


def is_expression(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def modelopt(entries: list[str], draw: random.Random, names: list[str]) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": entries}


def modelopt_mixed(entries: list[str], draw: random.Random, names: list[str]) -> dict[str, Any]:
    """Whole names in most entries, so that fused linears meet; others as lists have them."""
    algos = [*MIXED_ALGOS, "fp8", "INT9"] if draw.random() < 0.3 else MIXED_ALGOS[: draw.randint(1, 4)]
    keys = draw.sample(names, draw.randint(1, len(names))) + (entries if draw.random() < 0.3 else [])
    layers = {key.replace("language_model.", "") if draw.random() < 0.05 else key: {"quant_algo": draw.choice(algos)} for key in keys}
    content: dict[str, Any] = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    if draw.random() < 0.1:
        content["quantized_layers"] = {}
    return content | ({"ignore": entries} if draw.random() < 0.5 else {})


def compressed_tensors(entries: list[str], draw: random.Random, names: list[str]) -> dict[str, Any]:
    def sound(these: list[str]) -> list[str]:  # vLLM stops on what follows re: and is no expression
        return [entry for entry in these if is_expression(entry.removeprefix("re:"))]

    groups = {}
    for i in range(draw.choice([0, 1, 1, 1, 2, 3])):
        targets = [draw.choice(TARGETS)] if draw.random() < 0.6 else sound(entries_over(names, draw)) or ["Linear"]
        groups[f"group_{i}"] = {"targets": targets} | draw.choice(GROUPS)
    if draw.random() < 0.1:
        groups["cache"] = {"targets": ["re:.*Attention"], "weights": None}
    layout = draw.choice(["nvfp4-pack-quantized", "pack-quantized", "mixed-precision"])
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": groups, "ignore": sound(entries)}


def fp8(entries: list[str], draw: random.Random, names: list[str]) -> dict[str, Any]:
    """Whole names in most entries: nothing else counts."""
    some = draw.sample(names, draw.randint(1, len(names))) + entries
    content: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic", draw.choice(FP8_LISTS): some}
    kind = draw.random()
    if kind < 0.5:
        content["weight_block_size"] = [128, 128]
    elif kind < 0.7:
        content["activation_scheme"] = "static"
    if draw.random() < 0.1:
        content[FP8_LISTS[0]] = []
    if draw.random() < 0.05:
        content["weight_block_size"] = draw.choice([[128], [128, 128, 128]])
    if draw.random() < 0.05:
        content["activation_scheme"] = draw.choice(["token", "static"])
    return content


def auto_round(entries: list[str], draw: random.Random, names: list[str]) -> dict[str, Any]:
    said = [
        {"bits": 16, "data_type": "fp"},
        {"bits": 16},
        {"data_type": "float"},
        {},
        {"bits": 8},
        {"bits": 4, "group_size": 32},
        {"sym": False},
    ]
    content: dict[str, Any] = {"quant_method": "auto-round", "bits": 4, "group_size": 128, "packing_format": "auto_round:auto_gptq"}
    likely = draw.random() < 0.7
    extra = {entry: said[draw.choice([0, 1])] if likely else draw.choice(said) for entry in entries}
    if draw.random() < 0.9:
        content["extra_config"] = extra
    blocks = draw.choice([None, f"{PREFIX}layers", f"{PREFIX}layers,mtp.layers", "model.layers", [f"{PREFIX}layers", "mtp"], "lm_head", ""])
    if draw.random() < 0.2:
        blocks = entries_over(names, draw)
    if blocks is not None:
        content[draw.choice(["block_name_to_quantize", "to_quant_block_names"])] = blocks
    return content


def gptq(entries: list[str], draw: random.Random, names: list[str]) -> dict[str, Any]:
    content: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
    content["lm_head"] = draw.random() < 0.3
    if draw.random() < 0.5:
        some = draw.sample(names, draw.randint(1, 8))
        modules = draw.choice([entries, some, [["self_attn.q_proj", "self_attn.k_proj"], ["mlp.gate_proj"]], ["mlp.", "self_attn."]])
        content["modules_in_block_to_quantize"] = modules
    if draw.random() < 0.6:
        keys = [entry.removeprefix("re:") for entry in entries_over(names, draw) if is_expression(entry.removeprefix("re:"))]
        content["dynamic"] = {draw.choice(["-:", "-:", "+:", ""]) + key: draw.choice([{}, {"group_size": 32}, {"bits": 8}]) for key in keys}
    return content


MAKERS = {
    "nvfp4": modelopt,
    "modelopt-mixed": modelopt_mixed,
    "compressed-tensors": compressed_tensors,
    "fp8": fp8,
    "auto-round": auto_round,
    "gptq": gptq,
}


def configs(kind: str, names: list[str]) -> list[dict[str, Any]]:
    """The configs of one format."""
    draw = random.Random(f"{kind} {names[0]}")
    lists = BY_HAND + [entries_over(names, draw) for _ in range(NUM_RANDOM)]
    return [MAKERS[kind](entries, draw, names) for entries in lists]


def stored_as_gptq(names: list[str]) -> dict[str, str]:
    """Tensor → dtype of a checkpoint of which the layers' linears but in_proj_a and in_proj_b are packed."""
    dtypes = {}
    for name in names:
        packed = ".layers." in name and not name.startswith("mtp.") and not name.endswith(("in_proj_a", "in_proj_b"))
        dtypes |= {f"{name}.qweight": "I32", f"{name}.scales": "F16"} if packed else {f"{name}.weight": "BF16"}
    return dtypes
