"""Qwen3.5, 3.6 and 3.8 (dense): what each tensor is by its name, which linears vLLM fuses, what is never quantized.

In: tensor names and config.json. Out: components, modules, fused groups, the tensors a checkpoint must hold.
Leaves out: anything that computes (models/qwen3_5/layers.py), so this file imports no torch.
Names and fusions: vLLM 0.32, model_executor/models/qwen3_5.py and qwen3_5_mtp.py.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Protocol

from mtpress.errors import InputError

COMPONENTS = ("embeddings", "gdn", "attention", "mlp", "norms", "lm_head", "mtp", "vision")
COMPONENT_TITLES = {
    "embeddings": "embeddings", "gdn": "Gated DeltaNet", "attention": "full attention", "mlp": "MLP", "norms": "norms",
    "lm_head": "lm_head", "mtp": "MTP draft head", "vision": "vision tower", "other": "not known",
}  # fmt: skip

VISION_PREFIX = "model.visual."
MTP_PREFIX = "mtp."
LAYER = re.compile(r"^(model\.(?:language_model\.)?)layers\.([0-9]{1,6})\.(.+)$")  # more digits are no count of layers

# Linears of a decoder layer that vLLM loads as one matrix: they share one input and must share their global scales.
FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "linear_attn.in_proj_qkvz": ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z"),
    "linear_attn.in_proj_ba": ("linear_attn.in_proj_b", "linear_attn.in_proj_a"),
}
FUSED_OF = {part: fused for fused, parts in FUSED.items() for part in parts}
AB_LINEARS = FUSED["linear_attn.in_proj_ba"]
# Linears that read one input get one weight amax and one input amax. Fused ones must; in_proj_b/a join in_proj_qkv/z
# because modelopt 0.47 groups by input and not by what an engine fuses.
SAME_INPUT = {
    part: group
    for group in (FUSED["self_attn.qkv_proj"], FUSED["mlp.gate_up_proj"], (*FUSED["linear_attn.in_proj_qkvz"], *AB_LINEARS))
    for part in group
}

# Everything in a decoder layer that a 4-bit format may take, by component; in_proj_a/b only when a recipe asks.
QUANTIZABLE = {
    "attention": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    "gdn": ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z", "linear_attn.out_proj"),
    "mlp": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
}
# Linear modules kept whole that a quantization config must name, because the engine would take them as quantized.
KEPT_IN_LAYER = ("linear_attn.conv1d", *AB_LINEARS)

MTP_TENSORS = (
    "mtp.fc.weight", "mtp.norm.weight", "mtp.pre_fc_norm_embedding.weight", "mtp.pre_fc_norm_hidden.weight",
    "mtp.layers.0.input_layernorm.weight", "mtp.layers.0.post_attention_layernorm.weight",
    "mtp.layers.0.self_attn.q_proj.weight", "mtp.layers.0.self_attn.k_proj.weight", "mtp.layers.0.self_attn.v_proj.weight",
    "mtp.layers.0.self_attn.o_proj.weight", "mtp.layers.0.self_attn.q_norm.weight", "mtp.layers.0.self_attn.k_norm.weight",
    "mtp.layers.0.mlp.gate_proj.weight", "mtp.layers.0.mlp.up_proj.weight", "mtp.layers.0.mlp.down_proj.weight",
)  # fmt: skip


def component(name: str) -> str:
    """The component a tensor belongs to, one of COMPONENTS, or "other"."""
    if name.startswith(MTP_PREFIX):
        return "mtp"
    if name.startswith(VISION_PREFIX):
        return "vision"
    if name.startswith("lm_head."):
        return "lm_head"
    if re.fullmatch(r"model\.(language_model\.)?embed_tokens\.\w+", name):
        return "embeddings"
    if re.fullmatch(r"model\.(language_model\.)?norm\.weight", name):
        return "norms"
    if found := LAYER.match(name):
        rest = found[3]
        if re.fullmatch(r"(input_layernorm|post_attention_layernorm|self_attn\.[qk]_norm|linear_attn\.norm)\.weight", rest):
            return "norms"
        for prefix, label in (("linear_attn.", "gdn"), ("self_attn.", "attention"), ("mlp.", "mlp")):
            if rest.startswith(prefix):
                return label
    return "other"


def layer_index(name: str) -> int | None:
    """The decoder layer a body tensor belongs to; None outside the layers (and for the draft head)."""
    found = LAYER.match(name)
    return int(found[2]) if found else None


def body_prefix(names: Mapping[str, Any]) -> str:
    """`model.language_model.` or, in text-only checkpoints, `model.`; InputError where there is no decoder layer."""
    for name in names:
        if found := LAYER.match(name):
            return found[1]
    if names and any(name.startswith(MTP_PREFIX) for name in names):
        raise InputError(
            "a draft head and no decoder layers; mtpress graft CKPT OUT --from it puts the head into a checkpoint that has them"
        )
    raise InputError("no decoder layers under model.language_model.layers or model.layers; is it a Qwen3.5-class checkpoint?")


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = config.get("text_config", config)
    return inner if isinstance(inner, Mapping) else {}


def layer_types(config: Mapping[str, Any]) -> list[str]:
    """`linear_attention` or `full_attention` for every layer, from layer_types or full_attention_interval."""
    text = text_config(config)
    count = text.get("num_hidden_layers")
    if type(count) is not int or not 0 < count < 10_000:
        raise InputError(f"config.json: num_hidden_layers is {str(count)[:40]!r}, must be a count of layers")
    types = text.get("layer_types")
    if types is None:
        interval = text.get("full_attention_interval", 4)
        if type(interval) is not int or interval < 1:
            raise InputError(f"config.json: full_attention_interval is {str(interval)[:40]!r}, must be a count of layers")
        types = ["full_attention" if (i + 1) % interval == 0 else "linear_attention" for i in range(count)]
    if not isinstance(types, list) or len(types) != count or any(t not in ("linear_attention", "full_attention") for t in types):
        raise InputError(f"config.json: layer_types must name linear_attention or full_attention for each of the {count} layers")
    return types


def num_mtp_layers(config: Mapping[str, Any]) -> int:
    """mtp_num_hidden_layers as vLLM reads it: at top level, then in text_config."""
    value = config.get("mtp_num_hidden_layers")
    if value is None:
        value = text_config(config).get("mtp_num_hidden_layers")
    return value if type(value) is int and value > 0 else 0


# What a size is that config.json leaves out: transformers 5 writes no key that has its default, and vLLM builds its config by transformers.
SIZES = {
    "hidden_size": 4096, "intermediate_size": 12288, "vocab_size": 248320, "num_attention_heads": 16, "num_key_value_heads": 4,
    "head_dim": 256, "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}  # fmt: skip
VISION_SIZES = {
    "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "in_channels": 3, "patch_size": 16, "temporal_patch_size": 2,
    "spatial_merge_size": 2, "num_position_embeddings": 2304, "out_hidden_size": 3584,
}  # fmt: skip


def left_out(config: Mapping[str, Any]) -> dict[str, int]:
    """Sizes that config.json does not have → what engines take for them."""
    text, vision = text_config(config), config.get("vision_config")
    found = {key: size for key, size in SIZES.items() if key not in text}
    if isinstance(vision, Mapping):
        found |= {f"vision_config.{key}": size for key, size in VISION_SIZES.items() if key not in vision}
    return found


def sizes(config: Mapping[str, Any]) -> dict[str, int]:
    """The dimensions of the language model, the default of what is left out; InputError names one that is no size."""
    text = text_config(config)
    found = {key: text.get(key, default) for key, default in SIZES.items()}
    for key, value in found.items():
        if type(value) is not int or not 0 < value < 1 << 31:
            raise InputError(f"config.json: {key} is {str(value)[:40]!r}, must be a positive size")
    _refuse_arithmetic(text, found["head_dim"])
    return found


# rope_type → the keys it computes with. With mrope_section vLLM rotates by three positions in two of them alone.
ROPE_TYPES: dict[str, tuple[str, ...]] = {
    "default": (), "linear": ("factor",), "dynamic": ("factor",), "yarn": ("factor",), "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}  # fmt: skip
MROPE_TYPES = ("default", "yarn")


def rope_parameters(text: Mapping[str, Any]) -> Any:
    """The rotary embedding's parameters as transformers 5 reads them: rope_scaling of older configs goes first."""
    return text.get("rope_scaling") or text.get("rope_parameters")


