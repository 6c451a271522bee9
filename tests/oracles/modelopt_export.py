"""The oracle: NVIDIA modelopt's own NVFP4 build of a checkpoint, the way people make it by hand.

    .envs/modelopt/bin/python tests/oracles/modelopt_export.py SRC OUT TOKENS.json [--in-proj-ab]
        [--algorithm max|mse|local_hessian|… | --fp8 | --recipe NAME]

In: a BF16 qwen3_5 checkpoint and a JSON list of token-id lists. Out: what export_hf_checkpoint writes after calibration by one of
modelopt's own presets, "max" unless another is named, one forward a list (batch 1, no padding). Leaves out: the draft head, which
transformers does not load, and tokenizer, processor and template files, which modelopt does not write. Runs on the packages of
locks/modelopt.txt and imports nothing of mtpress.
"""

import argparse
import copy
import json
from pathlib import Path

import modelopt.torch.kernels.quantization.gemm as gemm
import modelopt.torch.quantization as mtq
import torch
from modelopt.recipe import load_recipe
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.quantization import tensor_quant
from modelopt.torch.quantization.tensor_quant import scaled_e4m3_impl
from transformers import Qwen3_5ForConditionalGeneration

FP8 = {"num_bits": (4, 3), "axis": None}
IN_FP8 = ("*self_attn*", "*linear_attn.in_proj_qkv*", "*linear_attn.in_proj_z*", "*linear_attn.out_proj*")
AB = ("*linear_attn.in_proj_a", "*linear_attn.in_proj_b")
# modelopt's presets by its own names of their algorithms
PRESETS = {
    "max": mtq.NVFP4_DEFAULT_CFG,
    "four_over_six": mtq.NVFP4_FOUR_OVER_SIX_CFG,
    "mse": mtq.NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG,
    "local_hessian": mtq.NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_CFG,
}


def quantization_config(algorithm: str, in_proj_ab: bool, fp8: bool = False) -> dict:
    """The algorithm's preset with the vision tower and the draft head off. Entries apply in order, later ones win.

    fp8: attention and GDN in FP8, as in modelopt's own recipes for this family.
    """
    config = copy.deepcopy(PRESETS[algorithm])
    if in_proj_ab:
        # defaults of builds that quantized these two had no such entries
        config["quant_cfg"] = [e for e in config["quant_cfg"] if not e["quantizer_name"].startswith(AB)]
    if fp8:
        kinds = ("weight_quantizer", "input_quantizer")
        config["quant_cfg"] += [{"quantizer_name": f"{name}{kind}", "cfg": FP8} for name in IN_FP8 for kind in kinds]
    config["quant_cfg"] += [{"quantizer_name": name, "enable": False} for name in ("*visual*", "*mtp*")]
    return config


def fake_quantize(x, amax, global_amax, quantize_block_scales=True, fp8_max_for_normalization=448.0, out_dtype=None):
    """What modelopt's Triton kernel of this name computes (kernels/quantization/gemm/fp4_kernel.py); it has none for CPUs."""
    assert quantize_block_scales
    scale = scaled_e4m3_impl(amax.float() / 6, global_amax.float() * (448 / fp8_max_for_normalization) / 6).reshape(-1, 1)
    blocks = x.float().reshape(len(scale), -1)
    size = blocks.abs() / torch.where(scale == 0, 1.0, scale)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    codes = sum((size >= bound) if i % 2 else (size > bound) for i, bound in enumerate((0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)))
    return (values[codes.long()] * scale).copysign(blocks).reshape(x.shape).to(out_dtype or x.dtype)


def fake_quantize_activations(x, block_size, amax, *formats):
    """The same for its kernel of activations, whose block scales are dynamic."""
    return fake_quantize(x, x.reshape(-1, block_size).abs().amax(-1), amax)


def load(source: Path) -> torch.nn.Module:
    """The model in BF16; anything but the draft head that does not load would make the comparison worthless."""
    model, info = Qwen3_5ForConditionalGeneration.from_pretrained(
        source, dtype=torch.bfloat16, attn_implementation="sdpa", local_files_only=True, output_loading_info=True
    )
    wrong = {kind: [n for n in names if not str(n).startswith("mtp.")] for kind, names in info.items()}
    if any(wrong.values()):
        raise SystemExit(f"{source} does not load cleanly: {wrong}")
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("--in-proj-ab", action="store_true", help="quantize linear_attn.in_proj_a and in_proj_b too")
    parser.add_argument("--algorithm", choices=PRESETS, default="max", help="modelopt's name of how scales are chosen")
    parser.add_argument("--fp8", action="store_true", help="attention and GDN in FP8")
    parser.add_argument("--recipe", help="a recipe that modelopt ships, in place of its default NVFP4")
    options = parser.parse_args()
    token_lists = json.loads(options.tokens.read_text(encoding="utf-8"))
    model = load(options.source)

    def forward_loop(model: torch.nn.Module) -> None:
        with torch.inference_mode():
            for ids in token_lists:
                model(input_ids=torch.tensor([ids]))

    if not gemm.IS_AVAILABLE:
        gemm.IS_AVAILABLE, gemm.static_blockwise_fp4_fake_quant = True, fake_quantize
        tensor_quant.dynamic_block_quantize_op = fake_quantize_activations
    config = quantization_config(options.algorithm, options.in_proj_ab, options.fp8)
    if options.recipe:
        config = load_recipe(options.recipe).quantize.model_dump()
    mtq.quantize(model, config, forward_loop)
    with torch.inference_mode():
        export_hf_checkpoint(model, export_dir=options.out)


if __name__ == "__main__":
    main()
