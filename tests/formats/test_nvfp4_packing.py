"""The compiled kernel at every level this machine has, bit for bit against the eager definition."""

import gc
import importlib
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtpress.formats import nvfp4, nvfp4_packing

ROOT = Path(__file__).resolve().parents[2]
EXTENSION = "mtpress.formats._nvfp4"
KERNELS = nvfp4_packing.KERNELS
INF_BITS = 0x7F80
# Subnormal, ordinary, and so large or small that scales reach both of their clamps; the first is an amax over 2688.
SCALES_2 = [0.03 / 2688, 1.0, 1e-40, 1e-30, 2.0**-12, 1 / 2688, 1e30, 3.0e38, 0.0, math.inf]

compiled = pytest.mark.skipif(not KERNELS, reason="installed without a C compiler")


def from_bits(bits: Tensor) -> Tensor:
    """BF16 numbers of integers 0…65535."""
    return bits.to(torch.int32).to(torch.int16).view(torch.bfloat16)


def every_number(*, finite: bool) -> Tensor:
    """BF16 [4096, 16]: every bit pattern once, in blocks of neighbours (so of one magnitude)."""
    bits = torch.arange(1 << 16)
    if finite:
        bits = torch.where((bits & 0x7FFF) < INF_BITS, bits, 0)
    return from_bits(bits).view(-1, nvfp4.GROUP_SIZE)


def assert_equal_bits(weight: Tensor, scale_2: Tensor, kernel: str) -> None:
    packed, scales = nvfp4.quantize(weight, scale_2, nvfp4.EAGER)
    found = nvfp4.quantize(weight, scale_2, kernel)
    assert found[0].dtype == torch.uint8 and found[1].dtype == torch.float8_e4m3fn
    assert torch.equal(found[1].view(torch.uint8), scales.view(torch.uint8))
    assert torch.equal(found[0], packed)


def test_the_build_has_a_kernel_wherever_there_is_a_compiler() -> None:
    assert KERNELS or not shutil.which("cc"), "the extension is not built: install the project again"
    assert nvfp4.kernel() == (KERNELS[0] if KERNELS else "eager")
    assert not KERNELS or KERNELS[-1] == "generic"


@compiled
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("scale_2", SCALES_2)
def test_every_number_beside_its_neighbours(kernel: str, scale_2: float) -> None:
    assert_equal_bits(every_number(finite=False), torch.tensor(scale_2), kernel)


@compiled
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("scale_2", SCALES_2)
def test_every_number_in_a_block_of_others(kernel: str, scale_2: float) -> None:
    shuffled = torch.randperm(1 << 16, generator=torch.Generator().manual_seed(0))
    weight = every_number(finite=True).view(-1)[shuffled].view(64, 1024)
    assert_equal_bits(weight, torch.tensor(scale_2), kernel)


@compiled
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("scale_2", [math.nan, -0.001])
def test_senseless_global_scales_give_the_same_bits_too(kernel: str, scale_2: float) -> None:
    assert_equal_bits(every_number(finite=False), torch.tensor(scale_2), kernel)


@compiled
@pytest.mark.parametrize("kernel", KERNELS)
def test_ties_of_codes_and_of_scales(kernel: str) -> None:
    """Blocks whose numbers lie on the bounds between codes, and blocks whose scales lie between two E4M3 numbers."""
    bounds = torch.tensor([*nvfp4.BOUNDS, 6.0, *(-bound for bound in nvfp4.BOUNDS), -0.0])
    powers = 2.0 ** torch.arange(-9, 9)
    codes = (bounds * powers.unsqueeze(-1)).to(torch.bfloat16)
    e4m3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    between = (6 * (e4m3[1:] + e4m3[:-1]) / 2).to(torch.bfloat16)
    scales = torch.zeros(len(between), nvfp4.GROUP_SIZE, dtype=torch.bfloat16)
    scales[:, 3] = between
    one = torch.tensor(1.0)
    scaled = codes.float() / nvfp4.block_scales(codes, one).float()
    assert all(((scaled.abs() == bound).sum() >= 18) for bound in nvfp4.BOUNDS)
    halves = (between.double() / 6).unsqueeze(-1) == (e4m3[1:] + e4m3[:-1]) / 2
    assert halves.any(-1).sum() > 50
    assert_equal_bits(codes, one, kernel)
    assert_equal_bits(scales, one, kernel)


