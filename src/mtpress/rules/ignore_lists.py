"""Rules on the ignore list: it leaves unquantized exactly what is stored in BF16, by the engine's own matching.

The list is what says so in each format: ignore and exclude_modules of modelopt, ignore and targets of compressed-tensors, extra_config
and block_name_to_quantize of AutoRound, modules_in_block_to_quantize and dynamic of GPTQ.
"""

from collections.abc import Iterator

from mtpress.models.qwen3_5 import engine as qwen3_5_engine
from mtpress.models.qwen3_5.engine import EngineLinear
from mtpress.quant_config import stored
from mtpress.quant_config.declaration import Declaration
from mtpress.quant_config.matching.expressions import MAX_SECONDS, is_endless
from mtpress.quant_config.matching.names import rename
from mtpress.quant_config.view import HF_QUANT_CONFIG, Subject
from mtpress.rules.rule import Problem, Rule
from mtpress.terminal import count

REPAIR = "mtpress repair CKPT OUT writes the list anew, module by module, from what is stored"


def stored_forms(subject: Subject, linear: EngineLinear) -> set[str]:
    """The forms in which the shards of a linear are stored; empty where none is."""
    return {form for form in map(subject.form, linear.modules) if form != "none"}


def declarations(subject: Subject) -> Iterator[Declaration]:
    """The config that the engine reads and, beside it, hf_quant_config.json."""
    if subject.declared is not None and subject.covered:
        yield subject.declared
        other = subject.hf_declared
        if other is not None and subject.declared.file != HF_QUANT_CONFIG and other.format == subject.declared.format:
            yield other


def ignore_malformed(subject: Subject) -> Iterator[Problem]:
    if subject.declared is not None and (held := subject.matcher(subject.declared)) is not None:
        for odd in held.malformed:
            yield Problem(f"{subject.declared.file}: {odd}", (subject.declared.file,))
        for linear in subject.linears:  # each expression is held against each name, whatever is covered
            held.verdict(linear)
        for text in filter(is_endless, held.expressions):
            said = f"the regular expression {text[:80]!r} takes over {MAX_SECONDS:.0f} s, as in vLLM, which would not start"
            yield Problem(f"{subject.declared.file}: {said}", (subject.declared.file,))
    for declared in declarations(subject):
        if declared.format not in ("nvfp4", "modelopt-fp8", "modelopt-mixed"):
            continue
        entries = declared.inner.get(declared.ignore_key, [])
        if not isinstance(entries, list) or len(entries) != len(declared.ignore):
            yield Problem(f"{declared.file}: {declared.ignore_key} must be a list of strings", (declared.file,))


def ignore_called_otherwise(subject: Subject) -> Iterator[Problem]:
    declared = subject.declared
    if declared is None or declared.legacy or declared.format not in ("nvfp4", "modelopt-fp8", "modelopt-mixed"):
        return
    if declared.ignore_key not in declared.inner and isinstance(declared.inner.get("exclude_modules"), list):
        said = "calls its list exclude_modules: vLLM reads that there since 0.33, and before it takes every linear as quantized"
        yield Problem(f"{declared.file} {said}", (declared.file,))


def ignore_splits_fused(subject: Subject) -> Iterator[Problem]:
    split = [linear for linear, verdict in subject.verdicts.items() if verdict == "split"]
    if split:
        names = tuple(module for linear in split for module in linear.modules)
        yield Problem(
            f"the list names some, not all, shards of {count(len(split), 'fused linear')}, or says different things of them", names
        )


def _plain_but_quantized(subject: Subject, part: str) -> tuple[str, ...]:
    return tuple(
        module
        for linear, verdict in subject.verdicts.items()
        if linear.part == part and verdict == "quantized" and stored_forms(subject, linear) == {"plain"}
        for module in linear.modules
        if subject.form(module) == "plain"
    )


def ignore_too_little(subject: Subject) -> Iterator[Problem]:
    if not subject.quantized:
        return  # quantization-not-stored says it
    names = _plain_but_quantized(subject, "body") + _plain_but_quantized(subject, "lm_head")
    if names:
        yield Problem(f"{count(len(names), 'module')} in BF16 that the engine takes as quantized", names)


def vision_not_ignored(subject: Subject) -> Iterator[Problem]:
    names = _plain_but_quantized(subject, "vision")
    if names:
        yield Problem(f"{count(len(names), 'module')} of the vision tower in BF16 that the engine takes as quantized", names)


