"""Ways to break config.json.

In: a `Case`. Out: the same with a config.json that is no JSON object, or that describes no model, or another one than is
stored. Each fault is there by construction. Leaves out: the files of the tokenizer.
"""

from typing import Any

from broken import ALL, CALIBRATED, CONFIG, JUNK, QUANTIZE, Case, edit_json, swollen, torn, unparsable, way

KIND = "config.json"
SIZES = (
    "hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim", "linear_num_key_heads",
    "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim", "linear_conv_kernel_dim", "num_hidden_layers",
)  # fmt: skip
FAULTS = ("weight-only", "calibrated", "check")  # inspect shows such a checkpoint and the fault
NO_SIZES = [v for v in JUNK if v != []] + [0, -64, 2**31, 2**63, 1e300, float("inf"), "64", [64], 64.0, False]


def set_text(case: Case, key: str, value: Any) -> str:
    edit_json(case.source / CONFIG, lambda c: c["text_config"].__setitem__(key, value))
    return f"text_config.{key} = {str(value)[:40]!r}"


@way(KIND)
def config_torn(case: Case) -> str:
    return torn(case.source / CONFIG, case.rng)


@way(KIND)
def config_swollen(case: Case) -> str:
    return swollen(case, case.source / CONFIG, "text_config")


@way(KIND)
def config_unparsable(case: Case) -> str:
    return unparsable(case.source / CONFIG, case.rng)


@way(KIND)
def config_not_a_file(case: Case) -> str:
    path = case.source / CONFIG
    path.unlink()
    what = case.rng.choice(("missing", "directory", "loop", "dangling"))
    if what == "directory":
        path.mkdir()
    elif what != "missing":
        path.symlink_to(path if what == "loop" else path.with_name("gone"))
    return what


@way(KIND)
def model_type_unknown(case: Case) -> str:
    said = case.rng.choice([*JUNK, "llama", "qwen3", "qwen3_5_moe", "QWEN3_5", "qwen3_5 ", "../qwen3_5", "os.system", "x" * 10_000])
    edit_json(case.source / CONFIG, lambda c: c.__setitem__("model_type", said) if case.rng.random() < 0.9 else c.pop("model_type"))
    return f"model_type {str(said)[:40]!r}"


@way(KIND, FAULTS)
def size_missing(case: Case) -> str:
    keys = case.rng.sample(SIZES, case.rng.randint(1, 3))
    edit_json(case.source / CONFIG, lambda c: [c["text_config"].pop(key) for key in keys])
    return f"without {', '.join(keys)}"


@way(KIND, FAULTS)
def size_no_size(case: Case) -> str:
    return set_text(case, case.rng.choice(SIZES), case.rng.choice(NO_SIZES))


@way(KIND, FAULTS)
def size_of_another_model(case: Case) -> str:
    """Every one of these stands in the shape of some stored tensor, so another value cannot be right."""
    import json

    key = case.rng.choice(SIZES)
    now = json.loads((case.source / CONFIG).read_text())["text_config"][key]
    return set_text(case, key, case.rng.choice([now + 1, now * 2, now * 7, now + 100, 9_999]))


@way(KIND, ALL)
def text_config_no_object(case: Case) -> str:
    value = case.rng.choice([v for v in JUNK if not isinstance(v, dict)] + [{}, [{}], ["text_config"]])
    edit_json(case.source / CONFIG, lambda c: c.__setitem__("text_config", value))
    return f"text_config = {value!r}"


@way(KIND, FAULTS)
def layer_types_wrong(case: Case) -> str:
    r = case.rng
    sound = [*["linear_attention"] * 3, "full_attention"]
    value = r.choice(
        [
            sound[:-1], sound + sound[:1], [*sound[:3], "sliding_attention"], ["full_attention", *sound[:3]], ["linear_attention"] * 4,
            ["full_attention"] * 4, sound[::-1], [None] * 4, [1, 2, 3, 4], [sound] * 4, "linear_attention", 4, {}, {"0": "full_attention"},
            [*sound[:3], "Full_attention"], [*sound[:3], True], [], sound * 2500, [[]] * 4, [{}] * 4,
        ]
    )  # fmt: skip
    return set_text(case, "layer_types", value)


