"""Rules on what is declared of the quantization: keys that the engine knows, files that agree, forms that match it."""

from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any

from mtpress.quant_config import stored
from mtpress.quant_config.declaration import MODELOPT_ALGOS, Declaration
from mtpress.quant_config.stored import NVFP4_GROUP_SIZE, Form
from mtpress.quant_config.view import HF_QUANT_CONFIG, QUANTIZATION_CONFIG, Subject
from mtpress.rules.rule import Problem, Rule
from mtpress.terminal import count

# Names that vLLM 0.32 knows, and those its own configs take over (auto-round → inc).
METHODS = (
    "awq", "auto_awq", "fp8", "fbgemm_fp8", "fp_quant", "modelopt", "modelopt_fp4", "modelopt_mxfp8", "modelopt_mixed", "auto_gptq",
    "gptq", "gptq_marlin", "awq_marlin", "humming", "compressed-tensors", "experts_int8", "quark", "moe_wna16", "torchao", "inc",
    "mxfp4", "mxfp8", "auto-round",
)  # fmt: skip
# What vLLM 0.32 takes of AutoRound (INCConfig.SUPPORTED_*), of these bits and group sizes the layouts that Marlin has kernels for.
PACKING_FORMATS = ("auto_round:auto_gptq", "auto_round:auto_awq", "auto_round:fp8", "auto_round:llm_compressor")
BACKENDS = ("auto", "gptq", "gptq:marlin", "awq", "awq:marlin", "marlin")
GPTQ_BITS, GPTQ_GROUP_SIZES = (4, 8), (-1, 32, 64, 128)
SCALED_BY = {"tensor": "tensor", "channel": "row", "block": "block"}
KINDS: dict[Form, str] = {"nvfp4": "nvfp4", "fp8": "fp8", "nvfp4-pack-quantized": "nvfp4", "pack-quantized": "int"}


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
    if declared is not None and declared.format in ("nvfp4", "modelopt-mixed"):
        wrong = sorted(str(size) for size in declared.group_sizes - {NVFP4_GROUP_SIZE})
        if wrong:
            yield Problem(f"{declared.file}: group_size is {', '.join(wrong)}, NVFP4 has blocks of {NVFP4_GROUP_SIZE}", (declared.file,))
        return
    found: dict[tuple[int, int], list[str]] = {}
    for module, scheme in subject.schemes.items():
        size = subject.stored_group_size(module) if scheme.kind == "int" else None
        if size is not None and size != subject.whole_group(module, scheme.group_size):
            found.setdefault((scheme.group_size, size), []).append(module)
    for (said, size), modules in found.items():
        yield Problem(f"group_size is {said}, {count(len(modules), 'module')} have scales for groups of {size}", tuple(modules))


def packing_format(subject: Subject) -> Iterator[Problem]:
    declared = subject.declared
    if declared is None or declared.format != "auto-round":
        return
    packing, backend = declared.content.get("packing_format"), declared.content.get("backend", declared.content.get("vllm_backend", "auto"))
    if packing is not None and packing not in PACKING_FORMATS:
        yield Problem(
            f"{declared.file}: packing_format is {str(packing)[:60]!r}, vLLM knows {', '.join(PACKING_FORMATS)}", (declared.file,)
        )
    elif packing in PACKING_FORMATS[2:] and "gptq" in declared.layouts:
        yield Problem(f"{declared.file}: packing_format is {packing!r}, which is none for integers", (declared.file,))
    if backend not in BACKENDS:
        yield Problem(f"{declared.file}: backend is {str(backend)[:60]!r}, vLLM knows {', '.join(BACKENDS)}", (declared.file,))


def no_kernel(subject: Subject) -> Iterator[Problem]:
    declared = subject.declared
    if declared is None or not subject.covered:
        return
    if declared.format == "compressed-tensors":
        yield from _activation_ordering(declared)
    elif declared.layouts == ("gptq",):
        schemes = {(s.bits, s.group_size, s.symmetric) for s in subject.schemes.values() if s.kind == "int"}
        for bits, size, symmetric in sorted(schemes):
            odd = [f"bits {bits}"] if bits not in GPTQ_BITS else []
            odd += [f"group_size {size}"] if size not in GPTQ_GROUP_SIZES else []
            odd += [] if symmetric else ["asymmetric codes"]
            if odd:
                yield Problem(f"{declared.file}: {declared.title} with {', '.join(odd)}", (declared.file,))
        if declared.content.get("desc_act") and declared.content.get("group_size") != -1:
            yield Problem(f"{declared.file}: desc_act, the order of activations, with groups", (declared.file,))


