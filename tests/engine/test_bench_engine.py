"""One benchmark of the built-in model on the real engine: two starts, a cell of two streams each."""

import json
from pathlib import Path
from typing import Any

import pytest

from mtpress.cli import main

pytestmark = pytest.mark.engine
LENGTH, STREAMS, REQUESTS = 24, 2, 4


@pytest.fixture(scope="module")
def measured(engine_python: Path, bf16_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The directory that the command writes, and its bench.json."""
    out = tmp_path_factory.mktemp("bench") / "out"
    options = ["--mtp", "off,2", "--lengths", str(LENGTH), "--streams", str(STREAMS), "--rounds", "1", "--requests", str(REQUESTS)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # two threads that spin on a busy machine are many times slower than one
        patch.chdir(out.parent)
        code = main(["bench", str(bf16_model), *options, "--engine", str(engine_python), "--out", out.name, "--no-plot"])
    assert code == 0
    return out, json.loads((out / "bench.json").read_text(encoding="utf-8"))


def test_every_answer_has_the_tokens_that_were_asked_for(measured: tuple[Path, dict[str, Any]]) -> None:
    """By the server's own count: with drafts, a chunk of the stream holds several tokens."""
    _, document = measured
    assert [configuration["label"] for configuration in document["configurations"]] == ["MTP off", "MTP n=2"]
    for run in document["runs"]:
        assert run["output_tokens"] == [LENGTH] * REQUESTS
        assert run["num_failed"] == 0
        assert all(0 < ttft < latency for ttft, latency in zip(run["ttft_seconds"], run["latency_seconds"], strict=True))
    off, on = document["runs"]
    assert off["prompt_tokens"] == on["prompt_tokens"]


def test_drafts_account_for_every_token(measured: tuple[Path, dict[str, Any]]) -> None:
    """A step yields one token of the model's and what it accepts; the first token of a request comes without a draft. A last step may
    accept more than the answer still takes."""
    _, document = measured
    off, on = document["configurations"]
    assert off["spec_decode"] is None
    counted = on["spec_decode"]
    assert counted["num_draft_tokens"] == 2 * counted["num_drafts"]
    yielded = counted["num_drafts"] + counted["num_accepted_tokens"] + REQUESTS
    assert REQUESTS * LENGTH <= yielded <= REQUESTS * (LENGTH + 2)
    assert 1.2 < counted["mean_accepted_length"] < 3  # the model was trained with its draft head
    first, second = counted["per_position"]
    assert 0 < second <= first < 1


def test_capacity_is_what_the_engine_logs(measured: tuple[Path, dict[str, Any]]) -> None:
    out, document = measured
    for server in document["servers"]:
        log = (out / f"logs/{server['configuration'] + 1}-1.engine.log").read_text(encoding="utf-8")
        assert f"KV cache size: {server['kv_cache_tokens']:,} tokens" in log
        assert f"{server['max_concurrency']:.2f}x" in log


def test_the_tables_name_engine_and_command(measured: tuple[Path, dict[str, Any]], bf16_model: Path) -> None:
    out, document = measured
    text = (out / "bench.md").read_text(encoding="utf-8")
    assert f"vLLM {document['engine']}" in text
    assert f"vllm serve {bf16_model.name} " in text
    assert str(out.parent) not in text
