"""The two declarations of a modelopt checkpoint whose linears are of several formats, as modelopt 0.47 exports them.

In: the declarations of one that is NVFP4 throughout (formats/nvfp4.py) and a format for each quantized module. Out: the same with
MIXED_PRECISION, `quantized_layers` and a config group for each format; or, where all are of one format, what modelopt writes then.
Source: modelopt 0.47, torch/export/quant_utils.py (process_layer_quant_config), convert_hf_config.py.

modelopt leaves the list of 16-bit modules out of a mixed declaration, for vLLM takes what `quantized_layers` does not name as 16 bits.
It stays in here: it says the same to vLLM, and engines that read the list alone are told.
"""

from collections.abc import Mapping
from typing import Any

GROUP_SIZE = 16
MIXED = "MIXED_PRECISION"
ALGOS = {
    "nvfp4": "NVFP4", "nvfp4_w4a16": "W4A16_NVFP4", "fp8": "FP8", "fp8_by_row": "FP8_PER_CHANNEL_PER_TOKEN", "fp8_in_blocks": "FP8_PB_WO",
}  # fmt: skip
NVFP4 = ("nvfp4", "nvfp4_w4a16")


def layer(name: str) -> dict[str, Any]:
    """The entry of `quantized_layers` for a module of a format."""
    return {"quant_algo": ALGOS[name]} | ({"group_size": GROUP_SIZE} if name in NVFP4 else {})


def group(name: str) -> dict[str, Any]:
    """The config group of a format, without its targets."""
    number: dict[str, Any] = {"dynamic": False, "num_bits": 8, "type": "float"}
    if name in NVFP4:
        number = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": GROUP_SIZE}
    return ({} if name == "nvfp4_w4a16" else {"input_activations": dict(number)}) | {"weights": number}


def quantization_config(nvfp4: Mapping[str, Any], formats: Mapping[str, str]) -> dict[str, Any]:
    """config.json's quantization_config. nvfp4: what it would be, were all modules NVFP4; formats: module → format."""
    names = list(dict.fromkeys(formats.values()))
    if len(names) == 1:
        groups = {"group_0": group(names[0]) | {"targets": ["Linear"]}}
        return {**nvfp4, "config_groups": groups, "quant_algo": ALGOS[names[0]]}
    groups = {
        f"group_{number}": group(name) | {"targets": sorted(module for module, format_ in formats.items() if format_ == name)}
        for number, name in enumerate(names)
    }
    layers = {module: layer(name) for module, name in formats.items()}
    return {**nvfp4, "config_groups": groups, "quantized_layers": layers, "quant_algo": MIXED}


def hf_quant_config(nvfp4: Mapping[str, Any], formats: Mapping[str, str]) -> dict[str, Any]:
    """hf_quant_config.json of the same."""
    names = set(formats.values())
    inner = {key: value for key, value in nvfp4["quantization"].items() if key != "group_size"}
    if len(names) == 1:
        return {**nvfp4, "quantization": inner | layer(names.pop())}
    layers = {module: layer(name) for module, name in formats.items()}
    return {**nvfp4, "quantization": inner | {"quant_algo": MIXED, "quantized_layers": layers}}
