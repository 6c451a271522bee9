"""NVFP4 in compressed-tensors' layout (nvfp4-pack-quantized): the numbers of modelopt's layout under other names, two as reciprocals.

In: scales, and which modules stay in 16 bits. Out: names, reciprocals, and the quantization_config. Leaves out: codes and block
scales, whose bytes are the same in both layouts (formats/nvfp4.py): two codes a byte, the even column in the low nibble, E4M3 in rows.

    modelopt          compressed-tensors
    weight            weight_packed          uint8 [N, K/2]
    weight_scale      weight_scale           float8_e4m3fn [N, K/16]
    weight_scale_2    weight_global_scale    float32; [] there, [1] here; the reciprocal
    input_scale       input_global_scale     the same; none where activations stay in 16 bits

A reciprocal in float32 gives the number back, to the last bit, for 82.8 % of all significands. The others, all over √2, come
back one ulp away: there are fewer floats between 1/2 and 1/√2 than between √2 and 2, and no neighbour does better (the test tries
them all). Once a number has been there and back, it stays.
Source: compressed-tensors 0.19, compressors/nvfp4 and quantization/quant_scheme.py; vLLM 0.32, compressed_tensors_w4a4_nvfp4.py,
which computes 1 / weight_global_scale in float32 when it loads, as `reciprocal` does.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mtpress.formats import nvfp4

WEIGHT, SCALE, GLOBAL_SCALE, INPUT_GLOBAL_SCALE = "weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"
OF_MODELOPT = {nvfp4.WEIGHT: WEIGHT, nvfp4.SCALE: SCALE, nvfp4.SCALE_2: GLOBAL_SCALE, nvfp4.INPUT_SCALE: INPUT_GLOBAL_SCALE}
RECIPROCAL = (nvfp4.SCALE_2, nvfp4.INPUT_SCALE)

FORMAT = "nvfp4-pack-quantized"
MIXED = "mixed-precision"
NVFP4: dict[str, Any] = {
    "actorder": None, "block_structure": None, "dynamic": False, "group_size": nvfp4.GROUP_SIZE, "num_bits": 4, "observer": None,
    "observer_kwargs": {}, "scale_dtype": "torch.float8_e4m3fn", "strategy": "tensor_group", "symmetric": True, "type": "float",
    "zp_dtype": None,
}  # fmt: skip
FP8: dict[str, Any] = {**NVFP4, "group_size": None, "num_bits": 8, "scale_dtype": None, "strategy": "tensor"}
VERSION = "0.19.0"  # whose config this is
# "Linear" is held against class names. vLLM's lm_head is a ParallelLMHead, so a quantized one must be named.
LM_HEAD_TARGET = r"re:.*lm_head$"


def reciprocal(scale: torch.Tensor) -> torch.Tensor:
    """1 / scale, float32 of any shape: from either layout to the other."""
    return 1.0 / scale.float()


def returns(scale: torch.Tensor) -> torch.Tensor:
    """Relative difference, float64, between scales and what two reciprocals make of them; 0 where they come back to the last bit."""
    there_and_back = reciprocal(reciprocal(scale)).double()
    return ((there_and_back - scale.double()) / scale.double()).abs()


def quantization_config(
    ignore: Sequence[str], *, weight_only: bool = False, kv_cache_fp8: bool = False, lm_head: bool = False
) -> dict[str, Any]:
    """config.json's quantization_config, as llm-compressor 0.14 writes it with compressed-tensors 0.19.

    ignore: full names of modules in 16 bits; a name is compared, not searched. weight_only: activations stay in 16 bits.
    lm_head: it is quantized too.
    """
    targets = ["Linear", *([LM_HEAD_TARGET] if lm_head else [])]
    return grouped_config([nvfp4_group(targets, weight_only=weight_only)], ignore, dict(FP8) if kv_cache_fp8 else None)


def nvfp4_group(targets: Sequence[str], *, weight_only: bool = False) -> dict[str, Any]:
    """The config group of NVFP4 linears."""
    inputs = None if weight_only else {**NVFP4, "dynamic": "local", "observer": "static_minmax"}
    return _group(FORMAT, targets, dict(NVFP4), inputs)


def fp8_group(targets: Sequence[str], strategy: str, *, static: bool = False, block: tuple[int, int] | None = None) -> dict[str, Any]:
    """The config group of FP8 linears. strategy: tensor, channel or block; static: the scale of their activations is stored, else
    vLLM makes one a token or, of blocks, one for each block of a token."""
    weights: dict[str, Any] = {**FP8, "strategy": strategy, "block_structure": list(block) if block is not None else None}
    inputs = dict(FP8) if static else {**FP8, "dynamic": True, "strategy": "token"}
    if block is not None:
        inputs |= {"strategy": "group", "group_size": block[1]}
    return _group("float-quantized", targets, weights, inputs)


def int_group(targets: Sequence[str], bits: int, group_size: int, *, symmetric: bool = True) -> dict[str, Any]:
    """The config group of integer linears whose activations stay in 16 bits."""
    weights = {
        "num_bits": bits, "type": "int", "group_size": group_size, "strategy": "group", "symmetric": symmetric, "dynamic": False,
    }  # fmt: skip
    return {"targets": list(targets), "weights": weights, "input_activations": None, "format": "pack-quantized"}


def _group(layout: str, targets: Sequence[str], weights: Mapping[str, Any], inputs: Mapping[str, Any] | None) -> dict[str, Any]:
    return {"format": layout, "input_activations": inputs, "output_activations": None, "targets": list(targets), "weights": weights}


def grouped_config(groups: Sequence[Mapping[str, Any]], ignore: Sequence[str], kv_cache_scheme: Any = None) -> dict[str, Any]:
    """quantization_config of several groups: mixed-precision where they are of several layouts."""
    layouts = list(dict.fromkeys(group["format"] for group in groups))
    return {
        "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
        "format": layouts[0] if len(layouts) == 1 else MIXED,
        "global_compression_ratio": None,
        "ignore": list(ignore),
        "kv_cache_scheme": kv_cache_scheme,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": VERSION,
    }


def departure(config: Mapping[str, Any]) -> str | None:
    """What in a compressed-tensors quantization_config is neither NVFP4 nor FP8 as vLLM takes them, in a few words; None if nothing is."""
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups or not all(isinstance(group, Mapping) for group in groups.values()):
        return "no config_groups"
    for key in ("sparsity_config", "transform_config"):
        if config.get(key):
            return f"a {key}"
    for name, group in groups.items():
        weights, inputs = group.get("weights"), group.get("input_activations")
        if group.get("output_activations"):
            return f"output_activations in {name}"
        fits = next((fits for fits in (_is_nvfp4, _is_fp8) if isinstance(weights, Mapping) and fits(weights)), None)
        if fits is None:
            return f"weights in {name} that are neither NVFP4 nor FP8"
        if inputs is not None and not (isinstance(inputs, Mapping) and fits(inputs)):
            return f"input_activations in {name} of another format than its weights"
    scheme = config.get("kv_cache_scheme")
    if isinstance(scheme, Mapping) and (scheme.get("strategy") != "tensor" or scheme.get("symmetric") is not True):
        return f"a kv_cache_scheme with strategy {str(scheme.get('strategy'))[:20]!r}"
    return None


def _is_nvfp4(number: Mapping[str, Any]) -> bool:
    wanted = {"num_bits": 4, "type": "float", "group_size": nvfp4.GROUP_SIZE, "strategy": "tensor_group", "symmetric": True}
    return all(number.get(key) == value for key, value in wanted.items())


def _is_fp8(number: Mapping[str, Any]) -> bool:
    return number.get("num_bits") == 8 and number.get("type") == "float" and number.get("symmetric", True) is True
