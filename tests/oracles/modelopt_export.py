"""The oracle: NVIDIA modelopt's own NVFP4 build of a checkpoint, the way people make it by hand.

    .envs/modelopt/bin/python tests/oracles/modelopt_export.py SRC OUT TOKENS.json [--in-proj-ab] [--fp8 | --recipe NAME]

In: a BF16 qwen3_5 checkpoint and a JSON list of token-id lists. Out: what export_hf_checkpoint writes after "max"
calibration, one forward a list (batch 1, no padding). Leaves out: the draft head, which transformers does not load, and
tokenizer, processor and template files, which modelopt does not write. Runs on the packages of locks/modelopt.txt and
imports nothing of mtpress.
"""

import argparse
import copy
import json
from pathlib import Path

import modelopt.torch.quantization as mtq
import torch
from modelopt.recipe import load_recipe
from modelopt.torch.export import export_hf_checkpoint
from transformers import Qwen3_5ForConditionalGeneration

FP8 = {"num_bits": (4, 3), "axis": None}
IN_FP8 = ("*self_attn*", "*linear_attn.in_proj_qkv*", "*linear_attn.in_proj_z*", "*linear_attn.out_proj*")
AB = ("*linear_attn.in_proj_a", "*linear_attn.in_proj_b")


def quantization_config(in_proj_ab: bool, fp8: bool = False) -> dict:
    """NVFP4_DEFAULT_CFG with the vision tower and the draft head off. Entries apply in order, later ones win.

    fp8: attention and GDN in FP8, as in modelopt's own recipes for this family.
    """
    config = copy.deepcopy(mtq.NVFP4_DEFAULT_CFG)
    if in_proj_ab:
        # defaults of builds that quantized these two had no such entries
        config["quant_cfg"] = [e for e in config["quant_cfg"] if not e["quantizer_name"].startswith(AB)]
    if fp8:
        kinds = ("weight_quantizer", "input_quantizer")
        config["quant_cfg"] += [{"quantizer_name": f"{name}{kind}", "cfg": FP8} for name in IN_FP8 for kind in kinds]
    config["quant_cfg"] += [{"quantizer_name": name, "enable": False} for name in ("*visual*", "*mtp*")]
    return config


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
    parser.add_argument("--fp8", action="store_true", help="attention and GDN in FP8")
    parser.add_argument("--recipe", help="a recipe that modelopt ships, in place of its default NVFP4")
    options = parser.parse_args()
    token_lists = json.loads(options.tokens.read_text(encoding="utf-8"))
    model = load(options.source)

    def forward_loop(model: torch.nn.Module) -> None:
        with torch.inference_mode():
            for ids in token_lists:
                model(input_ids=torch.tensor([ids]))

    config = quantization_config(options.in_proj_ab, options.fp8)
    if options.recipe:
        config = load_recipe(options.recipe).quantize.model_dump()
    mtq.quantize(model, config, forward_loop)
    with torch.inference_mode():
        export_hf_checkpoint(model, export_dir=options.out)


if __name__ == "__main__":
    main()