@way(KIND, FAULTS)
def interval_wrong(case: Case) -> str:
    """Without layer_types the interval decides; any but 4 makes other layers than are stored."""
    edit_json(case.source / CONFIG, lambda c: c["text_config"].pop("layer_types"))
    return set_text(case, "full_attention_interval", case.rng.choice([*[v for v in NO_SIZES if v is not None], 1, 2, 3, 5, 10**9]))


@way(KIND, QUANTIZE)
def draft_head_wrong(case: Case) -> str:
    return set_text(case, "mtp_num_hidden_layers", case.rng.choice([0, 2, 3, -1, -5, "1", 1.0, [1], {}, 10**30, False, True]))


@way(KIND, QUANTIZE)
def quantized_already(case: Case) -> str:
    value = case.rng.choice([{}, {"quant_method": "modelopt"}, {"quant_method": "fp8"}, [], None, "fp8", {"quant_algo": "NVFP4"}])
    edit_json(case.source / CONFIG, lambda c: c.__setitem__("quantization_config", value))
    return f"quantization_config {value}"


@way(KIND, QUANTIZE)
def arithmetic_wrong(case: Case) -> str:
    """What shapes do not show, and the layers compute with."""
    r = case.rng
    no_number = [v for v in JUNK if v is not None and not isinstance(v, float)] + [float("nan"), float("inf"), "1e-6", -1.0]
    key, value = r.choice(
        [
            ("rms_norm_eps", r.choice(no_number)),
            ("hidden_act", r.choice([*[v for v in JUNK if v is not None], "nope", "SILU", "__class__"])),
        ]
    )
    return set_text(case, key, value)


@way(KIND, QUANTIZE)
def rope_wrong(case: Case) -> str:
    r = case.rng
    number = r.choice([-1.0, 0, "10000", [1], {}, True, float("nan"), float("inf"), 10**400])
    key, value = r.choice(
        [
            ("rope_theta", number),
            ("partial_rotary_factor", r.choice([number, 1.5, 7])),
            ("mrope_section", r.choice([[], [1], "211", 3, [2, 1, "1"], [-2, 5, 1], [1e9, 1, 1], {}, [2, 1, 1, 1]])),
            ("rope_type", r.choice(["nope", 3, [], {}, True, ""])),
        ]
    )
    edit_json(case.source / CONFIG, lambda c: c["text_config"]["rope_parameters"].__setitem__(key, value))
    return f"rope_parameters.{key} = {str(value)[:40]!r}"


@way(KIND, QUANTIZE)
def rope_no_object(case: Case) -> str:
    return set_text(case, "rope_parameters", case.rng.choice([v for v in JUNK if v is not None and not isinstance(v, dict)]))


@way(KIND, QUANTIZE)
def heads_do_not_divide(case: Case) -> str:
    """Two query heads of 32 hold as much as one of 64, so shapes alone can agree: then the key heads do not divide them."""
    edit_json(case.source / CONFIG, lambda c: c["text_config"].update(num_attention_heads=1, head_dim=64))
    return "one head of 64 for two of 32"


@way(KIND, CALIBRATED)
def picture_token_of_another_tokenizer(case: Case) -> str:
    value = case.rng.choice([0, 1, 260, 262, 100_000, -1, "261", None, 261.5, [261]])
    edit_json(case.source / CONFIG, lambda c: c.__setitem__("image_token_id", value))
    return f"image_token_id = {value!r}"


@way(KIND, CALIBRATED)
def tower_of_another_model(case: Case) -> str:
    """The samples hold a picture, so the tower has to run."""
    key = case.rng.choice(
        ("depth", "hidden_size", "intermediate_size", "in_channels", "out_hidden_size", "patch_size", "temporal_patch_size")
    )
    value = case.rng.choice([*[v for v in NO_SIZES if v is not None], 2, 3, 33, 9_999])
    if (key, value) in (("temporal_patch_size", 2), ("in_channels", 3)):
        return ""
    edit_json(case.source / CONFIG, lambda c: c["vision_config"].__setitem__(key, value))
    return f"vision_config.{key} = {str(value)[:40]!r}"