def _activation_ordering(declared: Declaration) -> Iterator[Problem]:
    weights = [group.get("weights") for group in declared.groups]
    orders = {str(w["actorder"]) for w in weights if isinstance(w, Mapping) and w.get("actorder") in ("group", "dynamic")}
    if orders:
        yield Problem(f"{declared.file}: actorder {', '.join(sorted(orders))}", (declared.file,))


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
    declared = subject.declared
    if declared is None or not subject.covered:
        return

    def other(module: str) -> bool:
        form, scheme = subject.form(module), subject.schemes.get(module)
        if subject.model.component(f"{module}.weight") == "embeddings":
            return False  # weight-dtype says it: no declaration makes them loadable
        return form not in declared.layouts or (scheme is not None and form in KINDS and scheme.kind != KINDS[form])

    for form, modules in groupby(sorted(filter(other, subject.quantized), key=subject.form), key=subject.form):
        names = tuple(modules)
        yield Problem(f"{count(len(names), 'module')} stored as {stored.TITLES[form]}, declared is {declared.title}", names)
    if odd := tuple(filter(subject.other_fp8, subject.quantized)):
        stored_as = " and ".join(sorted({SCALED_BY[subject.fp8_schemes[module].scale_of] for module in odd}))
        yield Problem(f"{count(len(odd), 'module')} stored as FP8 with a scale for each {stored_as}, declared is {declared.title}", odd)


def format_not_covered(subject: Subject) -> Iterator[Problem]:
    declared = subject.declared
    if declared is not None and not subject.covered and declared.format != "unknown":
        forms = ", ".join(sorted({stored.TITLES[subject.form(module)] for module in subject.quantized})) or "nothing quantized"
        yield Problem(f"declared: {declared.title}; stored: {forms}. Its scales and its ignore list are not checked", (declared.file,))


def _differences(subject: Subject, one: Declaration, other: Declaration) -> Iterator[tuple[str, Any, Any]]:
    yield "quant_algo", one.algo, other.algo
    if not _says_more(one, other):
        yield "the KV cache", one.kv_cache, other.kv_cache
    sizes = [sorted(map(str, d.group_sizes or {NVFP4_GROUP_SIZE})) for d in (one, other)]
    yield "group_size", ", ".join(sizes[0]), ", ".join(sizes[1])


def configs_contradict(subject: Subject) -> Iterator[Problem]:
    one, other = subject.declared, subject.hf_declared
    if one is None or other is None or one.file == HF_QUANT_CONFIG or not subject.covered:
        return
    if one.format != other.format:
        yield Problem(f"config.json declares {one.title}, {HF_QUANT_CONFIG} declares {other.title}", (HF_QUANT_CONFIG,))
        return
    for what, here, there in _differences(subject, one, other):
        if here != there:
            yield Problem(f"{what}: config.json says {here or 'nothing'}, {HF_QUANT_CONFIG} says {there or 'nothing'}", (HF_QUANT_CONFIG,))
    modules = _taken_differently(subject, other)
    if modules:
        lists = "lists of layers" if other.format == "modelopt-mixed" else "ignore lists"
        message = f"the {lists} of config.json and {HF_QUANT_CONFIG} disagree on {count(len(modules), 'module')}"
        yield Problem(message, modules)


def _says_more(one: Declaration, other: Declaration) -> bool:
    """Whether hf_quant_config.json declares a quantized KV cache, and config.json says nothing of it."""
    return one.kv_cache == "auto" and other.kv_cache in ("fp8", "nvfp4")


def kv_cache_in_one_file(subject: Subject) -> Iterator[Problem]:
    one, other = subject.declared, subject.hf_declared
    if one is None or other is None or one.file == HF_QUANT_CONFIG or one.format != other.format or not _says_more(one, other):
        return
    yield Problem(f"the KV cache: {HF_QUANT_CONFIG} says {other.kv_cache}, config.json says nothing", (HF_QUANT_CONFIG,))


def _taken_differently(subject: Subject, other: Declaration) -> tuple[str, ...]:
    """The modules that the engine takes otherwise by another declaration."""
    theirs = subject.verdicts_of(other)
    differ = {m for linear, verdict in subject.verdicts.items() if verdict != theirs.get(linear) for m in linear.modules}
    there = subject.matcher(other) if other.format == "modelopt-mixed" else None
    if there is not None and subject.held is not None:
        differ |= {m for linear in subject.linears if subject.held.scheme(linear) != there.scheme(linear) for m in linear.modules}
    return tuple(sorted(differ))


