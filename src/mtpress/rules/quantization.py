"""Rules on what is declared of the quantization: keys that the engine knows, files that agree, forms that match it."""

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from mtpress.plan import NVFP4_GROUP_SIZE
from mtpress.rules import stored
from mtpress.rules.declaration import MODELOPT_ALGOS, Declaration
from mtpress.rules.rule import Problem, Rule, count
from mtpress.rules.subject import HF_QUANT_CONFIG, Subject

# Names that vLLM 0.32 knows, and those its own configs take over (auto-round → inc).
METHODS = (
    "awq", "auto_awq", "fp8", "fbgemm_fp8", "fp_quant", "modelopt", "modelopt_fp4", "modelopt_mxfp8", "modelopt_mixed", "auto_gptq",
    "gptq", "gptq_marlin", "awq_marlin", "humming", "compressed-tensors", "experts_int8", "quark", "moe_wna16", "torchao", "inc",
    "mxfp4", "mxfp8", "auto-round",
)  # fmt: skip


def quant_method(subject: Subject) -> Iterator[Problem]:
    declared = subject.declared
    if declared is None or declared.method in METHODS:
        return
    said = f"is {declared.method[:60]!r}, which vLLM does not know" if declared.method else "is missing"
    yield Problem(f"{declared.file}: quant_method {said}; for NVFP4 in modelopt's layout it is 'modelopt'", (declared.file,))


def quant_algo(subject: Subject) -> Iterator[Problem]:
    declared = subject.declared
    if declared is not None and declared.method.startswith("modelopt") and declared.algo not in MODELOPT_ALGOS:
        said = f"is {declared.algo[:60]!r}" if declared.algo else "is missing"
        yield Problem(f"{declared.file}: quant_algo {said}, vLLM knows {', '.join(MODELOPT_ALGOS)}", (declared.file,))


def group_size(subject: Subject) -> Iterator[Problem]:
    declared = subject.declared
    if declared is not None and declared.format == "nvfp4":
        wrong = sorted(str(size) for size in declared.group_sizes - {NVFP4_GROUP_SIZE})
        if wrong:
            yield Problem(f"{declared.file}: group_size is {', '.join(wrong)}, NVFP4 has blocks of {NVFP4_GROUP_SIZE}", (declared.file,))


def kv_cache_scheme(subject: Subject) -> Iterator[Problem]:
    declared = subject.declared
    if declared is not None and declared.method.startswith("modelopt") and declared.kv_cache == "?":
        yield Problem(f"{declared.file}: the scheme of the KV cache is none that vLLM knows, so it takes none", (declared.file,))


def quantization_undeclared(subject: Subject) -> Iterator[Problem]:
    if not subject.quantized:
        return
    titles = ", ".join(sorted({stored.TITLES[subject.form(module)] for module in subject.quantized}))
    holds = f"{count(len(subject.quantized), 'module')} stored as {titles}"
    if subject.declared is None:
        yield Problem(f"{holds}, but no config says so in a form that the engine takes", subject.quantized)


def quantization_not_stored(subject: Subject) -> Iterator[Problem]:
    declared = subject.declared
    if declared is not None and not subject.quantized:
        yield Problem(f"{declared.file} declares {declared.title}, but no module is stored quantized", (declared.file,))


def format_differs(subject: Subject) -> Iterator[Problem]:
    if subject.declared is None or not subject.covered:
        return
    other = sorted((m for m in subject.quantized if subject.form(m) != "nvfp4"), key=subject.form)
    for form, modules in groupby(other, key=subject.form):
        names = tuple(modules)
        yield Problem(f"{count(len(names), 'module')} stored as {stored.TITLES[form]}, declared is {subject.declared.title}", names)


def format_not_covered(subject: Subject) -> Iterator[Problem]:
    declared = subject.declared
    if declared is not None and not subject.covered and declared.format != "unknown":
        forms = ", ".join(sorted({stored.TITLES[subject.form(module)] for module in subject.quantized})) or "nothing quantized"
        yield Problem(f"declared: {declared.title}; stored: {forms}. Its scales and its ignore list are not checked", (declared.file,))


