"""Rules on names, dtypes and shapes: what config.json calls for is there in some form, and nothing more."""

from collections import defaultdict
from collections.abc import Iterator

from mtpress.quant_config import stored
from mtpress.quant_config.matching import Scheme
from mtpress.quant_config.stored import (
    GLOBAL_SCALE,
    INPUT_GLOBAL_SCALE,
    INPUT_SCALE,
    KV_SCALES,
    NVFP4_GROUP_SIZE,
    PLAIN_DTYPES,
    QWEIGHT,
    QZEROS,
    SCALARS,
    SCALE,
    SCALE_2,
    SCALE_INV,
    SCALE_SUFFIXES,
    SCALES,
    SUFFIXES,
    WEIGHT,
    WEIGHT_PACKED,
    WEIGHT_SHAPE,
    ZERO_POINT,
    Form,
)
from mtpress.quant_config.view import Subject
from mtpress.rules.config import ADAPTER
from mtpress.rules.rule import Problem, Rule
from mtpress.terminal import count

# vLLM 0.32 passes over these (AutoWeightsLoader, QuantizationConfig._ignore_unexpected_suffixes).
PASSED_OVER = (".bias", ".g_idx", ".q_scale", ".k_scale", ".v_scale", ".q_zero_point", ".k_zero_point", ".v_zero_point")
ROTARY = ("rotary_pos_emb.inv_freq", "rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
SCALE_DTYPES = {SCALE: "F8_E4M3", SCALE_2: "F32", INPUT_SCALE: "F32"}  # of modelopt NVFP4
INTEGERS, HALVES = ("I32",), ("F16", "BF16", "F32")
# What each form holds its parts as; the first is what to write.
DTYPES: dict[Form, dict[str, tuple[str, ...]]] = {
    "nvfp4": {suffix: (dtype,) for suffix, dtype in SCALE_DTYPES.items()},
    "nvfp4-pack-quantized": {SCALE: ("F8_E4M3",), GLOBAL_SCALE: ("F32",), INPUT_GLOBAL_SCALE: ("F32",)},
    "pack-quantized": {WEIGHT_PACKED: INTEGERS, SCALE: HALVES, ZERO_POINT: INTEGERS, WEIGHT_SHAPE: ("I64", "I32")},
    "fp8": {WEIGHT: ("F8_E4M3",), SCALE: ("F32",), SCALE_INV: ("F32",), INPUT_SCALE: ("F32",)},
    "gptq": {QWEIGHT: INTEGERS, QZEROS: INTEGERS, SCALES: HALVES, "g_idx": INTEGERS},
}
FP8_SCALES = (SCALE, SCALE_INV, INPUT_SCALE)  # which compressed-tensors and quant_method fp8 hold as BF16 too; vLLM casts them, exactly
ROWS_MULTIPLE = 32  # of the CPU kernel; Marlin pads
WORD_BITS = 32


def tensor_missing(subject: Subject) -> Iterator[Problem]:
    if subject.prefix is None:
        return
    missing = []
    for name in subject.called_for:
        module, _, suffix = name.rpartition(".")
        elsewhere = (
            name in subject.loaded_beside
            or name in subject.names.contested
            or (suffix == WEIGHT and subject.form(module) not in ("plain", "none"))
        )
        if name not in subject.tensors and not elsewhere and not name.startswith(subject.model.MTP_PREFIX):
            missing.append(name)
    if missing:
        yield Problem(f"missing in every form: {count(len(missing), 'tensor')} that config.json calls for", tuple(missing))


def unexpected(subject: Subject, *, all_of_them: bool = False) -> list[str]:
    """Stored tensors that config.json does not call for.

    all_of_them: biases of unknown modules too, which engines pass over, and what claims a name with others, which rules/names.py says.
    """
    modules = {subject.model.module_of(name) for name in subject.called_for}
    extra = []
    for name in (*subject.tensors, *sorted(subject.loaded_beside)) if modules else ():
        module, _, suffix = name.rpartition(".")
        if name in subject.called_for or name == "lm_head.weight":
            continue
        if name.endswith((*PASSED_OVER, *ROTARY)) and not (all_of_them and suffix == "bias" and module not in modules):
            continue
        if module in modules and (suffix in SUFFIXES.get(subject.form(module), ()) or suffix in SCALE_SUFFIXES):
            continue  # of its format; scale-orphan says where it is not
        if (name in subject.names.rivals and not all_of_them) or (name in subject.stored_vision and not subject.is_vl):
            continue  # rules/names.py and vision-in-text-model say it
        extra.append(name)
    return extra


def tensor_unexpected(subject: Subject) -> Iterator[Problem]:
    if subject.prefix is None:
        return
    if extra := unexpected(subject):
        adapter = next(filter(ADAPTER.search, extra), None)
        remedy = f"{adapter} is of an adapter: merge it into the model" if adapter is not None else ""
        yield Problem(f"{count(len(extra), 'tensor')} that config.json does not call for", tuple(extra), remedy)


def weight_dtype(subject: Subject) -> Iterator[Problem]:
    decided = {module for linear in subject.linears for module in linear.modules}
    wrong: dict[str, list[str]] = defaultdict(list)
    for name, info in subject.tensors.items():
        module, _, suffix = name.rpartition(".")
        form = subject.form(module)
        form = form if form != "fp8" or subject.covered else "none"
        known = DTYPES.get(form, {}).get(suffix, (info.dtype,))
        if form == "fp8" and suffix in FP8_SCALES and _holds_halves(subject):
            known = HALVES
        if name in subject.called_for and module not in decided and info.dtype not in PLAIN_DTYPES:
            wrong[f"{info.dtype}, must be BF16: no engine reads it quantized"].append(name)
        elif module in decided and form == "unknown" and suffix == WEIGHT:
            wrong[f"{info.dtype}, which is neither BF16 nor any known format"].append(name)
        elif info.dtype not in known:
            wrong[f"{info.dtype}, {stored.TITLES[form]} holds its {suffix} as {DTYPES[form][suffix][0]}"].append(name)
        elif suffix in KV_SCALES and info.dtype != "F32":
            wrong[f"{info.dtype}, scales of the KV cache are F32"].append(name)
    for why, names in wrong.items():
        yield Problem(f"{count(len(names), 'tensor')} of dtype {why}", tuple(names))


def _holds_halves(subject: Subject) -> bool:
    """Whether FP8 scales may stand in BF16: everywhere but in modelopt's layout."""
    return subject.declared is None or not subject.declared.method.startswith("modelopt")


def weight_precision(subject: Subject) -> Iterator[Problem]:
    matrices = {name: info for name, info in subject.tensors.items() if name in subject.called_for and len(info.shape) > 1}
    wide = {name: info.dtype for name, info in matrices.items() if info.dtype in PLAIN_DTYPES and info.dtype != "BF16"}
    if wide:
        dtypes = ", ".join(sorted(set(wide.values())))
        yield Problem(f"{count(len(wide), 'tensor')} of two dimensions or more stored as {dtypes}, not BF16", tuple(wide))


def _stored_shapes(subject: Subject, module: str, n: int, k: int) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Suffix → the shapes that a part of a quantized [N, K] may have; the first is what to write."""
    form = subject.form(module)
    if form == "fp8":
        return {WEIGHT: ((n, k),)} | (fp8_scale_shapes(subject, module, n, k) if subject.covered else {})
    if form in SCALARS:
        codes = WEIGHT if form == "nvfp4" else WEIGHT_PACKED
        return {codes: ((n, k // 2),), SCALE: ((n, k // NVFP4_GROUP_SIZE),)} | dict.fromkeys(SCALARS[form], ((), (1,)))
    scheme = subject.schemes.get(module, Scheme("int", 4, -1))
    group = subject.stored_group_size(module) or subject.whole_group(module, scheme.group_size)  # a wrong one is for group-size to say
    if scheme.kind != "int" or not scheme.bits or group < 1:
        return {}
    bits, groups = scheme.bits, -(-k // group)

    def words(size: int) -> int:
        return -(-size * bits // WORD_BITS)

    if form == "pack-quantized":
        return {WEIGHT_PACKED: ((n, words(k)),), SCALE: ((n, groups),), ZERO_POINT: ((words(n), groups),), WEIGHT_SHAPE: ((2,),)}
    if form == "gptq":
        return {QWEIGHT: ((words(k), n),), QZEROS: ((groups, words(n)),), SCALES: ((groups, n),), "g_idx": ((k,),)}
    return {}


def fp8_scale_shapes(subject: Subject, module: str, n: int, k: int) -> dict[str, tuple[tuple[int, ...], ...]]:
    """The same of the scales of FP8, as the layout that is declared holds them."""
    scheme = subject.schemes.get(module)
    if scheme is None or scheme.kind != "fp8" or subject.other_fp8(module):
        return {INPUT_SCALE: ((), (1,))}
    modelopt = not _holds_halves(subject)
    rows, columns = -(-n // scheme.block[0]), -(-k // scheme.block[1])
    shapes: dict[str, tuple[tuple[int, ...], ...]] = {
        "tensor": ((), (1,)),
        "channel": ((n,),) if modelopt else ((n, 1),),
        "block": ((rows, 1, columns, 1),) if modelopt else ((rows, columns),),
    }
    return {scheme.scale_name: shapes[scheme.scale_of], INPUT_SCALE: ((), (1,))}


def weight_shape(subject: Subject) -> Iterator[Problem]:
    wrong: dict[str, str] = {}
    for name, shape in subject.called_for.items():
        module, _, suffix = name.rpartition(".")
        expected: dict[str, tuple[tuple[int, ...], ...]] = {name: (shape,)}
        if suffix == WEIGHT and subject.form(module) not in ("plain", "none", "unknown") and len(shape) == 2:
            parts = _stored_shapes(subject, module, *shape)
            expected = {f"{module}.{part}": shapes for part, shapes in parts.items()}
            if subject.packed_shapes.get(module, shape) != shape:
                wrong[f"{module}.{WEIGHT_SHAPE}"] = f"says {list(subject.packed_shapes[module])}, must say {list(shape)}"
        for tensor, shapes in expected.items():
            info = subject.tensors.get(tensor)
            if info is not None and info.shape not in shapes:
                wrong[tensor] = f"is {list(info.shape)}, must be {list(shapes[0])}"
    if wrong:
        first = next(iter(wrong.values()))
        yield Problem(f"{count(len(wrong), 'tensor')} of another shape than config.json calls for; the first {first}", tuple(wrong))


def k_not_divisible(subject: Subject) -> Iterator[Problem]:
    for module in subject.quantized:
        shape = subject.called_for.get(f"{module}.{WEIGHT}", ())
        form, scheme = subject.form(module), subject.schemes.get(module)
        size = NVFP4_GROUP_SIZE if form in SCALARS else scheme.group_size if scheme is not None and scheme.kind == "int" else 0
        if scheme is not None and scheme.kind == form == "fp8" and scheme.scale_of == "block":
            size = scheme.block[1]
        if size > 0 and len(shape) == 2 and shape[1] % size:
            yield Problem(f"{module} has K = {shape[1]}, which {size} does not divide; vLLM refuses it", (module,))


def blocks_across_shards(subject: Subject) -> Iterator[Problem]:
    for linear in subject.linears:
        scheme = subject.schemes.get(linear.modules[0]) if len(linear.modules) > 1 else None
        if scheme is None or scheme.kind != "fp8" or scheme.scale_of != "block":
            continue
        for module in linear.modules[:-1]:
            shape = subject.called_for.get(f"{module}.{WEIGHT}", ())
            if subject.form(module) == "fp8" and len(shape) == 2 and shape[0] % scheme.block[0]:
                yield Problem(
                    f"{module} has {shape[0]} rows, which {scheme.block[0]} does not divide, and {linear.prefix} goes on behind them",
                    linear.modules,
                )
                break


def n_not_divisible(subject: Subject) -> Iterator[Problem]:
    for linear in subject.linears:
        if len(linear.modules) and all(subject.form(module) in ("gptq", "pack-quantized") for module in linear.modules):
            rows = [shape[0] if len(shape := subject.called_for.get(f"{m}.{WEIGHT}", ())) == 2 else 0 for m in linear.modules]
            if sum(rows) % ROWS_MULTIPLE and linear.part != "lm_head":
                yield Problem(f"{linear.prefix} has {sum(rows)} rows, which {ROWS_MULTIPLE} does not divide", linear.modules)


def _zeros_by_convention(subject: Subject) -> dict[str, int | None]:
    """Symmetric qzeros → the zero point stored, 7 or 8 of 4 bits (127 or 128 of 8); None where it is neither, or not one."""
    found: dict[str, int | None] = {}
    for name, word in subject.zero_words.items():
        scheme = subject.schemes.get(name.rpartition(".")[0])
        if scheme is not None and scheme.kind == "int" and scheme.symmetric and scheme.bits in (4, 8):
            values = {word >> place & (1 << scheme.bits) - 1 for place in range(0, WORD_BITS, scheme.bits)}
            middle = 1 << scheme.bits - 1
            found[name] = next(iter(values)) - middle if len(values) == 1 and values <= {middle - 1, middle} else None
    return found


def zeros_asymmetric(subject: Subject) -> Iterator[Problem]:
    names = tuple(name for name, offset in _zeros_by_convention(subject).items() if offset is None)
    if names:
        yield Problem(f"{count(len(names), 'tensor')} of zero points that are not the middle of the range, declared is sym", names)


def zeros_convention(subject: Subject) -> Iterator[Problem]:
    declared = subject.declared
    if declared is None:
        return
    as_is = declared.content.get("packing_format") == "auto_round" or declared.content.get("checkpoint_format") == "gptq_v2"
    expected = 0 if as_is else -1
    names = tuple(name for name, offset in _zeros_by_convention(subject).items() if offset is not None and offset != expected)
    if names:
        said, other = ("as it is", "less one") if as_is else ("less one", "as it is")
        yield Problem(f"{count(len(names), 'tensor')} hold the zero point {other}, the declared layout holds it {said}", names)


RULES = (
    Rule(
        "tensor-missing",
        "error",
        "A tensor that config.json calls for is in the checkpoint in no form. With a quantized model vLLM does not notice: it serves "
        "with what happened to be in memory.",
        "restore it: mtpress repair CKPT OUT --base SRC, or quantize again",
        tensor_missing,
    ),
    Rule(
        "tensor-unexpected",
        "error",
        "A tensor has no place in the model: vLLM stops with a ValueError.",
        "where it is a weight, give it the name that the model has for it, or merge it: mtpress repair CKPT OUT says what it may be, and "
        "drops what is no weight",
        tensor_unexpected,
    ),
    Rule(
        "weight-dtype",
        "error",
        "A tensor is not in its dtype: embeddings, conv1d and norms are BF16, NVFP4 scales F8_E4M3 and F32, FP8 scales F32 (outside "
        "modelopt's layout BF16 too), INT4 codes I32. vLLM casts what it finds, and says nothing: integers become weights, codes of "
        "embeddings become numbers without their scale.",
        "mtpress repair CKPT OUT dequantizes embeddings; else restore it: mtpress repair CKPT OUT --base SRC, or quantize again",
        weight_dtype,
    ),
    Rule(
        "weight-precision",
        "warning",
        "Matrices are stored as F16 or F32: they take more room, and are cast to BF16 when loaded.",
        "mtpress repair CKPT OUT --base SRC",
        weight_precision,
    ),
    Rule(
        "weight-shape",
        "error",
        "A tensor has another shape than config.json calls for, so it is of another model, or torn in the making.",
        "restore config.json or the tensor: mtpress repair CKPT OUT --base SRC",
        weight_shape,
    ),
    Rule(
        "k-not-divisible",
        "error",
        "A quantized linear whose input size is no multiple of the format's block: 16 of NVFP4, group_size of INT4, 128 of FP8 in blocks.",
        "keep it in BF16: leave it out of `quantize` in the recipe",
        k_not_divisible,
    ),
    Rule(
        "blocks-across-shards",
        "error",
        "FP8 in blocks: a shard of a fused linear, not the last, has rows that are no multiple of the block (in_proj_a and in_proj_b are "
        "so), so that a block would lie across two shards: ValueError.",
        "mtpress repair CKPT OUT dequantizes them; else keep them in BF16",
        blocks_across_shards,
    ),
    Rule(
        "n-not-divisible",
        "warning",
        "An INT4 linear whose rows, fused, are no multiple of 32: vLLM's CPU kernel refuses it, on a GPU it is padded at every step.",
        "keep it in BF16: leave it out of `quantize` in the recipe",
        n_not_divisible,
    ),
    Rule(
        "zeros-asymmetric",
        "error",
        "INT4 is declared symmetric and zero points are stored that are not: vLLM does not read them and takes the middle of the range, so "
        "every weight is off.",
        "where they are few, mtpress repair CKPT OUT --base SRC puts them in BF16; else quantize again: mtpress quantize SRC OUT "
        "--recipe int4-autoround-mtp",
        zeros_asymmetric,
    ),
    Rule(
        "zeros-convention",
        "warning",
        "Symmetric zero points are stored by the other convention than the layout's: GPTQ and auto_round:auto_gptq store 7 for 8, "
        "gptq_v2 and auto_round 8. vLLM does not read them; transformers shifts every weight by one step.",
        "mtpress repair CKPT OUT",
        zeros_convention,
    ),
)
