"""How much each fused linear of each layer loses in each format: the samples through the BF16 body, one layer at a time.

In: the plan of each candidate format, the samples, a directory that outlasts a kill. Out: for each layer, in the order of the plan's
jobs, format → error. Leaves out: what is chosen by it (plan/budget.py).

The error of a fused linear g in a format f, with y_t the layer's output for token t in BF16 and ŷ_t the same with g alone in f, its
activations rounded as vLLM does (quant_config/emulation.py), the layer's input being BF16's:

    error(g, f) = mean over tokens of ‖ŷ_t − y_t‖² / ‖y_t‖²

Each token is divided by its own energy because whatever reads y next, an RMSNorm, does so too: a few tokens of huge norm would else
decide alone. Errors of several linears may be added: rounding errors are small, so what they do to y is linear in them to first order,
and those of different matrices have no common cause, so that E‖Σδ‖² = ΣE‖δ‖². What this leaves out is how much a layer's error
matters further down, and it is the same for all layers here.

Scales are those of the recipe's rounding and of all samples, as the build stores them; the mean is over at most NUM_MEASURED samples,
evenly spread. A layer is moved through 1 + 1 + (mixer's groups + MLP's groups, of which only the MLP is computed) × formats times.
Memory: the layer, one fused linear of it rounded, and its activations. Each finished layer is a line in SENSITIVITY_NAME, with the
states behind it on the disk, so that a run which was stopped goes on there.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtpress.calibration.forward import CalibrationPass
from mtpress.calibration.samples import InputAmax
from mtpress.chat.sample import Sample
from mtpress.checkpoint.journal import SENSITIVITY_NAME, PartialError, difference, said_by, signed_line, write_whole
from mtpress.checkpoint.partial_directory import PartialDirectory
from mtpress.checkpoint.prefetch import Prefetch
from mtpress.checkpoint.shard_writer import disk_failure
from mtpress.checkpoint.source_guard import SourceGuard
from mtpress.errors import InputError
from mtpress.models.hidden_states import DiskStates, refuse_other_states
from mtpress.plan.budget import NUM_MEASURED, Choices, choice_record, choose_formats
from mtpress.plan.plan import Job, Plan, Step
from mtpress.progress import Progress
from mtpress.quant_config.emulation import EMULATIONS, EmulatedLinear
from mtpress.quantization.rounders import round_job

Errors = list[dict[str, float]]  # of the fused linears of a layer: format → error


class Journaled:
    """What has been measured, as lines of a file: what it was measured of, then the errors of one layer each.

    resume: go on with a file that is there. InputError where it is of something else and `begun`, a run that follows from it.
    """

    def __init__(self, directory: Path, made_of: Mapping[str, Any], resume: bool, begun: bool = False) -> None:
        self.path = directory / SENSITIVITY_NAME
        self.layers: list[Errors] = []
        self.states: dict[str, str] = {}  # what is said of the samples' states behind the last layer
        first = json.loads(json.dumps(made_of))
        *lines, _ = self.path.read_bytes().split(b"\n") if resume and self.path.exists() else [b""]
        try:
            said = [said_by(line) for line in lines]
            different = difference(said[0], first)
            found = [(_errors(line["errors"]), dict(line["states"])) for line in said[1:]]
        except (LookupError, ValueError, TypeError, AttributeError, RecursionError):
            different, found = "no measurement", []
        if different is None:
            self.layers = [errors for errors, _ in found]
            self.states = found[-1][1] if found else {}
        elif begun:
            partial = directory.parent
            raise PartialError(f"--resume: {partial} was begun with {different}; call it as it was begun, or delete it to start over")
        else:
            self.path.write_bytes(signed_line(first))

    def append(self, errors: Errors, states: Mapping[str, str]) -> None:
        """Adds a layer, with the SHA-256 of the states behind it, and waits until it is on the disk; a torn line is cut off first."""
        file = os.open(self.path, os.O_RDWR | os.O_APPEND)
        try:
            size = os.fstat(file).st_size
            os.ftruncate(file, os.pread(file, size, 0).rfind(b"\n") + 1)
            write_whole(file, signed_line({"errors": errors, "states": states}))
            os.fdatasync(file)
        finally:
            os.close(file)
        self.layers.append(errors)


def _errors(said: Any) -> Errors:
    """The errors of a line; ValueError or TypeError where they are none."""
    return [{str(name): float(error) for name, error in linear.items()} for linear in said]


def settle(
    found: Choices,
    place: PartialDirectory,
    made_of: Mapping[str, Any],
    samples: Sequence[Sample],
    device: torch.device,
    ready: Callable[[Path], None],
    guard: SourceGuard,
    resume: bool,
    silent: bool,
) -> tuple[list[str], dict[str, Any]]:
    """Measures what each choice loses, into the partial directory, or takes up what was measured there; the formats that follow, and what
    the record says of them. Where another run is in the way, any formats: the writer refuses it.

    made_of: what the measurement depends on. ready(partial directory) refuses what the machine cannot do.
    """
    partial, journal = place.path, place.journal
    begun = journal.num_finished() > 0
    if begun and not resume:
        return [min(group.bytes, key=group.bytes.__getitem__) for group in found.groups], {}
    try:
        place.claim()
    except OSError as error:
        raise disk_failure(partial, error) from None
    journaled: Journaled | None = None
    try:
        if not begun:
            ready(partial)
        journaled = Journaled(journal.directory, made_of, resume, begun)
        layers = [step for step in found.least.steps if step.layer is not None]
        with Progress("measure", sum(step.read_bytes for step in layers), silent=silent) as progress:
            errors = measure(found.plans, samples, device, journaled, progress)
        guard.look_closely()
    except BaseException as error:  # Ctrl-C too
        measured = len(journaled.layers) if journaled is not None else 0
        if not begun and not isinstance(error, PartialError) and (isinstance(error, InputError) or not measured):
            place.remove()
        elif isinstance(error, KeyboardInterrupt):
            left = f"{measured} measured layers are kept in {partial}, the same command with --resume goes on there"
            raise KeyboardInterrupt(left) from None
        raise
    finally:
        place.release()
    formats = choose_formats(found, errors)
    return formats, choice_record(found, formats, errors)


def measure(plans: Mapping[str, Plan], samples: Sequence[Sample], device: torch.device, journaled: Journaled, progress: Progress) -> Errors:
    """The errors of every fused linear of the body, layer after layer; what is journaled is not measured again."""
    # FP8's linears take no part in rounding hessian, so another plan says what is summed up
    plan = next((plan for name, plan in plans.items() if name != "fp8"), next(iter(plans.values())))
    steps = sorted((step for step in plan.steps if step.layer is not None), key=lambda step: step.layer or 0)
    done = len(journaled.layers)
    progress.skip(sum(step.read_bytes for step in steps[:done]))
    if done < len(steps):
        jobs = {name: {step.layer: [job for job in step.jobs if job.kind == "quantize"] for step in of.steps} for name, of in plans.items()}
        directory = journaled.path.parent
        if done:
            lengths = [len(sample.input_ids) for sample in samples]
            refuse_other_states(directory, done, lengths, plan.source.text_config["hidden_size"], journaled.states)
        groups = [[info for job in step.jobs for info in job.sources] for step in steps[done:]]
        with (
            closing(CalibrationPass(plan, samples, device, directory, first_layer=done)) as forward,
            closing(Prefetch(groups, device, ahead=device.type == "cuda").load()) as weights,
        ):
            for step in steps[done:]:
                tensors = next(weights)
                seen = forward.layer(step, tensors)
                layer = Layer(forward, step, tensors, seen)
                here = {name: (plans[name], of[step.layer]) for name, of in jobs.items()}
                with closing(layer):
                    errors = layer.errors(here)
                forward.sync(step)
                journaled.append(errors, forward.states_sha256())
                progress.advance(step.read_bytes, step.title)
            assert next(weights, None) is None
    return [error for layer_errors in journaled.layers for error in layer_errors]


class Layer:
    """One decoder layer behind which the samples stand already, its inputs still on disk."""

    def __init__(self, forward: CalibrationPass, step: Step, tensors: Mapping[str, Tensor], seen: InputAmax) -> None:
        assert step.layer is not None
        self.forward, self.tensors, self.seen = forward, tensors, seen
        self.start = f"{forward.plan.prefix}layers.{step.layer}."
        self.module: Any = forward.body.decoder_layer(step.layer, {n.removeprefix(self.start): t for n, t in tensors.items()})
        self.title = step.title
        states = forward.states
        count = len(states.lengths)
        self.members = list(range(0, count, -(-count // NUM_MEASURED)))
        self.stack = ExitStack()
        self.inputs = self.stack.enter_context(
            closing(DiskStates(states.directory, states.lengths, states.hidden_size, boundary=step.layer))
        )
        self.mixed = self.stack.enter_context(
            closing(DiskStates(states.directory, states.lengths, states.hidden_size, stream="hidden-mixed", members=self.members))
        )

    def close(self) -> None:
        self.stack.close()

    @torch.no_grad()
    def errors(self, jobs: Mapping[str, tuple[Plan, Sequence[Job]]]) -> Errors:
        """Of each job, format → error. jobs: format → its plan and its jobs here, the same linears in the same order for all."""
        with self.forward.body.delta_rule(self.module):
            self._keep_mixed()
            count = len(next(iter(jobs.values()))[1])
            return [{name: self._error(name, plan, of[i]) for name, (plan, of) in jobs.items()} for i in range(count)]

    def _keep_mixed(self) -> None:
        """Puts what stands between mixer and MLP on disk: where only the MLP changes, only it is computed."""
        kept: list[Tensor] = []
        hook = self.module.post_attention_layernorm.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
        for i, sample in enumerate(self.members):
            self._through(sample)
            self.mixed.put(i, kept.pop())
        hook.remove()
        self.mixed.advance()

    def _through(self, sample: int) -> Tensor:
        body = self.forward.body
        return body.through(self.module, self.inputs.peek(sample).to(body.device), body.positions[sample])

    def _mlp(self, member: int) -> Tensor:
        mixed = self.mixed.peek(member).to(self.forward.body.device)
        return mixed + self.module.mlp(self.module.post_attention_layernorm(mixed))  # type: ignore[no-any-return]

    def _error(self, name: str, plan: Plan, job: Job) -> float:
        total, tokens = 0.0, 0
        with installed(self.module, self._emulated(name, plan, job)):
            for i, sample in enumerate(self.members):
                exact = self.forward.states.peek(sample).to(self.forward.body.device).double()
                made = (self._mlp(i) if job.component == "mlp" else self._through(sample)).double()
                energy = exact.square().sum(-1)
                relative = (made - exact).square().sum(-1) / torch.where(energy == 0, 1.0, energy)
                total += float(relative.sum())
                tokens += relative.numel()
        error = total / tokens
        if not error < float("inf"):
            linear = job.sources[0].name
            raise InputError(f"{linear}: its layer computes {error} with it in {name}; the source weights are damaged")
        return error

    def _emulated(self, name: str, plan: Plan, job: Job) -> dict[str, EmulatedLinear]:
        """Name within the layer → what vLLM computes of what this build would store."""
        stored: dict[str, dict[str, Tensor]] = {}
        for made in round_job(plan, job, self.tensors, self.seen):
            for full, tensor in made.items():
                module, _, suffix = full.rpartition(".")
                stored.setdefault(module.removeprefix(self.start), {})[suffix] = tensor.to(self.forward.body.device)
        emulation, group = EMULATIONS["fp8" if name == "fp8" else "nvfp4"], list(stored.values())
        activations = name != "nvfp4_w4a16"
        return {module: emulation.make(parts, group, activations, torch.bfloat16) for module, parts in stored.items()}


@contextmanager
def installed(module: nn.Module, linears: Mapping[str, nn.Module]) -> Iterator[None]:
    """While it lasts, these stand in place of the layer's own."""
    own = {name: module.get_submodule(name) for name in linears}
    for name, linear in linears.items():
        module.set_submodule(name, linear)
    try:
        yield
    finally:
        for name, linear in own.items():
            module.set_submodule(name, linear)
