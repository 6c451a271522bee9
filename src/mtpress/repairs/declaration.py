"""Repairs of what is declared: the config files are written anew from what is stored.

In: the checkpoint as it stands. Out: quantization_config in config.json, and hf_quant_config.json or quantization_config.json where
the format has one, that declare the stored format and name every module in BF16. Keys that are right stay as they are.
Leaves out: which entries name a module in which format (quant_config/ignore_list.py).
"""

import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from mtpress.errors import InputError
from mtpress.quant_config import stored
from mtpress.quant_config.declaration import NVFP4_ALGOS, Declaration
from mtpress.quant_config.ignore_list import spare
from mtpress.quant_config.matching.modelopt import GROUP_SIZE
from mtpress.quant_config.stored import INPUT_GLOBAL_SCALE, INPUT_SCALE, KV_SCALES, ZERO_POINT, Form
from mtpress.quant_config.view import HF_QUANT_CONFIG, Subject
from mtpress.repairs.bf16 import in_bf16
from mtpress.repairs.compressed_groups import grouped_content, stored_bits
from mtpress.repairs.fp8_declaration import fp8_content, unloadable_lm_head
from mtpress.repairs.from_source import LARGEST_SHARE
from mtpress.repairs.mixed_precision import declare_mixed, stored_formats
from mtpress.repairs.repair import Context, Fix, Left, Repair, Turn
from mtpress.rules import ignore_lists
from mtpress.rules.quantization import BACKENDS, PACKING_FORMATS, format_differs
from mtpress.rules.rule import QUANTIZE_AGAIN, Finding
from mtpress.terminal import count

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
    if (formats := stored_formats(subject)) is not None:
        kv = _kv_cache(subject, subject.declared) if subject.declared is not None else "auto"
        yield declare_mixed(ctx, subject.model.kept_modules(subject.tensors, _prefix(subject)), formats, kv, _hf_kv_cache(subject, kv))
        return
    if "fp8" in forms or len(forms) > 1:
        yield from unloadable_lm_head(ctx)
        subject = ctx.subject
    kept = subject.model.kept_modules(subject.tensors, _prefix(subject))
    if len(forms) == 1 and forms <= DECLARED_AS.keys():
        form = next(iter(forms))
        try:
            content = _content(ctx, form, kept)
        except InputError as error:
            yield Left(str(error), "restore config.json: mtpress repair CKPT OUT --base SRC")
            return
    else:
        form = "fp8"
        found = fp8_content(subject, kept) or grouped_content(ctx, kept, lambda content: _holds_each(ctx, content))
        if found is None:
            titles = ", ".join(sorted(stored.TITLES[form] for form in forms))
            yield Left(f"modules are stored as {titles}, which no one config can declare", QUANTIZE_AGAIN)
            return
        content = found
    config = copy.deepcopy(ctx.overlay.config)
    config["quantization_config"] = content
    if isinstance(config.get("text_config"), dict):
        config["text_config"].pop("quantization_config", None)
    written, dropped = ["config.json"], ""
    ctx.overlay.set_config(config)
    if form == "nvfp4":
        ctx.overlay.write_json(HF_QUANT_CONFIG, _hf_content(subject, Declaration("config.json", content), kept))
        written.append(HF_QUANT_CONFIG)
    elif subject.has(HF_QUANT_CONFIG):
        ctx.overlay.drop_file(HF_QUANT_CONFIG)
        dropped = f"; {HF_QUANT_CONFIG}, which is modelopt's, left out"
    if subject.has(QUANTIZATION_CONFIG) or content.get("quant_method") == "auto-round":
        ctx.overlay.write_json(QUANTIZATION_CONFIG, content)
        written.append(QUANTIZATION_CONFIG)
    names = count(len(kept), "module")
    what = Declaration("config.json", content).title if form == "fp8" else stored.TITLES[form]
    yield Fix(f"{' and '.join(written)} written anew from what is stored: {what}, {names} named as BF16{dropped}")


