"""A small reference generator: KV cache, recurrent state and speculative decoding with the draft head, in plain PyTorch.

In: a checkpoint (BF16, or NVFP4 in modelopt layout with its activation rounding emulated) and a Sample. Out: a
`Generation`: tokens, and how many drafts were accepted at each position. Leaves out: batching and speed; engines have both.

It computes in float32, so that one token at a time and several at once round alike and greedy text does not depend on
the draft head; what is left to differ is what differs in the arithmetic itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5TextModel

from mtpress.chat.sample import Sample
from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.errors import InputError
from mtpress.formats import nvfp4
from mtpress.models import family
from mtpress.models.qwen3_5.draft_head import DraftHead
from mtpress.models.qwen3_5.layers import StreamedBody

DTYPE = torch.float32


class NVFP4Linear(nn.Module):
    """A linear whose weight was dequantized and whose input is rounded as W4A4 kernels round it."""

    def __init__(self, weight: Tensor, input_scale: Tensor) -> None:
        super().__init__()
        self.weight, self.input_scale = weight, input_scale

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(nvfp4.round_activations(x, self.input_scale), self.weight)


@dataclass
class Generation:
    """token_ids without the prompt. accepted[k]: how many steps accepted their draft at position k (and all before it)."""

    token_ids: list[int]
    num_steps: int
    num_drafts: int
    accepted: list[int]

    @property
    def acceptance(self) -> list[float]:
        """Per position: accepted / drafts, as vLLM counts it."""
        return [count / self.num_drafts if self.num_drafts else 0.0 for count in self.accepted]

    @property
    def tokens_per_step(self) -> float:
        return len(self.token_ids) / self.num_steps if self.num_steps else 0.0


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; otherwise top_k and top_p cut the distribution and `seed` fixes the draws."""

    temperature: float = 0.0
    top_k: int = 20
    top_p: float = 0.95
    seed: int = 0

    def probabilities(self, logits: Tensor) -> Tensor:
        """float32 [..., vocabulary] after temperature, top_k and top_p."""
        scaled = logits.float() / self.temperature
        if 0 < self.top_k < scaled.shape[-1]:
            scaled = scaled.masked_fill(scaled < scaled.topk(self.top_k).values[..., -1:], float("-inf"))
        ordered, place = scaled.softmax(-1).sort(-1, descending=True)
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= self.top_p, 0.0)
        cut = torch.zeros_like(ordered).scatter(-1, place, ordered)
        return cut / cut.sum(-1, keepdim=True)


