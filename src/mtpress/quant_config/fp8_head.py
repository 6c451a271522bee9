"""A draft head in FP8, as Qwen's own FP8 releases ship it, for a checkpoint that is to have it.

In: the checkpoint that gives the head, and the one that gets it. Out: whether the second's config can hold the head as it is stored, and
else its matrices in BF16, the value that the codes stand for. Leaves out: heads in other forms, and writing (stages/graft.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.checkpoint.safetensors import TensorInfo
from mtpress.quant_config.declaration import Declaration
from mtpress.quant_config.ignore_list import spare
from mtpress.quant_config.matching import Matcher
from mtpress.quant_config.matching.matcher import Scheme
from mtpress.quant_config.stored import SCALE_SUFFIXES, WEIGHT, fp8_scheme
from mtpress.quant_config.stored_matrix import StoredMatrix, stored_matrix
from mtpress.quant_config.view import Subject

Tensors = Mapping[str, TensorInfo]


def fp8_matrices(giver: Checkpoint, prefix: str) -> dict[str, StoredMatrix]:
    """Module of the head → its matrix, of those that are whole and in FP8."""
    subject = Subject(giver)
    modules = (module for module in subject.quantized if module.startswith(prefix) and subject.form(module) == "fp8")
    found = {module: stored_matrix("fp8", subject.modules[module]) for module in modules}
    return {module: matrix for module, matrix in found.items() if matrix is not None}


def scales_of(giver: Checkpoint, modules: Sequence[str]) -> dict[str, TensorInfo]:
    """The tensors beside the codes of FP8 modules."""
    names = (f"{module}.{suffix}" for module in modules for suffix in sorted(SCALE_SUFFIXES))
    return {name: giver.tensors[name] for name in names if name in giver.tensors}


def in_bf16(head: Tensors, modules: Sequence[str]) -> dict[str, TensorInfo]:
    """The head as it is once these modules are dequantized, by headers."""
    names = {f"{module}.{WEIGHT}" for module in modules}
    return {name: replace(info, dtype="BF16", num_bytes=2 * info.num_params) if name in names else info for name, info in head.items()}


def schemes_of(tensors: Tensors, modules: Sequence[str]) -> dict[str, Scheme]:
    """How FP8 modules are stored."""
    found = {}
    for module in modules:
        start = f"{module}."
        scheme = fp8_scheme({name.removeprefix(start): info for name, info in tensors.items() if name.startswith(start)})
        assert scheme is not None
        found[module] = scheme
    return found


def can_hold(subject: Subject, head: Tensors, modules: Sequence[str], tensors: Tensors) -> bool:
    """Whether what the checkpoint declares can hold the head as it is stored, with the list that says so. tensors: all of the result."""
    declared = subject.declared
    if declared is None or not subject.covered or subject.prefix is None:
        return False
    model = subject.model
    kept = model.kept_modules(tensors, subject.prefix)
    quantized = [*(module for module in subject.quantized if module not in kept and not module.startswith(model.MTP_PREFIX)), *modules]
    content = spare(declared, kept, quantized, len(model.layer_types(subject.config)), subject.prefix)
    matcher = subject.matcher(Declaration(declared.file, content))
    return matcher is not None and takes(subject, matcher, schemes_of(head, modules))


def takes(subject: Subject, matcher: Matcher, schemes: Mapping[str, Scheme]) -> bool:
    """Whether the engine takes these modules of the head as they are stored, and the rest of it as BF16."""
    head = [linear for linear in subject.linears if linear.part == "draft" and linear.prefix.startswith(subject.model.MTP_PREFIX)]
    for linear in head:
        stored = {schemes.get(module) for module in linear.modules}
        said = matcher.scheme(linear)
        if stored == {None} and matcher.verdict(linear) == "ignored":
            continue
        if said is None or None in stored or any(_kind(said) != _kind(scheme) for scheme in stored if scheme is not None):
            return False
    return bool(head)


def _kind(scheme: Scheme) -> tuple[object, ...]:
    return scheme.kind, scheme.scale_of, scheme.scale_name, scheme.static, scheme.block if scheme.scale_of == "block" else None
