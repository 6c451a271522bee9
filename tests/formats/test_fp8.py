"""FP8 as modelopt stores it: bits, scales, and how far it is from the weights."""

import pytest
import torch

from mtpress.formats import fp8
from mtpress.plan.plan import LAYOUTS
from mtpress.rounding.fp8 import round_group


def weight(n: int = 48, k: int = 80, seed: int = 0) -> torch.Tensor:
    return (0.05 * torch.randn(n, k, generator=torch.Generator().manual_seed(seed))).bfloat16()


def test_the_plan_knows_the_layout() -> None:
    planned = {suffix: (dtype, shape) for suffix, dtype, shape in LAYOUTS["fp8"].tensors(48, 80)}
    assert planned == fp8.output_tensors((48, 80))


def test_codes_are_the_nearest_numbers_of_e4m3_to_the_bf16_quotient() -> None:
    w = weight()
    scale = fp8.scale(w.abs().amax())
    assert float(scale) == float(torch.tensor(float(w.abs().amax()) / 448.0, dtype=torch.float64).float())
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    numbers = numbers[numbers.isfinite()].unique()
    quotient = (w.double() / scale.double()).bfloat16().double()
    distance = (quotient.unsqueeze(-1) - numbers).abs()
    codes = fp8.quantize(w, scale)
    assert torch.equal((codes.double() - quotient).abs(), distance.amin(-1))
    assert float(codes.float().abs().max()) == 448.0


def test_pieces_of_rows_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    w = weight()
    scale = fp8.scale(w.abs().amax())
    whole = fp8.quantize(w, scale)
    monkeypatch.setattr(fp8, "ROWS_BYTES", 4 * 80 * 5)
    assert torch.equal(fp8.quantize(w, scale).view(torch.uint8), whole.view(torch.uint8))


def test_the_relative_error_is_that_of_three_bits_of_mantissa() -> None:
    w = weight(512, 512)
    scale = fp8.scale(w.abs().amax())
    error = (fp8.dequantize(fp8.quantize(w, scale), scale).double() - w.double()).norm() / w.double().norm()
    assert 0.025 < float(error) < 0.028


def test_an_input_of_zeros_gets_the_scale_one() -> None:
    assert float(fp8.scale(torch.tensor(0.0))) == 1.0
    assert torch.equal(fp8.quantize(torch.zeros(2, 16).bfloat16(), torch.tensor(1.0)).float(), torch.zeros(2, 16))


def test_linears_of_one_input_share_the_largest_scale() -> None:
    q, k = weight(seed=1), 3 * weight(16, 80, seed=2)
    made = round_group({"q": q, "k": k})
    scale = fp8.scale(torch.maximum(q.abs().amax(), k.abs().amax()))
    for name, w in (("q", q), ("k", k)):
        assert torch.equal(made[name][fp8.SCALE], scale)
        assert torch.equal(made[name][fp8.WEIGHT].view(torch.uint8), fp8.quantize(w, scale).view(torch.uint8))


def test_rounding_once_is_nearer_than_rounding_what_was_rounded() -> None:
    """What vLLM makes of shards with scales of their own, against what is stored here."""
    q, k = weight(256, 256, seed=1), 1.7 * weight(256, 256, seed=2)
    shared = round_group({"q": q, "k": k})["q"]
    own = fp8.scale(q.abs().amax())
    twice = fp8.quantize(fp8.dequantize(fp8.quantize(q, own), own), shared[fp8.SCALE])

    def error(codes: torch.Tensor) -> float:
        return float((fp8.dequantize(codes, shared[fp8.SCALE]).double() - q.double()).norm() / q.double().norm())

    assert error(twice) > 1.2 * error(shared[fp8.WEIGHT])


def test_weights_that_are_no_numbers_show_in_the_scale() -> None:
    damaged = weight()
    damaged[3, 3] = float("nan")
    assert not bool(torch.isfinite(round_group({"q": weight(), "k": damaged})["q"][fp8.SCALE]))


SCALES = {  # of a matrix [48, 80], blocks of 32×32
    "tensor": (), "tensor as one": (1,), "row": (48,), "row as a column": (48, 1), "block": (2, 3), "modelopt's block": (2, 1, 3, 1),
}  # fmt: skip


@pytest.mark.parametrize("shape", SCALES.values(), ids=list(SCALES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_times_the_scale_of_their_tensor_row_or_block(
    shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = (100 * torch.randn(48, 80, generator=generator)).to(torch.float8_e4m3fn)
    scale = (0.01 * torch.rand(shape, generator=generator)).to(dtype)
    flat = scale.double().reshape(-1)
    expected = torch.empty(48, 80, dtype=torch.float64)
    for i in range(48):
        for j in range(80):
            which = 0 if flat.numel() == 1 else i if flat.numel() == 48 else 3 * (i // 32) + j // 32
            expected[i, j] = codes[i, j].double() * flat[which]
    made = fp8.dequantize(codes, scale, (32, 32))
    assert torch.equal(made, expected.float())
    for rows_bytes in (fp8.ROWS_BYTES, 1):
        monkeypatch.setattr(fp8, "ROWS_BYTES", rows_bytes)
        rounded, exact = fp8.to_bf16(codes, scale, (32, 32))
        assert torch.equal(rounded, made.bfloat16())
        assert exact == bool((made.bfloat16().float() == made).all())


def test_a_scale_of_four_bits_loses_nothing_in_bf16() -> None:
    codes = (100 * torch.randn(4, 16)).to(torch.float8_e4m3fn)
    assert fp8.to_bf16(codes, torch.tensor(0.375))[1]
    assert not fp8.to_bf16(codes, torch.tensor(1 / 3))[1]


def test_a_scale_of_no_known_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"scales \[3\] are none of a matrix \[4, 16\]"):
        fp8.dequantize(torch.zeros(4, 16).to(torch.float8_e4m3fn), torch.ones(3))
