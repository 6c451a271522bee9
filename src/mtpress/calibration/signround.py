"""The samples on their way through a body that is rounded by sign gradients, one decoder layer at a time.

In: the samples, a place for their hidden states, each layer's weights. Out: codes and scales of the layer's linears that the plan
quantizes, and its losses. Leaves out: the rounding itself (rounding/signround.py) and the stored layout (formats/int4.py).

Two streams of hidden states go through the body (calibration/two_streams.py): that of the BF16 weights, and that of the weights that
are stored. A layer is tuned so that what it makes of the second comes close to what its BF16 weights make of the first, as auto-round
does it (enable_quanted_input).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtpress.calibration.two_streams import TwoStreams
from mtpress.chat.sample import Sample
from mtpress.plan.plan import Plan, Step
from mtpress.rounding.batches import piece_tokens, pieces
from mtpress.rounding.signround import Losses, Settings, install, tune


class SignRoundPass(TwoStreams):
    """layer() for every decoder layer from `first_layer` on, in order; close() at the end. The losses of each layer are in `losses`.

    directory holds the hidden states. first_layer: 0, or the layer that a stopped run goes on with.
    """

    def __init__(
        self, plan: Plan, samples: Sequence[Sample], device: torch.device, directory: Path, settings: Settings, *, first_layer: int = 0
    ) -> None:
        super().__init__(plan, samples, device, directory, first_layer)
        self.settings = settings
        self.losses: dict[int, Losses] = {}

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

        self.move(module, self.exact)
        with self.body.delta_rule(module, gradients=True):
            found, losses = tune(linears, _Block(self, module), self.settings, order=f"layer {step.layer}")
        self.losses[step.layer] = losses
        install(linears, found)
        self.move(module, self.rounded)
        del module, linears  # their weights make room for the codes
        return {f"{start}{name}": (rounded.codes.cpu(), rounded.scales.cpu()) for name, rounded in found.items()}


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
