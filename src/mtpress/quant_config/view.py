"""A checkpoint as the rules see it: headers, small files and float32 scalars, each read once and only when asked for.

In: an open Checkpoint. Out: `Subject`: what config.json calls for, what is stored in which form, what is declared, and
what the engine would make of it. Leaves out: judging (the other files here) and weights (comparison/weights.py).
No property raises for a broken checkpoint: what cannot be known is empty, and a rule says why.
"""

import os
import struct
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.checkpoint.json_files import read_json_object, read_text
from mtpress.checkpoint.safetensors import Shard, TensorInfo, read_bytes, read_shard
from mtpress.errors import InputError
from mtpress.models import family
from mtpress.models.qwen3_5 import engine as qwen3_5_engine
from mtpress.models.qwen3_5.engine import VL_ARCHITECTURE, EngineLinear
from mtpress.models.qwen3_5.renames import Renaming, renaming
from mtpress.quant_config.declaration import Declaration
from mtpress.quant_config.matching import Matcher, Scheme, Verdict, matcher_of
from mtpress.quant_config.matching.matcher import FP8_BLOCK
from mtpress.quant_config.stored import FP8_SCALARS, KV_SCALES, PLAIN_DTYPES, SCALARS, Form, form_of, fp8_scheme

CONFIG, HF_QUANT_CONFIG, QUANTIZATION_CONFIG = "config.json", "hf_quant_config.json", "quantization_config.json"
SCALAR_SUFFIXES = (*(suffix for scales in SCALARS.values() for suffix in scales), *FP8_SCALARS, *KV_SCALES)
MAX_FOLDERS = 200  # below a checkpoint that are looked into for a head


