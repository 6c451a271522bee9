"""The compiled kernels of INT4 at every level this machine has, bit for bit against the eager definitions."""

import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtpress.formats import int4, int4_kernel
from mtpress.rounding import rtn, search

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "rounding"))
from int4_samples import GROUP, hard, sample

KERNELS = int4_kernel.KERNELS
ROUNDINGS = [rtn, search]
compiled = pytest.mark.skipif(not KERNELS, reason="installed without a C compiler")


def assert_equal_bits(weight: Tensor, rounding: ModuleType, kernel: str) -> None:
    """Of every finite group, and the others are told apart by their scales."""
    codes, scales = rounding.round_matrix(weight, int4.EAGER)
    found = rounding.round_matrix(weight, kernel)
    assert found[0].dtype == torch.uint8 and found[1].dtype == torch.float16
    finite = weight.view(-1, GROUP).isfinite().all(-1)
    assert torch.equal(found[1].view(-1)[finite].view(torch.int16), scales.view(-1)[finite].view(torch.int16))
    assert torch.equal(found[0].view(-1, GROUP)[finite], codes.view(-1, GROUP)[finite])
    assert not found[1].view(-1)[~finite].isfinite().any() and not scales.view(-1)[~finite].isfinite().any()


def test_the_build_has_a_kernel_wherever_there_is_a_compiler() -> None:
    assert KERNELS or not shutil.which("cc"), "the extension is not built: install the project again"
    assert int4.kernel() == (KERNELS[0] if KERNELS else "eager")
    assert not KERNELS or KERNELS[-1] == "generic"
    assert (int4_kernel.GROUP_SIZE, int4_kernel.PER_WORD) == (int4.GROUP_SIZE, int4.PER_WORD)


@compiled
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("finite", [True, False])
def test_kernels_give_the_bits_of_the_definition(kernel: str, finite: bool, rounding: ModuleType) -> None:
    assert_equal_bits(hard(finite), rounding, kernel)
    assert_equal_bits(sample("laplace", 32, seed=2), rounding, kernel)


@compiled
@given(st.binary(min_size=256, max_size=256), st.integers(0, 2))
@settings(max_examples=40, deadline=None)
def test_kernels_give_the_bits_of_the_definition_on_any_bytes(content: bytes, kind: int) -> None:
    bits = torch.frombuffer(bytearray(content), dtype=torch.int16).clone()
    if kind:  # finite; and of one magnitude
        bits &= ~0x0080
        bits = bits & ~0x7800 | 0x3800 if kind == 2 else bits
    for rounding in ROUNDINGS:
        for kernel in KERNELS:
            assert_equal_bits(bits.view(torch.bfloat16).view(1, GROUP), rounding, kernel)


@compiled
@pytest.mark.parametrize("kernel", KERNELS)
def test_scales_of_every_size_are_rounded_as_fp16_is(kernel: str) -> None:
    """Groups of zeros with one number: every finite BF16 number once, so every FP16 scale and what lies between."""
    bits = torch.arange(1 << 16)
    numbers = bits[(bits & 0x7FFF) < 0x7F80].to(torch.int32).to(torch.int16).view(torch.bfloat16)
    weight = torch.zeros(len(numbers), GROUP, dtype=torch.bfloat16)
    weight[:, 77] = numbers
    assert_equal_bits(weight, rtn, kernel)


@compiled
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("n", "k"), [(1, 8), (16, 8), (17, 40), (96, 384), (200, 128)])
def test_words_are_packed_as_the_definition_packs_them(kernel: str, n: int, k: int) -> None:
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
    assert torch.equal(int4.pack(codes, kernel), int4.pack(codes, int4.EAGER))


@compiled
def test_threads_and_pieces_join(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = sample("normal", 96, seed=4)
    whole = [rounding.round_matrix(weight, int4.EAGER) for rounding in ROUNDINGS]
    words = int4.pack(whole[0][0], int4.EAGER)
    monkeypatch.setattr(int4_kernel, "PIECE_GROUPS", 5)
    monkeypatch.setattr(int4_kernel, "PIECE_CODES", 256 * 20)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for rounding, expected in zip(ROUNDINGS, whole, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(rounding.round_matrix(weight), expected, strict=True))
    assert torch.equal(int4.pack(whole[0][0]), words)


@compiled
def test_kernels_refuse_what_does_not_fit() -> None:
    from mtpress.formats import _int4

    weight = sample("normal", 32)
    with pytest.raises(ValueError, match="no kernel 'sse9'"):
        search.round_matrix(weight, "sse9")
    with pytest.raises(ValueError, match="no kernel 'sse9'"):
        int4.pack(torch.zeros(8, 8, dtype=torch.uint8), "sse9")

    def zeros(size: int) -> "torch.Tensor":
        return torch.zeros(size, dtype=torch.uint8).numpy()

    for sizes in ((512, 128, 2, 192), (256, 128, 4, 192), (256, 128, 2, 191)):
        with pytest.raises(ValueError, match="256 bytes of weight"):
            _int4.round("generic", *map(zeros, (*sizes, 0)), 0)
    for factors, importance in ((192, 500), (0, 512)):
        with pytest.raises(ValueError, match="importance has 128 numbers"):
            _int4.round("generic", *map(zeros, (256, 128, 2, factors, importance)), 0)
    for codes, words, *rows in (
        (64, 32, 7, 0, 1),
        (64, 31, 8, 0, 8),
        (64, 32, 8, 0, 9),
        (64, 32, 8, 3, 2),
        (64, 32, 0, 0, 0),
        (64, 32, 8, -1, 2),
    ):
        with pytest.raises(ValueError, match="rows of k"):
            _int4.pack("generic", zeros(codes), zeros(words), *rows)
