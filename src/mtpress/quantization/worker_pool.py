"""Spreads a run over processes of this machine, or over machines with Ray: the same bytes as one process writes.

A calibrated run gives each worker a share of the samples: the largest |x| over all samples is the largest of the shares, and
no sample's activations depend on another's. A weight-only run gives them the shards of the output, one after another. Every
worker reads the source itself and sees the partial directory. In: a plan and its writer. Out: what stream.run wants of a
forward, or finished shards. Leaves out: what a worker does (quantization/worker.py).
"""

import math
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from multiprocessing import Pipe
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import psutil
import torch

from mtpress.calibration.block_hessian import InputHessian
from mtpress.calibration.samples import CalibrationSet, InputAmax
from mtpress.checkpoint.source_guard import SourceGuard
from mtpress.checkpoint.writer import CheckpointWriter
from mtpress.errors import InputError, MtpressError, ResourceError
from mtpress.models.hidden_states import STREAM, states_sha256, sync_states
from mtpress.plan.plan import Plan, Step
from mtpress.progress import Progress
from mtpress.quantization.rounders import read_losses, run, unfinished_steps
from mtpress.quantization.worker import Calls

if TYPE_CHECKING:
    from mtpress.chat.sample import Sample

POLL_SECONDS = 0.2
WATCH_SECONDS = 1.0
MAX_STOPPED = 20  # looks at a worker that stands still while this process runs, as after SIGSTOP or in a debugger, before it is ended
RAY_SECONDS = 60.0  # in which a cluster must have let a process join; ray.init itself tries for minutes, then aborts the process
JOIN = "import sys, ray; ray.init(address=sys.argv[1], log_to_driver=False, logging_level='ERROR')"


class Handle(Protocol):
    """A worker somewhere: call() begins a method, result() waits for it; one call at a time."""

    def call(self, method: str, *arguments: Any) -> None: ...

    def done(self) -> bool: ...

    def result(self) -> Any: ...

    def stop(self) -> None: ...


