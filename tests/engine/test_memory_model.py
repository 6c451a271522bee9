"""The memory model by itself: figures of model cards and public logs, what is refused and what would help."""

from dataclasses import replace
from typing import Any

import pytest

from full_size import make_full_size
from mtpress.engine.memory.hardware import Gpu, Hardware
from mtpress.engine.memory.kv_blocks import KV_BITS, kv_blocks, kv_bytes_per_token, state_bytes
from mtpress.engine.memory.memory_model import MemoryEstimate, ServeSettings, estimate, loaded_weights
from mtpress.engine.memory.reserved import num_graphs
from mtpress.engine.memory.served_model import ServedModel
from mtpress.errors import InputError
from qwen3_6_files import WIDTHS, config

GIB = 1 << 30
QWEN = config(WIDTHS["27b"], 64)
NVFP4_VLM, FP8, INFERACT = 20.6e9, 30.87e9, 26.38e9  # bytes of the weights


def gpus(gib: float, number: int = 1, *, free: float | None = None, unified: bool = False) -> Hardware:
    gpu = Gpu("a card", int(gib * GIB), int((free if free is not None else gib) * GIB), (12, 0), unified)
    return Hardware((gpu,) * number, 128 * GIB, 100 * GIB, 16)


@pytest.fixture(scope="session")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    out = tmp_path_factory.mktemp("memory") / "27b"
    make_full_size(out, sparse=True)
    return ServedModel.read(out)


def shrunk(model: ServedModel, num_bytes: float) -> ServedModel:
    """The model with its decoder layers' weights so small that all of them take num_bytes."""
    body = ("gdn", "attention", "mlp")
    rest = sum(size for part, size in model.weight_bytes.items() if part not in body)
    share = (num_bytes - rest) / (sum(model.weight_bytes.values()) - rest)
    return replace(model, weight_bytes={part: int(size * share) if part in body else size for part, size in model.weight_bytes.items()})


def test_27b_in_blocks() -> None:
    """16 attention layers of 4 heads of 256; a state is 48 float32 matrices of 128×128 and 3 inputs over 10,240 channels."""
    assert kv_bytes_per_token(QWEN) == 2 * 4 * 256 * 2
    assert state_bytes(QWEN) == 48 * 128 * 128 * 4 + 3 * 10240 * 2
    assert state_bytes(QWEN, 3) == 48 * 128 * 128 * 4 + 6 * 10240 * 2
    plain, drafting = kv_blocks(QWEN), kv_blocks(QWEN, kv_cache_dtype="fp8", num_speculative_tokens=3)
    assert (plain.block_size, plain.layers_per_block, plain.attention_groups, plain.state_groups, plain.states_per_sequence) == (
        784, 16, 1, 3, 2,
    )  # fmt: skip
    assert plain.bytes_per_block == 784 * 4096 * 16
    assert (drafting.block_size, drafting.layers_per_block, drafting.state_groups, drafting.states_per_sequence) == (1600, 17, 3, 5)


def test_few_layers_are_dealt_so_that_padding_wastes_least() -> None:
    four = config(WIDTHS["tiny"], 4)
    assert (kv_blocks(four).layers_per_block, kv_blocks(four).state_groups) == (1, 3)
    drafting = kv_blocks(four, num_speculative_tokens=1)  # 2 attention layers, 3 states: 3 is not below 1.5 · 2
    assert (drafting.layers_per_block, drafting.attention_groups, drafting.state_groups) == (2, 1, 2)
    five = {**four, "text_config": {**four["text_config"], "layer_types": ["linear_attention", "full_attention"] * 2}}
    assert (kv_blocks(five, num_speculative_tokens=1).layers_per_block, kv_blocks(five, num_speculative_tokens=1).state_groups) == (2, 1)


def test_a_state_is_split_over_gpus_and_a_head_is_not() -> None:
    assert state_bytes(QWEN, tensor_parallel_size=2) * 2 == state_bytes(QWEN)
    assert kv_bytes_per_token(QWEN, "fp8", 2) * 2 == kv_bytes_per_token(QWEN, "fp8")
    assert kv_bytes_per_token(QWEN, "fp8", 8) == kv_bytes_per_token(QWEN, "fp8", 4)