def is_declarable(ctx: Context) -> bool:
    """Whether a declaration stands for all that is stored, as it is."""
    subject = ctx.subject
    forms = {subject.form(module) for module in subject.quantized}
    if (len(forms) == 1 and forms <= DECLARED_AS.keys()) or stored_formats(subject) is not None:
        return True
    return fp8_content(subject, []) is not None or grouped_content(ctx, [], lambda content: False) is not None


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
        content = _spared(subject, declared.content, kept)
        content = _mended(subject, content) if form == "nvfp4" else _mended_other(ctx, form, content)
        if form == "nvfp4" or _holds(ctx, content):
            return content
    if form == "nvfp4":
        from mtpress.formats import nvfp4

        content = nvfp4.quantization_config(kept, False)
        if declared is not None:
            content |= {key: value for key, value in declared.inner.items() if key in ("kv_cache_scheme", "kv_cache_quant_algo")}
            if declared.algo in NVFP4_ALGOS:
                content["quant_algo"] = declared.algo
        return _mended(subject, content)
    return _spared(subject, _from_scratch(ctx, form, kept), kept)


def _spared(subject: Subject, content: Mapping[str, Any], kept: list[str]) -> dict[str, Any]:
    """The content with the entries that decide what stays in BF16 written anew."""
    declared = Declaration("config.json", content)
    return spare(declared, kept, subject.quantized, len(subject.model.layer_types(subject.config)), _prefix(subject))


def _holds(ctx: Context, content: dict[str, Any]) -> bool:
    """Whether no rule on lists or layouts finds fault with a declaration; else too little of it can be used."""
    subject = ctx.overlay.subject_with(ctx.overlay.config | {"quantization_config": content})
    return subject.covered and not any(True for rule in ignore_lists.RULES for _ in rule.find(subject))


def _holds_each(ctx: Context, content: dict[str, Any]) -> bool:
    """_holds(), and whether every module is stored as its group says."""
    subject = ctx.overlay.subject_with(ctx.overlay.config | {"quantization_config": content})
    return _holds(ctx, content) and not any(True for _ in format_differs(subject))


def _mended(subject: Subject, content: dict[str, Any]) -> dict[str, Any]:
    """An NVFP4 declaration with the keys put right that are not: algorithm, group sizes, activations, KV cache."""
    content = copy.deepcopy(content)
    content["quant_method"] = "modelopt"
    if str(content.get("quant_algo") or "").upper() not in NVFP4_ALGOS:
        content["quant_algo"] = "NVFP4"
    declared = Declaration("config.json", content)
    if "group_size" in content:
        content["group_size"] = GROUP_SIZE
    for group in declared.groups:
        weights = group.get("weights")
        if isinstance(weights, dict) and "group_size" in weights:
            weights["group_size"] = GROUP_SIZE
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


def _mended_other(ctx: Context, form: Form, content: dict[str, Any]) -> dict[str, Any]:
    """A declaration of compressed-tensors, AutoRound or GPTQ with the keys put right that what is stored decides.

    InputError for zero points that no declaration the engine knows can stand for.
    """
    subject, content = ctx.subject, copy.deepcopy(content)
    if form == "nvfp4-pack-quantized" and not any(name.endswith(f".{INPUT_GLOBAL_SCALE}") for name in subject.tensors):
        for group in Declaration("config.json", content).groups:
            assert isinstance(group, dict)
            group["input_activations"] = None
    bits = {found for module in subject.quantized if (found := stored_bits(subject, module)) is not None}
    if len(bits) == 1 and form == "gptq":
        content["bits"] = bits.pop()
    elif len(bits) == 1 and form == "pack-quantized":
        for group in Declaration("config.json", content).groups:
            if isinstance(weights := group.get("weights"), dict):
                weights["num_bits"] = min(bits)
    sizes = {size for module in subject.quantized if (size := subject.stored_group_size(module)) is not None}
    if len(sizes) == 1:
        (size,) = sizes
        said = content.get("group_size")
        if form == "gptq" and not (said == -1 and _whole_rows(subject, size)):
            content["group_size"] = size
        elif form == "pack-quantized":
            for group in Declaration("config.json", content).groups:
                weights = group.get("weights")
                if isinstance(weights, dict) and weights.get("group_size") not in (None, -1):
                    weights["group_size"] = size
    if form == "pack-quantized" and not any(name.endswith(".weight_g_idx") for name in subject.tensors):
        for group in Declaration("config.json", content).groups:
            if isinstance(weights := group.get("weights"), dict) and weights.get("actorder"):
                weights["actorder"] = None  # without g_idx the columns are where they were
    if form == "gptq" and content.get("sym") is False and _is_symmetric(ctx):
        content["sym"] = True
    if form == "gptq" and content.get("desc_act") and _in_order(ctx):
        content["desc_act"] = False
    if content.get("quant_method") == "auto-round":
        if content.get("backend", "auto") not in BACKENDS:
            del content["backend"]
        if content.get("packing_format", PACKING_FORMATS[0]) != PACKING_FORMATS[0]:
            if any({word >> place & 0xF for place in range(0, 32, 4)} - {7, 8} for word in subject.zero_words.values()):
                raise InputError("the zero points are not symmetric, and vLLM knows no such layout")
            content["packing_format"] = PACKING_FORMATS[0]
    return content


