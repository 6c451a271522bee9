"""Rules on names, dtypes and shapes: what config.json calls for is there in some form, and nothing more."""

from collections import defaultdict
from collections.abc import Iterator

from mtpress.models.qwen3_5_engine import VL_ARCHITECTURE
from mtpress.plan import NVFP4_GROUP_SIZE
from mtpress.rules.rule import Problem, Rule, count
from mtpress.rules.stored import (
    INPUT_SCALE,
    KV_SCALES,
    PLAIN_DTYPES,
    SCALE,
    SCALE_2,
    SCALE_SUFFIXES,
    SUFFIXES,
    WEIGHT,
)
from mtpress.rules.subject import Subject

# vLLM 0.32 passes over these (AutoWeightsLoader, QuantizationConfig._ignore_unexpected_suffixes).
PASSED_OVER = (".bias", ".g_idx", ".q_scale", ".k_scale", ".v_scale", ".q_zero_point", ".k_zero_point", ".v_zero_point")
ROTARY = ("rotary_pos_emb.inv_freq", "rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
SCALE_DTYPES = {SCALE: "F8_E4M3", SCALE_2: "F32", INPUT_SCALE: "F32"}


def body_prefix(subject: Subject) -> Iterator[Problem]:
    if subject.prefix is None:
        some = tuple(name for name in subject.tensors if "layers." in name and not name.startswith(subject.model.MTP_PREFIX))[:3]
        yield Problem("no decoder layers under model.language_model.layers (or, text only, model.layers); nothing in them is checked", some)
    elif subject.prefix == "model." and subject.architecture == VL_ARCHITECTURE:
        some = tuple(name for name in subject.tensors if name.startswith("model.layers."))
        yield Problem(f"the body stands under model.layers, {VL_ARCHITECTURE} reads model.language_model.layers (ValueError)", some)


def tensor_missing(subject: Subject) -> Iterator[Problem]:
    if subject.prefix is None:
        return
    missing = []
    for name in subject.called_for:
        module, _, suffix = name.rpartition(".")
        elsewhere = name in subject.loaded_beside or (suffix == WEIGHT and subject.form(module) not in ("plain", "none"))
        if name not in subject.tensors and not elsewhere and not name.startswith(subject.model.MTP_PREFIX):
            missing.append(name)
    if missing:
        yield Problem(f"missing in every form: {count(len(missing), 'tensor')} that config.json calls for", tuple(missing))


def tensor_unexpected(subject: Subject) -> Iterator[Problem]:
    if subject.prefix is None or not subject.called_for:
        return
    modules = {subject.model.module_of(name) for name in subject.called_for}
    extra = []
    for name in (*subject.tensors, *sorted(subject.loaded_beside)):
        module, _, suffix = name.rpartition(".")
        if name in subject.called_for or name == "lm_head.weight" or name.endswith((*PASSED_OVER, *ROTARY)):
            continue
        if module in modules and (suffix in SUFFIXES.get(subject.form(module), ()) or suffix in SCALE_SUFFIXES):
            continue  # of its format; scale-orphan says where it is not
        if name in subject.misplaced_mtp or (name in subject.stored_vision and not subject.is_vl):
            continue  # mtp-misplaced and vision-in-text-model say it
        extra.append(name)
    if extra:
        yield Problem(f"{count(len(extra), 'tensor')} that config.json does not call for", tuple(extra))


def weight_dtype(subject: Subject) -> Iterator[Problem]:
    decided = {module for linear in subject.linears for module in linear.modules}
    wrong: dict[str, list[str]] = defaultdict(list)
    for name, info in subject.tensors.items():
        module, _, suffix = name.rpartition(".")
        form = subject.form(module)
        if name in subject.called_for and module not in decided and info.dtype not in PLAIN_DTYPES:
            wrong[f"{info.dtype}, must be BF16: no engine reads it quantized"].append(name)
        elif module in decided and form == "unknown" and suffix == WEIGHT:
            wrong[f"{info.dtype}, which is neither BF16 nor any known format"].append(name)
        elif form == "nvfp4" and info.dtype != SCALE_DTYPES.get(suffix, info.dtype):
            wrong[f"{info.dtype}, NVFP4 holds its {suffix} as {SCALE_DTYPES[suffix]}"].append(name)
        elif suffix in KV_SCALES and info.dtype != "F32":
            wrong[f"{info.dtype}, scales of the KV cache are F32"].append(name)
    for why, names in wrong.items():
        yield Problem(f"{count(len(names), 'tensor')} of dtype {why}", tuple(names))


def weight_precision(subject: Subject) -> Iterator[Problem]:
    matrices = {name: info for name, info in subject.tensors.items() if name in subject.called_for and len(info.shape) > 1}
    wide = {name: info.dtype for name, info in matrices.items() if info.dtype in PLAIN_DTYPES and info.dtype != "BF16"}
    if wide:
        dtypes = ", ".join(sorted(set(wide.values())))
        yield Problem(f"{count(len(wide), 'tensor')} of two dimensions or more stored as {dtypes}, not BF16", tuple(wide))


def weight_shape(subject: Subject) -> Iterator[Problem]:
    wrong: dict[str, str] = {}
    for name, shape in subject.called_for.items():
        module, _, suffix = name.rpartition(".")
        expected: dict[str, tuple[tuple[int, ...], ...]] = {name: (shape,)}
        if suffix == WEIGHT and subject.form(module) == "nvfp4" and len(shape) == 2:
            n, k = shape
            expected = {name: ((n, k // 2),), f"{module}.{SCALE}": ((n, k // NVFP4_GROUP_SIZE),)}
            expected |= {f"{module}.{scalar}": ((), (1,)) for scalar in (SCALE_2, INPUT_SCALE)}
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
        if subject.form(module) == "nvfp4" and len(shape) == 2 and shape[1] % NVFP4_GROUP_SIZE:
            yield Problem(f"{module} has K = {shape[1]}, which {NVFP4_GROUP_SIZE} does not divide; vLLM refuses it", (module,))


RULES = (
    Rule(
        "body-prefix",
        "error",
        "The decoder layers stand under a prefix that the architecture does not read, or that only vLLM does (its own names, "
        "language_model.model.*).",
        "rename the tensors: mtpress repair CKPT OUT",
        body_prefix,
    ),
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
        "drop it: mtpress repair CKPT OUT",
        tensor_unexpected,
    ),
    Rule(
        "weight-dtype",
        "error",
        "A tensor is not in its dtype: embeddings, conv1d and norms are BF16, NVFP4 scales F8_E4M3 and F32. vLLM casts what it finds, and "
        "says nothing: integers become weights, scales lose their precision.",
        "restore it: mtpress repair CKPT OUT --base SRC, or quantize again",
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
        "An NVFP4 linear whose input size is no multiple of 16, the block of the format.",
        "keep it in BF16: leave it out of `quantize` in the recipe",
        k_not_divisible,
    ),
)