@pytest.mark.parametrize(
    ("dtype", "slot"),
    [("nvfp4", 2 * (128 + 16)), ("int8_per_token_head", 520), ("turboquant_k8v4", 256 + 132), ("turboquant_3bit_nc", 98 + 100)],
)
def test_packed_caches(dtype: str, slot: int) -> None:
    """Bytes a head and token as vLLM 0.32's backends pack them, at head_dim 256."""
    assert kv_bytes_per_token(QWEN, dtype) == 4 * slot


# (max_model_len, the rest of kv_blocks' arguments, blocks, tokens): tokens and concurrency as vLLM logged them, from the seeds and
# public threads; the blocks are the log's GiB by the size of a block, or follow from the two figures.
LOGGED = [
    ("club-3090#104", 262144, {"kv_cache_dtype": "fp8", "tensor_parallel_size": 2}, 411, 619_202),
    ("club-3090#594", 262144, {"kv_cache_dtype": "fp8", "num_speculative_tokens": 3, "tensor_parallel_size": 2}, 205, 300_220),
    ("recipes#810, FP8", 262144, {"tensor_parallel_size": 2}, 491, 377_456),
    ("recipes#810, NVFP4", 262144, {"tensor_parallel_size": 2}, 580, 445_875),
    ("recipes#810, one card", 32768, {"kv_cache_dtype": "fp8"}, 75, 91_022),
    ("recipes#810, 16-bit KV", 32768, {}, 112, 76_458),
]


@pytest.mark.parametrize(("source", "max_model_len", "shape", "num_blocks", "tokens"), LOGGED, ids=[row[0] for row in LOGGED])
def test_figures_that_vllm_logged_on_gpus(source: str, max_model_len: int, shape: dict[str, Any], num_blocks: int, tokens: int) -> None:
    assert abs(kv_blocks(QWEN, **shape).num_tokens(num_blocks, max_model_len) - tokens) <= 1


def test_seed_001_counted_by_vllm_0_19() -> None:
    """491,200 tokens and 6.98: then the size was blocks by groups, and the concurrency what it is today."""
    blocks = kv_blocks(QWEN, kv_cache_dtype="fp8", num_speculative_tokens=3, prefix_caching=False)
    groups = blocks.attention_groups + blocks.state_groups
    assert 491_200 // blocks.block_size * groups == 1228
    assert round(blocks.concurrency(1228, 262144), 2) == 6.98


def reported(model: ServedModel, hardware: Hardware, num_bytes: float, **settings: Any) -> MemoryEstimate:
    return estimate(shrunk(model, num_bytes), ServeSettings(**{"max_model_len": 262144, "max_num_seqs": 2, **settings}), hardware)


def test_whole_launches_within_ten_percent_of_what_was_reported(bf16: ServedModel) -> None:
    seed = {"kv_cache_dtype": "fp8", "num_speculative_tokens": 3, "language_model_only": True, "gpu_memory_utilization": 0.9}
    found = reported(bf16, gpus(94.97), NVFP4_VLM, **seed, prefix_caching=False, max_num_batched_tokens=8192)
    assert found.max_concurrency == pytest.approx(6.98, rel=0.1)
    for weights, tokens in ((FP8, 377_456), (INFERACT, 445_875)):
        two = reported(bf16, gpus(31.37, 2), weights, max_num_seqs=256, tensor_parallel_size=2)
        assert two.num_tokens == pytest.approx(tokens, rel=0.1)
    ampere = {"kv_cache_dtype": "fp8", "gpu_memory_utilization": 0.88, "tensor_parallel_size": 2, "max_num_batched_tokens": 8192}
    assert reported(bf16, gpus(23.56, 2), 19e9, **ampere).num_tokens == pytest.approx(619_202, rel=0.1)


def test_what_the_tower_and_sequences_cost_on_one_card(bf16: ServedModel) -> None:
    """recipes#810: 75 blocks, 112 without the tower, 126 with 8 sequences instead of 256."""
    card = {"max_model_len": 32768, "max_num_seqs": 256, "kv_cache_dtype": "fp8", "enforce_eager": True}
    whole = reported(bf16, gpus(31.37), INFERACT, **card)
    text = reported(bf16, gpus(31.37), INFERACT, **card, language_model_only=True)
    few = reported(bf16, gpus(31.37), INFERACT, **{**card, "max_num_seqs": 8}, language_model_only=True)
    assert text.num_blocks - whole.num_blocks == pytest.approx(37, abs=4)
    assert few.num_blocks - text.num_blocks == pytest.approx(14, abs=2)


