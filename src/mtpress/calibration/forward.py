"""The calibration samples on their way through the body: one decoder layer at a time, with what its linears read.

In: the samples, a place for their hidden states, each layer's weights. Out: an `InputAmax` a layer. Leaves out: reading the
weights (checkpoint/prefetch.py), what is made of the statistics (quantization/rounders.py), and spreading the samples over workers
(quantization/worker_pool.py).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from mtpress.calibration.block_hessian import InputHessian
from mtpress.calibration.kv_cache import SeenCache
from mtpress.calibration.samples import InputAmax
from mtpress.chat.sample import Sample
from mtpress.checkpoint.safetensors import read_rows, read_tensor
from mtpress.models import family
from mtpress.models.hidden_states import STREAM, DiskStates
from mtpress.models.qwen3_5.layers import StreamedBody
from mtpress.plan.plan import Plan, Step


def embed(plan: Plan, body: StreamedBody, samples: Sequence[Sample]) -> None:
    """Puts the samples in front of the first layer: embeddings of their tokens, the vision tower's patches for their pictures."""
    tensors, model = plan.source.tensors, family(plan.source.model_type)
    embeddings = tensors[f"{plan.prefix}embed_tokens.weight"]
    body.embed(samples, lambda ids: read_rows(embeddings, ids))
    if any(sample.has_pictures for sample in samples):
        tower = {n.removeprefix(model.VISION_PREFIX): i for n, i in tensors.items() if n.startswith(model.VISION_PREFIX)}
        body.see({name: read_tensor(info) for name, info in tower.items()})


class CalibrationPass:
    """layer() for every decoder layer from `first_layer` on, in order; close() at the end.

    directory holds the hidden states. A worker has some of the samples: `lengths` are those of all, and `members` says which of
    all its own are. first_layer: 0, or the layer that a stopped run goes on with.
    """

    whole_layers = True  # layer() wants every tensor of its layer

    def __init__(
        self,
        plan: Plan,
        samples: Sequence[Sample],
        device: torch.device,
        directory: Path,
        lengths: Sequence[int] | None = None,
        *,
        members: Sequence[int] | None = None,
        first_layer: int = 0,
    ) -> None:
        self.plan = plan
        lengths = lengths or [len(sample.input_ids) for sample in samples]
        hidden_size = plan.source.text_config["hidden_size"]
        self.states = DiskStates(
            directory, lengths, hidden_size, boundary=first_layer, members=members, pinned=device.type == "cuda", hashed=True
        )
        self.body = StreamedBody(plan.source.config, device, states=self.states)
        if first_layer:
            self.body.place(samples)
        else:
            embed(plan, self.body, samples)

    def layer(self, step: Step, tensors: Mapping[str, torch.Tensor]) -> InputAmax:
        """Moves the samples through the layer of this step; what its linears read, on the CPU."""
        assert step.layer is not None
        amax = InputAmax()
        start = f"{self.plan.prefix}layers.{step.layer}."
        if self.plan.recipe.rounding == "hessian":  # linears of one job read the same input
            first = [job.sources[0].name for job in step.weighted]
            amax = InputAmax(hessian=InputHessian(), weighted={n.removeprefix(start).removesuffix(".weight") for n in first})
        cache = SeenCache(amax) if self.plan.recipe.kv_cache == "fp8" else None
        self.body.layer(step.layer, {name.removeprefix(start): tensor for name, tensor in tensors.items()}, amax, cache)
        return amax

    def sync(self, step: Step) -> None:
        """Waits until the states behind the layer of this step are on the disk."""
        assert step.layer is not None
        self.states.sync(step.layer + 1)

    def states_sha256(self) -> dict[str, str]:
        """Stream → SHA-256 of what all samples hold behind the last layer."""
        return {STREAM: self.states.sha256()}

    def close(self) -> None:
        self.states.close()