def _is_symmetric(ctx: Context) -> bool:
    """Whether every zero point of 4 bits is the middle of the range; reads them, a dry run the first of each."""
    import torch

    from mtpress.checkpoint.safetensors import read_tensor

    words = set(ctx.subject.zero_words.values())
    if len(words) == 1 and words <= {0x77777777, 0x88888888} and ctx.may_read:
        infos = [info for name, info in ctx.subject.tensors.items() if name.endswith(".qzeros")]
        words = {int(word) & 0xFFFFFFFF for info in infos for word in torch.unique(read_tensor(info))}
    return len(words) == 1 and words <= {0x77777777, 0x88888888}


def _in_order(ctx: Context) -> bool:
    """Whether no column of an INT4 module in GPTQ's layout was moved, by its g_idx; reads them, so a dry run does not know."""
    import torch

    from mtpress.checkpoint.safetensors import read_tensor

    found = {name.rpartition(".")[0]: info for name, info in ctx.subject.tensors.items() if name.endswith(".g_idx")}
    for module, info in found.items() if ctx.may_read else ():
        size = ctx.subject.stored_group_size(module)
        if size is None or not torch.equal(read_tensor(info).long(), torch.arange(info.num_params) // size):
            return False
    return bool(found) and ctx.may_read


def _whole_rows(subject: Subject, size: int) -> bool:
    """Whether groups of that size are whole rows in every quantized module."""
    shapes = [subject.called_for.get(f"{module}.weight", ()) for module in subject.quantized]
    return all(len(shape) == 2 and shape[1] == size for shape in shapes)


def _kv_cache(subject: Subject, declared: Declaration) -> str:
    """What the engine takes the KV cache for, and FP8 where a scheme is declared that nobody knows and scales for FP8 are stored."""
    if declared.kv_cache != "?":
        return declared.kv_cache
    return "fp8" if any(name.endswith(tuple(f".{suffix}" for suffix in KV_SCALES)) for name in subject.tensors) else "auto"


def _hf_content(subject: Subject, declared: Declaration, kept: list[str]) -> dict[str, Any]:
    """hf_quant_config.json of what config.json declares."""
    from mtpress.formats import nvfp4

    kv = _hf_kv_cache(subject, declared.kv_cache)
    content = nvfp4.hf_quant_config(kept, kv == "fp8")
    old = subject.hf_declared
    producer = old.content.get("producer") if old is not None else None
    if isinstance(producer, Mapping) and producer.get("name") == "modelopt":
        content["producer"] = dict(producer)
    content["quantization"]["quant_algo"] = declared.algo
    if kv == "nvfp4":
        content["quantization"]["kv_cache_quant_algo"] = "NVFP4"
    return content


def _hf_kv_cache(subject: Subject, kv: str) -> str:
    """The KV cache of hf_quant_config.json: that of config.json or, where that says nothing, what the file itself says: engines that
    read it alone go by it."""
    beside = subject.hf_declared.kv_cache if subject.hf_declared is not None else "auto"
    return beside if kv == "auto" and beside in ("fp8", "nvfp4") else kv


def _from_scratch(ctx: Context, form: Form, kept: list[str]) -> dict[str, Any]:
    """The declaration of a format other than modelopt's where what is declared cannot be used; sizes are those of what is stored."""
    from mtpress.formats import compressed_tensors

    subject = ctx.subject
    if form == "nvfp4-pack-quantized":
        weight_only = not any(name.endswith(f".{INPUT_GLOBAL_SCALE}") for name in subject.tensors)
        return compressed_tensors.quantization_config(kept, weight_only=weight_only, lm_head="lm_head" in subject.quantized)
    bits = {found for module in subject.quantized if (found := stored_bits(subject, module)) is not None}
    sizes = {found for module in subject.quantized if (found := subject.stored_group_size(module)) is not None}
    if len(bits) != 1 or len(sizes) != 1:
        raise InputError(f"the {stored.TITLES[form]} weights are not all of one number of bits and one group size")
    layout: dict[str, Any] = {"bits": bits.pop(), "group_size": sizes.pop(), "sym": True}
    if form == "pack-quantized":
        symmetric = not any(name.endswith(f".{ZERO_POINT}") for name in subject.tensors)
        group = compressed_tensors.int_group(["Linear"], layout["bits"], layout["group_size"], symmetric=symmetric)
        return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}, "ignore": kept}
    if not subject.zero_words or any({word >> place & 0xF for place in range(0, 32, 4)} - {7, 8} for word in subject.zero_words.values()):
        raise InputError("nothing that can be used declares the INT4 weights, and their zero points are not the symmetric ones of 4 bits")
    declared = subject.declared
    if declared is not None and declared.format == "gptq":
        scalars = ("quant_method", "desc_act", "static_groups", "checkpoint_format", "true_sequential", "damp_percent", "meta")
        return {key: value for key, value in declared.content.items() if key in scalars} | layout
    from mtpress.formats import int4

    return int4.quantization_config(kept, f"{_prefix(subject)}layers") | layout


