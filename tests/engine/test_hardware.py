"""The machine, with NVML's answers made by hand: this suite runs where there is no GPU."""

# ruff: noqa: N802, N815 - the names are pynvml's

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from mtpress.engine.memory import hardware
from mtpress.engine.memory.hardware import Gpu, available_memory_bytes, read_hardware

MIB = 1 << 20


class Nvml:
    """As much of pynvml as is asked. cards: (name, total, reserved, free, compute capability); total None: not supported."""

    NVMLError = type("NVMLError", (Exception,), {})
    NVMLError_NotSupported = type("NVMLError_NotSupported", (NVMLError,), {})
    NVMLError_FunctionNotFound = type("NVMLError_FunctionNotFound", (NVMLError,), {})
    nvmlMemory_v2 = 2

    def __init__(self, *cards: tuple[str, int | None, int, int, tuple[int, int]], old_driver: bool = False) -> None:
        self.cards, self.old_driver, self.open = cards, old_driver, False

    def nvmlInit(self) -> None:
        if not self.cards:
            raise self.NVMLError("Driver Not Loaded")
        self.open = True

    def nvmlShutdown(self) -> None:
        self.open = False

    def nvmlDeviceGetCount(self) -> int:
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return f"GPU-{handle}abc"

    def nvmlDeviceGetName(self, handle: int) -> str:
        return self.cards[handle][0]

    def nvmlDeviceGetCudaComputeCapability(self, handle: int) -> tuple[int, int]:
        return self.cards[handle][4]

    def nvmlDeviceGetMemoryInfo(self, handle: int, version: int | None = None) -> Any:
        _, total, reserved, free, _ = self.cards[handle]
        if total is None:
            raise self.NVMLError_NotSupported("Not Supported")
        if version is not None and self.old_driver:
            raise self.NVMLError_FunctionNotFound("Function Not Found")
        return SimpleNamespace(total=total, free=free, **({"reserved": reserved} if version is not None else {}))


RTX = ("NVIDIA RTX PRO 6000", 97887 * MIB, 637 * MIB, 96000 * MIB, (12, 0))
H200 = ("NVIDIA H200", 143771 * MIB, 606 * MIB, 143000 * MIB, (9, 0))


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def put(*cards: Any, **options: Any) -> Nvml:
        made = Nvml(*cards, **options)
        monkeypatch.setitem(sys.modules, "pynvml", made)
        return made

    return put


def test_this_machine() -> None:
    found = read_hardware()
    assert found.num_cores >= 1 and 0 < found.available_bytes <= found.memory_bytes == psutil.virtual_memory().total
    assert 0 < available_memory_bytes() <= found.memory_bytes


@pytest.mark.parametrize(
    ("content", "flags"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx2 amx_tile\n\nprocessor\t: 1\nflags\t\t: fpu\n", frozenset({"fpu", "avx2", "amx_tile"})),
        ("processor\t: 0\nFeatures\t: fp asimd bf16\n", None),
        (None, None),
    ],
)
def test_what_the_processor_can(
    content: str | None, flags: frozenset[str] | None, nvml: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if content is not None:
        (tmp_path / "cpuinfo").write_text(content)
    monkeypatch.setattr(hardware, "CPUINFO", tmp_path / "cpuinfo")
    assert read_hardware().cpu_flags == flags


def test_no_driver_means_no_gpu(nvml: Any) -> None:
    nvml()
    assert read_hardware().gpus == ()


def test_what_the_driver_keeps_is_not_counted(nvml: Any) -> None:
    """CUDA tells 97,250 MiB of an RTX PRO 6000 whose NVML total is 97,887."""
    made = nvml(RTX, H200)
    assert read_hardware().gpus == (
        Gpu("NVIDIA RTX PRO 6000", 97250 * MIB, 96000 * MIB, (12, 0), False),
        Gpu("NVIDIA H200", 143165 * MIB, 143000 * MIB, (9, 0), False),
    )
    assert not made.open


def test_an_old_driver_tells_no_reserve(nvml: Any) -> None:
    nvml(RTX, old_driver=True)
    assert read_hardware().gpus[0].memory_bytes == 97887 * MIB


@pytest.mark.parametrize("total", [None, psutil.virtual_memory().total])
def test_unified_memory_is_the_hosts(nvml: Any, total: int | None) -> None:
    nvml(("NVIDIA GB10", total, 0, 1 << 30, (12, 1)))
    found = read_hardware()
    assert found.gpus == (Gpu("NVIDIA GB10", found.memory_bytes, found.available_bytes, (12, 1), True),)


@pytest.mark.parametrize(
    ("visible", "names"),
    [("1", ["NVIDIA H200"]), ("1,0", ["NVIDIA H200", "NVIDIA RTX PRO 6000"]), ("GPU-1a", ["NVIDIA H200"]), ("0,7,1", [RTX[0]]), ("", [])],
)
def test_the_gpus_that_the_engine_would_see(nvml: Any, monkeypatch: pytest.MonkeyPatch, visible: str, names: list[str]) -> None:
    nvml(RTX, H200)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpu.name for gpu in read_hardware().gpus] == names
