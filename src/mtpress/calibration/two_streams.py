"""Two streams of hidden states on their way through a body that is rounded layer by layer.

In: the samples, a place for their hidden states. Out: `exact`, what the BF16 weights make of the samples, and `rounded`, what the stored
weights make of them. Leaves out: how a layer is rounded (calibration/signround.py, calibration/gptq.py). Both streams keep three
boundaries on disk, so a stopped run goes on as after calibration.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mtpress.calibration.forward import embed
from mtpress.calibration.kv_cache import SeenCache
from mtpress.chat.sample import Sample
from mtpress.models.hidden_states import STREAM, DiskStates
from mtpress.models.qwen3_5.layers import StreamedBody
from mtpress.plan.plan import Plan, Step

ROUNDED_STREAM = "hidden-rounded"


class TwoStreams:
    """move() takes a stream through a layer; sync() after each layer; close() at the end.

    directory holds the hidden states. first_layer: 0, or the layer that a stopped run goes on with.
    """

    whole_layers = True  # a layer is rounded with all of its tensors in memory

    def __init__(self, plan: Plan, samples: Sequence[Sample], device: torch.device, directory: Path, first_layer: int) -> None:
        self.plan = plan
        lengths = [len(sample.input_ids) for sample in samples]
        place: Any = {"boundary": first_layer, "pinned": device.type == "cuda", "hashed": True}
        hidden_size = plan.source.text_config["hidden_size"]
        self.exact = DiskStates(directory, lengths, hidden_size, **place)
        self.rounded = DiskStates(directory, lengths, hidden_size, stream=ROUNDED_STREAM, **place)
        self.body = StreamedBody(plan.source.config, device, states=self.exact)
        if first_layer:
            self.body.place(samples)
        else:
            embed(plan, self.body, samples)
            self.exact.settle()
            for i in range(len(samples)):
                self.rounded.put(i, self.exact.peek(i))
            self.exact.advance()
            self.rounded.advance()

    def move(self, module: nn.Module, states: DiskStates, cache: SeenCache | None = None) -> None:
        """Moves every sample of a stream through the layer. cache: sees what a full-attention layer would cache."""
        with self.body.delta_rule(module):
            for i, positions in enumerate(self.body.positions):
                states.put(i, self.body.through(module, states.get(i).to(self.body.device, non_blocking=True), positions, cache))
        states.advance()

    def sync(self, step: Step) -> None:
        """Waits until the states of both streams behind the layer of this step are on the disk."""
        assert step.layer is not None
        self.exact.sync(step.layer + 1)
        self.rounded.sync(step.layer + 1)

    def states_sha256(self) -> dict[str, str]:
        """Stream → SHA-256 of what all samples hold behind the last layer."""
        return {STREAM: self.exact.sha256(), ROUNDED_STREAM: self.rounded.sha256()}

    def close(self) -> None:
        self.exact.close()
        self.rounded.close()
