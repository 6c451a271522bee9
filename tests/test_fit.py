import pytest

from mtpress.fit import MEMORIES, context_tokens, kv_bytes_per_token, state_bytes
from qwen3_6_files import WIDTHS, config

QWEN = config(WIDTHS["27b"], 64)
NVFP4_BYTES = 20_600_000_000


def test_the_cache_of_a_token() -> None:
    """16 full-attention layers and the draft head's; keys and values of 4 heads of 256, two bytes each."""
    assert kv_bytes_per_token(QWEN) == (16 + 1) * 2 * 4 * 256 * 2
    assert kv_bytes_per_token(QWEN, kv_bits=8) == kv_bytes_per_token(QWEN) // 2


def test_the_state_of_a_sequence() -> None:
    """48 layers: 48 heads of 128×128 in float32, and three inputs of the convolution over 10,240 channels."""
    assert state_bytes(QWEN) == 48 * (48 * 128 * 128 * 4 + 3 * 10240 * 2)


def test_a_card_that_is_too_small_has_no_room() -> None:
    room = context_tokens(NVFP4_BYTES, QWEN)
    assert list(room) == [memory.name for memory in MEMORIES]
    assert room["16 GB"] == room["24 GB"] == 0
    assert 100_000 < room["32 GB"] < 130_000
    assert context_tokens(55_600_000_000, QWEN)["48 GB"] == 0
    assert context_tokens(55_600_000_000, QWEN)["80 GB"] > 200_000


def test_room_grows_with_memory_and_shrinks_with_weights() -> None:
    room = context_tokens(NVFP4_BYTES, QWEN)
    assert room["32 GB"] < room["48 GB"] < room["80 GB"] < room["96 GB"] < room["141 GB"]
    assert room["128 GB"] < room["96 GB"]  # the host needs its share of unified memory
    assert context_tokens(NVFP4_BYTES - 10**9, QWEN)["32 GB"] > room["32 GB"]
    assert context_tokens(NVFP4_BYTES, QWEN, kv_bits=8)["32 GB"] == pytest.approx(2 * room["32 GB"], rel=1e-4)
