"""All bodies of a run side by side, one decoder layer at a time, over the same tokens.

In: the base, the checkpoints, the documents. Out: the final hidden states of each body on disk, behind its final norm, and how far
each layer of a checkpoint is from the base's (`LayerError`). Leaves out: logits (vocabulary.py). Memory holds one layer of one body;
hidden states wait on disk (models/hidden_states.py).

A layer adds to its input x, with its norms inside:   h = x + mixer(x)   y = h + mlp(h)   (the mixer: Gated DeltaNet or attention).
What base and checkpoint differ by is measured as ‖theirs − ours‖ / ‖ours‖ over all tokens, four times:
    mixer, mlp      the checkpoint's, on the base's x and h: what this component loses by itself
    layer           y of the checkpoint's layer on the base's x, and so both together, over what the layer adds (y − x)
    accumulated     y of the checkpoint's own stream, over ‖y‖: what has come together down to here
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from math import isfinite, prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtpress.chat.sample import Sample
from mtpress.checkpoint.prefetch import Prefetch
from mtpress.errors import InputError
from mtpress.evaluation.bodies import Body
from mtpress.evaluation.documents import Documents
from mtpress.evaluation.no_number import no_number
from mtpress.models.hidden_states import DiskStates
from mtpress.models.qwen3_5.layers import StreamedBody
from mtpress.progress import Progress

NUM_FORWARDS = 3  # of a checkpoint's layer: on its own stream, on the base's, and its MLP once more
MEASURED = ("mixer", "mlp", "layer", "accumulated")


@dataclass(frozen=True)
class LayerError:
    """component: gdn or attention. The others: see the module."""

    layer: int
    component: str
    mixer: float
    mlp: float
    layer_output: float
    accumulated: float


class Stream:
    """One body's hidden states on their way: in front of a layer, then behind it; at the end behind the final norm.

    embeddings: what went in, kept for the draft head; None where it is not needed.
    """

    def __init__(self, body: Body, documents: Documents, directory: Path, device: torch.device, keep_embeddings: bool) -> None:
        directory.mkdir()
        self.body, self.documents = body, documents
        hidden_size = body.checkpoint.text_config["hidden_size"]

        def states(name: str) -> DiskStates:
            return DiskStates(directory, documents.lengths, hidden_size, stream=name, pinned=device.type == "cuda")

        self.stack = ExitStack()
        self.states = self.stack.enter_context(closing(states("hidden")))
        self.embeddings = self.stack.enter_context(closing(states("hidden-embedded"))) if keep_embeddings else None
        self.mover = StreamedBody(body.checkpoint.config, device, states=self.states)
        shapes = dict(body.model.body_shapes(body.checkpoint.config, body.prefix, body.tensors))
        in_layers = sum(prod(shape) for name, shape in shapes.items() if body.model.layer_index(name) is not None)
        self.lm_head_layers = prod(shapes[f"{body.lm_head_module}.weight"]) * len(body.layer_types) / in_layers  # for progress

    def close(self) -> None:
        self.stack.close()

    def embed(self) -> None:
        """Puts every document in front of the first layer."""
        samples: Sequence[Sample] = self.documents.samples
        self.mover.embed(samples, self.body.embedding_rows)
        if any(sample.has_pictures for sample in samples):
            self.mover.see(self.body.vision_tower())
        self.states.advance()
        if self.embeddings is not None:
            for i in range(len(samples)):
                self.embeddings.put(i, self.states.get(i))
            self.embeddings.advance()

    def finish(self) -> None:
        """Takes the states through the final norm."""
        norm = self.mover.norm(self.body.final_norm())
        for i in range(len(self.documents.samples)):
            self.states.put(i, norm(self.states.get(i).to(self.mover.device)))
        self.states.advance()

    def through(self, module: nn.Module, i: int, states: Tensor) -> Tensor:
        return self.mover.through(module, states, self.mover.positions[i])


class _Sums:
    """Σ‖difference‖² and Σ‖reference‖² of each measure, float64."""

    def __init__(self) -> None:
        self.sums = {name: [0.0, 0.0] for name in MEASURED}

    def add(self, name: str, theirs: Tensor, ours: Tensor, reference: Tensor) -> None:
        difference = theirs.float() - ours.float()
        self.sums[name][0] += float(difference.square().sum(dtype=torch.float64))
        self.sums[name][1] += float(reference.float().square().sum(dtype=torch.float64))

    def error(self, layer: int, component: str, body: Body, base: Body) -> LayerError:
        """What was summed; FindingError where the checkpoint, or the base before it, computes what is no number."""
        lost, whole = self.sums["accumulated"]
        if not isfinite(lost):
            raise no_number(body if isfinite(whole) else base, layer)
        relative = {name: (lost / whole) ** 0.5 if whole else 0.0 for name, (lost, whole) in self.sums.items()}
        return LayerError(layer, component, relative["mixer"], relative["mlp"], relative["layer"], relative["accumulated"])


def refuse_pictures(bodies: Sequence[Body], documents: Documents) -> None:
    """InputError where documents have pictures and a body has no tower to see them with."""
    blind = next((body for body in bodies if not body.has_vision), None)
    if blind is not None and any(documents.with_images):
        raise InputError(f"{blind.checkpoint.path}: has no vision tower; leave it out, or name text with --data FILE.jsonl")


@torch.no_grad()
def run_layers(base: Stream, others: Sequence[Stream], directory: Path, progress: Progress) -> dict[str, list[LayerError]]:
    """Takes every stream from the embeddings to behind the final norm; name of a checkpoint → its layers' errors."""
    streams, device = [base, *others], base.mover.device
    for stream in streams:
        progress.note = f"embeddings, {stream.body.name}"
        stream.embed()
    errors: dict[str, list[LayerError]] = {stream.body.name: [] for stream in others}
    groups = [stream.body.layer_infos(i) for i in range(len(base.body.layer_types)) for stream in streams]
    prefetch = Prefetch(groups, device, ahead=device.type == "cuda")
    documents, hidden_size = base.documents, base.states.hidden_size
    with ExitStack() as stack:
        parts = {  # what the base's mixer and MLP add, for the layer that all are at
            name: stack.enter_context(closing(DiskStates(directory, documents.lengths, hidden_size, stream=f"hidden-{name}")))
            for name in ("mixer", "mlp")
        }
        weights = stack.enter_context(closing(prefetch.load()))
        for index, kind in enumerate(base.body.layer_types):
            component = "attention" if kind == "full_attention" else "gdn"
            _base_layer(base, index, next(weights), parts, progress)
            for stream in others:
                sums = _other_layer(stream, base, index, next(weights), parts, progress)
                errors[stream.body.name].append(sums.error(index, component, stream.body, base.body))
                stream.states.advance()
            base.states.advance()
    for stream in streams:
        stream.finish()
    return errors