class Generator:
    """Holds a whole checkpoint in memory: meant for small models and for checking engines, not for serving."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.model = family(checkpoint.model_type)
        self.entry = StreamedBody(checkpoint.config, torch.device("cpu"), DTYPE)  # embeddings, pictures, positions
        config = self.entry.text_config
        prefix = self.model.body_prefix(checkpoint.tensors)
        self.prefix = prefix
        with torch.device("meta"):
            self.body = Qwen3_5TextModel(config)
        self.body.rotary_emb = self.entry.rotary
        self._load(self.body, prefix)
        self.embeddings: Tensor = self.body.embed_tokens.weight
        self.lm_head = checkpoint.read("lm_head.weight").to(DTYPE) if "lm_head.weight" in checkpoint.tensors else self.embeddings
        self.head: DraftHead | None = None
        if self.model.MTP_TENSORS[0] in checkpoint.tensors:
            with torch.device("meta"):
                self.head = DraftHead(config)
            self._load(self.head, self.model.MTP_PREFIX)

    def _load(self, module: nn.Module, prefix: str) -> None:
        stored = {n.removeprefix(prefix): n for n in self.checkpoint.tensors if n.startswith(prefix)}
        weights = {}
        for short, name in stored.items():
            owner = short.removesuffix(".weight")
            if self.checkpoint.tensors[name].dtype == "U8":
                parts = {s: self.checkpoint.read(f"{prefix}{owner}.{s}") for s in (nvfp4.SCALE, nvfp4.SCALE_2, nvfp4.INPUT_SCALE)}
                weight = nvfp4.dequantize(self.checkpoint.read(name), parts[nvfp4.SCALE], parts[nvfp4.SCALE_2])
                module.set_submodule(owner, NVFP4Linear(weight, parts[nvfp4.INPUT_SCALE]))
            elif not short.endswith((nvfp4.SCALE, nvfp4.SCALE_2, nvfp4.INPUT_SCALE)) and not short.startswith("visual."):
                weights[short] = self.checkpoint.read(name).to(DTYPE)
        missing, unexpected = module.load_state_dict(weights, strict=False, assign=True)
        if missing or unexpected:
            raise InputError(f"{self.checkpoint.path}: {(missing + unexpected)[0]} does not fit the model that config.json describes")
        module.eval().requires_grad_(False)

    def logits(self, states: Tensor) -> Tensor:
        return F.linear(states, self.lm_head)

    @torch.no_grad()
    def generate(
        self,
        sample: Sample,
        max_new_tokens: int,
        *,
        num_drafts: int = 0,
        sampling: Sampling | None = None,
        stop_ids: frozenset[int] = frozenset(),
    ) -> Generation:
        """Continues one sample; num_drafts tokens are drafted a step by the MTP head (0: one token a step).

        Speculation changes nothing: greedy drafts are kept where they are the argmax, sampled ones by rejection
        sampling (Leviathan et al. 2022, arXiv 2211.17192), so tokens follow the body's own distribution.
        """
        if num_drafts and self.head is None:
            raise InputError(f"{self.checkpoint.path}: has no draft head to draft with")
        return _Run(self, sample, sampling or Sampling(), num_drafts).go(max_new_tokens, stop_ids)


class _Run:
    """One generation: the caches of body and head, and the position both have reached."""

    def __init__(self, owner: Generator, sample: Sample, sampling: Sampling, num_drafts: int) -> None:
        self.owner, self.sampling, self.num_drafts = owner, sampling, num_drafts
        self.dice = torch.Generator().manual_seed(sampling.seed)
        self.cache = DynamicCache(config=owner.entry.text_config)
        self.head_cache = DynamicCache()
        self.prompt = sample
        self.position = 0  # the next M-RoPE position, all three rows alike after the prompt

    def go(self, max_new_tokens: int, stop_ids: frozenset[int]) -> Generation:
        states, positions = self._prefill()
        result = Generation([], 0, 0, [0] * self.num_drafts)
        token = self._choose(self.owner.logits(states[:, -1]))
        result.token_ids.append(token)
        result.num_steps = 1
        drafted_from = self._follow(states, [*self.prompt.input_ids[1:].tolist(), token], positions)
        while len(result.token_ids) < max_new_tokens and not stop_ids.intersection(result.token_ids):
            drafts, odds = self._draft(drafted_from)
            states, accepted, token = self._verify(token, drafts, odds)
            result.num_steps += 1
            result.num_drafts += bool(drafts)
            for k in range(accepted):
                result.accepted[k] += 1
            result.token_ids += [*drafts[:accepted], token]
            steps = torch.arange(accepted + 1).expand(3, 1, -1) + self.position
            self.position += accepted + 1
            drafted_from = self._follow(states[:, : accepted + 1], [*drafts[:accepted], token], steps)
        stop = next((i + 1 for i, t in enumerate(result.token_ids) if t in stop_ids), len(result.token_ids))
        result.token_ids = result.token_ids[: min(stop, max_new_tokens)]
        return result

    def _prefill(self) -> tuple[Tensor, Tensor]:
        entry, owner = self.owner.entry, self.owner
        entry.embed([self.prompt], lambda ids: owner.embeddings[ids])
        if self.prompt.has_pictures:
            prefix = owner.model.VISION_PREFIX
            names = [n for n in owner.checkpoint.tensors if n.startswith(prefix)]
            if not names:
                raise InputError(f"{owner.checkpoint.path}: has no vision tower, so it cannot take images")
            entry.see({n.removeprefix(prefix): owner.checkpoint.read(n) for n in names})
        positions = entry.positions[0]
        self.position = int(positions.max()) + 1
        return self._body(entry.states.get(0), positions), positions

    def _body(self, embeds: Tensor, positions: Tensor) -> Tensor:
        out = self.owner.body(inputs_embeds=embeds, position_ids=positions, past_key_values=self.cache, use_cache=True)
        return out.last_hidden_state  # type: ignore[no-any-return]

    def _embed(self, ids: list[int]) -> Tensor:
        return self.owner.embeddings[torch.tensor(ids)].unsqueeze(0)

    def _head(self, ids: list[int], states: Tensor, positions: Tensor) -> Tensor:
        """The draft head over `states` [1, m, hidden], each with the token that follows it; its cache grows by m."""
        assert self.owner.head is not None
        past, m = self.head_cache.get_seq_length(), len(ids)
        mask = torch.ones(m, past + m, dtype=torch.bool).tril(past)[None, None]
        rope = self.owner.entry.rotary(states, positions)
        return self.owner.head(self._embed(ids), states, rope, mask, self.head_cache)  # type: ignore[no-any-return]

    def _follow(self, states: Tensor, next_ids: list[int], positions: Tensor) -> Tensor | None:
        """Takes what the body has settled into the head's cache; the last output is where drafting starts."""
        if not self.num_drafts:
            return None
        return self._head(next_ids, states, positions)[:, -1:]

    def _draft(self, start: Tensor | None) -> tuple[list[int], list[Tensor]]:
        """num_drafts tokens by running the one layer recursively, and the distributions they were drawn from."""
        if start is None:
            return [], []
        settled, z = self.head_cache.get_seq_length(), start
        drafts: list[int] = []
        odds: list[Tensor] = []
        for k in range(self.num_drafts):
            if k:
                z = self._head([drafts[-1]], z, torch.full((3, 1, 1), self.position + k - 1))
            logits = self.owner.logits(z[:, -1])
            if self.sampling.temperature:
                odds.append(self.sampling.probabilities(logits)[0])
            drafts.append(self._choose(logits))
        for layer in self.head_cache.layers:
            layer.keys, layer.values = layer.keys[:, :, :settled], layer.values[:, :, :settled]
        return drafts, odds

    def _verify(self, token: int, drafts: list[int], odds: list[Tensor]) -> tuple[Tensor, int, int]:
        """(hidden states of the fed tokens, how many drafts hold, the body's own next token)."""
        fed = [token, *drafts]
        before = self._snapshot() if drafts else None
        positions = torch.arange(len(fed)).expand(3, 1, -1) + self.position
        states = self._body(self._embed(fed), positions)
        logits = self.owner.logits(states)[0]
        accepted, following = self._accept(logits, drafts, odds)
        if before is not None and accepted < len(drafts):
            self._restore(before)
            kept = accepted + 1
            self._body(self._embed(fed[:kept]), positions[:, :, :kept])
        return states, accepted, following

    def _accept(self, logits: Tensor, drafts: list[int], odds: list[Tensor]) -> tuple[int, int]:
        for k, draft in enumerate(drafts):
            if not self.sampling.temperature:
                if int(logits[k].argmax()) != draft:
                    return k, int(logits[k].argmax())
                continue
            wanted = self.sampling.probabilities(logits[k])
            if float(torch.rand((), generator=self.dice)) * float(odds[k][draft]) > float(wanted[draft]):
                rest = (wanted - odds[k]).clamp(min=0)
                return k, int(torch.multinomial(rest / rest.sum(), 1, generator=self.dice))
        return len(drafts), self._choose(logits[len(drafts) : len(drafts) + 1])

    def _choose(self, logits: Tensor) -> int:
        """One token from logits [1, vocabulary]."""
        if not self.sampling.temperature:
            return int(logits.argmax())
        return int(torch.multinomial(self.sampling.probabilities(logits)[0], 1, generator=self.dice))

    def _snapshot(self) -> list[Mapping[str, Any]]:
        saved: list[Mapping[str, Any]] = []
        for layer in self.cache.layers:
            if hasattr(layer, "recurrent_states"):
                saved.append({"conv": layer.conv_states[0].clone(), "recurrent": layer.recurrent_states[0].clone()})
            else:
                saved.append({"length": layer.keys.shape[2]})
        return saved

    def _restore(self, saved: list[Mapping[str, Any]]) -> None:
        for layer, was in zip(self.cache.layers, saved, strict=True):
            if "length" in was:
                layer.keys, layer.values = layer.keys[:, :, : was["length"]], layer.values[:, :, : was["length"]]
            else:
                layer.conv_states[0], layer.recurrent_states[0] = was["conv"], was["recurrent"]
