"""The one-layer Multi-Token-Prediction head of Qwen3.5-class models, which transformers leaves out.

In: hidden states of the body after its final norm, and the embedding of the next token. Out: hidden states whose
logits, by the body's lm_head, predict the token after that. Leaves out: embeddings and lm_head, which are the body's.
"""

import copy
from typing import Any

import torch
from torch import nn
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5DecoderLayer, Qwen3_5RMSNorm


class DraftHead(nn.Module):
    """Parameters are named as in the checkpoint below `mtp.`: fc, layers.0.*, norm, pre_fc_norm_embedding, pre_fc_norm_hidden.

    z⁰ = h (after the final norm); zᵏ = norm(layer(fc[rms(e(next token)); rms(zᵏ⁻¹)])), embedding first.
    Source: vLLM 0.32, model_executor/models/qwen3_5_mtp.py.
    """

    def __init__(self, config: Qwen3_5TextConfig) -> None:
        super().__init__()
        layer_config = copy.deepcopy(config)
        layer_config.layer_types = ["full_attention"]
        layer_config.num_hidden_layers = 1
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.layers = nn.ModuleList([Qwen3_5DecoderLayer(layer_config, 0)])
        self.norm = Qwen3_5RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.pre_fc_norm_embedding = Qwen3_5RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.pre_fc_norm_hidden = Qwen3_5RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        next_embeds: torch.Tensor,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
    ) -> torch.Tensor:
        """next_embeds, hidden_states: [B, T, hidden] → [B, T, hidden]; the cache, if given, grows by T."""
        joined = torch.cat([self.pre_fc_norm_embedding(next_embeds), self.pre_fc_norm_hidden(hidden_states)], dim=-1)
        states = self.layers[0](
            self.fc(joined),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
        )
        return self.norm(states)  # type: ignore[no-any-return]