def group_size(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    """What the scales show; modules whose scales show another group size than the others are dequantized to BF16."""
    sizes = Counter(size for module in ctx.subject.quantized if (size := ctx.subject.stored_group_size(module)) is not None)
    usual = sizes.most_common(1)[0][0] if sizes else None
    odd = [module for module in ctx.subject.quantized if ctx.subject.stored_group_size(module) not in (usual, None)]
    if len(sizes) < 2 or len(odd) > LARGEST_SHARE * len(ctx.subject.quantized):
        yield from declare(ctx)
        return
    made = in_bf16(ctx, odd, damaged=False)
    yield from made.told(ctx, ": their groups are not those of the others")
    if made.missing:
        takes = f"--base SRC, which puts it in BF16; or {QUANTIZE_AGAIN}" if ctx.base is None else QUANTIZE_AGAIN
        yield Left(f"the scales of {made.missing[0]} are for groups of another size than those of the others", takes)


def no_kernel(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    before = ctx.overlay.config
    steps = list(declare(ctx))
    if ctx.overlay.config == before:
        yield Left("vLLM has no kernel for what is stored, and nothing lossless changes that", QUANTIZE_AGAIN)
    else:
        yield from steps


def written_anew(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    yield from declare(ctx)


ANEW = "the config files are written anew from what is stored"
LISTED = "the list is written anew, module by module, from what is stored"
REPAIRS = (
    *(Repair(rule_id, ANEW, written_anew, Turn.DECLARATION) for rule_id in (
        "quant-method", "quant-algo", "quantization-undeclared", "configs-contradict", "configs-differ",
        "hf-quant-config-missing",
    )),
    Repair("kv-cache-scheme", "FP8 where scales for it are stored; else it is taken out, which is what vLLM makes of it", written_anew,
           Turn.DECLARATION),
    Repair("kv-cache-in-one-file", "nothing is wrong: each engine reads its own file, and the declaration stays where it is"),
    Repair("group-size", "what the scales show is declared; a module of other groups than the rest is dequantized to BF16",
           group_size, Turn.CONFIG),
    Repair("packing-format", "set to auto_round:auto_gptq where the zero points are symmetric, and they are written as it wants them",
           written_anew, Turn.DECLARATION),
    Repair("no-kernel", "the declaration is put right where symmetric codes are declared asymmetric, or columns that were never moved in "
           "an order of their own; else left: vLLM has no kernel for what is stored", no_kernel, Turn.DECLARATION),
    Repair("quantization-not-stored", "the declaration is taken out of every config file", written_anew, Turn.DECLARATION),
    *(Repair(rule_id, LISTED, written_anew, Turn.DECLARATION) for rule_id in (
        "ignore-malformed", "ignore-called-otherwise", "ignore-splits-fused", "ignore-too-little", "vision-not-ignored", "ignore-too-much",
        "ignore-matches-nothing", "mtp-not-ignored", "mtp-fc-not-ignored",
    )),
    Repair("format-not-covered", "mtpress does not know the format well enough to judge or to mend it"),
)  # fmt: skip
