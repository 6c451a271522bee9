"""The flags that mtpress writes, and how it reads what users write, by the parser of the real `vllm serve`."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mtpress.engine.launch import profiles
from mtpress.engine.launch.arguments import ON, final_values, read
from mtpress.engine.launch.installed import find_engine
from mtpress.engine.launch.settings import REASONING_PARSER
from serve_profiles import BUILDS, Layouts, dry_run

pytestmark = pytest.mark.engine

SCRIPT = Path(__file__).with_name("parse_arguments.py")
WRITTEN = (
    ["--max_model_len=4096", "-tp", "2", "--no-enable-prefix-caching"],
    ["--compilation-config.cudagraph_mode", "NONE", "--gpu_memory_utilization", "0.5"],
    ["--spec-tokens", "2", "--spec-method", "mtp"],
    ["--max-model-len", "32k", "--device-memory-utilization", "0.6", "--enforce-eager"],
    ["-O3", "--kv-cache-dtype", "auto", "--kv_cache_dtype=fp8"],
)
WRONG = (["--linear-backend", "nonsense"], ["--kv-cache-dtype", "tq-t4nc"], ["--no-such-flag"])


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What stands after `vllm serve` in the dry run of every profile."""
    layouts = Layouts(tmp_path_factory.mktemp("layouts"))
    return {name: list(dry_run(name, layouts[BUILDS.get(name, "nvfp4-mtp-vlm")]).command[2:]) for name in profiles.profiles()}


@pytest.fixture(scope="module")
def found(lines: dict[str, list[str]], engine_python: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("parsed")
    asked, answered = folder / "lines.json", folder / "found.json"
    asked.write_text(json.dumps([*lines.values(), *([str(folder), *line] for line in (*WRITTEN, *WRONG))]))
    done = subprocess.run([str(engine_python), str(SCRIPT), str(asked), str(answered)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return list(json.loads(answered.read_text()))


def test_vllm_accepts_every_profile(lines: dict[str, list[str]], found: list[dict[str, Any]]) -> None:
    assert not {name: result["error"] for name, result in zip(lines, found, strict=False) if "error" in result}
    gb10 = dict(zip(lines, found, strict=False))["gb10"]
    assert gb10["linear_backend"] == "cutlass"
    assert gb10["speculative_config"] == {"method": "mtp", "num_speculative_tokens": 2}
    assert gb10["default_chat_template_kwargs"] == {"preserve_thinking": True}
    assert (gb10["reasoning_parser"], gb10["reasoning_parser_plugin"]) == ("mtpress", str(REASONING_PARSER))
    assert (gb10["max_num_seqs"], gb10["kv_cache_dtype"], gb10["tool_call_parser"]) == (64, "fp8", "qwen3_xml")


def test_what_vllm_does_not_know_is_refused_by_its_parser(found: list[dict[str, Any]]) -> None:
    assert [set(result) for result in found[-len(WRONG) :]] == [{"error"}] * len(WRONG)


def test_users_arguments_are_read_as_vllm_reads_them(found: list[dict[str, Any]]) -> None:
    theirs = found[-len(WRONG) - len(WRITTEN) : -len(WRONG)]
    ours = [final_values(read(line)) for line in WRITTEN]
    first, second, third, fourth, fifth = theirs
    assert (first["max_model_len"], first["tensor_parallel_size"], first["enable_prefix_caching"]) == (4096, 2, False)
    assert ours[0] == {"--max-model-len": "4096", "--tensor-parallel-size": "2", "--enable-prefix-caching": "false"}
    assert second["gpu_memory_utilization"] == 0.5
    assert ours[1] == {"--compilation-config": '{"cudagraph_mode": "NONE"}', "--gpu-memory-utilization": "0.5"}
    assert (third["spec_tokens"], third["spec_method"]) == (2, "mtp")
    assert json.loads(ours[2]["--speculative-config"]) == {"num_speculative_tokens": 2, "method": "mtp"}
    assert (fourth["max_model_len"], fourth["gpu_memory_utilization"], fourth["enforce_eager"]) == (32000, 0.6, True)
    assert ours[3] == {"--max-model-len": "32k", "--gpu-memory-utilization": "0.6", "--enforce-eager": ON}
    assert fifth["kv_cache_dtype"] == ours[4]["--kv-cache-dtype"] == "fp8"


def test_the_engine_here_is_found_by_any_of_its_names(engine_python: Path) -> None:
    named = [find_engine(str(path)) for path in (engine_python.parents[1], engine_python, engine_python.with_name("vllm"))]
    assert len({(engine.python, engine.command) for engine in named}) == 1
    assert (named[0].version, named[0].platform, str(named[0].release)) == ("0.32.0+cpu", "cpu", "0.32.0")
    assert "mtpress_nvfp4_cpu" in named[0].plugins
