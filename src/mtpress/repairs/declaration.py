"""Repairs of what is declared: the config files are written anew from what is stored.

In: the checkpoint as it stands. Out: quantization_config in config.json, and hf_quant_config.json or quantization_config.json where
the format has one, that declare the stored format and name every module in BF16. Keys that are right stay as they are.
Leaves out: which entries name a module in which format (kept_modules.py).
"""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from mtpress.errors import InputError
from mtpress.kept_modules import spare
from mtpress.plan import NVFP4_GROUP_SIZE
from mtpress.repairs.repair import AGAIN, Context, Fix, Left, Repair, Turn
from mtpress.rules import stored
from mtpress.rules.declaration import NVFP4_ALGOS, Declaration
from mtpress.rules.rule import Finding, count
from mtpress.rules.stored import INPUT_SCALE, KV_SCALES, Form
from mtpress.rules.subject import HF_QUANT_CONFIG, Subject

QUANTIZATION_CONFIG = "quantization_config.json"
DECLARED_AS: dict[Form, tuple[str, ...]] = {
    "nvfp4": ("nvfp4",), "nvfp4-pack-quantized": ("compressed-tensors",), "pack-quantized": ("compressed-tensors",),
    "gptq": ("auto-round", "gptq"),
}  # fmt: skip
FP8_KV = {"dynamic": False, "num_bits": 8, "type": "float"}


def declare(ctx: Context) -> Iterator[Fix | Left]:
    """Writes every declaration anew from what is stored."""
    subject = ctx.subject
    forms = {subject.form(module) for module in subject.quantized}
    if not forms:
        yield from _undeclare(ctx)
        return
    if len(forms) > 1 or not forms <= DECLARED_AS.keys():
        titles = ", ".join(sorted(stored.TITLES[form] for form in forms))
        yield Left(f"modules are stored as {titles}, which no one config can declare", AGAIN)
        return
    form = forms.pop()
    kept = subject.model.kept_modules(subject.tensors, _prefix(subject))
    try:
        content = _content(ctx, form, kept)
    except InputError as error:
        yield Left(str(error), "restore config.json: mtpress repair CKPT OUT --base SRC")
        return
    config = copy.deepcopy(ctx.overlay.config)
    config["quantization_config"] = content
    if isinstance(config.get("text_config"), dict):
        config["text_config"].pop("quantization_config", None)
    written = ["config.json"]
    ctx.overlay.set_config(config)
    if form == "nvfp4":
        ctx.overlay.write_json(HF_QUANT_CONFIG, _hf_content(subject, Declaration("config.json", content), kept))
        written.append(HF_QUANT_CONFIG)
    elif subject.has(HF_QUANT_CONFIG):
        ctx.overlay.drop_file(HF_QUANT_CONFIG)
    if subject.has(QUANTIZATION_CONFIG) or content.get("quant_method") == "auto-round":
        ctx.overlay.write_json(QUANTIZATION_CONFIG, content)
        written.append(QUANTIZATION_CONFIG)
    yield Fix(
        f"{' and '.join(written)} declare {stored.TITLES[form]} and name the {count(len(kept), 'module')} in BF16, from what is stored"
    )


def _prefix(subject: Subject) -> str:
    return subject.prefix or "model.language_model."


def _undeclare(ctx: Context) -> Iterator[Fix | Left]:
    config = copy.deepcopy(ctx.overlay.config)
    config.pop("quantization_config", None)
    if isinstance(config.get("text_config"), dict):
        config["text_config"].pop("quantization_config", None)
    ctx.overlay.set_config(config)
    for name in (HF_QUANT_CONFIG, QUANTIZATION_CONFIG):
        if ctx.subject.has(name):
            ctx.overlay.drop_file(name)
    yield Fix("the declaration is taken out: every weight is in BF16")


def _content(ctx: Context, form: Form, kept: list[str]) -> dict[str, Any]:
    """quantization_config of config.json: what is declared where it is of the stored format, else one made from scratch."""
    subject = ctx.subject
    declared = subject.declared
    if declared is not None and not declared.legacy and declared.format in DECLARED_AS[form]:
        num_layers = len(subject.model.layer_types(subject.config))
        content = spare(declared, kept, subject.quantized, num_layers, _prefix(subject))
        return _mended(subject, content) if form == "nvfp4" else content
    if form == "nvfp4":
        from mtpress.formats import nvfp4

        content = nvfp4.quantization_config(kept, False)
        if declared is not None:
            content |= {key: value for key, value in declared.inner.items() if key in ("kv_cache_scheme", "kv_cache_quant_algo")}
            if declared.algo in NVFP4_ALGOS:
                content["quant_algo"] = declared.algo
        return _mended(subject, content)
    return _from_scratch(ctx, form, kept)