class ProcessWorker:
    """A worker in a process of its own on this machine."""

    def __init__(self, threads: int) -> None:
        self.connection, theirs = Pipe()
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, "-m", "mtpress.quantization.worker", str(theirs.fileno())]
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL)
        theirs.close()
        self.looks_stopped, self.stood_still = 0, False

    def watch(self) -> None:
        """Ends the process when it was seen standing still for too long; whoever waits for it then hears that it ended."""
        with suppress(psutil.Error):
            stopped = psutil.Process(self.process.pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
            self.looks_stopped = self.looks_stopped + 1 if stopped else 0
            if self.looks_stopped >= MAX_STOPPED:
                self.stood_still = True
                self.process.kill()

    def call(self, method: str, *arguments: Any) -> None:
        with suppress(ConnectionError):  # result() says what became of it
            self.connection.send_bytes(pickle.dumps((method, arguments)))

    def done(self) -> bool:
        return self.connection.poll(0)

    def result(self) -> Any:
        try:
            well, value = pickle.loads(self.connection.recv_bytes())
        except (EOFError, ConnectionError):
            code = self.process.wait()
            if self.stood_still:
                raise ResourceError(
                    f"a worker process stood still for {MAX_STOPPED * WATCH_SECONDS:.0f} s (SIGSTOP?) and was ended"
                ) from None
            how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
            raise ResourceError(f"a worker process {how}; is there memory for as many? Try a smaller --workers") from None
        if not well:
            raise value
        return value

    def stop(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.wait()


class RayWorker:
    """A worker that Ray puts on some machine of its cluster."""

    def __init__(self, resources: Mapping[str, float]) -> None:
        import ray

        self.ray = ray
        self.actor: Any = ray.remote(**resources)(Calls).remote()
        self.pending: Any = None

    def call(self, method: str, *arguments: Any) -> None:
        self.pending = self.actor.answer.remote(method, *arguments)

    def done(self) -> bool:
        return bool(self.ray.wait([self.pending], timeout=0)[0])

    def result(self) -> Any:
        try:
            return self.ray.get(self.pending)
        except self.ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, MtpressError):
                raise error.cause from None
            raise
        except self.ray.exceptions.RayActorError as error:
            reason = str(error).strip().splitlines()[-1][:160]
            raise ResourceError(f"a Ray worker died ({reason}); is there memory for as many? Try a smaller --workers") from None

    def stop(self) -> None:
        self.ray.kill(self.actor)


class WorkerPool:
    """Workers that all have made the plan; close() ends them."""

    whole_layers = False  # the workers read the layers themselves

    def __init__(self, plan: Plan, writer: CheckpointWriter, source: str | Path, device: torch.device, count: int, ray: str | None) -> None:
        self.plan, self.writer = plan, writer
        self.on_ray = ray is not None
        self.joined = ray is not None and connect(ray)
        self.handles: list[Handle] = []
        self.digests: dict[int, bytes] = {}  # of each sample's states behind the last layer
        self.left = threading.Event()
        path = str(Path(source).absolute()) if Path(source).is_dir() else str(source)
        recipe, partial = plan.recipe.canonical(), str(writer.partial.absolute())
        try:
            threads = max(1, torch.get_num_threads() // count)
            resources = ray_resources(count, device) if self.on_ray else {}
            if self.on_ray:
                threads = max(1, int(resources["num_cpus"]))
            for _ in range(count):
                self.handles.append(RayWorker(resources) if self.on_ray else ProcessWorker(threads))
            threading.Thread(target=self._watch, name="mtpress-watch", daemon=True).start()
            for number, handle in enumerate(self.handles):
                place = f"cuda:{number % torch.cuda.device_count()}" if device.type == "cuda" and ray is None else str(device)
                handle.call("__init__", path, plan.source.identity, recipe, partial, place, threads)
            self._results()
        except BaseException:
            self.close()
            raise

    def _watch(self) -> None:
        while not self.left.wait(WATCH_SECONDS):
            for handle in self.handles:
                if isinstance(handle, ProcessWorker):
                    handle.watch()

    def close(self) -> None:
        self.left.set()
        for handle in self.handles:
            handle.stop()
        if self.joined:
            import ray

            ray.shutdown()

    def _results(self) -> list[Any]:
        return [handle.result() for handle in self.handles]

    def begin(self, samples: "Sequence[Sample]", first_layer: int) -> None:
        """Deals the samples out, longest first to the worker that has the fewest tokens."""
        lengths = [len(sample.input_ids) for sample in samples]
        shares: list[list[int]] = [[] for _ in self.handles]
        for member in sorted(range(len(samples)), key=lambda i: -lengths[i]):
            min(shares, key=lambda share: sum(lengths[i] for i in share)).append(member)
        for handle, share in zip(self.handles, shares, strict=True):
            share.sort()
            handle.call("begin", [samples[i] for i in share], lengths, share, first_layer)
        self._results()

    def layer(self, step: Step, tensors: object) -> InputAmax:
        """What the linears of a layer read of all samples."""
        for handle in self.handles:
            handle.call("layer", step.layer)
        merged = InputAmax(hessian=InputHessian() if self.plan.recipe.rounding == "hessian" else None)
        self.digests = {}
        for amax, parts, digests in self._results():
            merged.merge(amax)
            self.digests |= digests
            if merged.hessian is not None:
                merged.hessian.merge(parts)
        if self.on_ray:  # the files may be written on other machines
            for handle in self.handles:
                handle.call("sync", step.layer)
            self._results()
        return merged

    def sync(self, step: Step) -> None:
        assert step.layer is not None
        if not self.on_ray:
            sync_states(self.writer.lock.directory, step.layer + 1)

    def states_sha256(self) -> dict[str, str]:
        """Stream → SHA-256 of what all samples hold behind the last layer."""
        return {STREAM: states_sha256(self.digests)}

    def write_shards(self, progress: Progress) -> dict[str, float]:
        """Every unfinished shard of a weight-only run; the seconds that the workers spent per kind of work, together."""
        waiting = [file for file in self.plan.shards if file not in self.writer.sha256]
        waiting.sort(key=lambda file: sum(tensor.num_bytes for tensor in self.plan.shards[file]))
        idle, busy = list(self.handles), list[Handle]()
        spent: dict[str, float] = {}
        seen = set(self.writer.finished)
        while waiting or busy:
            while waiting and idle:
                handle = idle.pop()
                handle.call("write_shard", waiting.pop(), dict(self.writer.metadata))
                busy.append(handle)
            time.sleep(POLL_SECONDS)
            for handle in [handle for handle in busy if handle.done()]:
                for kind, seconds in handle.result().items():
                    spent[kind] = spent.get(kind, 0.0) + seconds
                busy.remove(handle)
                idle.append(handle)
            self.writer.take_up()
            for step in self.plan.steps:
                if step.title in self.writer.finished - seen:
                    progress.advance(step.effort(calibrated=False), step.title)
            seen = set(self.writer.finished)
        return spent

    def peak_memory_bytes(self) -> list[int]:
        """Of each worker."""
        for handle in self.handles:
            handle.call("peak_memory_bytes")
        return self._results()


def connect(address: str) -> bool:
    """Joins a Ray cluster: "local" starts one of this machine, "auto" finds the one this machine belongs to. False: this process has."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anyone unasked
    try:
        import ray
    except ImportError:
        raise InputError("--ray: Ray is not installed; `pip install mtpress[ray]`, or use --workers alone on this machine") from None
    if ray.is_initialized():
        return False
    if address != "local":
        _refuse_dead(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", include_dashboard=False if address == "local" else None)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or ["no answer"])[0][:160]
        raise ResourceError(
            f"--ray {address}: no cluster there ({reason}); start one with `ray start --head`, or use --ray local"
        ) from None
    return True


def _refuse_dead(address: str) -> None:
    """ResourceError where no cluster lets a process of its own join in RAY_SECONDS."""
    known = Path(tempfile.gettempdir()) / "ray" / "ray_current_cluster"
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or (known.read_text().strip() if known.is_file() else "")
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():
        return  # ray.init knows what to say of it
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=10):
            pass
        joined = subprocess.run(
            [sys.executable, "-c", JOIN, address], stdin=subprocess.DEVNULL, capture_output=True, timeout=RAY_SECONDS, check=False
        )
        reason = "" if joined.returncode == 0 else "what answers is no Ray that this one can join"
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error) or "no answer"
    except subprocess.TimeoutExpired:
        reason = f"no answer in {RAY_SECONDS:.0f} s"
    if reason:
        raise ResourceError(f"--ray {address}: no cluster there ({reason}); start one with `ray start --head`, or use --ray local")


def ray_resources(count: int, device: torch.device) -> dict[str, float]:
    """What each of `count` actors asks the cluster for, so that all of them have room at once.

    CPUs: a share of the smallest machine's. GPUs: one, or a share of one where there are fewer GPUs than actors.
    """
    import ray

    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus = min((machine["CPU"] for machine in machines if machine.get("CPU")), default=0.0)
    resources = {"num_cpus": float(cpus // count) or _floor(cpus / count)}
    if device.type == "cuda":
        gpus = sum(machine.get("GPU", 0.0) for machine in machines)
        if not gpus:
            raise ResourceError("--ray: no machine of the cluster has a GPU that Ray knows of; use --device cpu")
        resources["num_gpus"] = _floor(1 / math.ceil(count / gpus))
    return resources


def _floor(share: float) -> float:
    """Ray counts in ten-thousandths and rounds up."""
    return math.floor(share * 10_000) / 10_000


@dataclass(frozen=True)
class Spread:
    """Over how many workers a run is spread: processes of this machine or, with the address of a cluster, Ray actors."""

    source: str | Path
    workers: int = 1
    ray: str | None = None


@dataclass(frozen=True)
class Written:
    """What writing the weights took: seconds per kind of work, each worker's peak memory in bytes, and the losses of the layers."""

    seconds: dict[str, float]
    worker_memory: list[int] = field(default_factory=list)
    losses: dict[int, dict[str, float]] = field(default_factory=dict)


def write_weights(
    plan: Plan,
    writer: CheckpointWriter,
    calibrated: CalibrationSet | None,
    device: torch.device,
    guard: SourceGuard,
    progress: Progress,
    spread: Spread,
) -> Written:
    """Every unfinished tensor, by this process or by workers."""
    first_layer = next((step.layer for step in unfinished_steps(plan, writer) if step.layer is not None), None)
    if spread.workers == 1 and spread.ray is None:
        if calibrated is None or first_layer is None:
            return Written(run(plan, writer, device, None, guard, progress), losses=read_losses(writer.lock.directory))
        with closing(_pass(plan, calibrated, device, writer.lock.directory, first_layer)) as forward:
            return Written(run(plan, writer, device, forward, guard, progress), losses=read_losses(writer.lock.directory))
    with closing(WorkerPool(plan, writer, spread.source, device, spread.workers, spread.ray)) as pool:
        if calibrated is None:
            spent = pool.write_shards(progress)
            writer.wait()
        else:
            if first_layer is not None:
                pool.begin(calibrated.samples, first_layer)
            spent = run(plan, writer, device, pool, guard, progress)
        return Written(spent, pool.peak_memory_bytes())


def _pass(plan: Plan, calibrated: CalibrationSet, device: torch.device, directory: Path, first_layer: int) -> Any:
    """What moves the samples in this process, as the rounding wants it."""
    if plan.recipe.rounding == "signround":
        from mtpress.calibration.signround import SignRoundPass
        from mtpress.rounding.signround import Settings

        said = plan.recipe.signround
        settings = Settings(iterations=said.iterations, batch_size=said.batch_size)
        return SignRoundPass(plan, calibrated.samples, device, directory, settings, first_layer=first_layer)
    if plan.recipe.rounding == "gptq":
        from mtpress.calibration import gptq as gptq_pass

        assert plan.recipe.gptq is not None
        chosen = gptq_pass.Settings(plan.recipe.gptq.scales, plan.recipe.gptq.damping)
        return gptq_pass.GptqPass(plan, calibrated.samples, device, directory, chosen, first_layer=first_layer)
    from mtpress.calibration.forward import CalibrationPass

    return CalibrationPass(plan, calibrated.samples, device, directory, first_layer=first_layer)
