"""How vLLM decides by a quantization config what each of its linears is: one format a file, all of one protocol.

In: a declaration, the class that the engine builds, the dtypes of what is stored (GPTQ goes by them). Out: a `Matcher`.
Leaves out: judging (rules/).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mtpress.quant_config.matching.auto_round import LayerConfig
from mtpress.quant_config.matching.compressed_tensors import ConfigGroups
from mtpress.quant_config.matching.fp8 import ModulesToNotConvert
from mtpress.quant_config.matching.gptq import ModuleList
from mtpress.quant_config.matching.matcher import Matcher, Scheme, Verdict
from mtpress.quant_config.matching.modelopt import FP8_ALGOS, NVFP4, W4A16, IgnoreList, QuantizedLayers

if TYPE_CHECKING:
    from mtpress.quant_config.declaration import Declaration

__all__ = ("Matcher", "Scheme", "Verdict", "matcher_of")


def matcher_of(declared: "Declaration", architecture: str, dtypes: Mapping[str, str]) -> Matcher | None:
    """The matcher of a declaration; None for a format whose matching is not modelled.

    architecture: a key of qwen3_5_engine.RENAMES. dtypes: tensor name → safetensors dtype, of every file in the directory.
    """
    if declared.format == "nvfp4":
        return IgnoreList(declared.ignore, architecture, W4A16 if declared.weight_only else NVFP4)
    if declared.format == "modelopt-mixed":
        return QuantizedLayers(declared.inner.get("quantized_layers"), declared.ignore, architecture)
    if declared.format == "modelopt-fp8" and declared.algo in FP8_ALGOS:
        return IgnoreList(declared.ignore, architecture, FP8_ALGOS[declared.algo])
    if declared.format == "compressed-tensors":
        return ConfigGroups(declared.content, architecture)
    if declared.format == "auto-round":
        return LayerConfig(declared.content, architecture)
    if declared.format == "fp8":
        return ModulesToNotConvert(declared.content, architecture)
    if declared.format == "gptq":
        return ModuleList(declared.content, architecture, dtypes)
    return None