def test_trying_cuda_graphs_takes_a_block_for_every_sequence(bf16: ServedModel) -> None:
    """recipes#810: one 32 GB card at vLLM's default of 256 sequences dies there, whatever its utilisation, and starts eagerly."""
    card = {"max_model_len": 32768, "max_num_seqs": 256, "kv_cache_dtype": "fp8", "gpu_memory_utilization": 0.8}
    for utilization in (0.9, 0.93):
        found = reported(bf16, gpus(31.37), INFERACT, **{**card, "gpu_memory_utilization": utilization})
        assert found.problem is not None and "CUDA graphs" in found.problem
        assert found.remedies[0].startswith("--max-num-seqs ")


def test_weights_by_component(bf16: ServedModel) -> None:
    one = loaded_weights(bf16.weight_bytes, mtp=False, vision=False)
    assert one == {part: size for part, size in bf16.weight_bytes.items() if part not in ("mtp", "vision")}
    two = loaded_weights(bf16.weight_bytes, tensor_parallel_size=2)
    assert two["norms"] == bf16.weight_bytes["norms"] and two["lm_head"] * 2 == bf16.weight_bytes["lm_head"]


def test_the_lines_say_what_is_where(bf16: ServedModel) -> None:
    text = {"kv_cache_dtype": "fp8", "num_speculative_tokens": 3, "language_model_only": True}
    found = reported(bf16, gpus(94.97), NVFP4_VLM, **text)
    assert found.problem is None and found.remedies == ()
    assert found.kv_bytes_per_token == 17 * 2048 and found.state_bytes_per_sequence == 15 * 17 * 1600 * 2048
    shown = "\n".join(found.lines())
    for words in ("weights 19.7 GB: embeddings 2.54 GB", "MTP draft head 849 MB", "34.8 kB a token", "836 MB of Gated DeltaNet state"):
        assert words in shown
    assert f"room for {found.num_tokens:,} tokens: {found.max_concurrency:.2f} sequences of 262,144" in shown
    assert "vision" not in shown and "does not fit" not in shown
    assert found.as_json()["num_tokens"] == found.num_tokens


def test_weights_that_do_not_fit(bf16: ServedModel) -> None:
    found = estimate(bf16, ServeSettings(8192, 1, num_speculative_tokens=1), gpus(31.37))
    assert found.problem is not None and found.problem.startswith("weights and what runs beside them take 58")
    assert found.num_tokens == found.num_sequences == 0
    assert not any("would fit" in remedy for remedy in found.remedies)
    assert any(remedy.startswith("MTP off frees") for remedy in found.remedies)
    split = estimate(bf16, ServeSettings(8192, 1, num_speculative_tokens=1), gpus(31.37, 4))
    assert any(remedy.startswith("--tensor-parallel-size 2 ") for remedy in split.remedies)


def test_a_context_that_does_not_fit_says_which_would(bf16: ServedModel) -> None:
    found = reported(bf16, gpus(31.37), NVFP4_VLM, num_speculative_tokens=3)
    assert found.problem is not None and found.problem.startswith("one sequence of 262,144 tokens needs")
    longest = next(remedy for remedy in found.remedies if remedy.startswith("--max-model-len"))
    assert "would fit" in longest
    again = reported(bf16, gpus(31.37), NVFP4_VLM, num_speculative_tokens=3, max_model_len=int(longest.split()[1]))
    assert again.problem is None
    assert any(remedy.startswith("--kv-cache-dtype fp8") for remedy in found.remedies)
    assert any(remedy.startswith("--language-model-only frees 2.") for remedy in found.remedies)


def test_too_many_sequences(bf16: ServedModel) -> None:
    found = reported(bf16, gpus(94.97), NVFP4_VLM, max_num_seqs=512, max_model_len=8192, num_speculative_tokens=3, enforce_eager=True)
    assert found.problem is not None and found.problem.startswith("512 sequences at once")
    assert found.remedies[0].startswith("--max-num-seqs 64 would fit")
    assert not any("fp8" in remedy for remedy in found.remedies)  # a state takes the same blocks' bytes