@compiled
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 16), (1, 48), (3, 1008), (63, 16), (64, 16), (65, 16), (129, 80), (7, 5120), (0, 32)])
def test_any_number_of_blocks(kernel: str, rows: int, columns: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(torch.bfloat16)
    if rows:
        assert_equal_bits(weight, nvfp4.global_scale(weight.abs().max()), kernel)
    else:
        assert [tuple(part.shape) for part in nvfp4.quantize(weight, torch.tensor(1.0), kernel)] == [(0, 16), (0, 2)]


@compiled
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("rows", [1, 64, 67])
def test_given_scales_are_taken_as_they_are(kernel: str, rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, 80, generator=generator).to(torch.bfloat16)
    scales = torch.randint(1, 127, (rows, 5), generator=generator, dtype=torch.uint8).view(torch.float8_e4m3fn)
    for scale_2 in (0.01, 1e-40, 3.0):
        expected, _ = nvfp4.quantize(weight, torch.tensor(scale_2), nvfp4.EAGER, scales)
        packed, same = nvfp4.quantize(weight, torch.tensor(scale_2), kernel, scales)
        assert torch.equal(packed, expected) and same is scales
    step = scales.float().repeat_interleave(16, 1) * 3.0
    assert torch.equal(nvfp4.unpack(packed), nvfp4.encode(weight / step))


@compiled
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("piece", [1, 3, 64, 100])
def test_pieces_and_threads_give_the_same_bits(threads: int, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvfp4_packing, "PIECE_BLOCKS", piece)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    weight = torch.randn(37, 144, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    weight[36, 143] = -9
    assert_equal_bits(weight, torch.tensor(0.002), KERNELS[0])
    assert float(nvfp4.amax(weight, KERNELS[0])) == 9


@compiled
def test_outputs_in_huge_pages_hold_the_same_bits_and_outlive_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [torch.randn(65, 48, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16) for seed in range(4)]
    scale_2 = torch.tensor(0.001)
    expected = [nvfp4.quantize(weight, scale_2, nvfp4.EAGER) for weight in weights]
    monkeypatch.setattr(nvfp4_packing, "HUGE_FROM", 1)
    found = [nvfp4.quantize(weight, scale_2, KERNELS[0]) for weight in weights]
    gc.collect()
    for (packed, scales), (expected_packed, expected_scales) in zip(found, expected, strict=True):
        assert torch.equal(packed, expected_packed)
        assert torch.equal(scales.view(torch.uint8), expected_scales.view(torch.uint8))


@compiled
@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(0, 0xFFFF), min_size=32, max_size=32),
    st.floats(min_value=0, max_value=2.0**127, width=32),
    st.sampled_from(KERNELS or ("none",)),
)
def test_arbitrary_bits(bits: list[int], scale_2: float, kernel: str) -> None:
    weight = from_bits(torch.tensor(bits)).view(2, 16)
    assert_equal_bits(weight, torch.tensor(scale_2), kernel)
    assert_same_amax(weight, kernel)


@compiled
@pytest.mark.parametrize("kernel", KERNELS)
def test_random_blocks_of_every_spread(kernel: str) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(512, 512, generator=generator) * 2.0 ** torch.randint(-30, 30, (512, 1), generator=generator)
    weight[:, 64:80] = 0
    weight[:, 80:96] = -0.0
    assert_equal_bits(weight.to(torch.bfloat16), torch.tensor(1.7e-4), kernel)


@compiled
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_matrix_at_an_odd_address(kernel: str) -> None:
    """Tensors of a safetensors file start wherever its header ends."""
    weight = torch.randn(65 * 48 + 1, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)[1:].view(65, 48)
    assert weight.is_contiguous() and weight.data_ptr() % 4
    assert_equal_bits(weight, torch.tensor(0.001), kernel)
    assert_same_amax(weight, kernel)


def assert_same_amax(weight: Tensor, kernel: str) -> None:
    found, expected = nvfp4.amax(weight, kernel), nvfp4.amax(weight, nvfp4.EAGER)
    assert found.dtype == expected.dtype == torch.float32 and found.shape == expected.shape == ()
    assert torch.equal(found, expected) or (found.isnan() and expected.isnan())


@compiled
@pytest.mark.parametrize("kernel", KERNELS)
def test_amax_is_found_wherever_it_lies(kernel: str) -> None:
    weight = torch.randn(3, 1040, generator=torch.Generator().manual_seed(0)).clamp(-3, 3).to(torch.bfloat16)
    for place in (0, 63, 64, 1023, 1024, 1500, 3119):
        for value in (-4.0, 4.0, 3e38, -math.inf, math.nan):
            marked = weight.clone()
            marked.view(-1)[place] = value
            found = float(nvfp4.amax(marked, kernel))
            assert found == float(torch.tensor(abs(value), dtype=torch.bfloat16)) or (math.isnan(value) and math.isnan(found))
            assert_same_amax(marked, kernel)