class Subject:
    """Everything that can be decided about a checkpoint without reading its weights.

    Tensors go by the family's names here, whatever names they are stored under: `names` has what that changes, and rules/names.py says it
    once. What more than one tensor claims is nobody's.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.path = checkpoint.path
        self.config = checkpoint.config
        self.model = family(checkpoint.model_type)
        self.names: Renaming = renaming({**checkpoint.tensors, **checkpoint.unindexed}, self.config, self.architecture)
        self.tensors = self._by_family_names(checkpoint.tensors)
        self.unreadable: dict[str, str] = {}
        self._json: dict[str, dict[str, Any] | None] = {}

    def _by_family_names(self, tensors: Mapping[str, TensorInfo]) -> Mapping[str, TensorInfo]:
        if not self.names.new_names:
            return tensors
        found = {self.names.new_names.get(name, name): info for name, info in tensors.items()}
        return {name: info if info.name == name else replace(info, name=name) for name, info in found.items()}

    # ---- files

    def json(self, name: str) -> dict[str, Any] | None:
        """A JSON file beside the weights; None where it is missing or, noted in `unreadable`, no JSON object."""
        if name not in self._json:
            self._json[name] = None
            if (self.path / name).is_file():
                try:
                    self._json[name] = read_json_object(self.path / name)
                except InputError as error:
                    self.unreadable[name] = str(error)
        return self._json[name]

    def has(self, name: str) -> bool:
        return (self.path / name).is_file()

    def text(self, name: str) -> str | None:
        """A text file beside the weights; None where it is missing, not UTF-8 or, noted in `unreadable`, no file of a sensible size."""
        if not self.has(name):
            return None
        try:
            return read_text(self.path / name)
        except InputError as error:
            self.unreadable[name] = str(error)
            return None

    @cached_property
    def stray_shards(self) -> dict[str, Shard | None]:
        """Safetensors files that no index names; None for one that cannot be read."""
        known = {shard.path.name for shard in self.checkpoint.shards}
        found: dict[str, Shard | None] = {}
        for path in sorted(self.path.glob("*.safetensors")):
            if path.name not in known:
                try:
                    found[path.name] = read_shard(path)
                except InputError:
                    found[path.name] = None
        return found

    @cached_property
    def leftovers(self) -> dict[str, str]:
        """Files that no index names and that hold what it names elsewhere: a copy, or another save; file → how much of it."""
        known = {name for shard in self.checkpoint.shards for name in (info.name for info in shard.tensors)}
        found = {}
        for file, shard in self.stray_shards.items():
            names = {info.name for info in shard.tensors} if shard is not None and self.checkpoint.index is not None else set()
            if twice := len(names & known):
                found[file] = f"{twice if twice < len(names) else 'all'} of its {len(names)} tensors in the indexed files too"
        return found

    # ---- what config.json calls for

    @cached_property
    def architecture(self) -> str:
        """The class that the engine builds; where config.json names none that it knows, the one of the model_type."""
        said = self.config.get("architectures")
        first = said[0] if isinstance(said, list) and said and isinstance(said[0], str) else ""
        return first if first in qwen3_5_engine.RENAMES else qwen3_5_engine.ARCHITECTURE[self.checkpoint.model_type]

    @cached_property
    def prefix(self) -> str | None:
        """Of the body's tensors; None where there is no decoder layer under a prefix of the family."""
        try:
            return str(self.model.body_prefix(self.tensors))
        except InputError:
            return None

    @cached_property
    def _called_for(self) -> tuple[dict[str, tuple[int, ...]], str | None]:
        prefix = self.prefix or "model.language_model."
        try:
            shapes = dict(self.model.body_shapes(self.config, prefix, self.tensors)) | self.model.mtp_shapes(self.config)
            vision = self.model.vision_shapes(self.config) if "vision_config" in self.config else {}
        except InputError as error:
            return {}, str(error)
        shapes |= vision if self.stored_vision else {}
        problem = self._wrong_defaults(shapes)
        return ({}, problem) if problem else (shapes, None)

    def _wrong_defaults(self, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        """Why the sizes that config.json leaves out are not the defaults that engines take for them: a tensor says otherwise."""
        left_out: dict[str, int] = self.model.left_out(self.config)
        for name, shape in shapes.items() if left_out else ():
            if (info := self.tensors.get(name)) is not None and info.dtype in PLAIN_DTYPES and info.shape != shape:
                keys = [key for key, size in left_out.items() if any(size == n or n % size == 0 for n in shape)] or list(left_out)
                return (
                    f"config.json: {keys[0]} is missing (engines take {left_out[keys[0]]}), by which {name} is {list(shape)}; stored is "
                    f"{list(info.shape)}"
                )
        return None

    @property
    def called_for(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the body, the draft head and, where any of it is stored, the vision tower, with its BF16 shape."""
        return self._called_for[0]

    @property
    def config_problem(self) -> str | None:
        """Why `called_for` is empty."""
        return self._called_for[1]

    @cached_property
    def vocab_size(self) -> int | None:
        size = self.model.text_config(self.config).get("vocab_size")
        return size if type(size) is int else None

    # ---- what is stored

    @cached_property
    def modules(self) -> dict[str, dict[str, TensorInfo]]:
        """Module → its tensors by the last part of their names."""
        found: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
        for name, info in self.tensors.items():
            module, _, suffix = name.rpartition(".")
            found[module][suffix] = info
        return dict(found)

    @cached_property
    def forms(self) -> dict[str, Form]:
        return {module: form_of(tensors) for module, tensors in self.modules.items()}

    def form(self, module: str) -> Form:
        return self.forms.get(module, "none")

    @cached_property
    def quantized(self) -> tuple[str, ...]:
        """Modules stored in a quantized form."""
        return tuple(module for module, form in self.forms.items() if form not in ("plain", "none", "unknown"))

    @cached_property
    def stored_mtp(self) -> tuple[str, ...]:
        return tuple(name for name in self.tensors if name.startswith(self.model.MTP_PREFIX))

    @cached_property
    def unindexed(self) -> Mapping[str, TensorInfo]:
        """Tensors of named shards that the index does not name."""
        return self._by_family_names(self.checkpoint.unindexed)

    @cached_property
    def stray_tensors(self) -> dict[str, dict[str, TensorInfo]]:
        """The same of shards that no index names: file → its tensors."""
        found = {}
        for file, shard in self.stray_shards.items():
            stored = {info.name: info for info in shard.tensors} if shard is not None else {}
            found[file] = by_family_names(stored, self.config, self.architecture)
        return found

    @cached_property
    def loaded_beside(self) -> frozenset[str]:
        """Tensors that no index names and vLLM loads all the same: in named shards and, without any index, in every shard."""
        stray = [name for tensors in self.stray_tensors.values() for name in tensors]
        return frozenset([*self.unindexed, *(stray if self.checkpoint.index is None else ())])

    @cached_property
    def unindexed_mtp(self) -> dict[str, tuple[str, TensorInfo]]:
        """Tensors of the draft head that lie on disk, that the index does not name and that it names nowhere else: name → file, tensor.

        In named shards, in files beside them, and in files of folders below that hold a head and nothing else.
        """
        beside = self.stray_tensors if self.checkpoint.index is not None else {}
        found: dict[str, tuple[str, TensorInfo]] = {}
        for file, tensors in {"": self.unindexed, **beside, **(self.heads_in_folders if self._lacks_head else {})}.items():
            for name, info in tensors.items():
                if name.startswith(self.model.MTP_PREFIX) and name not in self.tensors:
                    found.setdefault(name, (file or info.file.name, info))
        return found

    @cached_property
    def _lacks_head(self) -> bool:
        beside = {*self.unindexed, *(name for tensors in self.stray_tensors.values() for name in tensors)}
        return not any(name.startswith(self.model.MTP_PREFIX) for name in (*self.tensors, *beside))

    @cached_property
    def heads_in_folders(self) -> dict[str, dict[str, TensorInfo]]:
        """Safetensors files one folder below that hold a whole draft head and nothing else: path → its tensors."""
        found = {}
        folders = [entry.name for entry in os.scandir(self.path) if entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".")]
        for path in (path for folder in sorted(folders)[:MAX_FOLDERS] for path in sorted((self.path / folder).glob("*.safetensors"))):
            try:
                stored = {info.name: info for info in read_shard(path).tensors} if path.is_file() else {}
            except InputError:
                continue
            tensors = by_family_names(stored, self.config, self.architecture)
            if set(self.model.MTP_TENSORS) <= tensors.keys() and all(name.startswith(self.model.MTP_PREFIX) for name in tensors):
                found[f"{path.parent.name}/{path.name}"] = tensors
        return found

    @cached_property
    def is_head_alone(self) -> bool:
        """Whether nothing of a model is stored but its draft head."""
        parts = {self.model.component(name) for name in (*self.tensors, *self.unindexed)}
        return bool(self.stored_mtp) and parts <= {"mtp", "other"}

    @cached_property
    def stored_vision(self) -> tuple[str, ...]:
        return tuple(name for name in self.tensors if name.startswith(self.model.VISION_PREFIX))

    @cached_property
    def scalars(self) -> dict[str, float]:
        """Value of every float32 scalar scale: 4 bytes each, read from where the header says they lie."""
        found: dict[str, float] = {}
        for name, info in self.tensors.items():
            if info.dtype == "F32" and info.num_bytes == 4 and name.rpartition(".")[2] in SCALAR_SUFFIXES:
                raw = bytearray(4)
                read_bytes(info, memoryview(raw))
                found[name] = struct.unpack("<f", raw)[0]
        return found

    # ---- what is declared, and what the engine makes of it

    @cached_property
    def declared(self) -> Declaration | None:
        """What the engine goes by: config.json's quantization_config, else hf_quant_config.json, else text_config's."""
        levels = (self.config, self.model.text_config(self.config))
        # compressed-tensors once called its config so; vLLM still looks for it
        own, inner = (level.get("quantization_config") or level.get("compression_config") for level in levels)
        if isinstance(own, dict) and own:
            return Declaration(CONFIG, own)
        if self.hf_declared is not None and self.hf_declared.method:
            return self.hf_declared
        return Declaration(CONFIG, inner) if isinstance(inner, dict) and inner else None

    @cached_property
    def hf_declared(self) -> Declaration | None:
        """hf_quant_config.json, which modelopt writes."""
        content = self.json(HF_QUANT_CONFIG)
        return Declaration(HF_QUANT_CONFIG, content) if content else None

    @cached_property
    def beside(self) -> Declaration | None:
        """quantization_config.json, which AutoRound writes; vLLM and transformers read it only where config.json declares nothing."""
        content = self.json(QUANTIZATION_CONFIG)
        return Declaration(QUANTIZATION_CONFIG, content) if content else None

    @cached_property
    def covered(self) -> bool:
        """Whether the rules know the declared format: NVFP4, INT4 and modelopt's FP8 in the layouts of stored.py, or none at all."""
        return self.declared is None or bool(self.declared.layouts)

    @cached_property
    def linears(self) -> tuple[EngineLinear, ...]:
        try:
            return tuple(qwen3_5_engine.linears(self.config, self.architecture, self.prefix or "model.language_model."))
        except InputError:
            return ()

    @cached_property
    def dtypes(self) -> dict[str, str]:
        """Tensor name → dtype of everything in the directory, indexed or not: what vLLM derives the modules of GPTQ from."""
        named = {info.name: info.dtype for shard in self.checkpoint.shards for info in shard.tensors}
        by_name = {self.names.new_names.get(name, name): dtype for name, dtype in named.items()}
        return by_name | {name: info.dtype for tensors in self.stray_tensors.values() for name, info in tensors.items()}

    def matcher(self, declared: Declaration) -> Matcher | None:
        """vLLM's matching by a declaration; None for a format whose matching is not modelled."""
        return matcher_of(declared, self.architecture, self.dtypes)

    def verdicts_of(self, declared: Declaration) -> dict[EngineLinear, Verdict]:
        """What the engine takes each linear for by a declaration; empty where that is not modelled."""
        held = self.matcher(declared)
        return {linear: held.verdict(linear) for linear in self.linears} if held is not None else {}

    @cached_property
    def held(self) -> Matcher | None:
        """The matcher of what is declared; None where nothing, or a format that the rules do not know, is."""
        return self.matcher(self.declared) if self.declared is not None and self.covered else None

    @cached_property
    def verdicts(self) -> Mapping[EngineLinear, Verdict]:
        """The verdicts of what is declared; empty where nothing, or a format that the rules do not know, is."""
        return {linear: self.held.verdict(linear) for linear in self.linears} if self.held is not None else {}

    @cached_property
    def schemes(self) -> Mapping[str, Scheme]:
        """Module → how the config says it is stored; of lm_head, which target and draft share, what it says to the target."""
        found: dict[str, Scheme] = {}
        if self.held is not None:
            for linear in self.linears:
                if (scheme := self.held.scheme(linear)) is not None:
                    found |= {module: scheme for module in linear.modules if module not in found}
        return found

    # ---- FP8

    @cached_property
    def fp8_schemes(self) -> Mapping[str, Scheme]:
        """Module in FP8 → how it is stored, by its shapes; without those whose scale is missing or fits none."""
        found: dict[str, Scheme] = {}
        for module in self.quantized:
            if self.form(module) == "fp8":
                said = self.schemes.get(module)
                block = said.block if said is not None else FP8_BLOCK
                if (scheme := fp8_scheme(self.modules[module], block)) is not None:
                    found[module] = scheme
        return found

    def other_fp8(self, module: str) -> bool:
        """Whether a module is stored in FP8 of another kind than the FP8 that the config says it is."""
        said, stored = self.schemes.get(module), self.fp8_schemes.get(module)
        if said is None or stored is None or said.kind != "fp8":
            return False
        return (said.scale_of, said.scale_name) != (stored.scale_of, stored.scale_name)

    # ---- INT4

    def whole_group(self, module: str, group_size: int) -> int:
        """A group size in columns: -1 stands for the whole row."""
        shape = self.called_for.get(f"{module}.weight", ())
        return group_size if group_size > 0 or len(shape) != 2 else shape[1]

    def stored_group_size(self, module: str) -> int | None:
        """The group size that the scales of an INT4 module show, by config.json's K; None where they show none."""
        shape = self.called_for.get(f"{module}.weight", ())
        form, tensors = self.form(module), self.modules.get(module, {})
        scales = tensors.get("scales" if form == "gptq" else "weight_scale")
        if form not in ("gptq", "pack-quantized") or scales is None or len(shape) != 2 or len(scales.shape) != 2:
            return None
        groups = scales.shape[0 if form == "gptq" else 1]
        return shape[1] // groups if groups and shape[1] % groups == 0 else None

    @cached_property
    def zero_words(self) -> dict[str, int]:
        """The first word of every qzeros: the zero points of the first group of eight rows (of four, in 8 bits)."""
        found: dict[str, int] = {}
        for name, info in self.tensors.items():
            if name.endswith(".qzeros") and info.dtype == "I32" and info.num_bytes >= 4:
                raw = bytearray(4)
                read_bytes(replace(info, shape=(1,), num_bytes=4), memoryview(raw))
                found[name] = struct.unpack("<I", raw)[0]
        return found

    @cached_property
    def packed_shapes(self) -> dict[str, tuple[int, int]]:
        """Module → the [N, K] that compressed-tensors stores as weight_shape beside its INT4 codes."""
        found: dict[str, tuple[int, int]] = {}
        for name, info in self.tensors.items():
            if name.endswith(".weight_shape") and info.dtype in ("I64", "I32") and info.shape == (2,):
                raw = bytearray(info.num_bytes)
                read_bytes(info, memoryview(raw))
                found[name.rpartition(".")[0]] = struct.unpack("<2q" if info.dtype == "I64" else "<2i", raw)
        return found

    @property
    def is_vl(self) -> bool:
        return self.architecture == VL_ARCHITECTURE and "vision_config" in self.config


def by_family_names(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], architecture: str) -> dict[str, TensorInfo]:
    """Tensors of one file by the family's names; those of other names keep them."""
    new_names = renaming(tensors, config, architecture).new_names
    return {new: replace(info, name=new) for name, info in tensors.items() for new in (new_names.get(name, name),)}


TEXT_ONLY_FLAG = "--language-model-only"


def stripped(subject: Subject) -> bool:
    """Whether the tower was taken out on purpose: the engine must be told, no config key tells it."""
    return subject.is_vl and not subject.stored_vision and subject.config.get("language_model_only") is True
