"""One worker of a run that is spread over processes or machines: a share of the samples, or some of the shards.

In: the source and the recipe, from which it makes the same plan as everyone, and its share. Out: what the linears have read
of its samples, or shards in the partial directory with their lines in the journal. Leaves out: who does what (quantization/worker_pool.py).

    python -m mtpress.quantization.worker FD        serves calls that arrive on an open connection, until it is closed
"""

import ctypes
import json
import pickle
import signal
import sys
from collections.abc import Sequence
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.checkpoint.journal import Journal
from mtpress.checkpoint.record import peak_memory_bytes
from mtpress.errors import InputError
from mtpress.plan.bf16_source import bf16_source
from mtpress.plan.plan import Plan, make_plan
from mtpress.plan.recipe import Recipe

if TYPE_CHECKING:
    from mtpress.calibration.block_hessian import Parts
    from mtpress.chat.sample import Sample

PR_SET_PDEATHSIG = 1


class Worker:
    """Its methods are called from worker_pool.py, over a connection or as a Ray actor; arguments and results are plain values."""

    def __init__(self, source: str, identity: str, recipe: dict[str, Any], partial: str, device: str, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        made = Recipe.model_validate_json(json.dumps(recipe))
        checkpoint, _ = bf16_source(Checkpoint.open(source), made.dequantize)
        if checkpoint.identity != identity:
            raise InputError(f"{source}: is not the same checkpoint on every worker; put it where all of them see it")
        if not (Path(partial) / ".").is_dir():
            raise InputError(f"{partial}: a worker does not see it; OUT must lie on a disk that all workers share")
        self.plan: Plan = make_plan(checkpoint, made)
        self.partial, self.device = Path(partial), torch.device(device)
        self.forward: Any = None
        self.weights: Any = None

    def begin(self, samples: "Sequence[Sample]", lengths: Sequence[int], members: Sequence[int], first_layer: int) -> None:
        """Takes a share of the calibration samples: `members` says which of all, whose lengths are `lengths`, they are."""
        from mtpress.calibration.forward import CalibrationPass
        from mtpress.checkpoint.prefetch import Prefetch

        directory = Journal(self.partial).directory
        self.forward = CalibrationPass(self.plan, samples, self.device, directory, lengths, members=members, first_layer=first_layer)
        layers = [step for step in self.plan.steps if step.layer is not None and step.layer >= first_layer]
        groups = [[info for job in step.jobs for info in job.sources] for step in layers]
        self.weights = Prefetch(groups, self.device, ahead=self.device.type == "cuda").load()

    def layer(self, layer: int) -> "tuple[dict[str, float], dict[str, Parts], dict[int, bytes]]":
        """Moves its samples through the next layer; the largest |x| that each of its linears has read, the sums of a Hessian, and the
        digests of its samples' states behind the layer."""
        step = next(step for step in self.plan.steps if step.layer == layer)
        amax = self.forward.layer(step, next(self.weights))
        seen = {name: float(value) for name, value in amax.amax.items()}
        return seen, amax.hessian.parts if amax.hessian else {}, self.forward.states.digests

    def sync(self, layer: int) -> None:
        """Waits until the states behind a layer are on the disk."""
        self.forward.states.sync(layer + 1)

    def write_shard(self, file: str, metadata: dict[str, str]) -> dict[str, float]:
        """Writes what is unfinished of one shard, weight-only; the seconds spent per kind of work."""
        from mtpress.checkpoint.shard_writer import ShardWriter
        from mtpress.checkpoint.source_guard import SourceGuard
        from mtpress.progress import Progress
        from mtpress.quantization.rounders import run

        journal = Journal(self.partial)
        journal.lock(f"{file}.lock")
        writer = ShardWriter(self.partial, {file: self.plan.shards[file]}, metadata, journal=journal)
        writer.start()
        try:
            with Progress("", 0, silent=True) as progress:
                return run(self.plan, writer, self.device, None, SourceGuard(self.plan.source), progress)
        finally:
            writer.stop(None)
            journal.unlock()

    def peak_memory_bytes(self) -> int:
        return peak_memory_bytes()

    def end(self) -> None:
        if self.weights is not None:
            self.weights.close()
            self.forward.close()


class Calls:
    """Calls of a Worker by name; the first, "__init__", makes it: Ray hands on what a call raises, not what making an actor does."""

    def __init__(self) -> None:
        self.worker: Worker | None = None

    def answer(self, method: str, *arguments: Any) -> Any:
        if method == "__init__":
            self.worker = Worker(*arguments)
            return None
        return getattr(self.worker, method)(*arguments)


def serve(connection: Connection) -> None:
    """Answers (method, arguments) with (True, result) or (False, exception), one after another.

    Pickled here and not by the connection, for which torch would put tensors into shared memory.
    """
    calls = Calls()
    while True:
        try:
            method, arguments = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            connection.send_bytes(pickle.dumps((True, calls.answer(method, *arguments))))
        except Exception as error:  # told to the process that asked
            connection.send_bytes(pickle.dumps((False, error)))


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the process that started this one decides
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if sys.platform == "linux":  # a worker must not write on when that process was killed
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    with closing(Connection(int(sys.argv[1]))) as connection:
        serve(connection)


if __name__ == "__main__":
    main()