def _refuse(key: str, value: Any, must: str) -> InputError:
    return InputError(f"config.json: {key} is {str(value)[:40]!r}, must be {must}")


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 1e12


def _refuse_arithmetic(text: Mapping[str, Any], head_dim: int) -> None:
    """Keys that no shape depends on and that a forward computes with: InputError names one that cannot be. Missing ones have defaults."""
    if (eps := text.get("rms_norm_eps")) is not None and not (_is_positive(eps) and eps < 1):
        raise _refuse("rms_norm_eps", eps, "a small positive number")
    if (act := text.get("hidden_act")) is not None and act != "silu":
        raise _refuse("hidden_act", act, "'silu' in this family")
    rope = rope_parameters(text)
    if rope is None:
        return
    if not isinstance(rope, Mapping):
        raise _refuse("rope_parameters", rope, "an object")
    if by_layer := next((key for key, value in rope.items() if isinstance(value, Mapping) and key.endswith("_attention")), None):
        raise _refuse("rope_parameters", f"by layer type ({by_layer})", "one object for all layers in this family")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise _refuse("rope_type", kind, f"one of {', '.join(ROPE_TYPES)}")
    if "mrope_section" in rope and kind not in MROPE_TYPES:
        raise _refuse("rope_type", kind, f"{' or '.join(MROPE_TYPES)} beside mrope_section, which engines rotate by in no other")
    if missing := next((key for key in ROPE_TYPES[kind] if key not in rope), None):
        raise _refuse(f"rope_parameters.{missing}", None, f"there for rope_type {kind}")
    if not _is_positive(theta := rope.get("rope_theta", text.get("rope_theta", 1e4))):
        raise _refuse("rope_theta", theta, "a positive number")
    factor = rope.get("partial_rotary_factor", text.get("partial_rotary_factor", 0.25))
    if not _is_positive(factor) or factor > 1:
        raise _refuse("partial_rotary_factor", factor, "a number over 0, at most 1")
    num_pairs = int(head_dim * factor) // 2
    section = rope.get("mrope_section")
    if section is not None and not (
        isinstance(section, list) and len(section) == 3 and all(type(n) is int and n >= 0 for n in section) and sum(section) == num_pairs
    ):
        if "head_dim" not in text:
            raise InputError(f"config.json: head_dim is missing (engines take {head_dim}), by which mrope_section must sum to {num_pairs}")
        raise _refuse(
            "mrope_section", section, f"three counts whose sum is {num_pairs}, half of what head_dim × partial_rotary_factor rotates"
        )