def configs_differ(subject: Subject) -> Iterator[Problem]:
    one, other = subject.declared, subject.beside
    if one is None or other is None or one.format != "auto-round" or not subject.covered:
        return
    if other.format != one.format:
        yield Problem(f"{QUANTIZATION_CONFIG} declares {other.title}, config.json declares {one.title}", (QUANTIZATION_CONFIG,))
        return
    defaults = {"bits": None, "group_size": None, "sym": True, "data_type": "int", "packing_format": PACKING_FORMATS[0]}
    for key, default in defaults.items():
        here, there = one.content.get(key, default), other.content.get(key, default)
        if here != there:
            yield Problem(f"{key}: config.json says {str(here)[:40]}, {QUANTIZATION_CONFIG} says {str(there)[:40]}", (QUANTIZATION_CONFIG,))
    modules = _taken_differently(subject, other)
    if modules:
        yield Problem(
            f"by {QUANTIZATION_CONFIG} the engine would take {count(len(modules), 'module')} otherwise than by config.json", modules
        )


def hf_quant_config_missing(subject: Subject) -> Iterator[Problem]:
    declared = subject.declared
    if declared is not None and declared.format in ("nvfp4", "modelopt-mixed") and subject.covered and not subject.has(HF_QUANT_CONFIG):
        yield Problem(f"no {HF_QUANT_CONFIG}; vLLM reads config.json, some engines read only that file", (HF_QUANT_CONFIG,))


REPAIR = "mtpress repair CKPT OUT writes both config files anew from what is stored"
RULES = (
    Rule("quant-method", "error", "`quant_method` is missing or none that vLLM knows: it refuses the checkpoint.", REPAIR, quant_method),
    Rule("quant-algo", "error", "A modelopt config whose `quant_algo` is missing or unknown: ValueError.", REPAIR, quant_algo),
    Rule(
        "group-size",
        "error",
        "The group_size is not that of the stored scales: NVFP4 has 16, INT4 what its scales show. The scales do not fit their parameters.",
        REPAIR,
        group_size,
    ),
    Rule(
        "packing-format",
        "error",
        "AutoRound's `packing_format` or `backend` is none that vLLM knows (auto-round's own `auto_round`, which it writes for "
        "asymmetric codes, is none): ValueError.",
        "if the codes are symmetric, mtpress repair CKPT OUT; else quantize again: mtpress quantize SRC OUT --recipe NAME",
        packing_format,
    ),
    Rule(
        "no-kernel",
        "error",
        "INT4 of a kind that vLLM 0.32 has no kernel for: asymmetric GPTQ or AutoRound, another group_size than 32, 64, 128 or the whole "
        "row, activations in an order of their own.",
        "mtpress repair CKPT OUT where only the declaration says so; else quantize again: mtpress quantize SRC OUT --recipe "
        "int4-autoround-mtp",
        no_kernel,
    ),
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
        "NVFP4: mtpress repair CKPT OUT declares what is stored, mtpress convert CKPT OUT --to modelopt stores what is declared; else "
        "quantize again",
        format_differs,
    ),
    Rule(
        "format-not-covered",
        "note",
        "The checkpoint is in a format whose scales and ignore rules mtpress does not know (AWQ, MXFP4, INT8); files, draft head and "
        "tokenizer are checked.",
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
        "kv-cache-in-one-file",
        "note",
        "hf_quant_config.json alone declares a quantized KV cache, as modelopt's own exports do. vLLM 0.32 reads the declaration of "
        "config.json and keeps the cache in 16 bits; engines that read the other file (SGLang) quantize it.",
        "nothing needs to be done; in vLLM, --kv-cache-dtype fp8 does what the file says",
        kv_cache_in_one_file,
    ),
    Rule(
        "configs-differ",
        "warning",
        "config.json and quantization_config.json, which AutoRound writes both, say different things. vLLM and transformers go by "
        "config.json as long as it declares anything.",
        REPAIR,
        configs_differ,
    ),
    Rule(
        "hf-quant-config-missing",
        "note",
        "There is no hf_quant_config.json, which modelopt writes beside its checkpoints.",
        REPAIR,
        hf_quant_config_missing,
    ),
)
