"""What a run will take: memory, disk and time, from a plan and the rates of this machine.

In: the plan, the lengths of the samples, the directory of the output, a `Machine`. Out: a `Promise`, and a refusal where the machine cannot
keep it, with what would fit. The record sets the promise beside the fact. Leaves out: Ray's other machines (the time is that
of this one).

    time     the larger of disk and processor, as they overlap, and the forward on top, whose matrix products need every core:
             disk       read / read rate + written / write rate
             processor  (written / hash rate + copied / copy rate) / cores + packed / pack rate
             forward    2 · parameters of the linears · tokens / matmul rate + tokens · delta-rule time + pairs of tokens / attention rate
    memory   what is loaded now + what is read at a time (weight-only: two fused groups; calibrated: a layer, two for a GPU) + what
             waits for the disk + the widest activations of the longest sample
    disk     the output + three boundaries of hidden states

Rounding hessian adds to the forward the numbers that are read by what shares an input / rate of its sums, and to memory these sums.

A run that tunes its layers by gradients (rounding signround) takes in place of that forward
    time     the forward twice, and for each iteration: 7 · parameters of the linears · tokens of the batch / matmul rate (a product
             forwards, two slower ones backwards), attention and delta rule with their backward, and 30 bytes a tuned weight / copy rate
    memory   a layer + 2.7 bytes a tuned weight (4.7 where batches go through in pieces) + the largest matrix + what autograd keeps
    disk     the output + three boundaries of two streams of hidden states
Rounding gptq has two streams as well; its forwards, and what it takes beside them, are those of quantization/gptq_cost.py.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from mtpress.calibration.block_hessian import BLOCK
from mtpress.checkpoint.direct_io import NUM_STAGES, PIECE_BYTES
from mtpress.checkpoint.shard_writer import MAX_QUEUED_BYTES
from mtpress.errors import ResourceError
from mtpress.models import family
from mtpress.models.hidden_states import NUM_SLOTS, NUM_WAITING
from mtpress.plan.budget import NUM_MEASURED, Choices
from mtpress.plan.plan import Plan, Step
from mtpress.progress import human_bytes, human_seconds
from mtpress.quantization import gptq_cost
from mtpress.quantization.machine import Machine
from mtpress.rounding.batches import batches, kept_bytes, piece_tokens, pieces

SPARE_BYTES = 64_000_000  # a disk is not filled to the last byte
NAME_BYTES = 400  # a tensor in a header, the index, the ignore lists and the journal
START_SECONDS = 0.5
TUNED_BYTES = 2.7  # a weight: its offset, the best code, a share of its group's parameters
GRADIENT_BYTES = 2.0  # a weight, where a batch goes in pieces
TUNED_TRAFFIC = 30.0  # bytes a weight and iteration, as if copied: weights made twice, the step, the best kept, what is allocated
ATTENTION_BACKWARD, RULE_BACKWARD = 2.5, 8.0  # times the forward
WORKER_START_SECONDS = 5.0  # a fresh Python that loads its libraries


@dataclass(frozen=True)
class Promise:
    """What a run takes: peak resident memory of all its processes, bytes on the output's disk, seconds."""

    memory_bytes: int
    disk_bytes: int
    seconds: float

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "seconds": round(self.seconds, 3)}

    def __str__(self) -> str:
        return f"about {human_seconds(self.seconds)}, {human_bytes(self.memory_bytes)} of memory, {human_bytes(self.disk_bytes)} of disk"


def promise(
    plan: Plan,
    machine: Machine,
    lengths: Sequence[int],
    loaded_bytes: int,
    *,
    beside_bytes: int = 0,
    steps_done: Collection[str] = (),
    workers: int = 1,
) -> Promise:
    """What the steps that are not done will take.

    loaded_bytes: the memory of this process before anything is read. beside_bytes: files beside the weights.
    """
    steps = [step for step in plan.steps if step.title not in steps_done]
    names = NAME_BYTES * sum(len(step.outputs) for step in plan.steps)
    return Promise(
        memory_bytes=_memory(plan, lengths, loaded_bytes, workers, machine.gpu),
        disk_bytes=plan.output_bytes + states_bytes(plan, lengths) + beside_bytes + names,
        seconds=(START_SECONDS if workers == 1 else WORKER_START_SECONDS)
        + _work_seconds(plan, machine, steps)
        + _forward_seconds(plan, machine, steps, lengths),
    )


