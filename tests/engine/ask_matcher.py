"""Runs under the engine's python: asks vLLM's own matchers about many quantization configs.

    ask_matcher.py ASKED.json ANSWERED.json

In: a list of {"architecture": class name, "format", "configs": [content, …], "dtypes": {tensor: safetensors dtype},
"target": [[prefix, class name], …], "draft": […]}. Out: for each a list with, for each config, {"target": {prefix: [verdict,
scheme]}, "draft": {…}}, where a verdict is "ignored", "quantized" or "split", or {"error": …} where the config is refused as
a whole. One config object goes through target and draft, as it does when vLLM loads a checkpoint with its draft head.
"""

import copy
import json
import sys
import tempfile
from pathlib import Path

import numpy
import vllm.model_executor.layers.linear as linear
from safetensors.numpy import save_file
from vllm.model_executor.layers.quantization import auto_gptq
from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.fp8 import Fp8Config
from vllm.model_executor.layers.quantization.inc import INCConfig
from vllm.model_executor.layers.quantization.modelopt import LINEAR_ALGOS, ModelOptMixedPrecisionConfig, ModelOptNvFp4Config
from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.utils import configure_quant_config
from vllm.model_executor.models import qwen3_5
from vllm.model_executor.models.qwen3_5_mtp import Qwen3_5MTP

CONFIGS = {
    "nvfp4": ModelOptNvFp4Config,
    "modelopt-mixed": ModelOptMixedPrecisionConfig,
    "compressed-tensors": CompressedTensorsConfig,
    "fp8": Fp8Config,
    "auto-round": INCConfig,
    "gptq": AutoGPTQConfig,
}
SPLIT = ("some but not all shards", "different quantization schemes for the shards", "requires consistent quant config", "Mixed quant_algo")
# kind, bits, group_size, symmetric, activations: as mtpress.quant_config.matching.Scheme has it; of FP8 scale_of, static, block and
# scale_name too
BLOCK, SCALE, SCALE_INV = [128, 128], "weight_scale", "weight_scale_inv"
MIXED = {
    "FP8": ["fp8", 8, -1, True, True, "tensor", True, BLOCK, SCALE],
    "FP8_PER_CHANNEL_PER_TOKEN": ["fp8", 8, -1, True, True, "channel", False, BLOCK, SCALE],
    "FP8_PB_WO": ["fp8", 8, -1, True, True, "block", False, BLOCK, SCALE],
    "NVFP4": ["nvfp4", 4, 16, True, True], "W4A16_NVFP4": ["nvfp4", 4, 16, True, False], "MXFP8": ["other", 8, -1, True, False],
}  # fmt: skip
NUMPY = {"BF16": numpy.float16, "F16": numpy.float16, "F32": numpy.float32, "U8": numpy.uint8, "I32": numpy.int32, "I64": numpy.int64}


def layer_of(name):
    """A layer of a class, without weights: the matchers look at its class alone."""
    kind = ParallelLMHead if name == "ParallelLMHead" else getattr(linear, name)
    return kind.__new__(kind)


def modelopt(config, layer, prefix):
    return ["ignored", None] if config.is_layer_excluded(prefix) else ["quantized", None]


def modelopt_mixed(config, layer, prefix):
    if config.is_layer_excluded(prefix):
        return ["ignored", None]
    algo = config._resolve_quant_algo(prefix)
    return ["quantized", MIXED[algo]] if algo in LINEAR_ALGOS else ["ignored", None]


def compressed_tensors(config, layer, prefix):
    found = config.get_scheme_dict(layer, prefix)
    if found is None:
        return ["ignored", None]
    weights = found["weights"]
    nvfp4 = config._is_nvfp4_format(weights)
    inputs = found["input_activations"]
    acting = found["format"] in ("naive-quantized", "int-quantized", "float-quantized", "nvfp4-pack-quantized")
    if acting and not nvfp4 and weights.num_bits == 8 and (config._is_fp8_w8a8(weights, inputs) or config._is_fp8_w8a16(weights, None)):
        static = inputs is not None and not inputs.dynamic
        return [
            "quantized",
            [
                "fp8",
                8,
                -1,
                True,
                inputs is not None,
                getattr(weights.strategy, "value", weights.strategy),
                static,
                weights.block_structure or BLOCK,
                SCALE,
            ],
        ]
    whole = not nvfp4 and config._is_wNa16_group_channel(weights, found["input_activations"]) and found["format"] == "pack-quantized"
    size = -1 if weights.group_size is None else weights.group_size
    kind = "nvfp4" if nvfp4 else "int" if whole and weights.type == "int" else "other"
    return ["quantized", [kind, weights.num_bits, size, weights.symmetric, found["input_activations"] is not None]]


def fp8(config, layer, prefix):
    if not isinstance(layer, linear.LinearBase):
        return ["ignored", None]  # lm_head: Fp8Config has no method for it
    if is_layer_skipped(prefix, config.ignored_layers, config.packed_modules_mapping, match_mode=config.ignored_layers_match_mode):
        return ["ignored", None]
    block = config.weight_block_size
    kind = ["block", False, block, SCALE_INV] if block else ["tensor", config.activation_scheme == "static", BLOCK, SCALE]
    return ["quantized", ["fp8", 8, -1, True, True, *kind]]


def auto_round(config, layer, prefix):
    try:
        method = config.get_quant_method(layer, prefix)
        if type(method).__name__ == "UnquantizedLinearMethod":
            return ["ignored", None]
    except NotImplementedError:
        pass  # quantized, in a form that this platform has no kernel for
    found = config.config_parser.resolve(layer, prefix)
    return ["quantized", ["int", found.bits, found.group_size, found.sym, False]]


def gptq(config, layer, prefix):
    method = config.get_quant_method(layer, prefix)
    if method is None or type(method).__name__.startswith("Unquantized"):
        return ["ignored", None]
    held = method.quant_config
    return ["quantized", ["int", held.weight_bits, held.group_size, held.is_sym, False]]


ASK = {
    "nvfp4": modelopt,
    "modelopt-mixed": modelopt_mixed,
    "compressed-tensors": compressed_tensors,
    "fp8": fp8,
    "auto-round": auto_round,
    "gptq": gptq,
}


def verdicts(ask, config, linears):
    found = {}
    for prefix, kind in linears:
        try:
            found[prefix] = ask(config, layer_of(kind), prefix)
        except ValueError as error:
            assert any(said in str(error) for said in SPLIT), error
            found[prefix] = ["split", None]
    return found


def answer(asked, content, folder):
    model = getattr(qwen3_5, asked["architecture"])
    try:
        config = CONFIGS[asked["format"]].from_config(copy.deepcopy(content))
    except (ValueError, AssertionError, TypeError) as error:
        return {"error": f"{type(error).__name__}: {str(error)[:200]}"}
    config.maybe_update_config(folder)
    configure_quant_config(config, model)
    target = verdicts(ASK[asked["format"]], config, asked["target"])
    configure_quant_config(config, Qwen3_5MTP)
    return {"target": target, "draft": verdicts(ASK[asked["format"]], config, asked["draft"])}


def main():
    auto_gptq.verify_marlin_supported = lambda **_: None  # which kernels there are is not what is asked
    answers = []
    for asked in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        with tempfile.TemporaryDirectory() as folder:
            save_file({n: numpy.zeros(1, NUMPY[dtype]) for n, dtype in asked["dtypes"].items()}, f"{folder}/model.safetensors")
            answers.append([answer(asked, content, folder) for content in asked["configs"]])
    Path(sys.argv[2]).write_text(json.dumps(answers), encoding="utf-8")


main()
