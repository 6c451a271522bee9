"""What a checkpoint says of its own quantization, in config.json or hf_quant_config.json, read as vLLM 0.32 reads it.

In: the JSON content. Out: a `Declaration`. Leaves out: what is stored (stored.py) and judging (the rules).
Source: vLLM 0.32, transformers_utils/model_arch_config_convertor.py, layers/quantization/modelopt.py and inc/inc.py (from_config),
utils/torch_utils.py (get_kv_cache_quant_algo_string).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from mtpress.quant_config.matching.compressed_tensors import scheme_of
from mtpress.quant_config.matching.matcher import Scheme
from mtpress.quant_config.matching.modelopt import FP8_ALGOS
from mtpress.quant_config.stored import Form

Format = Literal["nvfp4", "modelopt-fp8", "modelopt-mixed", "compressed-tensors", "auto-round", "gptq", "awq", "fp8", "unknown"]

NVFP4_ALGOS = ("NVFP4", "W4A16_NVFP4")
MODELOPT_ALGOS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", *NVFP4_ALGOS, "MXFP8", "MIXED_PRECISION")
# What modelopt's mixed precision can say of a module, and mtpress knows.
LAYER_FORMS: dict[str, Form] = {"NVFP4": "nvfp4", "W4A16_NVFP4": "nvfp4", **dict.fromkeys(FP8_ALGOS, "fp8")}
LAYER_TITLES = {
    "NVFP4": "NVFP4 W4A4", "W4A16_NVFP4": "NVFP4 W4A16", "FP8": "FP8", "FP8_PER_CHANNEL_PER_TOKEN": "FP8 by row",
    "FP8_PB_WO": "FP8 in blocks",
}  # fmt: skip
COMPRESSED_FORMS: dict[str, Form] = {"nvfp4": "nvfp4-pack-quantized", "int": "pack-quantized", "fp8": "fp8"}  # by the kind of a scheme
METHODS: dict[str, Format] = {
    "compressed-tensors": "compressed-tensors", "auto-round": "auto-round", "inc": "auto-round", "gptq": "gptq", "awq": "awq", "fp8": "fp8",
}  # fmt: skip
TITLES: dict[Format, str] = {
    "nvfp4": "modelopt", "modelopt-fp8": "modelopt FP8", "modelopt-mixed": "modelopt mixed precision",
    "compressed-tensors": "compressed-tensors", "auto-round": "AutoRound", "gptq": "GPTQ", "awq": "AWQ", "fp8": "FP8",
    "unknown": "unknown",
}  # fmt: skip


@dataclass(frozen=True)
class Declaration:
    """A quantization config. file: where it stands; content: as it stands there."""

    file: str
    content: Mapping[str, Any]

    @cached_property
    def inner(self) -> Mapping[str, Any]:
        """modelopt's two layouts: everything under `quantization` (hf_quant_config.json), or flat (config.json)."""
        inner = self.content.get("quantization")
        return inner if isinstance(inner, Mapping) else self.content

    @property
    def legacy(self) -> bool:
        return self.inner is not self.content

    @cached_property
    def method(self) -> str:
        """quant_method; in hf_quant_config.json's layout, which has none, modelopt as producer stands for it."""
        method = str(self.content.get("quant_method") or "").lower().replace("compressed_tensors", "compressed-tensors")
        producer = self.content.get("producer")
        if not method and self.legacy and isinstance(producer, Mapping) and producer.get("name") == "modelopt":
            return "modelopt"
        return method

    @cached_property
    def algo(self) -> str:
        return str(self.inner.get("quant_algo") or "").upper()

    @cached_property
    def format(self) -> Format:
        if not self.method.startswith("modelopt"):
            return METHODS.get(self.method, "unknown")
        if self.algo in NVFP4_ALGOS:
            return "nvfp4"
        if self.algo == "MIXED_PRECISION":
            return "modelopt-mixed"
        return "modelopt-fp8" if self.algo in MODELOPT_ALGOS else "unknown"

    @property
    def ignore_key(self) -> str:
        return "exclude_modules" if self.legacy else "ignore"

    @cached_property
    def ignore(self) -> tuple[str, ...]:
        """The entries that are strings, in order; what is not a list of strings is for a rule to say."""
        entries = self.inner.get(self.ignore_key)
        return tuple(entry for entry in entries if isinstance(entry, str)) if isinstance(entries, list) else ()

    @cached_property
    def groups(self) -> tuple[Mapping[str, Any], ...]:
        groups = self.content.get("config_groups")
        return tuple(group for group in groups.values() if isinstance(group, Mapping)) if isinstance(groups, Mapping) else ()

    @cached_property
    def schemes(self) -> tuple[Scheme, ...]:
        """Of compressed-tensors: how each group says its linears are stored, but for groups of the KV cache."""
        if self.format != "compressed-tensors":
            return ()
        layout = self.content.get("format")
        return tuple(scheme_of(group, layout) for group in self.groups if isinstance(group.get("weights"), Mapping))

    @cached_property
    def layer_entries(self) -> tuple[Mapping[str, Any], ...]:
        """Of modelopt's mixed precision: what is said of each module."""
        layers = self.inner.get("quantized_layers") if self.format == "modelopt-mixed" else None
        return tuple(entry for entry in layers.values() if isinstance(entry, Mapping)) if isinstance(layers, Mapping) else ()

    @cached_property
    def layer_algos(self) -> tuple[str, ...]:
        """The algorithms of modelopt's mixed precision, each once."""
        said = (entry.get("quant_algo") for entry in self.layer_entries)
        return tuple(dict.fromkeys(algo.upper() for algo in said if isinstance(algo, str)))

    @cached_property
    def layouts(self) -> tuple[Form, ...]:
        """The stored forms that it stands for; empty where mtpress does not know the format, or not this kind of it."""
        if self.format == "nvfp4":
            return ("nvfp4",)
        if self.format == "modelopt-fp8":
            return ("fp8",) if self.algo in FP8_ALGOS else ()
        if self.format == "modelopt-mixed":
            known = all(algo in LAYER_FORMS for algo in self.layer_algos)
            return tuple(dict.fromkeys(LAYER_FORMS[algo] for algo in self.layer_algos)) if known else ()
        if self.format == "compressed-tensors":
            forms = COMPRESSED_FORMS
            if not self.groups:  # nothing is quantized then, whatever is stored
                said = str(self.content.get("format"))
                return tuple(form for form in forms.values() if form == said)
            known = all(scheme.kind in forms for scheme in self.schemes)
            return tuple(dict.fromkeys(forms[scheme.kind] for scheme in self.schemes)) if known else ()
        if self.format == "auto-round":
            integer = self.content.get("data_type", "int") == "int"
            return ("gptq",) if integer and not any("awq" in str(self.content.get(key)) for key in ("packing_format", "backend")) else ()
        if self.format == "fp8":
            return ("fp8",)
        return ("gptq",) if self.format == "gptq" else ()

    @cached_property
    def weight_only(self) -> bool:
        """Whether activations stay in 16 bits: everything but modelopt's and compressed-tensors' NVFP4 with input_activations."""
        if self.format == "compressed-tensors":
            return not any(scheme.activations for scheme in self.schemes)
        if self.format == "fp8":
            return False
        if self.format in ("modelopt-fp8", "modelopt-mixed"):
            return bool(self.layer_algos) and set(self.layer_algos) == {"W4A16_NVFP4"}
        silent = bool(self.groups) and all(group.get("input_activations") is None for group in self.groups)
        return self.algo != "NVFP4" or silent

    @cached_property
    def group_sizes(self) -> set[Any]:
        """Every group_size that is said, at the top or in a group of the config."""
        weights = [group.get("weights") for group in self.groups]
        said = [self.inner.get("group_size"), *(w.get("group_size") for w in (*weights, *self.layer_entries) if isinstance(w, Mapping))]
        return {size if isinstance(size, int) else str(size) for size in said if size is not None}

    @cached_property
    def kv_cache(self) -> str:
        """What it declares of the KV cache: "auto" (nothing), "fp8", "nvfp4", or "?" for what vLLM does not know."""
        said = self.inner.get("kv_cache_scheme") or self.inner.get("kv_cache_quant_algo")
        if not said:
            return "auto"
        if isinstance(said, Mapping):
            bits, float_type = said.get("num_bits"), said.get("type") == "float"
            if float_type and bits == 8 and said.get("dynamic") is False:
                return "fp8"
            return "nvfp4" if float_type and bits == 4 else "?"
        return str(said).lower() if str(said).lower() in ("fp8", "nvfp4") else "?"

    @property
    def packing(self) -> str | None:
        """How codes are packed: AutoRound's packing_format, compressed-tensors' format, GPTQ's checkpoint_format."""
        key = {"auto-round": "packing_format", "compressed-tensors": "format", "gptq": "checkpoint_format"}.get(self.format)
        said = self.content.get(key) if key is not None else None
        return str(said) if said is not None else None

    @property
    def title(self) -> str:
        if self.layouts:
            return TITLES[self.format] + self._kind()
        if self.format == "unknown":
            return f"unknown ({' '.join(word for word in (self.method or 'no quant_method', self.algo) if word)})"
        return TITLES[self.format]

    def _kind(self) -> str:
        """The number format of its weights, as the title says it."""
        nvfp4 = f" NVFP4 ({'W4A16' if self.weight_only else 'W4A4'})"
        if self.format == "nvfp4":
            return nvfp4
        if self.format == "modelopt-fp8":
            return {"FP8_PER_CHANNEL_PER_TOKEN": " by row", "FP8_PB_WO": " in blocks of 128×128"}.get(self.algo, "")
        if self.format == "fp8":
            block = self.content.get("weight_block_size")
            return f" in blocks of {'×'.join(map(str, block))}" if isinstance(block, list) and len(block) == 2 else ""
        if self.format == "modelopt-mixed":
            return f" ({', '.join(LAYER_TITLES[algo] for algo in self.layer_algos)})"
        if self.format == "compressed-tensors":
            return " and".join(dict.fromkeys(map(_scheme_title, self.schemes)))
        sym = self.content.get("sym", True)
        return _int_title(self.content.get("bits"), self.content.get("group_size"), sym is not False)


def _scheme_title(scheme: Scheme) -> str:
    if scheme.kind == "nvfp4":
        return f" NVFP4 ({'W4A4' if scheme.activations else 'W4A16'})"
    if scheme.kind == "fp8":
        place = {"tensor": "", "channel": " by row", "block": f" in blocks of {scheme.block[0]}×{scheme.block[1]}"}[scheme.scale_of]
        return f" FP8{place}{'' if scheme.activations else ' (W8A16)'}"
    return _int_title(scheme.bits, scheme.group_size, scheme.symmetric)


def _int_title(bits: Any, group_size: Any, symmetric: bool) -> str:
    size = f" g{group_size}" if type(group_size) is int and group_size > 0 else ""
    return f" INT{bits if type(bits) is int else ''}{size}{'' if symmetric else ' asymmetric'}"
