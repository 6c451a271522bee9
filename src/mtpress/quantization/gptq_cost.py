"""What rounding by GPTQ takes of memory and time, beside the forwards of its samples (calibration/gptq.py), for preflight.

In: a step of the plan, the tokens of the samples, rates of the machine. Out: bytes and seconds. Leaves out: what every calibrated run
takes.

    memory   the larger of 8 K² (H and its factor) and 4 K² + 9 N K (the factor, a matrix and its errors), and 3.2 bytes a weight of the
             layer: both kinds of codes with their scales, and what the rounded linears multiply with
    time     for each group that reads one input: K² operations a token for H, half of it being the other half; K³/3 for its factor; N K²
             to carry errors on, and a few calls for every column; activations that are rounded, at every forward
"""

from collections.abc import Iterator

import torch

from mtpress.plan.plan import Step
from mtpress.quantization.machine import Machine

FORWARDS = 3.8  # of all samples through a layer: exact, rounded, up to each group of linears, those that are held out twice more
HELD_BYTES = 3.2
# of the rate of BF16 products: H; the errors of 128 columns carried on to the others; Cholesky. The second is fitted to a whole run.
SUMS_SHARE, CARRY_SHARE, FACTOR_SHARE = 0.45, 0.28, 0.3
COLUMN_SECONDS, COLUMN_TRAFFIC = 1.5e-4, 150.0  # a column of a matrix; bytes of a code in it, as if copied
ACTIVATION_TRAFFIC = 200.0  # bytes of an activation that is rounded to NVFP4, as if copied


def _groups(step: Step) -> Iterator[tuple[int, list[int]]]:
    """K and the Ns of the linears that read the same input."""
    for job in step.jobs:
        if job.kind == "quantize":
            yield job.sources[0].shape[1], [info.shape[0] for info in job.sources]


def memory_bytes(step: Step) -> int:
    """What is in memory beside the layer and its activations while it is rounded."""
    weights = sum(k * sum(ns) for k, ns in _groups(step))
    largest = max((max(8 * k * k, 4 * k * k + 9 * max(ns) * k) for k, ns in _groups(step)), default=0)
    return round(HELD_BYTES * weights) + largest


def seconds(step: Step, machine: Machine, tokens: int, rounds_activations: bool) -> float:
    """What a layer takes beside its forwards."""
    found, traffic = 0.0, 0.0
    for k, ns in _groups(step):
        products = k * k * (tokens / SUMS_SHARE + sum(ns) / CARRY_SHARE) + k**3 / 3 / FACTOR_SHARE
        found += products / machine.matmul + COLUMN_SECONDS * k * len(ns)
        traffic += COLUMN_TRAFFIC * k * sum(ns) + (ACTIVATION_TRAFFIC * FORWARDS * k * tokens if rounds_activations else 0.0)
    return found + traffic / machine.copy / max(1, torch.get_num_threads())
