"""What config.json computes with, whichever library wrote it.

In: config.json of a checkpoint and of its source. Out: a `Difference` for every key that computes and is not the source's, keys that the
source lacks among them. Leaves out: the class, the declared quantization and the draft head's count, which have rules of their own.

transformers 4 and 5 spell some things differently: rope_theta, rope_scaling and partial_rotary_factor became rope_parameters,
torch_dtype became dtype, full_attention_interval became layer_types. Each is compared by what it says.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from mtpress.comparison.difference import Difference, differing, is_empty, same
from mtpress.errors import InputError
from mtpress.json_files import shown
from mtpress.models.qwen3_5 import names as qwen3_5
from mtpress.quant_config.view import CONFIG

TEXT, VISION = "text_config", "vision_config"
# Keys by which nothing is computed, or that have rules of their own (rules/config.py, draft_head.py, vision.py, declaration.py).
FREE = {
    "model_type", "architectures", "transformers_version", "quantization_config", "compression_config", "_name_or_path", "name_or_path",
    "_commit_hash", "use_cache", "initializer_range", "attention_dropout", "language_model_only", "output_router_logits",
    "router_aux_loss_coef", "return_dict", "output_attentions", "output_hidden_states", "chunk_size_feed_forward", "id2label", "label2id",
    "problem_type", "finetuning_task", "task_specific_params", "torchscript", "pruned_heads", "use_bfloat16", "tie_encoder_decoder",
    "_attn_implementation_autoset", "_attn_implementation", "attn_implementation", "mtp_num_hidden_layers", "bos_token_id",
    "pad_token_id", "sep_token_id", "decoder_start_token_id", "model_name", "unsloth_version", "unsloth_fixed",
}  # fmt: skip
# What transformers 5.19 (models/qwen3_5/configuration_qwen3_5.py) and vLLM 0.32 take where a key is missing.
TEXT_DEFAULTS = {
    "attn_output_gate": True, "hidden_act": "silu", "rms_norm_eps": 1e-6, "linear_conv_kernel_dim": 4, "max_position_embeddings": 32768,
    "is_causal": True,
}  # fmt: skip
VISION_DEFAULTS = {
    "hidden_act": "gelu_pytorch_tanh", "in_channels": 3, "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2,
    "num_position_embeddings": 2304, "rope_parameters": {"rope_type": "axial", "rope_theta": 10000.0},
}  # fmt: skip
ROPE_DEFAULTS = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
# Keys of other models of the same engines that compute where they are added; of any other added key it is not known what it does.
COMPUTING = {
    "rope_scaling", "rope_theta", "rope_parameters", "partial_rotary_factor", "sliding_window", "use_sliding_window", "max_window_layers",
    "attention_chunk_size", "attn_logit_softcapping", "final_logit_softcapping", "logit_scale", "logits_scaling", "attention_multiplier",
    "residual_multiplier", "embedding_multiplier", "layer_scale", "is_causal", "use_bidirectional_attention", "head_dtype", "auto_map",
    "matryoshka_dimensions", "is_matryoshka", "num_experts", "num_experts_per_tok", "norm_topk_prob", "decoder_sparse_step", "qkv_bias",
    "attention_bias", "mlp_bias", "dual_chunk_attention_config", "position_embedding_type", "custom_pipelines", "block_configs",
    "model_max_length", "query_pre_attn_scalar", "mlp_only_layers", "tie_word_embeddings", "text_config", "vision_config", "dtype",
    "mrope_section", "mrope_interleaved", "deepstack_visual_indexes", "rope_type", "temperature", "top_p", "top_k", "do_sample",
    "repetition_penalty", "max_length", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id",
    "forced_eos_token_id", "no_repeat_ngram_size", "min_length", "length_penalty", "num_beams",
} | {*TEXT_DEFAULTS, *VISION_DEFAULTS, *qwen3_5.SIZES, *qwen3_5.VISION_SIZES}  # fmt: skip
# One thing under several keys: what is compared → every key that says it.
SPELLINGS = {
    "rope_parameters": ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor"),
    "layer_types": ("layer_types", "full_attention_interval"),
    "dtype": ("dtype", "torch_dtype"),
    "num_heads": ("num_heads", "num_attention_heads"),
}


def _rope(text: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary embeddings as one object. Two values where two keys disagree: versions of the engines read the one or the other."""
    said: dict[str, list[Any]] = {}
    for name in ("rope_parameters", "rope_scaling"):
        inner = text.get(name)
        if isinstance(inner, Mapping):
            for key, value in inner.items():
                if value is not None:
                    said.setdefault("rope_type" if key == "type" else key, []).append(value)  # transformers 4 said type
        elif inner is not None:
            said.setdefault(name, []).append(inner)
    if (theta := text.get("rope_theta")) is not None:
        said.setdefault("rope_theta", []).append(theta)
    # transformers 5 writes its default beside the value that counts
    factor = text.get("partial_rotary_factor")
    if factor is not None and ("partial_rotary_factor" not in said or not same(factor, ROPE_DEFAULTS["partial_rotary_factor"])):
        said.setdefault("partial_rotary_factor", []).append(factor)
    found = {key: values[0] if all(same(values[0], value) for value in values) else values for key, values in said.items()}
    return ROPE_DEFAULTS | found


