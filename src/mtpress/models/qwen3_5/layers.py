"""The forward of the body, one decoder layer at a time, with transformers' own layer modules and weights streamed in.

In: token ids and pixels of samples (batch 1, no padding), then each layer's weights as they come from disk. Out: the
hidden states of every sample and, through a callback, what each linear reads. Leaves out: lm_head and the draft head, and
where the hidden states wait between two layers (models/hidden_states.py).

On CPU, with delta_rule="transformers", the final hidden states equal those of transformers' whole model bit for bit: same
modules, same dtype, same order. By default linear-attention layers use the faster rule of gated_delta_rule.py, which differs
from transformers' in the order of float32 operations only.
"""

import copy
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import Qwen3_5Config, Qwen3_5TextConfig
from transformers.models.qwen3_5 import modeling_qwen3_5
from transformers.models.qwen3_5.modeling_qwen3_5 import (
    Qwen3_5DecoderLayer,
    Qwen3_5Model,
    Qwen3_5RMSNorm,
    Qwen3_5TextRotaryEmbedding,
    Qwen3_5VisionModel,
)

from mtpress.chat.sample import Sample
from mtpress.errors import InputError
from mtpress.models.gated_delta_rule import chunk_gated_delta_rule
from mtpress.models.gated_delta_rule_gradient import differentiable_rule
from mtpress.models.hidden_states import DiskStates, MemoryStates

InputSeen = Callable[[str, Tensor], None]  # (linear's name within the layer, its input [1, T, K])


def model_config(config: Mapping[str, Any]) -> Qwen3_5Config:
    """transformers' config object of a config.json; a text-only one is wrapped, with no vision tower of its own."""
    plain = copy.deepcopy({k: v for k, v in config.items() if k != "quantization_config"})
    try:
        text_only = plain.get("model_type") == "qwen3_5_text"
        wrapped = Qwen3_5Config(text_config=plain) if text_only else Qwen3_5Config(**plain)
        wrapped._attn_implementation = "sdpa"
        for inner in (wrapped.text_config, wrapped.vision_config):
            inner._attn_implementation = "sdpa"
        return wrapped
    except Exception as error:  # transformers validates with exceptions of many kinds
        raise InputError(f"config.json: transformers does not accept it ({str(error).strip().splitlines()[0][:160]})") from None


