"""The groups of a compressed-tensors config, written anew from what is stored.

In: a checkpoint whose modules are of the forms that compressed-tensors holds, several of them or FP8. Out: a quantization_config in which
vLLM's matcher takes each as what it is: the one that is declared, with what it lacks, or one made from scratch. Leaves out: configs of
one form that is not FP8 (declaration.py).
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mtpress.quant_config.declaration import COMPRESSED_FORMS, Declaration
from mtpress.quant_config.matching.compressed_tensors import scheme_of
from mtpress.quant_config.matching.matcher import Scheme
from mtpress.quant_config.stored import INPUT_GLOBAL_SCALE, QWEIGHT, WEIGHT, WEIGHT_PACKED, ZERO_POINT
from mtpress.quant_config.view import Subject
from mtpress.repairs.mixed_precision import HELD
from mtpress.repairs.repair import Context

LM_HEAD = "lm_head"


def grouped_content(ctx: Context, kept: Sequence[str], holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any] | None:
    """The quantization_config; None where a module is in no form that it can hold. holds: whether no rule on lists finds fault with one."""
    from mtpress.formats import compressed_tensors

    subject = ctx.subject
    stored = {module: stored_scheme(subject, module) for module in subject.quantized}
    if any(scheme is None for scheme in stored.values()):
        return None
    schemes = {module: scheme for module, scheme in stored.items() if scheme is not None}
    declared = subject.declared
    kv_cache = None
    if declared is not None and declared.format == "compressed-tensors":
        content = completed(declared.content, kept, schemes, subject)
        if holds(content):
            return content
        kv_cache = declared.content.get("kv_cache_scheme")
    return compressed_tensors.grouped_config(groups_of(schemes), kept, kv_cache)


def stored_scheme(subject: Subject, module: str) -> Scheme | None:
    """How a module is stored, as a group would say it; None where no group can."""
    form, tensors = subject.form(module), subject.modules[module]
    if form not in HELD["compressed-tensors"]:
        return None
    if form == "nvfp4-pack-quantized":
        return Scheme("nvfp4", 4, 16, True, INPUT_GLOBAL_SCALE in tensors)
    if form == "fp8":
        scheme = subject.fp8_schemes.get(module)
        rows = tensors[WEIGHT].shape[:1]
        lies = scheme is not None and scheme.scale_name == "weight_scale" and (tensors["weight_scale"].shape != rows or rows == (1,))
        return scheme if lies else None
    bits, size = stored_bits(subject, module), subject.stored_group_size(module)
    return Scheme("int", bits, size, ZERO_POINT not in tensors) if bits is not None and size is not None else None


def completed(content: Mapping[str, Any], kept: Sequence[str], schemes: Mapping[str, Scheme], subject: Subject) -> dict[str, Any]:
    """What is declared, with `kept` ignored and every module that no target matches named in the group whose scheme is its own."""
    from mtpress.formats.compressed_tensors import LM_HEAD_TARGET

    new = copy.deepcopy(dict(content))
    new["ignore"] = list(kept)
    matcher = subject.matcher(Declaration("config.json", new))
    groups = new.get("config_groups")
    if matcher is None or not isinstance(groups, Mapping):
        return new
    for linear in subject.linears:
        if linear.part == "draft" and linear.modules == (LM_HEAD,):
            continue
        for module in linear.modules:
            scheme = schemes.get(module)
            if scheme is None or matcher.verdict(linear) == "quantized":
                continue
            group = next((g for g in groups.values() if isinstance(g, dict) and same(scheme_of(g, new.get("format")), scheme)), None)
            if group is not None and isinstance(targets := group.get("targets"), list):
                name = LM_HEAD_TARGET if module == LM_HEAD else module
                group["targets"] = [*(target for target in targets if target not in (module, name)), name]
    return new


def same(said: Scheme, stored: Scheme) -> bool:
    """Whether a group's scheme is what a module's tensors show; how many activations have a scale, they do not."""
    if said.kind != stored.kind:
        return False
    if said.kind == "fp8":
        return (said.scale_of, said.static, said.block if said.scale_of == "block" else None) == (
            stored.scale_of, stored.static, stored.block if stored.scale_of == "block" else None
        )  # fmt: skip
    return (said.bits, said.group_size, said.symmetric, said.activations) == (
        stored.bits, stored.group_size, stored.symmetric, stored.activations
    )  # fmt: skip


def groups_of(schemes: Mapping[str, Scheme]) -> list[dict[str, Any]]:
    """A group for each scheme, with the full names of its modules."""
    from mtpress.formats.compressed_tensors import LM_HEAD_TARGET

    found: dict[Scheme, list[str]] = {}
    for module, scheme in schemes.items():
        found.setdefault(scheme, []).append(LM_HEAD_TARGET if module == LM_HEAD else module)
    return [_group(scheme, targets) for scheme, targets in found.items()]


def _group(scheme: Scheme, targets: Sequence[str]) -> dict[str, Any]:
    from mtpress.formats import compressed_tensors

    assert scheme.kind in COMPRESSED_FORMS
    if scheme.kind == "nvfp4":
        return compressed_tensors.nvfp4_group(targets, weight_only=not scheme.activations)
    if scheme.kind == "fp8":
        block = scheme.block if scheme.scale_of == "block" else None
        return compressed_tensors.fp8_group(targets, scheme.scale_of, static=scheme.static, block=block)
    return compressed_tensors.int_group(targets, scheme.bits, scheme.group_size, symmetric=scheme.symmetric)


def stored_bits(subject: Subject, module: str) -> int | None:
    """Bits of a code of an INT4 module, by config.json's K; None where its shape shows none."""
    shape, tensors = subject.called_for.get(f"{module}.weight", ()), subject.modules.get(module, {})
    codes = tensors.get(QWEIGHT if subject.form(module) == "gptq" else WEIGHT_PACKED)
    if subject.form(module) not in ("gptq", "pack-quantized") or codes is None or len(shape) != 2 or len(codes.shape) != 2:
        return None
    words = codes.shape[0 if subject.form(module) == "gptq" else 1]
    return words * 32 // shape[1] if words * 32 % shape[1] == 0 else None
