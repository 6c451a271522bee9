"""The samples on their way through a body that is rounded by sign gradients, one decoder layer at a time.

In: the samples, a place for their hidden states, each layer's weights. Out: codes and scales of the layer's linears that the plan
quantizes, and its losses. Leaves out: the rounding itself (rounding/signround.py) and the stored layout (formats/int4.py).

Two streams of hidden states go through the body: `hidden`, that of the BF16 weights, and `hidden-rounded`, that of the weights that
are stored. A layer is tuned so that what it makes of the second comes close to what its BF16 weights make of the first, as auto-round
does it (enable_quanted_input). Both streams keep three boundaries on disk, so a stopped run goes on as after calibration.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtpress.calibration_pass import embed
from mtpress.chat import Sample
from mtpress.hidden_states import DiskStates
from mtpress.models.qwen3_5_layers import StreamedBody
from mtpress.plan import Plan, Step
from mtpress.rounding.signround import Losses, Settings, install, tune
from mtpress.tuning_batches import piece_tokens, pieces

ROUNDED_STREAM = "hidden-rounded"


class SignRoundPass:
    """layer() for every decoder layer from `first_layer` on, in order; close() at the end. The losses of each layer are in `losses`.

    directory holds the hidden states. first_layer: 0, or the layer that a stopped run goes on with.
    """

    whole_layers = True  # layer() wants every tensor of its layer

    def __init__(
        self, plan: Plan, samples: Sequence[Sample], device: torch.device, directory: Path, settings: Settings, *, first_layer: int = 0
    ) -> None:
        self.plan, self.settings = plan, settings
        self.losses: dict[int, Losses] = {}
        lengths = [len(sample.input_ids) for sample in samples]
        place: Any = {"boundary": first_layer, "pinned": device.type == "cuda"}
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

    @torch.no_grad()
    def layer(self, step: Step, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """Name of a quantized module → (codes uint8 [N, K], scales float16 [N, K/128]), on the CPU.

        InputError names a matrix that cannot be tuned.
        """
        assert step.layer is not None
        start = f"{self.plan.prefix}layers.{step.layer}."
        module = self.body.decoder_layer(step.layer, {name.removeprefix(start): tensor for name, tensor in tensors.items()})
        wanted = [name.removeprefix(start).removesuffix(".weight") for name in step.quantized]
        linears = {name: linear for name, linear in module.named_modules() if name in wanted and isinstance(linear, nn.Linear)}
        assert len(linears) == len(wanted)

        self._move(module, self.exact)
        with self.body.delta_rule(module, gradients=True):
            found, losses = tune(linears, _Block(self, module), self.settings, order=f"layer {step.layer}")
        self.losses[step.layer] = losses
        install(linears, found)
        self._move(module, self.rounded)
        del module, linears  # their weights make room for the codes
        return {f"{start}{name}": (rounded.codes.cpu(), rounded.scales.cpu()) for name, rounded in found.items()}

    def _move(self, module: nn.Module, states: DiskStates) -> None:
        """Moves every sample of a stream through the layer."""
        with self.body.delta_rule(module):
            for i, positions in enumerate(self.body.positions):
                states.put(i, self.body.through(module, states.get(i).to(self.body.device, non_blocking=True), positions))
        states.advance()

    def sync(self, step: Step) -> None:
        """Waits until the states of both streams behind the layer of this step are on the disk."""
        assert step.layer is not None
        self.exact.sync(step.layer + 1)
        self.rounded.sync(step.layer + 1)

    def close(self) -> None:
        self.exact.close()
        self.rounded.close()


class _Block:
    """A layer's output error. Samples of a batch go side by side, filled up with zeros behind: what follows a token does not change it.

    The loss is the mean over all elements of the batch's samples, fill left out; so a long sample counts for more than a short one.
    """

    def __init__(self, owner: SignRoundPass, module: nn.Module) -> None:
        self.owner, self.module = owner, module
        self.lengths = [len(sample.input_ids) for sample in owner.body.samples]
        self.num_samples = len(self.lengths)
        self.piece_tokens = piece_tokens(owner.plan.source.text_config)

    def pieces(self, batch: Sequence[int]) -> list[list[int]]:
        return pieces(self.lengths, batch, self.piece_tokens)

    def loss(self, piece: Sequence[int], batch: Sequence[int]) -> Tensor:
        body, width = self.owner.body, max(self.lengths[i] for i in piece)
        inputs = [F.pad(self.owner.rounded.peek(i), (0, 0, 0, width - self.lengths[i])) for i in piece]
        positions = [F.pad(body.positions[i], (0, width - self.lengths[i])) for i in piece]
        made = body.through(self.module, torch.cat(inputs).to(body.device), torch.cat(positions, 1))
        errors = [
            (made[at, : self.lengths[i]].float() - self.owner.exact.peek(i)[0].to(body.device).float()).square().sum()
            for at, i in enumerate(piece)
        ]
        return torch.stack(errors).sum() / (sum(self.lengths[i] for i in batch) * made.shape[-1])