def with_weights(module: nn.Module, weights: Mapping[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """A module built on the meta device, given its weights without a copy; floating weights in `dtype`, as transformers loads them."""
    ready = {name: w.to(dtype) if w.is_floating_point() else w for name, w in weights.items()}
    module.load_state_dict(ready, strict=True, assign=True)
    return module.eval().requires_grad_(False)


@contextmanager
def fast_delta_rule(layer: nn.Module, rule: Callable[..., Any] | None = None) -> Iterator[None]:
    """While it lasts, a linear-attention layer's forward calls mtpress's rule; afterwards transformers' own is back in place.

    rule: differentiable_rule where gradients are wanted.
    """
    ours = rule or chunk_gated_delta_rule
    mixer: Any = layer.linear_attn
    # transformers 5.14 keeps the rule in the module, 5.19 calls a global name
    place, name = (
        (mixer, "chunk_gated_delta_rule")
        if hasattr(mixer, "chunk_gated_delta_rule")
        else (modeling_qwen3_5, "torch_chunk_gated_delta_rule")
    )
    theirs, num_v_heads = getattr(place, name), mixer.num_v_heads
    mixer.num_v_heads = mixer.num_k_heads  # keys are repeated for value heads only where these differ; our rule needs no copies
    setattr(place, name, ours)
    try:
        yield
    finally:
        setattr(place, name, theirs)
        mixer.num_v_heads = num_v_heads


@contextmanager
def reading(module: nn.Module, seen: InputSeen) -> Iterator[None]:
    """While it lasts, seen(name, inputs) is called before each linear of a layer."""
    hooks = [
        linear.register_forward_pre_hook(lambda _, args, name=name: seen(name, args[0]), prepend=True)
        for name, linear in module.named_modules()
        if isinstance(linear, nn.Linear)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class StreamedBody:
    """Hidden states of all samples, moved through the body layer by layer.

    embed() first, see() next if any sample has pictures, then layer() for every layer in order, final_norm() last. A run that
    was stopped calls place() instead of the first two: its states are on disk.

    delta_rule: "mtpress" for the fast chunked rule (on CUDA only where flash-linear-attention's kernel is missing),
    "transformers" for whatever transformers takes.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        device: torch.device,
        dtype: torch.dtype = torch.bfloat16,
        states: MemoryStates | DiskStates | None = None,
        delta_rule: Literal["mtpress", "transformers"] = "mtpress",
    ) -> None:
        self.config = model_config(config)
        self.text_config: Qwen3_5TextConfig = self.config.text_config
        self.device, self.dtype = device, dtype
        has_kernel = device.type == "cuda" and importlib.util.find_spec("fla") is not None
        self._own_delta_rule = delta_rule == "mtpress" and not has_kernel
        try:
            self.rotary = Qwen3_5TextRotaryEmbedding(config=self.text_config).to(device)
        except Exception as error:  # rope parameters of a kind that transformers knows but cannot compute from
            raise InputError(f"config.json: rope_parameters do not work ({str(error)[:120] or type(error).__name__})") from None
        self.samples: list[Sample] = []
        self.states = states or MemoryStates()
        self.positions: list[Tensor] = []
        self._begun = False

    def place(self, samples: Sequence[Sample]) -> None:
        """Says which samples these are; their hidden states stand in front of the layer that comes next."""
        self.samples = list(samples)
        self.positions = [self._positions(s) for s in samples]
        self._begun = True

    @torch.no_grad()
    def embed(self, samples: Sequence[Sample], rows: Callable[[Tensor], Tensor]) -> None:
        """Starts the samples: rows(token ids) gives their embeddings [T, hidden]."""
        self.place(samples)
        self._begun = False
        for i, sample in enumerate(samples):
            self.states.put(i, rows(sample.input_ids).to(self.dtype).unsqueeze(0))

    def _positions(self, sample: Sample) -> Tensor:
        """int64 [3, 1, T]: M-RoPE positions, transformers' own rule."""
        ids = sample.input_ids.unsqueeze(0)
        if not sample.has_pictures:
            return torch.arange(ids.shape[1]).expand(3, 1, -1)
        kinds = (ids == self.config.image_token_id).int() + 2 * (ids == self.config.video_token_id).int()
        holder = Qwen3_5Model.__new__(Qwen3_5Model)
        nn.Module.__init__(holder)
        holder.config = self.config
        grids = {"image_grid_thw": sample.image_grid_thw, "video_grid_thw": sample.video_grid_thw}
        positions, _ = Qwen3_5Model.get_rope_index(holder, ids, kinds, **grids)
        return positions  # type: ignore[no-any-return]

    @torch.no_grad()
    def see(self, weights: Mapping[str, Tensor]) -> None:
        """Puts the merged patches of each picture and video, from the real vision tower, in the place of its placeholders."""
        with torch.device("meta"):
            tower = Qwen3_5VisionModel(self.config.vision_config)
        tower.rotary_pos_emb = type(tower.rotary_pos_emb)(self.config.vision_config)
        tower = with_weights(tower, weights, self.dtype).to(self.device)
        self.states.settle()
        for i, sample in enumerate(self.samples):
            if not sample.has_pictures:
                continue
            states = self.states.get(i)
            for pixels, grid, token in (
                (sample.pixel_values, sample.image_grid_thw, self.config.image_token_id),
                (sample.pixel_values_videos, sample.video_grid_thw, self.config.video_token_id),
            ):
                if pixels is not None and grid is not None:
                    seen = tower(pixels.to(self.device, self.dtype), grid_thw=grid.to(self.device)).pooler_output
                    states[0, sample.input_ids == token] = seen.to(states.device, states.dtype)
            self.states.put(i, states)

    @torch.no_grad()
    def layer(self, index: int, weights: Mapping[str, Tensor], input_seen: InputSeen | None = None, cache: Any = None) -> None:
        """Moves every sample through one decoder layer; weights by their names within the layer.

        cache: what a full-attention layer hands its keys and values to (update of kv_cache.SeenCache), and takes them from.
        """
        module = self.decoder_layer(index, weights)
        if not self._begun:
            self.states.advance()
            self._begun = True
        with self.delta_rule(module), reading(module, input_seen) if input_seen is not None else nullcontext():
            for i, positions in enumerate(self.positions):
                states = self.states.get(i).to(self.device, non_blocking=True)
                self.states.put(i, self.through(module, states, positions, cache if hasattr(module, "self_attn") else None))
        self.states.advance()

    def decoder_layer(self, index: int, weights: Mapping[str, Tensor]) -> nn.Module:
        """transformers' layer with these weights."""
        with torch.device("meta"):
            module = Qwen3_5DecoderLayer(self.text_config, index)
        return with_weights(module, weights, self.dtype)

    def delta_rule(self, module: nn.Module, gradients: bool = False) -> AbstractContextManager[None]:
        """While it lasts, a layer computes with the rule that was chosen; with `gradients`, autograd passes through it."""
        if not self._own_delta_rule or not hasattr(module, "linear_attn"):
            return nullcontext()
        return fast_delta_rule(module, differentiable_rule if gradients else None)

    def through(self, module: nn.Module, states: Tensor, positions: Tensor, cache: Any = None) -> Tensor:
        """States [B, T, hidden] behind a layer; positions int64 [3, B, T]."""
        rope = self.rotary(states, positions.to(states.device))
        return module(states, position_embeddings=rope, attention_mask=None, past_key_values=cache)  # type: ignore[no-any-return]

    def norm(self, weight: Tensor) -> nn.Module:
        """transformers' final norm with this weight."""
        with torch.device("meta"):
            norm = Qwen3_5RMSNorm(self.text_config.hidden_size, eps=self.text_config.rms_norm_eps)
        return with_weights(norm, {"weight": weight.to(self.device)}, self.dtype)

    @torch.no_grad()
    def final_norm(self, weight: Tensor) -> list[Tensor]:
        """The final hidden states [1, T, hidden] of every sample, as transformers returns them."""
        norm = self.norm(weight)
        return [norm(self.states.get(i).to(self.device)).cpu() for i in range(len(self.samples))]
