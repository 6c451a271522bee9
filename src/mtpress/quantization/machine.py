"""How fast this machine is, measured in two seconds on what a run does: read, write, hash, pack, and the forward's three parts.

In: the plan, whose source is read and whose sizes are used, and the directory of the output. Out: a `Machine`. Leaves out: what
follows from it (quantization/preflight.py).
"""

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from mtpress.calibration.block_hessian import InputHessian
from mtpress.checkpoint.direct_io import PIECE_BYTES, aligned_buffer, open_direct
from mtpress.checkpoint.safetensors import TensorInfo
from mtpress.errors import ResourceError
from mtpress.models import family
from mtpress.plan.plan import Plan
from mtpress.quantization.rounders import rounding

PROBE_SECONDS = 0.3  # for each of at most eight things; less where the run itself will be short
BYTES_WORTH_A_SECOND = 4e10
PROBE_TOKENS = 512
PROBE_PIECES = 4  # of the file that is written over and over


@dataclass(frozen=True)
class Machine:
    """Rates of this machine: bytes a second, operations a second, seconds a token and layer."""

    read: float
    write: float
    hash: float
    copy: float
    pack: float
    matmul: float = 0.0
    attention: float = 0.0
    delta_rule: float = 0.0
    hessian: float = 0.0  # numbers that a linear reads, a second
    gpu: bool = False


def rate(work: Callable[[], float], seconds: float) -> float:
    """Amount of work a second: work() does some and says how much; the first call warms up where there is time for a second."""
    started = time.perf_counter()
    amount = work()
    spent = time.perf_counter() - started
    if spent > seconds:
        return amount / spent
    started, amount = time.perf_counter(), 0.0
    while True:
        amount += work()
        spent = time.perf_counter() - started
        if spent > seconds:
            return amount / spent


def begin(plan: Plan, out: Path) -> Future[dict[str, float]]:
    """Starts the half of the probe that needs one core and the disk, while this thread loads libraries.

    Reads the source past the page cache, writes a file without a name on the disk of `out`.
    """
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mtpress-probe")
    begun = pool.submit(_storage_rates, plan, out, _seconds(plan))
    pool.shutdown(wait=False)
    return begun


def measure(plan: Plan, begun: Future[dict[str, float]], device: torch.device, lengths: Sequence[int]) -> Machine:
    """The other half, which needs every core; about two seconds in all."""
    weight = torch.randn(1024, 5120).bfloat16().to(device)

    def packed() -> int:
        rounding(plan).matrix(weight)
        _finish(device)
        return weight.nbytes

    forward = _forward_rates(plan, device, lengths, _seconds(plan)) if lengths else {}
    return Machine(**begun.result(), pack=rate(packed, _seconds(plan)), **forward, gpu=device.type == "cuda")


def _seconds(plan: Plan) -> float:
    if plan.recipe.rounding == "signround":  # goes over a layer hundreds of times
        return PROBE_SECONDS
    return min(PROBE_SECONDS, plan.read_bytes / BYTES_WORTH_A_SECOND + 0.005)


def _storage_rates(plan: Plan, out: Path, seconds: float) -> dict[str, float]:
    largest = max(plan.source.tensors.values(), key=lambda info: info.num_bytes)
    buffer = aligned_buffer(PIECE_BYTES)
    buffer[:] = os.urandom(PIECE_BYTES)  # zeros are too easy for some disks
    other = bytearray(PIECE_BYTES)

    def copied() -> int:
        other[:] = buffer
        return len(other)

    def hashed() -> int:
        hashlib.sha256(buffer)
        return len(buffer)

    return {
        "write": _write_rate(out, buffer, seconds),
        "hash": rate(hashed, seconds),
        "copy": rate(copied, seconds / 3),
        "read": _read_rate(largest, buffer, seconds),
    }


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _read_rate(info: TensorInfo, buffer: memoryview, seconds: float) -> float:
    file = open_direct(info.file, os.O_RDONLY)
    start = info.offset - info.offset % PIECE_BYTES
    pieces = max(1, info.num_bytes // PIECE_BYTES)
    count = 0

    def piece() -> int:
        nonlocal count
        count += 1
        return max(1, os.preadv(file, [buffer], start + (count - 1) % pieces * PIECE_BYTES))

    try:
        return rate(piece, seconds)
    finally:
        os.close(file)


def _write_rate(out: Path, buffer: memoryview, seconds: float) -> float:
    parent = next(p for p in out.absolute().parents if p.exists())
    path = parent / f".{out.name}.probe-{os.getpid()}"
    try:
        file = open_direct(path, os.O_WRONLY | os.O_CREAT)
        path.unlink()  # it takes room until it is closed, and no kill can leave it behind
        count = 0

        def piece() -> int:
            nonlocal count
            count += 1
            written = os.pwrite(file, buffer, count % PROBE_PIECES * PIECE_BYTES)
            os.fdatasync(file)
            return written

        try:
            return rate(piece, seconds)
        finally:
            os.close(file)
    except OSError as error:
        raise ResourceError(f"{parent}: cannot be written ({error.strerror or error}); free space or choose another disk") from None


def _forward_rates(plan: Plan, device: torch.device, lengths: Sequence[int], seconds: float) -> dict[str, float]:
    from mtpress.models.gated_delta_rule import chunk_gated_delta_rule

    d = family(plan.source.model_type).sizes(plan.source.config)
    tokens = min(PROBE_TOKENS, max(lengths))

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device=device)

    x, w = random(tokens, d["hidden_size"]), random(min(4096, d["intermediate_size"]), d["hidden_size"])
    heads, dim = d["num_attention_heads"], d["head_dim"]
    q = random(1, heads, tokens, dim)
    k = random(1, tokens, d["linear_num_key_heads"], d["linear_key_head_dim"])
    v = random(1, tokens, d["linear_num_value_heads"], d["linear_value_head_dim"])
    gate = torch.rand(1, tokens, d["linear_num_value_heads"], device=device)

    def matmul() -> float:
        F.linear(x, w)
        _finish(device)
        return 2.0 * x.numel() * w.shape[0]

    def attention() -> float:
        F.scaled_dot_product_attention(q, q, q, is_causal=True)
        _finish(device)
        return float(tokens * tokens * heads * dim)

    def delta_rule() -> float:
        chunk_gated_delta_rule(k, k, v, -gate, gate, use_qk_l2norm_in_kernel=True)
        _finish(device)
        return float(tokens)

    def hessian() -> float:
        InputHessian().add("", x)
        return float(x.numel())

    with torch.no_grad():
        rates = {
            "matmul": rate(matmul, seconds),
            "attention": rate(attention, seconds / 2),
            "delta_rule": 1 / rate(delta_rule, seconds / 2),
        }
        return rates | ({"hessian": rate(hessian, seconds / 2)} if plan.recipe.rounding == "hessian" else {})
