"""vLLM's benchmark client without vLLM: arguments, environment, the driver's protocol, and what becomes of bad answers."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from mtpress.bench.client import DRIVER, BenchClient, Load, cell_run
from mtpress.bench.measurement import Cell
from mtpress.engine.drivers.process import LOOP, DriverProcess, client_environment
from mtpress.engine.launch.installed import Engine
from mtpress.engine.server.metrics import SpecDecode
from mtpress.errors import EngineError, InputError
from mtpress.evaluation.tasks.run import DRIVER as TASKS_DRIVER

CELL = Cell(50, 2)
RESULT: dict[str, Any] = {
    "seconds": 2.0, "ttft_seconds": [0.1, 0.2, 0.0], "latency_seconds": [1.0, 2.0, 0.0], "prompt_tokens": [5, 6, 1],
    "output_tokens": [50, 50, 0], "errors": ["", "", "Traceback\n  …\nConnectionError: gone"],
    "acceptance": {"num_drafts": 3, "num_draft_tokens": 6, "num_accepted_tokens": 3, "per_position": [2 / 3, 1 / 3]},
}  # fmt: skip


def value_of(arguments: list[str], flag: str) -> str:
    assert arguments.count(flag) == 1
    return arguments[arguments.index(flag) + 1]


def test_the_server_counts_and_templates_and_nothing_is_sent_before_the_cell() -> None:
    arguments = Load(CELL, 4, Path("p.jsonl"), salt="s").arguments("http://h:1", "m")
    assert value_of(arguments, "--backend") == "openai-chat"
    assert value_of(arguments, "--ready-check-timeout-sec") == "0"
    assert value_of(arguments, "--max-concurrency") == "2"
    assert value_of(arguments, "--num-prompts") == "4"
    assert value_of(arguments, "--temperature") == "0.0"
    assert json.loads(value_of(arguments, "--extra-body")) == {"cache_salt": "s", "max_completion_tokens": 50}
    assert {"--skip-tokenizer-init", "--ignore-eos", "--disable-shuffle", "--save-detailed"} <= set(arguments)


def test_answers_may_end_by_themselves() -> None:
    assert "--ignore-eos" not in Load(CELL, 4, Path("p.jsonl"), natural_end=True).arguments("http://h:1", "m")


def test_random_tokens_need_the_tokenizer() -> None:
    arguments = Load(CELL, 4, tokenizer=Path("ckpt")).arguments("http://h:1", "m")
    assert value_of(arguments, "--dataset-name") == "random"
    assert value_of(arguments, "--tokenizer") == "ckpt"
    assert value_of(arguments, "--random-output-len") == "50"
    assert "--skip-tokenizer-init" not in arguments


def test_no_proxy_and_no_foreign_key_reaches_the_client() -> None:
    outside = {"HTTP_PROXY": "http://proxy", "https_proxy": "x", "OPENAI_API_KEY": "another service's", "PATH": "/bin"}
    kept = client_environment(outside, None)
    assert kept["PATH"] == "/bin"
    assert not {"HTTP_PROXY", "https_proxy", "OPENAI_API_KEY"} & set(kept)
    assert client_environment(outside, "ours")["OPENAI_API_KEY"] == "ours"


def test_requests_that_failed_are_counted_and_not_timed() -> None:
    run = cell_run(RESULT, CELL, 1, 2, acceptance=True)
    assert run.latency_seconds == (1.0, 2.0)
    assert (run.num_failed, run.first_error) == (1, "ConnectionError: gone")
    assert (run.configuration, run.round) == (1, 2)
    assert run.spec_decode == SpecDecode(3, 6, 3, (2, 1))
    assert cell_run(RESULT, CELL, 1, 2, acceptance=False).spec_decode is None


def test_a_cell_without_an_answer_is_an_error_with_the_reason() -> None:
    dead = RESULT | {"errors": ["Bad Request"] * 3}
    with pytest.raises(EngineError, match="50 tokens × 2 streams: none of 3 requests was answered: Bad Request"):
        cell_run(dead, CELL, 0, 0, acceptance=True)


def engine(python: Path) -> Engine:
    return Engine(python, ("vllm",), "0.32.0", "cpu")


def test_a_python_without_vllm_is_told_in_one_line(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match="vLLM's benchmark client cannot be used there: No module named 'vllm'"),
        BenchClient(engine(Path(sys.executable)), tmp_path / "log"),
    ):
        pass


def stand_in(folder: Path, body: str) -> Engine:
    """An engine whose python is a script; the driver it is told to run is not run."""
    script = folder / "python"
    script.write_text(f"#!{sys.executable}\nimport json, os, sys, time\n{body}\n", encoding="utf-8")
    script.chmod(0o755)
    return engine(script)


def test_cells_are_asked_one_after_another_of_one_process(tmp_path: Path) -> None:
    body = f"""
