"""A checkpoint as a server sees it: what it is called, in what format it is, what its parts weigh, whether it has a draft head.

In: a directory or Hub id. Out: a `ServedModel`, from headers and small files alone. Leaves out: whether the checkpoint is
sound (`mtpress check`), and what it takes to serve it (memory_model.py, launch.py).
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.checkpoint.safetensors import TensorInfo
from mtpress.models.qwen3_5.names import COMPONENTS
from mtpress.quant_config import stored
from mtpress.quant_config.declaration import Declaration
from mtpress.quant_config.view import Subject, stripped

NOT_PARAMETERS = (*stored.SCALE_SUFFIXES, *stored.KV_SCALES, "q_scale")
# quant_method as a config spells it → the name under which vLLM 0.32 runs it (each QuantizationConfig.override_quantization_method).
VLLM_METHODS = {"auto-round": "inc", "gptq": "auto_gptq"}
MODELOPT_METHODS = {"NVFP4": "modelopt_fp4", "W4A16_NVFP4": "modelopt_fp4", "MXFP8": "modelopt_mxfp8", "MIXED_PRECISION": "modelopt_mixed"}


@dataclass(frozen=True)
class ServedModel:
    """What is stored, by the engine's needs.

    format: in words ("BF16", "modelopt NVFP4 (W4A4)"); quant_method: vLLM's --quantization word, None for an unquantized one.
    weight_bytes: by component (models/qwen3_5.COMPONENTS), only those stored. kv_cache_declared: "fp8" where the config asks for it.
    has_vision: a tower is stored. needs_language_model_only: the tower was stripped on purpose, and the engine must be told.
    lacks_input_scales: modelopt's weight-only NVFP4 linears are in it, for which vLLM 0.32 counts an input_scale that they do not have.
    num_mtp_layers: 0 where no draft head is stored, whatever config.json says.
    """

    path: Path
    name: str
    architecture: str
    model_type: str
    config: Mapping[str, Any]
    format: str
    quant_method: str | None
    weight_bytes: Mapping[str, int]
    kv_cache_declared: str | None
    has_vision: bool
    needs_language_model_only: bool
    num_mtp_layers: int
    max_position_embeddings: int
    num_params: int
    lacks_input_scales: bool = False

    @classmethod
    def read(cls, path: str | Path) -> "ServedModel":
        """Reads headers and config; InputError as Checkpoint.open, and for a family that mtpress does not know."""
        checkpoint = Checkpoint.open(path)
        subject = Subject(checkpoint)
        weight_bytes: Counter[str] = Counter()
        for tensor, info in subject.tensors.items():
            weight_bytes[subject.model.component(tensor)] += info.num_bytes
        bits = stored_bits(subject.declared)
        declared, positions = subject.declared, subject.model.text_config(checkpoint.config).get("max_position_embeddings")
        return cls(
            path=checkpoint.path,
            name=checkpoint.path.resolve().name,
            architecture=subject.architecture,
            model_type=checkpoint.model_type,
            config=checkpoint.config,
            format=declared.title if declared is not None else "BF16",
            quant_method=vllm_method(declared) if declared is not None else None,
            weight_bytes={part: weight_bytes[part] for part in (*COMPONENTS, "other") if part in weight_bytes},
            kv_cache_declared=declared.kv_cache if declared is not None and declared.kv_cache == "fp8" else None,
            has_vision=bool(subject.stored_vision),
            needs_language_model_only=stripped(subject),
            num_mtp_layers=max(1, subject.model.num_mtp_layers(checkpoint.config)) if subject.stored_mtp else 0,
            max_position_embeddings=positions if type(positions) is int and positions > 0 else 0,
            lacks_input_scales=declared is not None
            and declared.method.startswith("modelopt")
            and any(scheme.kind == "nvfp4" and not scheme.activations for scheme in subject.schemes.values()),
            num_params=sum(num_params(t.rpartition(".")[2], i, bits) for t, i in subject.tensors.items()),
        )


def vllm_method(declared: Declaration) -> str | None:
    """The --quantization word that vLLM 0.32 settles on for a declaration, None where it knows none."""
    if declared.method.startswith("modelopt"):
        return MODELOPT_METHODS.get(declared.algo, "modelopt")
    return VLLM_METHODS.get(declared.method, declared.method) or None


def stored_bits(declared: Declaration | None) -> int:
    """Bits of a packed weight as its config declares them, 4 where it does not say."""
    if declared is None:
        return 4
    said = {scheme.bits for scheme in declared.schemes if scheme.kind == "int"}
    bits = said.pop() if len(said) == 1 else declared.content.get("bits")
    return bits if bits in (2, 3, 4, 8) else 4


def num_params(suffix: str, info: TensorInfo, bits: int = 4) -> int:
    """Weights that a stored tensor stands for; scales, zero points and the like stand for none."""
    if suffix in NOT_PARAMETERS:
        return 0
    if suffix in ("weight_packed", "qweight") or (suffix == stored.WEIGHT and info.dtype == "U8"):
        return info.num_bytes * 8 // bits
    return info.num_params
