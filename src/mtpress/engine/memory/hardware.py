"""The machine that an engine would start on: its GPUs, its memory, its cores.

In: NVML (the driver's own library, by pynvml), /proc/meminfo and /proc/cpuinfo. Out: a `Hardware`. Leaves out: measuring how fast it is
(quantization/machine.py), and GPUs that are not NVIDIA's. No torch and no CUDA context: looking takes no memory on the GPU.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

CPUINFO = Path("/proc/cpuinfo")

# A GPU whose memory NVML does not tell, or tells within this share of the host's: it has none of its own.
SAME_MEMORY = 0.02


@dataclass(frozen=True)
class Gpu:
    """One GPU as the driver names it. unified: host and GPU share one memory (GB10, Jetson), so free is what the host has free."""

    name: str
    memory_bytes: int
    free_bytes: int
    compute_capability: tuple[int, int]
    unified: bool


@dataclass(frozen=True)
class Hardware:
    """The GPUs that an engine may use, in its order, the host's memory and its cores. cpu_flags: as Linux names them; None: not known."""

    gpus: tuple[Gpu, ...]
    memory_bytes: int
    available_bytes: int
    num_cores: int
    cpu_flags: frozenset[str] | None = None


def available_memory_bytes() -> int:
    """MemAvailable: what can be handed out now without swapping."""
    return int(psutil.virtual_memory().available)


def read_hardware() -> Hardware:
    """This machine now. Without NVIDIA's driver there are no GPUs; CUDA_VISIBLE_DEVICES is followed."""
    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0))
    gpus = _read_gpus(int(memory.total), int(memory.available))
    return Hardware(gpus, int(memory.total), int(memory.available), cores, _read_cpu_flags())


def _read_cpu_flags() -> frozenset[str] | None:
    try:
        lines = CPUINFO.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    first = next((line for line in lines if line.startswith("flags")), None)  # ARM calls them features, and has others
    return frozenset(first.partition(":")[2].split()) if first is not None else None


def _read_gpus(host_bytes: int, available_bytes: int) -> tuple[Gpu, ...]:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return tuple(_read_gpu(pynvml, handle, host_bytes, available_bytes) for handle in _visible(pynvml, handles))
    except pynvml.NVMLError:
        return ()
    finally:
        pynvml.nvmlShutdown()


def _visible(pynvml: Any, handles: list[Any]) -> list[Any]:
    """The GPUs that CUDA_VISIBLE_DEVICES names, by number or UUID, in its order; CUDA stops at the first that it does not know."""
    said = os.environ.get("CUDA_VISIBLE_DEVICES")
    if said is None:
        return handles
    uuids = [str(pynvml.nvmlDeviceGetUUID(handle)) for handle in handles]
    found = []
    for word in filter(None, (part.strip() for part in said.split(","))):
        if word.isdigit():
            at = int(word) if int(word) < len(handles) else None
        else:
            at = next((i for i, uuid in enumerate(uuids) if uuid.startswith(word)), None)
        if at is None:
            break
        found.append(handles[at])
    return found


def _read_gpu(pynvml: Any, handle: Any, host_bytes: int, available_bytes: int) -> Gpu:
    name, capability = str(pynvml.nvmlDeviceGetName(handle)), pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    try:
        total, free = _read_memory(pynvml, handle)
    except pynvml.NVMLError_NotSupported:  # GB10 answers so: there is no memory that is the GPU's
        total, free = 0, 0
    unified = total == 0 or abs(total - host_bytes) <= SAME_MEMORY * host_bytes
    if unified:
        total, free = host_bytes, available_bytes
    return Gpu(name, total, free, (int(capability[0]), int(capability[1])), unified)


def _read_memory(pynvml: Any, handle: Any) -> tuple[int, int]:
    """(total, free), total as CUDA tells it: without the 600 MiB or so that driver and firmware keep."""
    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
        return int(memory.total) - int(memory.reserved), int(memory.free)
    except pynvml.NVMLError_NotSupported:
        raise
    except pynvml.NVMLError:  # a driver before 510 knows the first version only
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        return int(memory.total), int(memory.free)