def _differences(subject: Subject, one: Declaration, other: Declaration) -> Iterator[tuple[str, Any, Any]]:
    yield "quant_algo", one.algo, other.algo
    yield "the KV cache", one.kv_cache, other.kv_cache
    sizes = [sorted(map(str, d.group_sizes or {NVFP4_GROUP_SIZE})) for d in (one, other)]
    yield "group_size", ", ".join(sizes[0]), ", ".join(sizes[1])


def configs_contradict(subject: Subject) -> Iterator[Problem]:
    one, other = subject.declared, subject.hf_declared
    if one is None or other is None or one.file == HF_QUANT_CONFIG or not subject.covered:
        return
    for what, here, there in _differences(subject, one, other):
        if here != there:
            yield Problem(f"{what}: config.json says {here or 'nothing'}, {HF_QUANT_CONFIG} says {there or 'nothing'}", (HF_QUANT_CONFIG,))
    theirs = subject.verdicts_of(other)
    modules = {module for linear, verdict in subject.verdicts.items() if verdict != theirs[linear] for module in linear.modules}
    if modules:
        message = f"the ignore lists of config.json and {HF_QUANT_CONFIG} disagree on {count(len(modules), 'module')}"
        yield Problem(message, tuple(sorted(modules)))


def hf_quant_config_missing(subject: Subject) -> Iterator[Problem]:
    declared = subject.declared
    if declared is not None and declared.format == "nvfp4" and not subject.has(HF_QUANT_CONFIG):
        yield Problem(f"no {HF_QUANT_CONFIG}; vLLM reads config.json, some engines read only that file", (HF_QUANT_CONFIG,))


REPAIR = "mtpress repair CKPT OUT writes both config files anew from what is stored"
RULES = (
    Rule("quant-method", "error", "`quant_method` is missing or none that vLLM knows: it refuses the checkpoint.", REPAIR, quant_method),
    Rule("quant-algo", "error", "A modelopt config whose `quant_algo` is missing or unknown: ValueError.", REPAIR, quant_algo),
    Rule("group-size", "error", "NVFP4 with a group_size other than 16: the scales do not fit their parameters.", REPAIR, group_size),
    Rule(
        "kv-cache-scheme",
        "warning",
        "The scheme of the KV cache is malformed or unknown; vLLM warns and leaves the cache in 16 bits.",
        'make it {"dynamic": false, "num_bits": 8, "type": "float"} or leave it out; mtpress repair CKPT OUT does',
        kv_cache_scheme,
    ),
    Rule(
        "quantization-undeclared",
        "error",
        "Quantized tensors that no config declares: the engine loads packed bytes as if they were BF16, or refuses.",
        REPAIR,
        quantization_undeclared,
    ),
    Rule(
        "quantization-not-stored",
        "error",
        "A quantization is declared, every weight is BF16: the engine finds none of the scales it waits for.",
        "remove quantization_config and hf_quant_config.json, or quantize: mtpress quantize",
        quantization_not_stored,
    ),
    Rule(
        "format-differs",
        "error",
        "Modules are stored in another format than the one declared.",
        "mtpress convert CKPT OUT --to modelopt, or quantize again",
        format_differs,
    ),
    Rule(
        "format-not-covered",
        "note",
        "The checkpoint is in a format whose scales and ignore rules mtpress does not check yet; files, draft head and tokenizer are.",
        "try it in the engine, with the check for missing weights on",
        format_not_covered,
    ),
    Rule(
        "configs-contradict",
        "error",
        "config.json and hf_quant_config.json say different things. vLLM goes by config.json, other engines by the other file.",
        REPAIR,
        configs_contradict,
    ),
    Rule(
        "hf-quant-config-missing",
        "note",
        "There is no hf_quant_config.json, which modelopt writes beside an NVFP4 checkpoint.",
        REPAIR,
        hf_quant_config_missing,
    ),
)
