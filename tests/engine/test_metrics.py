"""The /metrics page of vLLM 0.32, as its CPU engine wrote it after two requests (shortened to what is read and a few neighbours)."""

import pytest

from mtpress.engine.server.metrics import Metrics, SpecDecode
from mtpress.errors import EngineError

LABELS = 'engine="0",model_name="tiny"'
PAGE = f"""\
# HELP python_gc_objects_collected_total Objects collected during gc
# TYPE python_gc_objects_collected_total counter
python_gc_objects_collected_total{{generation="0"}} 3.2e+04
# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{{{LABELS}}} 16.0
# HELP vllm:spec_decode_num_drafts_created Number of spec decoding drafts.
# TYPE vllm:spec_decode_num_drafts_created gauge
vllm:spec_decode_num_drafts_created{{{LABELS}}} 1.7952546719412646e+09
# TYPE vllm:spec_decode_num_draft_tokens_total counter
vllm:spec_decode_num_draft_tokens_total{{{LABELS}}} 48.0
# TYPE vllm:spec_decode_num_accepted_tokens_total counter
vllm:spec_decode_num_accepted_tokens_total{{{LABELS}}} 31.0
# TYPE vllm:spec_decode_num_accepted_tokens_per_pos_total counter
vllm:spec_decode_num_accepted_tokens_per_pos_total{{{LABELS},position="0"}} 12.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{{{LABELS},position="1"}} 11.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{{{LABELS},position="2"}} 8.0
# TYPE vllm:num_preemptions_total counter
vllm:num_preemptions_total{{{LABELS}}} 5.0
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{{{LABELS}}} 42.0
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{{{LABELS}}} 47.0
# TYPE vllm:iteration_tokens_total histogram
vllm:iteration_tokens_total_bucket{{{LABELS},le="1.0"}} 4.0
vllm:iteration_tokens_total_bucket{{{LABELS},le="+Inf"}} 18.0
vllm:iteration_tokens_total_count{{{LABELS}}} 18.0
vllm:iteration_tokens_total_sum{{{LABELS}}} 89.0
# HELP vllm:cache_config_info Information of the LLMEngine CacheConfig
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{{block_size="256",cache_dtype="auto",engine="0",kv_cache_max_concurrency="256.0",\
kv_cache_size_tokens="524288",mamba_block_size="2048",num_cpu_blocks="None",num_gpu_blocks="4096"}} 1.0
"""


def test_a_real_page() -> None:
    metrics = Metrics.parse(PAGE)
    assert metrics.spec_decode == SpecDecode(16, 48, 31, (12, 11, 8))
    assert (metrics.prompt_tokens, metrics.generation_tokens, metrics.preemptions) == (42, 47, 5)
    assert metrics.kv_cache is not None
    assert metrics.kv_cache.num_tokens == 524288
    assert metrics.kv_cache.max_concurrency == 256.0
    assert (metrics.kv_cache.num_blocks, metrics.kv_cache.block_size, metrics.kv_cache.dtype) == (4096, 256, "auto")
    assert metrics.kv_cache.labels["mamba_block_size"] == "2048"


def test_the_rates_are_vllms() -> None:
    """What vLLM logged for these counts: mean acceptance length 1 + accepted / drafts, rates over drafts."""
    spec = SpecDecode(16, 48, 31, (12, 11, 8))
    assert spec.acceptance_rate == pytest.approx(31 / 48)
    assert spec.mean_accepted_length == pytest.approx(1 + 31 / 16)
    assert spec.per_position == pytest.approx((0.75, 0.6875, 0.5))
    assert spec.as_json()["mean_accepted_length"] == 2.9375


def test_differences_are_what_came_between() -> None:
    assert SpecDecode(16, 48, 31, (12, 11, 8)) - SpecDecode(6, 18, 11, (5, 4, 2)) == SpecDecode(10, 30, 20, (7, 7, 6))


def test_nothing_drafted_divides_by_nothing() -> None:
    spec = SpecDecode(0, 0, 0, (0, 0))
    assert (spec.acceptance_rate, spec.mean_accepted_length, spec.per_position) == (0.0, 1.0, (0.0, 0.0))


def test_engines_behind_one_server_are_added() -> None:
    lines = [line.replace('engine="0"', 'engine="1"') for line in PAGE.splitlines() if "accepted" in line and line[0] != "#"]
    both = Metrics.parse(PAGE + "\n".join(lines) + "\n")
    assert both.spec_decode == SpecDecode(16, 48, 62, (24, 22, 16))


def test_a_server_that_drafts_nothing_or_says_little() -> None:
    lines = [line for line in PAGE.splitlines() if "spec_decode" not in line and "cache_config" not in line]
    metrics = Metrics.parse("\n".join(lines) + "\n")
    assert metrics.spec_decode is None
    assert metrics.kv_cache is None
    assert Metrics.parse("").prompt_tokens == 0
    older = Metrics.parse('vllm:cache_config_info{block_size="16",num_gpu_blocks="None"} 1.0\n').kv_cache
    assert older is not None
    assert (older.num_tokens, older.num_blocks, older.block_size) == (None, None, 16)


@pytest.mark.parametrize("text", ["<html><body>hello</body></html>", "a{b=1} x", "vllm:prompt_tokens_total NaNsense\n"])
def test_what_is_no_page_is_told(text: str) -> None:
    with pytest.raises(EngineError, match="/metrics is no page of Prometheus metrics"):
        Metrics.parse(text)
