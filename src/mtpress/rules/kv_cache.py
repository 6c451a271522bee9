"""Rules on the scales of an FP8 KV cache: a pair for every full-attention layer or for none, where the engine reads them.

Read in vLLM 0.32: model_loader/weight_utils.py (the names), layers/quantization/kv_cache.py (what becomes of a missing one). Whether
they are sound numbers is scale-unsound's.
"""

import re
from collections import defaultdict
from collections.abc import Iterator

from mtpress.quant_config.stored import KV_SCALES
from mtpress.quant_config.view import Subject
from mtpress.rules.rule import Problem, Rule
from mtpress.terminal import count

READ = re.compile(r"(.*\.self_attn)\.(?:[kv]_proj\.|qkv_proj\.)?([kv]_scale)")


def _stored(subject: Subject) -> dict[str, set[str]]:
    """Attention module → which of its two scales are stored."""
    found: dict[str, set[str]] = defaultdict(set)
    for name in subject.tensors:
        if match := READ.fullmatch(name):
            found[match[1]].add(match[2])
    return found


def kv_scale_missing(subject: Subject) -> Iterator[Problem]:
    if subject.declared is None or subject.declared.kv_cache != "fp8":
        return
    held = _stored(subject)
    layers = {name.rpartition(".k_proj.")[0] for name in subject.called_for if name.endswith(".self_attn.k_proj.weight")}
    body = {layer for layer in layers if not layer.startswith(subject.model.MTP_PREFIX)}
    wanted = body if held.keys() & body else set()
    missing = [f"{layer}.{scale}" for layer in sorted(held.keys() | wanted) for scale in KV_SCALES if scale not in held.get(layer, ())]
    if missing:
        yield Problem(f"{count(len(missing), 'scale')} of the KV cache missing, of layers or beside ones that have theirs", tuple(missing))


def kv_scale_misplaced(subject: Subject) -> Iterator[Problem]:
    names = tuple(name for name in subject.tensors if name.endswith(tuple(f".{s}" for s in KV_SCALES)) and not READ.fullmatch(name))
    if names:
        yield Problem(f"{count(len(names), 'scale')} of a KV cache in modules that have none", names)


RULES = (
    Rule(
        "kv-scale-missing",
        "error",
        "Some full-attention layers have scales of the FP8 KV cache and others none, or a layer has one of its two. vLLM takes 1 for a "
        "missing pair, k_scale for a missing v_scale, and stops where k_scale alone is missing. The draft head may do without.",
        "quantize again with kv_cache: fp8, or with fp8_cast, which needs none",
        kv_scale_missing,
    ),
    Rule(
        "kv-scale-misplaced",
        "error",
        "A k_scale or v_scale in a module without a KV cache, as Gated DeltaNet layers are: vLLM stops with a ValueError.",
        "drop it: mtpress repair CKPT OUT",
        kv_scale_misplaced,
    ),
)
