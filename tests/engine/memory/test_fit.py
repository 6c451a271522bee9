import pytest

from mtpress.engine.memory.fit import MEMORIES, context_tokens
from qwen3_6_files import WIDTHS, config

QWEN = config(WIDTHS["27b"], 64)
NVFP4_BYTES = 20_600_000_000


def test_a_card_that_is_too_small_has_no_room() -> None:
    room = context_tokens(NVFP4_BYTES, QWEN, vision=True)
    assert list(room) == [memory.name for memory in MEMORIES]
    assert room["16 GB"] == room["24 GB"] == 0
    assert 95_000 < room["32 GB"] < 110_000
    assert context_tokens(55_600_000_000, QWEN)["48 GB"] == 0
    assert context_tokens(55_600_000_000, QWEN)["80 GB"] > 200_000


def test_room_grows_with_memory_and_shrinks_with_weights() -> None:
    room = context_tokens(NVFP4_BYTES, QWEN)
    assert room["32 GB"] < room["48 GB"] < room["80 GB"] < room["96 GB"] < room["141 GB"]
    assert room["128 GB"] < room["96 GB"]  # the host needs its share of unified memory
    assert context_tokens(NVFP4_BYTES - 10**9, QWEN)["32 GB"] > room["32 GB"]


def test_fp8_halves_a_token_and_the_tower_costs_two_gigabytes() -> None:
    room = context_tokens(NVFP4_BYTES, QWEN)
    assert context_tokens(NVFP4_BYTES, QWEN, "fp8")["32 GB"] == pytest.approx(2 * room["32 GB"], rel=0.02)
    less = room["48 GB"] - context_tokens(NVFP4_BYTES, QWEN, vision=True)["48 GB"]
    assert 1.5e9 < less * 17 * 4096 < 2.5e9
