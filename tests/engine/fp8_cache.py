"""Where vLLM's CPU build keeps an FP8 KV cache: with AVX-512 or AMX (vLLM 0.32, v1/attention/backends/cpu_attn.py, _get_attn_isa)."""

from pathlib import Path

import pytest

from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.engine.memory.hardware import read_hardware
from mtpress.quant_config.view import Subject

FLAGS = {"avx512f", "amx_tile"}


def has_kernel() -> bool:
    flags = read_hardware().cpu_flags
    return flags is None or bool(FLAGS & flags)


def skip_without_kernel() -> None:
    """Skips the test on a CPU whose engine refuses an FP8 KV cache."""
    if not has_kernel():
        pytest.skip("vLLM's CPU build keeps an FP8 KV cache with AVX-512 or AMX only")


def skip_if_declared(checkpoint: Path) -> None:
    """The same for a checkpoint that declares such a cache."""
    if getattr(Subject(Checkpoint.open(checkpoint)).declared, "kv_cache", "") == "fp8":
        skip_without_kernel()