print(json.dumps({{"ready": "1"}}), flush=True)
for number, line in enumerate(sys.stdin):
    asked = json.loads(line)["arguments"]
    result = {RESULT!r} | {{"seconds": number + 1.0}}
    print(json.dumps({{"error": "no " + asked[1]}} if "fail" in asked else {{"result": result}}), flush=True)
"""
    with BenchClient(stand_in(tmp_path, body), tmp_path / "log") as client:
        pid = client.process.pid
        assert [client.measure(Load(CELL, 3, Path("p")), "http://h:1", "m").seconds for _ in range(2)] == [1.0, 2.0]
        with pytest.raises(EngineError, match=r"^50 tokens × 2 streams: vLLM.s benchmark client: no http://h:1"):
            client.measure(Load(CELL, 3, Path("p")), "http://h:1", "fail")
    assert not Path(f"/proc/{pid}").exists()


def test_a_client_that_dies_is_an_error_that_names_the_log(tmp_path: Path) -> None:
    body = 'print(json.dumps({"ready": "1"}), flush=True); sys.stdin.readline(); sys.exit(3)'
    with (
        BenchClient(stand_in(tmp_path, body), tmp_path / "client.log") as client,
        pytest.raises(EngineError, match=r"client\.log says why"),
    ):
        client.measure(Load(CELL, 3, Path("p")), "http://h:1", "m")


def test_leaving_ends_a_client_that_hangs(tmp_path: Path) -> None:
    body = 'print(json.dumps({"ready": "1"}), flush=True); time.sleep(600)'
    with BenchClient(stand_in(tmp_path, body), tmp_path / "log") as client:
        pid = client.process.pid
    assert not Path(f"/proc/{pid}").exists()


VLLM = """
import argparse, sys
def add_cli_args(parser): parser.add_argument("--model")
async def main_async(options):
    print("noise on stdout")
    if options.model == "bad": raise ValueError("wrong\\n  model")
    return {"duration": 1.5, "ttfts": [0.25], "itls": [[0.25, 0.5]], "input_lens": [3], "output_lens": [4], "errors": [""]}
"""


def test_the_driver_answers_on_stdout_and_lets_nothing_else_there(tmp_path: Path) -> None:
    for name, text in {
        "vllm/__init__.py": "__version__ = '9.9'",
        "vllm/utils/__init__.py": "from argparse import ArgumentParser as FlexibleArgumentParser",
        "vllm/benchmarks/__init__.py": "",
        "vllm/benchmarks/serve.py": VLLM,
        "pandas.py": "",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with DriverProcess(Path(sys.executable), DRIVER, tmp_path / "log", environment, "vLLM's client") as client:
        assert client.ready == "9.9"
        good = client.ask({"arguments": ["--model", "good"]})
        with pytest.raises(EngineError, match="ValueError: wrong model"):
            client.ask({"arguments": ["--model", "bad"]})
        with pytest.raises(EngineError, match="does not take the arguments"):
            client.ask({"arguments": ["--unknown"]})
        assert client.ask({"arguments": ["--model", "good"]}) == good
    assert good["latency_seconds"] == [1.0]  # older versions give no latencies; they are the gaps' sum
    assert good["acceptance"] is None
    assert "noise on stdout" in (tmp_path / "log").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", [DRIVER, LOOP, TASKS_DRIVER], ids=lambda path: f"{path.parent.name}/{path.name}")
def test_drivers_import_nothing_of_mtpress(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert "import mtpress" not in source
    assert "from mtpress" not in source
