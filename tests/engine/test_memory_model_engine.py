"""The memory model against vLLM itself: what the installed engine makes of its KV cache, launch by launch."""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fp8_cache import has_kernel

from full_size import make_full_size
from mtpress.engine.memory.hardware import Hardware
from mtpress.engine.memory.memory_model import ServeSettings, estimate
from mtpress.engine.memory.served_model import ServedModel
from qwen3_6_files import WIDTHS

pytestmark = pytest.mark.engine

GIB = 1 << 30
BUILTIN_MODEL = Path(__file__).resolve().parents[2] / "src/mtpress/builtin/mtpress-tiny"
# 27B's heads, hence its states, pages and groups, on a body that is small enough to be started in seconds.
HEADS_OF_27B = ("num_attention_heads", "num_key_value_heads", "head_dim", "linear_num_key_heads", "linear_num_value_heads",
                "linear_key_head_dim", "linear_value_head_dim")  # fmt: skip
# model, max_model_len, draft tokens, KV cache, prefix caching; by GiB of VLLM_CPU_KVCACHE_SPACE, which one process has once.
LAUNCHES: dict[int, list[tuple[str, int, int, str, bool]]] = {
    1: [("tiny", 1024, 0, "auto", False), ("tiny", 4096, 1, "fp8", False), ("tiny", 1000, 3, "auto", True),
        ("narrow", 8192, 3, "auto", False)],
    3: [("narrow", 32768, 1, "fp8", False), ("heads", 4096, 1, "auto", True), ("heads", 16384, 3, "fp8", False)],
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("kv-cache")
    make_full_size(root / "narrow", layers=12, width="tiny")
    wide = replace(WIDTHS["tiny"], hidden_size=128, **{name: getattr(WIDTHS["27b"], name) for name in HEADS_OF_27B})
    make_full_size(root / "heads", layers=64, width=wide, sparse=True)
    return {"tiny": BUILTIN_MODEL, "narrow": root / "narrow", "heads": root / "heads"}


def arguments(model: Path, launch: tuple[str, int, int, str, bool]) -> dict[str, Any]:
    _, max_model_len, draft, kv_cache_dtype, prefix_caching = launch
    given = {"model": str(model), "max_model_len": max_model_len, "max_num_seqs": 2, "max_num_batched_tokens": 1024}
    given |= {"kv_cache_dtype": kv_cache_dtype, "enable_prefix_caching": prefix_caching}
    return given | ({"speculative_config": {"method": "mtp", "num_speculative_tokens": draft}} if draft else {})


@pytest.mark.parametrize("space", LAUNCHES)
def test_vllm_finds_room_for_just_as_many(space: int, models: dict[str, Path], engine_python: Path, tmp_path: Path) -> None:
    launches = [launch for launch in LAUNCHES[space] if launch[3] != "fp8" or has_kernel()]
    asked, answered = tmp_path / "launches.json", tmp_path / "answers.json"
    asked.write_text(json.dumps([arguments(models[launch[0]], launch) for launch in launches]))
    command = [str(engine_python), str(Path(__file__).with_name("ask_kv_cache.py")), str(asked), str(answered)]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": str(space)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    answers = json.loads(answered.read_text())
    assert len(answers) == len(launches)
    for launch, answer in zip(launches, answers, strict=True):
        name, max_model_len, draft, kv_cache_dtype, prefix_caching = launch
        settings = ServeSettings(
            max_model_len, 2, kv_cache_dtype, draft, prefix_caching=prefix_caching, enforce_eager=True, cpu_kv_bytes=space * GIB
        )
        found = estimate(ServedModel.read(models[name]), settings, Hardware((), 64 * GIB, 64 * GIB, 2))
        assert found.problem is None
        assert {key: getattr(found, key) for key in answer} == answer, launch
        line = f"KV cache size: {found.num_tokens:,} tokens, Maximum concurrency for {max_model_len:,} tokens per request: "
        assert f"{line}{found.max_concurrency:.2f}x" in done.stdout + done.stderr