@pytest.mark.parametrize("kernel", [*KERNELS, nvfp4.EAGER])
@pytest.mark.parametrize("size", [0.0, -0.0, 1e-40, 1.5, -2.5])
def test_amax_of_equal_numbers(kernel: str, size: float) -> None:
    weight = torch.full((2, 16), size, dtype=torch.bfloat16)
    assert float(nvfp4.amax(weight, kernel)) == float(weight[0, 0].abs())


@compiled
def test_infinity_and_nan_show_in_the_amax() -> None:
    weight = torch.ones(2, 16, dtype=torch.bfloat16)
    weight[1, 1] = -math.inf
    assert [float(nvfp4.amax(weight, by)) for by in (*KERNELS, nvfp4.EAGER)] == [math.inf] * (len(KERNELS) + 1)
    weight[0, 1] = math.nan
    assert all(math.isnan(float(nvfp4.amax(weight, by))) for by in (*KERNELS, nvfp4.EAGER))


def test_what_the_kernel_cannot_read_is_packed_eagerly() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    scale_2 = torch.tensor(0.001)
    assert nvfp4_packing.takes(weight) == bool(KERNELS)
    strided, wider = torch.cat([weight, weight], dim=1)[:, :64], weight.float()
    for other in (strided, wider):
        assert not nvfp4_packing.takes(other)
        assert torch.equal(nvfp4.quantize(other.contiguous(), scale_2)[0], nvfp4.quantize(weight, scale_2)[0])
        assert float(nvfp4.amax(other.contiguous())) == float(nvfp4.amax(weight))
    assert not nvfp4_packing.takes(weight.to("meta"))


@compiled
def test_a_level_that_this_machine_lacks_is_refused() -> None:
    weight = torch.zeros(1, 16, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="no kernel 'sse9'"):
        nvfp4.quantize(weight, torch.tensor(1.0), "sse9")
    with pytest.raises(ValueError, match="no kernel 'eager'"):
        nvfp4_packing.amax(weight, "eager")


@compiled
def test_buffers_of_other_sizes_are_refused() -> None:
    extension = importlib.import_module(EXTENSION)
    for sizes in ((31, 8, 1), (32, 7, 1), (32, 8, 2)):
        with pytest.raises(ValueError, match="a block is 32 bytes"):
            extension.pack("generic", 1.0, False, *(bytearray(size) for size in sizes))
    with pytest.raises((TypeError, BufferError)):
        extension.pack("generic", 1.0, False, bytes(32), bytes(8), bytearray(1))
    for blocks, sizes in ((0, (32, 0, 1)), (2, (96, 0, 3)), (1, (31, 0, 1)), (1, (32, 1020, 1)), (2, (64, 1024, 2))):
        with pytest.raises(ValueError, match="a block is 32 bytes"):
            extension.search("generic", 1.0, 3, 7, blocks, *(bytearray(size) for size in sizes))


def test_without_the_extension_the_same_bits_come_from_pytorch() -> None:
    """A process of its own, in which the extension cannot be imported, as where it was never compiled."""
    script = f"""
import sys
sys.modules["{EXTENSION}"] = None
import torch
from mtpress.formats import nvfp4
from mtpress.rounding.max import round_group
weight = torch.randn(33, 80, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
parts = round_group({{"up": weight}})["up"]
print(nvfp4.kernel(), *(bytes(part.view(-1).view(torch.uint8).tolist()).hex() for part in parts.values()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    weight = torch.randn(33, 80, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
    scale_2 = nvfp4.global_scale(nvfp4.amax(weight))
    packed, scales = nvfp4.quantize(weight, scale_2)
    expected = [bytes(part.view(-1).view(torch.uint8).tolist()).hex() for part in (packed, scales, scale_2)]
    assert done.stdout.split() == ["eager", *expected]


def test_an_install_without_a_compiler_succeeds(tmp_path: Path) -> None:
    """setup.py's build step with a compiler that fails: exit code 0 and no extension; with the real one there is one."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    formats = tmp_path / "src" / "mtpress" / "formats"
    formats.mkdir(parents=True)
    for name in ("_nvfp4.c", "_nvfp4_search.h", "_levels.h"):
        shutil.copy(ROOT / "src" / "mtpress" / "formats" / name, formats)
    for compiler, expected in (("false", 0), (None, 1 if KERNELS else 0)):
        out = tmp_path / f"with-{compiler}"
        command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(out), "--build-temp", str(out / "temp")]
        environment = {"PATH": "/usr/bin:/bin", **({"CC": compiler} if compiler else {})}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert len(list(out.glob("mtpress/formats/_nvfp4*"))) == expected, done.stderr
