"""What vLLM builds from a Qwen3.5-class checkpoint: its linears, the names it gives them, what it loads into each.

In: config.json and the prefix of the body's tensors. Out: `EngineLinear`s of the target and of the draft, in the order
they are built, and the renames that turn checkpoint names into engine names. Leaves out: whether a linear is taken as
quantized (matching/). conv1d, embed_tokens and the norms are built without a quantization config, so they are not here.
Source: vLLM 0.32, models/qwen3_5/names.py, qwen3_5_mtp.py, qwen3_vl.py, layers/mamba/gdn/qwen_gdn_linear_attn.py.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mtpress.models.qwen3_5 import names as qwen3_5

VL_ARCHITECTURE = "Qwen3_5ForConditionalGeneration"
TEXT_ARCHITECTURE = "Qwen3_5ForCausalLM"
ARCHITECTURE = {"qwen3_5": VL_ARCHITECTURE, "qwen3_5_text": TEXT_ARCHITECTURE}

# Starts of checkpoint names → of engine names, applied one after the other (WeightsMapper.orig_to_new_prefix).
RENAMES: dict[str, tuple[tuple[str, str], ...]] = {
    VL_ARCHITECTURE: (
        ("model.visual.", "visual."),
        ("lm_head.", "language_model.lm_head."),
        ("model.language_model.", "language_model.model."),
    ),
    TEXT_ARCHITECTURE: (("model.language_model.", "model."),),
}

# packed_modules_mapping: fused linear → its shards, by their last names. The draft's own table is shorter. Their order counts.
DRAFT_PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
GDN_PACKED = {"in_proj_qkvz": ("in_proj_qkv", "in_proj_z"), "in_proj_ba": ("in_proj_b", "in_proj_a")}
PACKED: dict[str, dict[str, tuple[str, ...]]] = {
    VL_ARCHITECTURE: DRAFT_PACKED | {"qkv": ("qkv",)} | GDN_PACKED,  # the vision tower's qkv is stored as one
    TEXT_ARCHITECTURE: DRAFT_PACKED | GDN_PACKED,
}

# Last name of a linear → the class that vLLM builds it as; compressed-tensors matches its targets with these.
LAYER_CLASSES = {
    "qkv_proj": "QKVParallelLinear", "qkv": "QKVParallelLinear", "gate_up_proj": "MergedColumnParallelLinear",
    "in_proj_qkvz": "MergedColumnParallelLinear", "in_proj_ba": "MergedColumnParallelLinear", "o_proj": "RowParallelLinear",
    "out_proj": "RowParallelLinear", "down_proj": "RowParallelLinear", "proj": "RowParallelLinear", "fc": "ColumnParallelLinear",
    "linear_fc1": "ColumnParallelLinear", "linear_fc2": "RowParallelLinear", "lm_head": "ParallelLMHead",
}  # fmt: skip

Part = Literal["body", "lm_head", "vision", "draft"]


@dataclass(frozen=True)
class EngineLinear:
    """One linear of the engine: its name there, and the checkpoint modules that are loaded into it, in shard order."""

    prefix: str
    modules: tuple[str, ...]
    part: Part


def _layer(layer_type: str, engine: str, checkpoint: str, part: Part) -> Iterator[EngineLinear]:
    """The linears of one decoder layer under its two names, which end in a dot."""
    mixer = (*qwen3_5.QUANTIZABLE["gdn"], *qwen3_5.AB_LINEARS) if layer_type == "linear_attention" else qwen3_5.QUANTIZABLE["attention"]
    done: set[str] = set()
    for name in (*mixer, *qwen3_5.QUANTIZABLE["mlp"]):
        built = qwen3_5.FUSED_OF.get(name, name)
        if built not in done:
            done.add(built)
            members = qwen3_5.FUSED.get(built, (name,))
            yield EngineLinear(f"{engine}{built}", tuple(f"{checkpoint}{member}" for member in members), part)


def _vision(config: Mapping[str, Any]) -> Iterator[EngineLinear]:
    for name, shape in qwen3_5.vision_shapes(config).items():
        module = qwen3_5.module_of(name)
        if name.endswith(".weight") and len(shape) == 2 and not module.endswith("pos_embed"):
            yield EngineLinear(module.replace("model.visual.", "visual.", 1), (module,), "vision")


def linears(config: Mapping[str, Any], architecture: str, prefix: str) -> Iterator[EngineLinear]:
    """Every linear whose format the quantization config decides; InputError where config.json lacks a size.

    prefix: of the body's tensors in the checkpoint. mtp.fc is among them, although 0.32 builds it in BF16 whatever a
    modelopt NVFP4 config says: older builds and other engines ask the config.
    """
    inside = "language_model." if architecture == VL_ARCHITECTURE else ""
    for i, layer_type in enumerate(qwen3_5.layer_types(config)):
        yield from _layer(layer_type, f"{inside}model.layers.{i}.", f"{prefix}layers.{i}.", "body")
    yield EngineLinear(f"{inside}lm_head", ("lm_head",), "lm_head")
    if architecture == VL_ARCHITECTURE and "vision_config" in config:
        yield from _vision(config)
    yield EngineLinear("mtp.fc", ("mtp.fc",), "draft")
    yield from _layer("full_attention", "mtp.layers.0.", "mtp.layers.0.", "draft")
    yield EngineLinear("lm_head", ("lm_head",), "draft")


def packed(part: Part, architecture: str) -> Mapping[str, tuple[str, ...]]:
    """The table of fused linears that the engine matches a quantization config with."""
    return DRAFT_PACKED if part == "draft" else PACKED[architecture]


def layer_class(linear: EngineLinear) -> str:
    """The name of the class that the engine builds a linear as."""
    return LAYER_CLASSES[linear.prefix.rpartition(".")[2]]
