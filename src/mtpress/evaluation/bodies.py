"""A checkpoint as eval runs it: its layers, lm_head and draft head, each built when it is asked for.

In: an open checkpoint, BF16 or quantized in any form of linears.EMULATIONS. Out: a `Body`, which hands out modules whose
linears compute as vLLM's. Leaves out: moving samples through them (layers.py). Opening reads headers only, and refuses what cannot
be compared with the base, so that nothing fails an hour later.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5DecoderLayer

from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.checkpoint.json_files import read_json_object
from mtpress.checkpoint.safetensors import TensorInfo, read_rows, read_tensor
from mtpress.errors import InputError
from mtpress.formats import fp8
from mtpress.models.qwen3_5.draft_head import DraftHead
from mtpress.models.qwen3_5.layers import StreamedBody
from mtpress.quant_config.emulation import EMULATIONS, INPUT_SCALES, EmulatedLinear, emulation_of
from mtpress.quant_config.misnamed import refuse_misnamed
from mtpress.quant_config.stored import KV_SCALES, TITLES, WEIGHT
from mtpress.quant_config.view import Subject

DTYPE = torch.bfloat16
ROWS_MULTIPLE = 128  # pieces of lm_head begin where packed zero points and scales do too


class Body:
    """One model of a run. kv_cache_fp8: whether keys and values are rounded to FP8, as the engine's cache would hold them."""

    def __init__(self, checkpoint: Checkpoint, name: str, kv_cache: str = "auto") -> None:
        self.checkpoint, self.name = checkpoint, name
        self.subject = Subject(checkpoint)
        refuse_misnamed(self.subject)
        self.tensors = checkpoint.tensors
        self.model = self.subject.model
        if self.subject.prefix is None:
            raise InputError(f"{checkpoint.path}: no decoder layers; is it a Qwen3.5-class checkpoint?")
        self.prefix = self.subject.prefix
        if self.subject.config_problem:
            raise InputError(f"{checkpoint.path}: {self.subject.config_problem}")
        self.layer_types: list[str] = self.model.layer_types(checkpoint.config)
        self.kv_cache_fp8 = kv_cache == "fp8" or (kv_cache == "auto" and getattr(self.subject.declared, "kv_cache", "") == "fp8")

    # ---- what is stored

    @cached_property
    def _fused(self) -> dict[str, tuple[str, ...]]:
        """Module → the modules that vLLM makes one linear of."""
        return {module: linear.modules for linear in self.subject.linears for module in linear.modules}

    @cached_property
    def forms(self) -> dict[str, int]:
        """Title of a quantized form → how many modules are stored in it."""
        found: dict[str, int] = defaultdict(int)
        for module in self.subject.quantized:
            found[TITLES[self.subject.form(module)]] += 1
        return dict(found)

    @property
    def has_vision(self) -> bool:
        return bool(self.subject.stored_vision)

    @cached_property
    def lm_head_module(self) -> str:
        tied = not any(name.startswith("lm_head.") for name in self.tensors)
        return f"{self.prefix}embed_tokens" if tied else "lm_head"

    @cached_property
    def no_draft_head(self) -> str | None:
        """Why there is no draft head to draft with; None where it is whole."""
        if not self.subject.stored_mtp:
            return "no draft head is stored"
        wanted = self.model.mtp_shapes(self.checkpoint.config)
        wrong = next((problem for name, shape in wanted.items() if (problem := self.problem(name, shape))), None)
        return f"draft head: {wrong}" if wrong else None

    def problem(self, name: str, shape: tuple[int, ...]) -> str | None:
        """Why a tensor that the model calls for is not there to compute with, in whatever form it is stored; None where it is."""
        module, _, suffix = name.rpartition(".")
        infos, form = self.subject.modules.get(module, {}), self.subject.form(module)
        if suffix != WEIGHT or form in ("plain", "none"):
            info = self.tensors.get(name)
            if info is None:
                return f"{name} is missing"
            return None if info.shape == shape else f"{name} is {list(info.shape)}, config.json calls for {list(shape)}"
        if module not in self._fused:
            return f"{module} is stored as {TITLES[form]}, which no engine reads there; mtpress repair makes BF16 of it"
        emulation = emulation_of(form, infos)
        if emulation is None or len(shape) != 2:
            return f"{module} is stored as {TITLES[form]}, which eval does not emulate"
        missing = [part for part in emulation.parts if part not in infos]
        if missing:
            return f"{module}.{missing[0]} is missing"
        if form in INPUT_SCALES and self._rounds_input(module) and INPUT_SCALES[form] not in infos:
            return f"{module}.{INPUT_SCALES[form]} is missing"
        declared = self.subject.declared
        if form == "gptq" and declared is not None and declared.content.get("desc_act"):
            return f"{module} has its columns in order of activations (desc_act), which eval does not emulate"
        why = emulation.problem(infos, (shape[0], shape[1]))
        return f"{module}: {why}" if why else None

    def _rounds_input(self, module: str) -> bool:
        """Whether the engine quantizes what this module reads: what the config says, else whether a scale for it is stored."""
        scheme = self.subject.schemes.get(module)
        suffix = INPUT_SCALES.get(self.subject.form(module))
        if scheme is not None and scheme.kind in ("nvfp4", "fp8"):
            return scheme.activations
        return suffix is None or suffix in self.subject.modules[module]

    # ---- modules

    def layer_infos(self, index: int) -> list[TensorInfo]:
        return self._below(f"{self.prefix}layers.{index}.")

    def _below(self, start: str) -> list[TensorInfo]:
        return [info for name, info in self.tensors.items() if name.startswith(start)]

    def layer(self, mover: StreamedBody, index: int, tensors: Mapping[str, Tensor]) -> nn.Module:
        """transformers' decoder layer with the weights of this checkpoint, `tensors` by their full names."""
        with torch.device("meta"):
            module: nn.Module = Qwen3_5DecoderLayer(mover.text_config, index)
        self._fill(module, f"{self.prefix}layers.{index}.", tensors)
        if self.layer_types[index] == "full_attention":
            self._round_cache(module.get_submodule("self_attn"), f"{self.prefix}layers.{index}.self_attn")
        return module

    def draft_head(self, mover: StreamedBody) -> DraftHead:
        """The draft head, its weights read now."""
        with torch.device("meta"):
            head = DraftHead(mover.text_config)
        infos = self._below(self.model.MTP_PREFIX)
        self._fill(head, self.model.MTP_PREFIX, {info.name: read_tensor(info).to(mover.device) for info in infos})
        self._round_cache(head.get_submodule("layers.0.self_attn"), f"{self.model.MTP_PREFIX}layers.0.self_attn")
        return head

    def final_norm(self) -> Tensor:
        return self.checkpoint.read(f"{self.prefix}norm.weight")

    def embedding_rows(self, ids: Tensor) -> Tensor:
        return read_rows(self.tensors[f"{self.prefix}embed_tokens.weight"], ids)

    def vision_tower(self) -> dict[str, Tensor]:
        start = self.model.VISION_PREFIX
        return {info.name.removeprefix(start): read_tensor(info) for info in self._below(start)}

    def lm_head_piece(self, start: int, stop: int, device: torch.device) -> EmulatedLinear:
        """Rows start to stop of lm_head; start is a multiple of ROWS_MULTIPLE."""
        module, infos = self.lm_head_module, self.subject.modules[self.lm_head_module]
        num_rows = self.subject.called_for[f"{module}.{WEIGHT}"][0]
        parts = {suffix: self._piece(info, start, stop, num_rows, device) for suffix, info in infos.items()}
        return self._linear(module, parts, [parts])

    def _piece(self, info: TensorInfo, start: int, stop: int, num_rows: int, device: torch.device) -> Tensor:
        if len(info.shape) < 2 and info.num_params < num_rows:
            return read_tensor(info).to(device)
        if self.subject.form(self.lm_head_module) == "gptq":  # stored transposed
            columns = info.shape[1]
            return read_tensor(info)[:, start * columns // num_rows : -(-stop * columns // num_rows)].contiguous().to(device)
        first, last = start * info.shape[0] // num_rows, -(-stop * info.shape[0] // num_rows)
        row_bytes = info.num_bytes // info.shape[0]
        place = replace(
            info, shape=(last - first, *info.shape[1:]), offset=info.offset + first * row_bytes, num_bytes=(last - first) * row_bytes
        )
        return read_tensor(place).to(device)

    def _linear(self, module: str, parts: Mapping[str, Tensor], group: Sequence[Mapping[str, Tensor]]) -> EmulatedLinear:
        form = self.subject.form(module)
        if form == "plain":
            return EmulatedLinear(parts[WEIGHT].to(DTYPE))
        emulation = emulation_of(form, parts)
        assert emulation is not None
        return emulation.make(parts, group, self._rounds_input(module), DTYPE)

    def _fill(self, module: nn.Module, start: str, tensors: Mapping[str, Tensor]) -> None:
        """Puts the tensors below `start` into a module that is on the meta device."""
        owners: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for name, tensor in tensors.items():
            owner, _, suffix = name.rpartition(".")
            owners[owner][suffix] = tensor
        plain: dict[str, Tensor] = {}
        for owner, parts in owners.items():
            if self.subject.form(owner) in EMULATIONS:
                fused = [owners[member] for member in self._fused.get(owner, (owner,)) if member in owners]
                module.set_submodule(owner.removeprefix(start), self._linear(owner, parts, fused))
            else:
                plain |= {f"{owner}.{suffix}".removeprefix(start): t for suffix, t in parts.items() if suffix not in KV_SCALES}
        ready = {name: t.to(DTYPE) if t.is_floating_point() else t for name, t in plain.items()}
        module.load_state_dict(ready, strict=True, assign=True)
        module.eval().requires_grad_(False)

    def _round_cache(self, attention: nn.Module, name: str) -> None:
        """Has an attention layer compute with keys and values as an FP8 cache holds them."""
        if not self.kv_cache_fp8:
            return
        scales = {kind: self._kv_scale(name, kind) for kind in "kv"}

        def with_cache(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, {**kwargs, "past_key_values": FP8Cache(kwargs.get("past_key_values"), scales["k"], scales["v"])}

        attention.register_forward_pre_hook(with_cache, with_kwargs=True)

    def _kv_scale(self, attention: str, kind: str) -> float:
        """modelopt's name, then compressed-tensors'; without a stored one the engine takes 1."""
        names = (f"{attention}.{kind}_proj.{kind}_scale", f"{attention}.{kind}_scale")
        return next((self.subject.scalars[name] for name in names if name in self.subject.scalars), 1.0)


class FP8Cache:
    """Keys and values rounded to E4M3 under a scale each; `inner` is the cache that keeps them, if any does."""

    def __init__(self, inner: Any, k_scale: float, v_scale: float) -> None:
        self.inner, self.k_scale, self.v_scale = inner, k_scale, v_scale

    def update(self, keys: Tensor, values: Tensor, layer: int, *more: Any, **options: Any) -> tuple[Tensor, Tensor]:
        keys, values = (
            fp8.round_activations(x, torch.tensor(s, device=x.device)) for x, s in ((keys, self.k_scale), (values, self.v_scale))
        )
        return (keys, values) if self.inner is None else self.inner.update(keys, values, layer, *more, **options)


# ---- opening


def open_bodies(base: str | Path, checkpoints: Sequence[str | Path], kv_cache: str = "auto") -> tuple[Body, list[Body]]:
    """The base and the checkpoints to be held against it; InputError, from headers alone, for what cannot be."""
    found = Body(_as_loaded(base), "BF16", "bf16")
    _refuse_missing(found)
    if found.subject.quantized and any(not m.startswith(found.model.MTP_PREFIX) for m in found.subject.quantized):
        raise InputError(f"{found.checkpoint.path}: --base must be in BF16, {found.subject.quantized[0]} is quantized")
    others: list[Body] = []
    for given, name in zip(checkpoints, _names(checkpoints), strict=True):
        body = Body(_as_loaded(given), name, kv_cache)
        _refuse_other_model(body, found)
        _refuse_missing(body)
        _refuse_other_vocabulary(body.checkpoint.path, found.checkpoint.path)
        others.append(body)
    return found, others


def _as_loaded(path_or_id: str | Path) -> Checkpoint:
    """What the engine loads: every tensor of the files that the index names, and no other file."""
    opened = Checkpoint.open(path_or_id)
    return replace(opened, tensors={**opened.tensors, **opened.unindexed}, unindexed={})


def _names(checkpoints: Sequence[str | Path]) -> Iterator[str]:
    """The last part of each path, or as many as tell them apart."""
    paths = [Path(given).absolute() for given in checkpoints]
    places = [path.resolve() for path in paths]
    if len(set(places)) < len(places):
        twice = next(path for path, place in zip(paths, places, strict=True) if places.count(place) > 1)
        raise InputError(f"{twice}: named twice; name each checkpoint once")
    for path in paths:
        length = 1
        while any(other != path and other.parts[-length:] == path.parts[-length:] for other in paths):
            length += 1
        yield "/".join(path.parts[-length:])


def _refuse_missing(body: Body) -> None:
    vision = body.model.VISION_PREFIX
    wanted = {n: s for n, s in body.subject.called_for.items() if not n.startswith((body.model.MTP_PREFIX, vision))}
    for name, shape in wanted.items():
        if problem := body.problem(name, shape):
            raise InputError(f"{body.checkpoint.path}: {problem}; `mtpress check` says what is wrong with it")


def _refuse_other_model(body: Body, base: Body) -> None:
    """The same layers in the same sizes; how a checkpoint computes with them is its own config's business."""
    shapes, there = (
        {name.removeprefix(b.prefix): shape for name, shape in b.model.body_shapes(b.checkpoint.config, b.prefix, ("lm_head.",))}
        for b in (body, base)
    )
    if different := next((name for name in {**there, **shapes} if shapes.get(name) != there.get(name)), None):
        here, wanted = (f"{list(s[different])}" if different in s else "nothing" for s in (shapes, there))
        raise InputError(f"{body.checkpoint.path}: is of another model than the base: {different} is {here}, the base has {wanted}")


def _refuse_other_vocabulary(path: Path, base: Path) -> None:
    """A checkpoint without a tokenizer of its own is asked with the base's."""
    if not (path / "tokenizer.json").is_file() or not (base / "tokenizer.json").is_file():
        return
    here, there = (_vocabulary(folder / "tokenizer.json") for folder in (path, base))
    if here != there:
        odd = sorted(token for token in {**here, **there} if here.get(token) != there.get(token))
        raise InputError(
            f"{path}: its tokenizer is not the base's: {len(odd)} tokens differ, the first is {odd[0][:40]!r}; KL needs one vocabulary"
        )


def _vocabulary(path: Path) -> dict[str, int]:
    """Token → id, with the added ones."""
    content = read_json_object(path)
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    added = content.get("added_tokens")
    if not isinstance(vocabulary, Mapping) or not isinstance(added, list):
        raise InputError(f"{path}: has no model.vocab or no added_tokens; copy it from the base")
    extra = {token.get("content"): token.get("id") for token in added if isinstance(token, Mapping)}
    return {**vocabulary, **extra}