def _mixer_of(module: Any) -> nn.Module:
    return module.linear_attn if hasattr(module, "linear_attn") else module.self_attn  # type: ignore[no-any-return]


def _base_layer(base: Stream, index: int, tensors: Mapping[str, Tensor], parts: Mapping[str, DiskStates], progress: Progress) -> None:
    """Puts the base's states behind the layer, without advancing, and what its mixer and MLP add into `parts`."""
    module: Any = base.body.layer(base.mover, index, tensors)
    with base.mover.delta_rule(module):
        for i, x in _inputs(base):
            with _outputs_of(_mixer_of(module), module.mlp) as seen:
                base.states.put(i, base.through(module, i, x))
            for name, output in zip(("mixer", "mlp"), seen, strict=True):
                parts[name].put(i, output)
            _advance(progress, base, i, index, 1)
    for states in parts.values():
        states.advance()


def _other_layer(
    stream: Stream, base: Stream, index: int, tensors: Mapping[str, Tensor], parts: Mapping[str, DiskStates], progress: Progress
) -> _Sums:
    """Puts a checkpoint's states behind the layer and measures it on the base's states too."""
    module: Any = stream.body.layer(stream.mover, index, tensors)
    sums = _Sums()
    with stream.mover.delta_rule(module):
        for i, x in _inputs(base):
            mixed, added = (parts[name].get(i).to(x.device) for name in ("mixer", "mlp"))
            h = x + mixed
            y = h + added
            with _outputs_of(_mixer_of(module)) as seen:
                there = stream.through(module, i, x)
            sums.add("mixer", seen[0], mixed, mixed)
            sums.add("layer", there, y, y.float() - x.float())
            sums.add("mlp", module.mlp(module.post_attention_layernorm(h)), added, added)
            own = stream.through(module, i, stream.states.get(i).to(x.device, non_blocking=True))
            sums.add("accumulated", own, y, y)
            stream.states.put(i, own)
            _advance(progress, stream, i, index, NUM_FORWARDS)
    return sums


def _inputs(base: Stream) -> Iterator[tuple[int, Tensor]]:
    for i in range(len(base.documents.samples)):
        yield i, base.states.get(i).to(base.mover.device, non_blocking=True)


def _advance(progress: Progress, stream: Stream, i: int, index: int, forwards: int) -> None:
    note = f"layer {index + 1}/{len(stream.body.layer_types)}, {stream.body.name}"
    progress.advance(stream.documents.lengths[i] * forwards, note[:40])


class _outputs_of:  # noqa: N801  (reads as a function)
    """While it lasts, collects what the modules return, in order."""

    def __init__(self, *modules: nn.Module) -> None:
        self.seen: list[Tensor] = []
        self.hooks = [module.register_forward_hook(self._hook) for module in modules]

    def _hook(self, module: nn.Module, args: Any, output: Any) -> None:
        self.seen.append(output[0] if isinstance(output, tuple) else output)

    def __enter__(self) -> list[Tensor]:
        return self.seen

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()


def layers_effort(streams: Sequence[Stream]) -> float:
    """What progress counts for run_layers: tokens through layers."""
    return float(streams[0].documents.num_tokens * len(streams[0].body.layer_types) * (1 + NUM_FORWARDS * (len(streams) - 1)))