def test_memory_that_others_hold(bf16: ServedModel) -> None:
    found = reported(bf16, gpus(94.97, free=60), NVFP4_VLM, language_model_only=True)
    assert found.problem is not None and "--gpu-memory-utilization 0.92 asks for 93.8 GB" in found.problem
    assert any(remedy.startswith("--gpu-memory-utilization 0.62 would fit") for remedy in found.remedies)


def test_unified_memory_is_bounded_by_what_the_host_has(bf16: ServedModel) -> None:
    seed = {"kv_cache_dtype": "fp8", "num_speculative_tokens": 2, "language_model_only": True, "max_num_batched_tokens": 8192}
    launch = {**seed, "max_num_seqs": 64, "max_model_len": 131072, "gpu_memory_utilization": 0.7}
    assert reported(bf16, gpus(119.6, unified=True), NVFP4_VLM, **launch).problem is None
    busy = reported(bf16, gpus(119.6, free=70, unified=True), NVFP4_VLM, **launch)
    assert busy.problem is not None and "74.5 GB are free" in busy.problem


def test_splits_that_cannot_be(bf16: ServedModel) -> None:
    for parallel, number, words in ((2, 1, "there are 1 GPUs"), (3, 3, "linear_num_key_heads 16"), (16, 16, "num_attention_heads 24")):
        problem = estimate(bf16, ServeSettings(8192, 1, tensor_parallel_size=parallel), gpus(141, number)).problem
        assert problem is not None and words in problem
    assert estimate(bf16, ServeSettings(8192, 1, tensor_parallel_size=8), gpus(141, 8)).problem is None


def test_the_cpu_platform(bf16: ServedModel) -> None:
    host = Hardware((), 24 * GIB, 20 * GIB, 2)
    small = shrunk(bf16, 10e9)
    found = estimate(small, ServeSettings(4096, 1, cpu_kv_bytes=2 * GIB), host)
    assert found.problem is None and found.kv_room_bytes == 2 * GIB and found.block_size == 896
    assert estimate(bf16, ServeSettings(4096, 1, cpu_kv_bytes=GIB), host).problem == "57.5 GB of memory are needed, 21.5 GB are available"
    short = estimate(small, ServeSettings(262144, 1, cpu_kv_bytes=GIB), host)
    assert short.problem is not None and short.problem.startswith("one sequence of 262,144")
    assert any(remedy.startswith("--max-model-len ") and "would fit" in remedy for remedy in short.remedies)
    assert any(remedy.startswith("VLLM_CPU_KVCACHE_SPACE=") for remedy in short.remedies)
    assert (
        estimate(small, ServeSettings(4096, 1), host).kv_room_bytes
        == int(0.92 * 24 * GIB) - estimate(small, ServeSettings(4096, 1), host).weight_bytes - 700_000_000
    )


def test_a_declared_kv_cache_is_taken(bf16: ServedModel) -> None:
    declared = replace(bf16, kv_cache_declared="fp8")
    settings = ServeSettings(8192, 1)
    assert estimate(declared, settings, gpus(141)).kv_bytes_per_token * 2 == estimate(bf16, settings, gpus(141)).kv_bytes_per_token
    explicit = replace(settings, kv_cache_dtype="bfloat16")
    assert estimate(declared, explicit, gpus(141)).kv_bytes_per_token == estimate(bf16, settings, gpus(141)).kv_bytes_per_token


def test_an_unknown_kv_cache(bf16: ServedModel) -> None:
    with pytest.raises(InputError, match=r"--kv-cache-dtype tq-t4nc: .*turboquant_4bit_nc"):
        estimate(bf16, ServeSettings(8192, 1, kv_cache_dtype="tq-t4nc"), gpus(141))
    assert {"auto", "fp8", "bfloat16"} <= KV_BITS.keys()


def test_graph_sizes() -> None:
    """1, 2, 4, 8 and so on by 8 up to 256, by 16 up to 512; twice, for whole steps and for pieces."""
    assert num_graphs(1, 0) == 2 * 2 and num_graphs(2, 3) == 2 * 5 and num_graphs(1024, 0) == 2 * 51