def layer_shapes(config: Mapping[str, Any], layer_type: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of one decoder layer, by their names within the layer."""
    d = sizes(config)
    h, inter = d["hidden_size"], d["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (h,),
        "post_attention_layernorm.weight": (h,),
        "mlp.gate_proj.weight": (inter, h),
        "mlp.up_proj.weight": (inter, h),
        "mlp.down_proj.weight": (h, inter),
    }
    if layer_type == "full_attention":
        heads, kv = d["num_attention_heads"] * d["head_dim"], d["num_key_value_heads"] * d["head_dim"]
        gate = 2 if text_config(config).get("attn_output_gate", True) else 1
        shapes |= {
            "self_attn.q_proj.weight": (gate * heads, h),
            "self_attn.k_proj.weight": (kv, h),
            "self_attn.v_proj.weight": (kv, h),
            "self_attn.o_proj.weight": (h, heads),
            "self_attn.q_norm.weight": (d["head_dim"],),
            "self_attn.k_norm.weight": (d["head_dim"],),
        }
    else:
        keys = d["linear_num_key_heads"] * d["linear_key_head_dim"]
        values = d["linear_num_value_heads"] * d["linear_value_head_dim"]
        shapes |= {
            "linear_attn.in_proj_qkv.weight": (2 * keys + values, h),
            "linear_attn.in_proj_z.weight": (values, h),
            "linear_attn.in_proj_b.weight": (d["linear_num_value_heads"], h),
            "linear_attn.in_proj_a.weight": (d["linear_num_value_heads"], h),
            "linear_attn.conv1d.weight": (2 * keys + values, 1, d["linear_conv_kernel_dim"]),
            "linear_attn.A_log": (d["linear_num_value_heads"],),
            "linear_attn.dt_bias": (d["linear_num_value_heads"],),
            "linear_attn.norm.weight": (d["linear_value_head_dim"],),
            "linear_attn.out_proj.weight": (h, values),
        }
    return shapes


def is_tied(config: Mapping[str, Any], stored: Collection[str] = ()) -> bool:
    """Whether the embeddings serve as lm_head. A stored lm_head counts whatever config.json says: vLLM 0.32 takes it
    (ModelConfig.maybe_untie_word_embeddings), transformers 5 where it differs from the embeddings."""
    declared = config.get("tie_word_embeddings", text_config(config).get("tie_word_embeddings", False))
    return bool(declared) and not any(name.startswith("lm_head.") for name in stored)


def untied_config(config: Mapping[str, Any], stored: Collection[str]) -> dict[str, Any]:
    """The config itself or, where it ties embeddings to an lm_head that is stored, one that does not: what the engine makes of it."""
    if not is_tied(config) or is_tied(config, stored):
        return dict(config)
    inner = config.get("text_config")
    untied = {**config, "tie_word_embeddings": False}
    return {**untied, "text_config": {**inner, "tie_word_embeddings": False}} if isinstance(inner, Mapping) else untied


def body_shapes(config: Mapping[str, Any], prefix: str, stored: Collection[str] = ()) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor the language model must have, with its shape; lm_head where embeddings are not tied, or it is among the names stored."""
    d = sizes(config)
    yield f"{prefix}embed_tokens.weight", (d["vocab_size"], d["hidden_size"])
    for i, layer_type in enumerate(layer_types(config)):
        for name, shape in layer_shapes(config, layer_type).items():
            yield f"{prefix}layers.{i}.{name}", shape
    yield f"{prefix}norm.weight", (d["hidden_size"],)
    if not is_tied(config, stored):
        yield "lm_head.weight", (d["vocab_size"], d["hidden_size"])


def mtp_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The 15 tensors of the draft head with their shapes."""
    h = sizes(config)["hidden_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "mtp.fc.weight": (h, 2 * h),
        "mtp.norm.weight": (h,),
        "mtp.pre_fc_norm_embedding.weight": (h,),
        "mtp.pre_fc_norm_hidden.weight": (h,),
    }
    shapes |= {f"mtp.layers.0.{name}": shape for name, shape in layer_shapes(config, "full_attention").items()}
    assert shapes.keys() == set(MTP_TENSORS)
    return shapes


def vision_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of the vision tower with their shapes: 12 a block and 9 around the blocks, 333 at depth 27."""
    said = config.get("vision_config")
    vision = {key: said.get(key, default) for key, default in VISION_SIZES.items()} if isinstance(said, Mapping) else {}
    if not vision or any(type(size) is not int or not 0 < size < 1 << 31 for size in vision.values()):
        raise InputError(f"config.json: vision_config must hold {', '.join(VISION_SIZES)} as positive sizes")
    if vision["depth"] >= 10_000:
        raise InputError(f"config.json: vision_config.depth is {vision['depth']}, must be a count of blocks")
    h, inter = vision["hidden_size"], vision["intermediate_size"]
    merged = h * vision["spatial_merge_size"] ** 2
    patch = (vision["in_channels"], vision["temporal_patch_size"], vision["patch_size"], vision["patch_size"])
    weights: dict[str, tuple[int, ...]] = {"patch_embed.proj": (h, *patch)}
    for i in range(vision["depth"]):
        weights |= {
            f"blocks.{i}.norm1": (h,),
            f"blocks.{i}.norm2": (h,),
            f"blocks.{i}.attn.qkv": (3 * h, h),
            f"blocks.{i}.attn.proj": (h, h),
            f"blocks.{i}.mlp.linear_fc1": (inter, h),
            f"blocks.{i}.mlp.linear_fc2": (h, inter),
        }
    weights |= {"merger.norm": (h,), "merger.linear_fc1": (merged, merged), "merger.linear_fc2": (vision["out_hidden_size"], merged)}
    shapes: dict[str, tuple[int, ...]] = {f"{VISION_PREFIX}pos_embed.weight": (vision["num_position_embeddings"], h)}
    for module, shape in weights.items():
        shapes[f"{VISION_PREFIX}{module}.weight"] = shape
        shapes[f"{VISION_PREFIX}{module}.bias"] = shape[:1]
    return shapes


def module_of(name: str) -> str:
    """The module that owns a tensor: its name without the last part."""
    return name.rpartition(".")[0]


class Stored(Protocol):
    """A tensor by its header: what is stored, or what will be."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


PLAIN_DTYPES = ("BF16", "F16", "F32")


def natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts layer 10 after layer 9."""
    return [(int(part), "") if part.isdigit() and part.isascii() and len(part) < 19 else (-1, part) for part in name.split(".")]


def kept_modules(tensors: Mapping[str, Stored], prefix: str) -> list[str]:
    """Modules stored in 16 bits (or F32) that a quantization config must name, because an engine would take them as quantized.

    lm_head and the embeddings, the vision tower, the draft head (norms too), then the layers. prefix: of the body's tensors.
    lm_head is named where none is stored as well: tied to the embeddings, it is as plain as they are.
    """
    if not any(name.startswith("lm_head.") for name in tensors) or _is_plain(tensors, "lm_head.weight"):
        around = ["lm_head", f"{prefix}embed_tokens"]
    else:
        around = [f"{prefix}embed_tokens"]
    parts: dict[str, list[str]] = {"vision": [], "mtp": [], "layers": []}
    for name in sorted(tensors, key=natural):
        part = "layers" if layer_index(name) is not None else component(name)
        if part in parts and _is_plain(tensors, name) and (part == "mtp" or len(tensors[name].shape) >= 2):
            parts[part].append(module_of(name))
    return [*around, *parts["vision"], *parts["mtp"], *parts["layers"]]


def _is_plain(tensors: Mapping[str, Stored], name: str) -> bool:
    return name.endswith(".weight") and name in tensors and tensors[name].dtype in PLAIN_DTYPES


def text_only_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a build whose vision tower was stripped: VL names and architecture stay (the safest form for every
    vLLM that knows the family), and `language_model_only` says that the tower is gone."""
    return {**config, "language_model_only": True}