def ignore_too_much(subject: Subject) -> Iterator[Problem]:
    quantized = set(subject.quantized)
    names = tuple(
        module
        for linear, verdict in subject.verdicts.items()
        if linear.part != "draft" and verdict == "ignored"
        for module in linear.modules
        if module in quantized
    )
    if names:
        forms = ", ".join(sorted({stored.TITLES[subject.form(module)] for module in names}))
        yield Problem(f"{count(len(names), 'module')} in {forms} that the engine takes as BF16{_bare_lm_head(subject, names)}", names)


def _bare_lm_head(subject: Subject, names: tuple[str, ...]) -> str:
    """What is wrong with a target that people write, and that transformers matches."""
    declared = subject.declared
    if "lm_head" not in names or declared is None or declared.format != "compressed-tensors":
        return ""
    targets = [target for group in declared.groups if isinstance(said := group.get("targets"), list) for target in said]
    return "; the target 'lm_head' is not vLLM's name of it, 're:.*lm_head$' matches" if "lm_head" in targets else ""


def ignore_matches_nothing(subject: Subject) -> Iterator[Problem]:
    if not subject.linears or (subject.is_vl and subject.prefix != "model.language_model."):
        return  # config-incomplete or body-prefix says it
    others = _names_of_other_modules(subject)
    for declared in declarations(subject):
        held = subject.matcher(declared)
        idle = tuple(held.idle(subject.linears, others)) if held is not None else ()
        if idle:
            number = "1 entry matches" if len(idle) == 1 else f"{len(idle)} entries match"
            yield Problem(f"{declared.file}: {number} nothing in the engine", idle)


def _names_of_other_modules(subject: Subject) -> set[str]:
    """Engine names of the modules that no list decides about: norms, conv1d, embeddings. To name them does no harm."""
    decided = {module for linear in subject.linears for module in linear.modules}
    names = {*subject.called_for, *subject.tensors}
    if subject.is_vl and not subject.stored_vision:
        names |= {*subject.model.vision_shapes(subject.config)}
    modules = {subject.model.module_of(name) for name in names} - decided
    return {rename(module, qwen3_5_engine.RENAMES[subject.architecture]) for module in modules}


RULES = (
    Rule(
        "ignore-malformed",
        "error",
        "The ignore list is no list of names, or what stands for it in the format is not what the engine reads there (GPTQ's `dynamic` "
        "as null is one, an entry of `quantized_layers` without quant_algo another): ValueError, or a crash inside the engine; or "
        "a regular expression in it does not end, and neither does the start of the engine.",
        REPAIR,
        ignore_malformed,
    ),
    Rule(
        "ignore-called-otherwise",
        "warning",
        "The list of modelopt stands in config.json under its name in hf_quant_config.json, exclude_modules, and not as ignore: vLLM 0.33 "
        "reads it, 0.32 reads an empty list. What follows from that in 0.32 is judged beside it.",
        REPAIR,
        ignore_called_otherwise,
    ),
    Rule(
        "ignore-splits-fused",
        "error",
        "The list names one shard of a linear that the engine fuses (q/k/v, gate/up, in_proj_qkv/z, in_proj_b/a), and not the others, or "
        "gives two of them different formats: ValueError, whatever the format.",
        REPAIR,
        ignore_splits_fused,
    ),
    Rule(
        "ignore-too-little",
        "error",
        "BF16 modules of the body, or lm_head, that the list does not match: the engine waits for scales that never come.",
        REPAIR,
        ignore_too_little,
    ),
    Rule(
        "vision-not-ignored",
        "error",
        "A BF16 vision tower that the list does not match: the checkpoint serves only with --language-model-only. Of modelopt, "
        "`*model.visual*` and `model.visual` do not match it, `model.visual*` does; of compressed-tensors, `re:model.visual.*` does not, "
        "`re:.*visual.*` does; AutoRound without block_name_to_quantize takes it as quantized.",
        REPAIR,
        vision_not_ignored,
    ),
    Rule(
        "ignore-too-much",
        "error",
        "Quantized modules that the list matches, as `…layers.1*` matches layers 10 to 19, or that no target, no block name and no entry "
        "of `quantized_layers` matches: the engine builds them in BF16, nothing fits.",
        REPAIR,
        ignore_too_much,
    ),
    Rule(
        "ignore-matches-nothing",
        "warning",
        "Entries that have no effect: names under another prefix, globs where the format has none (compressed-tensors, GPTQ) or on one "
        "shard of a fused linear (modelopt), `re:` where it means nothing (modelopt, AutoRound).",
        REPAIR,
        ignore_matches_nothing,
    ),
)