def with_measuring(promised: Promise, found: Choices, machine: Machine, lengths: Sequence[int]) -> Promise:
    """The promise of the smallest output, with what comes before it under a byte budget: the pass that measures (sensitivity.py).

    A layer is gone through once with all samples and once with those measured, then once more for each linear of the mixer and each format
    that rounds it; for those of the MLP only the MLP is. Each is packed once a format. The output may be as large as the budget.
    """
    plan, times = found.least, len(found.plans)
    some = lengths[:: -(-len(lengths) // NUM_MEASURED)] if lengths else []
    layers = [step for step in plan.steps if step.layer is not None]
    once, measured = (_forward_seconds(plan, machine, layers, of) for of in (lengths, some))
    seconds = once + measured
    for step in layers:
        jobs = [job for job in step.jobs if job.kind == "quantize"]
        mlp = [job for job in jobs if job.component == "mlp"]
        of_mlp = sum(info.num_params for job in mlp for info in job.sources)
        seconds += times * (len(jobs) - len(mlp)) * _forward_seconds(plan, machine, [step], some)
        seconds += times * len(mlp) * 2.0 * of_mlp * sum(some) / machine.matmul
        seconds += times * sum(info.num_bytes for job in jobs for info in job.sources) / machine.pack
    largest = max(info.num_bytes for job in plan.jobs if job.kind == "quantize" for info in job.sources)
    return Promise(
        memory_bytes=promised.memory_bytes + 2 * largest,  # a fused linear, rounded
        disk_bytes=promised.disk_bytes + min(found.budget, found.most_bytes) - found.least_bytes,
        seconds=promised.seconds + seconds,
    )


def states_bytes(plan: Plan, lengths: Sequence[int]) -> int:
    """Hidden states on disk."""
    hidden_size: int = family(plan.source.model_type).sizes(plan.source.config)["hidden_size"]
    return (2 if plan.recipe.rounding in ("signround", "gptq") else 1) * NUM_SLOTS * 2 * sum(lengths) * hidden_size


def _tunes(plan: Plan) -> bool:
    return plan.recipe.rounding == "signround"


def _work_seconds(plan: Plan, machine: Machine, steps: Sequence[Step]) -> float:
    """Reading, packing, hashing and writing, which overlap one another."""
    read = sum(step.read_bytes for step in steps)
    written = sum(tensor.num_bytes for step in steps for tensor in step.outputs)
    quantized = sum(info.num_bytes for step in steps for job in step.jobs if job.kind == "quantize" for info in job.sources)
    disk = read / machine.read + written / machine.write
    cores = max(1, torch.get_num_threads())
    processor = (written / machine.hash + 2 * (read + written) / machine.copy) / cores + quantized / machine.pack
    return max(disk, processor)


def _forward_seconds(plan: Plan, machine: Machine, steps: Sequence[Step], lengths: Sequence[int]) -> float:
    if not lengths:
        return 0.0
    d = family(plan.source.model_type).sizes(plan.source.config)
    types = family(plan.source.model_type).layer_types(plan.source.config)
    tokens, pairs = sum(lengths), sum(length * length for length in lengths)
    per_pair = d["num_attention_heads"] * d["head_dim"] / machine.attention
    tuned_tokens, tuned_pairs, iterations = _tuned_tokens(plan, lengths, d) if _tunes(plan) else (0, 0, 0)
    by_gptq = plan.recipe.rounding == "gptq"
    times, seconds = gptq_cost.FORWARDS if by_gptq else 2 if _tunes(plan) else 1, 0.0
    for step in steps:
        if step.layer is None:
            continue
        params = sum(info.num_params for job in step.jobs for info in job.sources if len(info.shape) == 2)
        seconds += params * (2.0 * times * tokens + 7.0 * tuned_tokens) / machine.matmul
        if types[step.layer] == "full_attention":
            seconds += (times * pairs + (1 + ATTENTION_BACKWARD) * tuned_pairs) * per_pair
        else:
            seconds += (times * tokens + (1 + RULE_BACKWARD) * tuned_tokens) * machine.delta_rule
        if machine.hessian:
            seconds += tokens * sum(_weighted_widths(step)) / machine.hessian
        if by_gptq:
            seconds += gptq_cost.seconds(step, machine, tokens, plan.recipe.format == "nvfp4")
        seconds += iterations * TUNED_TRAFFIC * _tuned_weights(step) / machine.copy / max(1, torch.get_num_threads())
    return seconds


def _weighted_widths(step: Step) -> list[int]:
    """K of each input of a layer that rounding hessian sums up."""
    return [job.sources[0].shape[1] for job in step.weighted]


def _hessian_bytes(plan: Plan) -> int:
    """Two sums a width while samples pass, then a cost and its float32 form for one of them; what a sample adds, in parts."""
    if plan.recipe.rounding != "hessian":
        return 0
    widths = [_weighted_widths(step) for step in plan.steps if step.layer is not None]
    return BLOCK * 8 * max(2 * sum(layer) + 6 * max(layer, default=0) for layer in widths)


def _tuned_weights(step: Step) -> int:
    return sum(info.num_params for job in step.jobs if job.kind == "quantize" for info in job.sources)


def _tuned_tokens(plan: Plan, lengths: Sequence[int], d: Mapping[str, int]) -> tuple[int, int, int]:
    """Tokens and pairs of tokens that go through one layer in all its iterations, fill included, and the iterations."""
    said, limit = plan.recipe.signround, piece_tokens(d)
    sampler = batches(len(lengths), said.batch_size, 0)
    drawn = [next(sampler) for _ in range(min(said.iterations, 100))]
    parts = [[lengths[i] for i in part] for batch in drawn for part in pieces(lengths, batch, limit)]
    share = said.iterations / len(drawn)
    tokens = sum(len(part) * max(part) for part in parts)
    pairs = sum(len(part) * max(part) ** 2 for part in parts)
    return round(share * tokens), round(share * pairs), said.iterations


def _tuning_bytes(plan: Plan, lengths: Sequence[int]) -> int:
    """What is in memory beside a layer while it is tuned."""
    d = family(plan.source.model_type).sizes(plan.source.config)
    size = min(plan.recipe.signround.batch_size, len(lengths))
    longest, limit = sorted(lengths)[-size:], piece_tokens(d)
    parts = pieces(longest, range(size), limit)
    widest = max(len(part) * max(longest[i] for i in part) for part in parts)
    weights = max((_tuned_weights(step) for step in plan.steps if step.layer is not None), default=0)
    largest = max((info.num_bytes for job in plan.jobs if job.kind == "quantize" for info in job.sources), default=0)
    return round(weights * (TUNED_BYTES + (GRADIENT_BYTES if len(parts) > 1 else 0.0))) + largest + widest * kept_bytes(d)


def _rounding_bytes(plan: Plan, lengths: Sequence[int]) -> int:
    """What is in memory beside a layer while samples pass it and it is rounded."""
    if _tunes(plan):
        return _tuning_bytes(plan, lengths)
    beside = max(gptq_cost.memory_bytes(step) for step in plan.steps) if plan.recipe.rounding == "gptq" else _hessian_bytes(plan)
    return beside + _activation_bytes(plan, max(lengths, default=0))


def _memory(plan: Plan, lengths: Sequence[int], loaded_bytes: int, workers: int, on_gpu: bool = False) -> int:
    groups = [sum(info.num_bytes for info in job.sources) for job in plan.jobs if job.kind == "quantize"]
    queue = min(MAX_QUEUED_BYTES, sum(tensor.num_bytes for job in plan.jobs if job.kind == "quantize" for tensor in job.outputs))
    writing = queue // 2 + (NUM_STAGES + 1) * PIECE_BYTES + max(groups, default=0) // 3  # the queue is seldom full
    if not lengths:
        return loaded_bytes * (1 if workers == 1 else workers + 1) + workers * (2 * max(groups, default=0) + writing)
    layers = [step.read_bytes for step in plan.steps if step.layer is not None]
    layers += [
        sum(info.num_bytes for info in job.sources)
        for step in plan.steps
        if step.layer is None
        for job in step.jobs
        if job.kind == "quantize"
    ]
    forward = (2 if on_gpu else 1) * max(layers, default=0)
    forward += _rounding_bytes(plan, lengths)
    if workers == 1:
        return loaded_bytes + forward + writing
    return loaded_bytes * (workers + 1) + workers * forward + 2 * max(groups, default=0) + writing


def _activation_bytes(plan: Plan, tokens: int) -> int:
    """What a layer holds at once of the longest sample, at its widest: the MLP, or the delta rule's float32 copies."""
    d: dict[str, int] = family(plan.source.model_type).sizes(plan.source.config)
    waiting = (NUM_WAITING + 3) * 2 * tokens * d["hidden_size"]
    mlp = 4 * 2 * tokens * d["intermediate_size"]
    keys, values = d["linear_num_key_heads"] * d["linear_key_head_dim"], d["linear_num_value_heads"] * d["linear_value_head_dim"]
    gdn = 2 * tokens * (3 * (2 * keys + values) + 3 * values)
    return waiting + max(mlp, gdn)


def free_memory_bytes() -> int:
    """What this process may still take: of the machine, or of its control group where that is less."""
    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (group / "memory.max").read_text().strip(), int((group / "memory.current").read_text())
        reclaimable = next(int(line.split()[1]) for line in (group / "memory.stat").read_text().splitlines() if line.startswith("file "))
    except (OSError, ValueError, StopIteration):
        return free
    return free if limit == "max" else min(free, int(limit) - used + reclaimable)


def refuse(
    plan: Plan, promised: Promise, lengths: Sequence[int], partial: Path, loaded_bytes: int, device: torch.device, workers: int = 1
) -> None:
    """ResourceError where memory, the GPU's or the disk cannot hold what was promised, saying what would fit.

    partial: the directory that is being written; what it holds already counts as room.
    """
    free = free_memory_bytes()
    needed = promised.memory_bytes - loaded_bytes
    if needed > free:
        raise ResourceError(
            f"the run needs {human_bytes(needed)} more memory, {human_bytes(free)} are free; {_what_fits(plan, lengths, free, workers)}"
        )
    if device.type == "cuda":
        gpu_needed = 2 * max((step.read_bytes for step in plan.steps if step.layer is not None), default=0)
        gpu_needed += _rounding_bytes(plan, lengths)
        gpu_free, _ = torch.cuda.mem_get_info(device)
        if gpu_needed > gpu_free:
            raise ResourceError(
                f"the run needs {human_bytes(gpu_needed)} of GPU memory, {human_bytes(gpu_free)} are free; stop what else runs there, "
                "set a smaller calibration max_seq_len in the recipe, or use --device cpu"
            )
    disk = psutil.disk_usage(str(partial)).free + sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    if promised.disk_bytes + SPARE_BYTES > disk:
        states = states_bytes(plan, lengths)
        tokens = f", calibrate with fewer tokens (their hidden states take {human_bytes(states)})"
        fewer = tokens if states > promised.disk_bytes // 10 else ""
        raise ResourceError(
            f"{partial.parent}: {human_bytes(disk)} are free, the output needs {human_bytes(promised.disk_bytes)}; "
            f"free space{fewer} or choose another disk"
        )


def _what_fits(plan: Plan, lengths: Sequence[int], free: int, workers: int) -> str:
    if workers > 1 and _memory(plan, lengths, 0, 1) <= free:
        return "one worker would fit: leave --workers out"
    tokens = max(lengths, default=0)
    while tokens > 64:
        tokens //= 2
        if _memory(plan, [tokens] * len(lengths), 0, 1) <= free:
            return f"samples of at most {tokens} tokens would fit: set calibration max_seq_len {tokens} in the recipe"
    if plan.recipe.rounding == "gptq":
        simpler = "max" if plan.recipe.format == "nvfp4" else "rtn"
        other = replace(plan, recipe=plan.recipe.model_copy(update={"rounding": simpler, "gptq": None}))
        if _memory(other, lengths if other.recipe.needs_samples else [], 0, 1) <= free:
            return f"another rounding would fit: set rounding {simpler} in the recipe"
        return f"free {human_bytes(_memory(plan, lengths, 0, 1) - free)}, or use a machine with more"
    if lengths and _memory(plan, [], 0, 1) <= free:
        if _tunes(plan):
            return "rounding without samples would fit: set rounding search in the recipe"
        return "a weight-only run would fit: --weight-only SCALE"
    return f"free {human_bytes(_memory(plan, [], 0, 1) - free)}, or use a machine with more"