def _mended(subject: Subject, content: dict[str, Any]) -> dict[str, Any]:
    """An NVFP4 declaration with the keys put right that are not: algorithm, group sizes, activations, KV cache."""
    content = copy.deepcopy(content)
    content["quant_method"] = "modelopt"
    if str(content.get("quant_algo") or "").upper() not in NVFP4_ALGOS:
        content["quant_algo"] = "NVFP4"
    declared = Declaration("config.json", content)
    if "group_size" in content:
        content["group_size"] = NVFP4_GROUP_SIZE
    for group in declared.groups:
        weights = group.get("weights")
        if isinstance(weights, dict) and "group_size" in weights:
            weights["group_size"] = NVFP4_GROUP_SIZE
    if not declared.weight_only and not any(name.endswith(f".{INPUT_SCALE}") for name in subject.tensors):
        if declared.groups:
            for group in declared.groups:
                assert isinstance(group, dict)
                group["input_activations"] = None
        else:
            content["quant_algo"] = "W4A16_NVFP4"
    kv = _kv_cache(subject, declared)
    if kv != declared.kv_cache:
        content.pop("kv_cache_scheme", None)
        content.pop("kv_cache_quant_algo", None)
        if kv == "fp8":
            content["kv_cache_scheme"] = dict(FP8_KV)
    return content


def _kv_cache(subject: Subject, declared: Declaration) -> str:
    """What the engine takes the KV cache for, and FP8 where a scheme is declared that nobody knows and scales for FP8 are stored."""
    if declared.kv_cache != "?":
        return declared.kv_cache
    return "fp8" if any(name.endswith(tuple(f".{suffix}" for suffix in KV_SCALES)) for name in subject.tensors) else "auto"


def _hf_content(subject: Subject, declared: Declaration, kept: list[str]) -> dict[str, Any]:
    """hf_quant_config.json of what config.json declares."""
    from mtpress.formats import nvfp4

    content = nvfp4.hf_quant_config(kept, declared.kv_cache == "fp8")
    old = subject.hf_declared
    producer = old.content.get("producer") if old is not None else None
    if isinstance(producer, Mapping) and producer.get("name") == "modelopt":
        content["producer"] = dict(producer)
    content["quantization"]["quant_algo"] = declared.algo
    if declared.kv_cache == "nvfp4":
        content["quantization"]["kv_cache_quant_algo"] = "NVFP4"
    return content


def _from_scratch(ctx: Context, form: Form, kept: list[str]) -> dict[str, Any]:
    """The declaration of INT4 in GPTQ's layout, or of compressed-tensors NVFP4, where none can be used."""
    subject = ctx.subject
    if form == "gptq":
        from mtpress.checkpoint import read_tensor
        from mtpress.formats import int4

        module = next(module for module in subject.quantized if {"qweight", "qzeros", "scales"} <= subject.modules[module].keys())
        tensors = subject.modules[module]
        group_size = tensors["qweight"].shape[0] * int4.PER_WORD // tensors["scales"].shape[0]
        content = int4.quantization_config(kept, f"{_prefix(subject)}layers") | {"group_size": group_size}
        if ctx.may_read:
            stored_zero = int(read_tensor(tensors["qzeros"]).view(-1)[0]) & 0xF
            if stored_zero == int4.STORED_AS_IS:
                content["packing_format"] = "auto_round"
            elif stored_zero != int4.STORED_LESS_ONE:
                raise InputError("nothing declares the INT4 weights, and their zero points are not symmetric")
        return content
    if form == "nvfp4-pack-quantized":
        from mtpress.formats import compressed_tensors

        weight_only = not any(name.endswith(f".{compressed_tensors.INPUT_GLOBAL_SCALE}") for name in subject.tensors)
        return compressed_tensors.quantization_config(kept, weight_only=weight_only, lm_head="lm_head" in subject.quantized)
    raise InputError(f"nothing declares the {stored.TITLES[form]} weights")


def written_anew(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    yield from declare(ctx)


ANEW = "the config files are written anew from what is stored"
LISTED = "the list is written anew, module by module, from what is stored"
REPAIRS = (
    *(Repair(rule_id, ANEW, written_anew, Turn.DECLARATION) for rule_id in (
        "quant-method", "quant-algo", "group-size", "quantization-undeclared", "configs-contradict", "hf-quant-config-missing",
    )),
    Repair("kv-cache-scheme", "FP8 where scales for it are stored; else it is taken out, which is what vLLM makes of it", written_anew,
           Turn.DECLARATION),
    Repair("quantization-not-stored", "the declaration is taken out of every config file", written_anew, Turn.DECLARATION),
    *(Repair(rule_id, LISTED, written_anew, Turn.DECLARATION) for rule_id in (
        "ignore-malformed", "ignore-splits-fused", "ignore-too-little", "vision-not-ignored", "ignore-too-much", "ignore-matches-nothing",
        "mtp-not-ignored", "mtp-fc-not-ignored",
    )),
    Repair("format-not-covered", "mtpress does not know the format well enough to judge or to mend it"),
)  # fmt: skip