def _layer_types(config: Mapping[str, Any]) -> Any:
    try:
        return qwen3_5.layer_types(config)
    except InputError:
        return qwen3_5.text_config(config).get("layer_types")


def _section(config: Mapping[str, Any], section: str) -> Mapping[str, Any] | None:
    """text_config or vision_config; a text-only config is its own text_config."""
    inner = config.get(section)
    if inner is None and section == TEXT and config.get("model_type") == "qwen3_5_text":
        return config
    return inner if isinstance(inner, Mapping) else None


def _text(config: Mapping[str, Any]) -> dict[str, Any] | None:
    inner = _section(config, TEXT)
    if inner is None:
        return None
    merged = {key for name in ("rope_parameters", "layer_types", "dtype") for key in SPELLINGS[name]}
    found = {key: value for key, value in inner.items() if key not in merged}
    found |= {"rope_parameters": _rope(inner), "layer_types": _layer_types(config)}
    # either level may say these; the text model computes with both
    for key in ("dtype", "tie_word_embeddings"):
        said = [level.get(name) for level in (config, inner) for name in SPELLINGS.get(key, (key,)) if level.get(name) is not None]
        if said:
            found[key] = said[0] if all(same(said[0], other) for other in said) else said
    return found


def _vision(config: Mapping[str, Any]) -> dict[str, Any] | None:
    inner = _section(config, VISION)
    if inner is None:
        return None
    found = {key: value for key, value in inner.items() if key not in SPELLINGS["dtype"]}
    if (heads := found.pop("num_attention_heads", None)) is not None:
        found.setdefault("num_heads", heads)
    return found


def _around(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The level above text_config; None of a text-only config, which has one level."""
    if _section(config, TEXT) is config:
        return None
    return {key: value for key, value in config.items() if key not in (TEXT, VISION, "tie_word_embeddings", *SPELLINGS["dtype"])}


def differences(config: Mapping[str, Any], base: Mapping[str, Any]) -> Iterator[Difference]:
    """What of `config` does not compute as `base` does."""
    for section, meaning, defaults in ((TEXT, _text, TEXT_DEFAULTS), (VISION, _vision, VISION_DEFAULTS), ("", _around, {})):
        here, there = meaning(config), meaning(base)
        if here is None or there is None:
            continue
        for key, ours, theirs in differing(here, there, defaults, FREE):
            if key == "dtype" and (ours is None or theirs is None or ours == "bfloat16"):
                continue  # which dtype is right is the rule `dtype`'s; a build of an F16 or F32 source is BF16
            if key == "eos_token_id" and (ours is None or theirs is None):
                continue
            known = key in COMPUTING or not is_empty(theirs)
            place = f"{section}.{key}" if section else key
            for inner, one, other in _inside(ours, theirs):
                yield Difference(
                    "config" if known else "config-unknown", CONFIG, f"{place}{inner}",
                    None if one is None else shown(one), None if other is None else shown(other),
                )  # fmt: skip


def _inside(here: Any, there: Any) -> Iterator[tuple[str, Any, Any]]:
    """(what is added to the place, value here, value there): an object key by key, anything else whole."""
    if isinstance(here, Mapping) and isinstance(there, Mapping):
        for key, ours, theirs in differing(here, there, {}, ()):
            yield f".{key}", ours, theirs
    else:
        yield "", here, there


def restored(config: Mapping[str, Any], base: Mapping[str, Any], places: list[str]) -> dict[str, Any]:
    """`config` with what `places` (of differences) say as `base` says it, under every spelling; keys that `base` lacks are gone."""
    changed = copy.deepcopy(dict(config))
    for place in places:
        section, _, key = place.partition(".") if place.startswith((f"{TEXT}.", f"{VISION}.")) else ("", "", place)
        key = key.partition(".")[0]
        ours = changed[section] if isinstance(changed.get(section), dict) else changed
        theirs = base[section] if isinstance(base.get(section), Mapping) else base
        for level, source in ((ours, theirs), *(((changed, base),) if key in ("dtype", "tie_word_embeddings") else ())):
            for name in SPELLINGS.get(key, (key,)):
                level.pop(name, None)
                if name in source:
                    level[name] = copy.deepcopy(source[name])
    return changed
