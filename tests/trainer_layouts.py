"""How trainers and exporters store tensors of the family under names and in layouts that are not its own.

In: the tensors of a checkpoint. Out: the same numbers, stored otherwise. RENAMED: which of them is which is certain; UNPLACED: it is
not, so that they stay as they are. Leaves out: the wrappers of trainers (tests/models/qwen3_5/test_renames.py).
"""

import re
from collections.abc import Callable

import torch

Tensors = dict[str, torch.Tensor]
Layout = Callable[[Tensors], Tensors]


def named(*changes: tuple[str, str]) -> Layout:
    """Names changed by regular expressions, one after the other."""

    def store(tensors: Tensors) -> Tensors:
        made = {}
        for name, tensor in tensors.items():
            for old, new in changes:
                name = re.sub(old, new, name)
            made[name] = tensor
        return made

    return store


def parts(end: str, make: Callable[[torch.Tensor], Tensors]) -> Layout:
    """Every tensor whose name ends so, as parts: what follows its name → the part."""

    def store(tensors: Tensors) -> Tensors:
        made: Tensors = {}
        for name, tensor in tensors.items():
            made |= {name + behind: part.contiguous() for behind, part in make(tensor).items()} if re.search(end, name) else {name: tensor}
        return made

    return store


def joined(*ends: str, into: str) -> Layout:
    """Tensors of one module whose names end so, as one of all their rows."""

    def store(tensors: Tensors) -> Tensors:
        made = dict(tensors)
        for name in [n for n in tensors if n.endswith(ends[0])]:
            start = name.removesuffix(ends[0])
            made[start + into] = torch.cat([made.pop(start + end) for end in ends])
        return made

    return store


def both(first: Layout, second: Layout) -> Layout:
    return lambda tensors: second(first(tensors))


def low_rank(tensor: torch.Tensor) -> Tensors:
    n, k = tensor.shape
    return {".lora_a": torch.ones(4, k).to(tensor), ".lora_b": torch.ones(n, 4).to(tensor)}


def normed(tensor: torch.Tensor) -> Tensors:
    return {"_g": tensor.float().norm(dim=1, keepdim=True).to(tensor), "_v": tensor}


def spectral(tensor: torch.Tensor) -> Tensors:
    return {".original": tensor, ".0._u": tensor[:, 0]}


def halves(tensor: torch.Tensor) -> Tensors:
    first, second = tensor.chunk(2)
    return {".0": first, ".1": second}


TOWER = r"^model\.visual\."
BLOCKS = (r"\.blocks\.", ".encoder.layers.")
DRAFT = r"^mtp\."

RENAMED: dict[str, Layout] = {
    "parametrizations": named((r"down_proj\.weight$", "down_proj.parametrizations.weight.original")),
    "A_log.weight": named((r"(A_log|dt_bias)$", r"\1.weight")),
    "visual_encoder": named((TOWER, "visual_encoder.")),
    "vision_model": named((TOWER, "vision_model.")),
    "the merger as projector": named((TOWER + r"merger\.", "multi_modal_projector.merger.")),
    "a head under eagle": named((DRAFT, "eagle.")),
    "a head under nextn": named((DRAFT, "model.nextn.")),
    "a head behind the last layer": named((DRAFT + r"(layers\.0\.)?", "model.language_model.layers.4.")),
}  # fmt: skip
UNPLACED: dict[str, Layout] = {
    "weight_orig of pruning": named((r"down_proj\.weight$", "down_proj.weight_orig")),
    "norm.kernel": named((r"layernorm\.weight$", "layernorm.kernel")),
    "norm.scale": named((r"norm\.weight$", "norm.scale")),
    "spectral norm": both(parts(r"down_proj\.weight$", spectral), named((r"down_proj\.weight\.", "down_proj.parametrizations.weight."))),
    "qkvz and ba as one": both(
        joined("linear_attn.in_proj_qkv.weight", "linear_attn.in_proj_z.weight", into="linear_attn.in_proj_qkvz.weight"),
        joined("linear_attn.in_proj_b.weight", "linear_attn.in_proj_a.weight", into="linear_attn.in_proj_ba.weight"),
    ),
    "qkvz under the name of qkv": joined(
        "linear_attn.in_proj_qkv.weight", "linear_attn.in_proj_z.weight", into="linear_attn.in_proj_qkv.weight"
    ),
    "gate and up as one": joined("mlp.gate_proj.weight", "mlp.up_proj.weight", into="mlp.gate_up_proj.weight"),
    "w1, w3 and w2": named(("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")),
    "a turned kernel": both(
        named((r"down_proj\.weight$", "down_proj.kernel")),
        lambda tensors: {n: t.t().contiguous() if n.endswith(".kernel") else t for n, t in tensors.items()},
    ),
    "weight norm": parts(r"down_proj\.weight$", normed),
    "halves": parts(r"down_proj\.weight$", halves),
    "halves of lm_head": parts(r"lm_head\.weight$", halves),
    "experts of one": named((r"mlp\.(\w+)_proj", r"mlp.experts.0.\1")),
    "a flat parameter": parts(r"down_proj\.weight$", lambda tensor: {"_flat_param": tensor.flatten()}),
    "attention by other words": named((r"self_attn\.", "attention."), ("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")),
    "layers by other words": named((r"\.layers\.(\d)\.(linear_attn|self_attn|mlp)\.", r".h.\1.\2.")),
    "a tower of other words": named((TOWER, "vision_model."), BLOCKS, (r"\.attn\.qkv", ".self_attn.in_proj"), ("linear_fc", "fc")),
    "a tower of no known word": named(
        (TOWER, "vit."), (r"^vit\.blocks", "vit.stages"), (r"^vit(.*)\.(attn|mlp|norm)", r"vit\1.x_\2"), (r"^vit\.(merger|p)", r"vit.y_\1")
    ),
    "a merger of other words": named((TOWER + r"merger\.(linear_fc)?", "multi_modal_projector.")),
    "a head of other words": named((DRAFT + r"layers\.0", "eagle.midlayer"), (DRAFT + r"fc", "eagle.project"), (DRAFT, "eagle.")),
    "adapters beside the weights": lambda tensors: tensors
    | {n + "_down": t[:4].clone() for n, t in tensors.items() if n.endswith("down_proj.weight")},
    "adapters in place of the weights": parts(r"down_proj\.weight$", low_rank),
    "another tower beside": lambda tensors: tensors | {"audio_tower.proj.weight": torch.ones(8, 4).bfloat16()},
}  # fmt: skip
