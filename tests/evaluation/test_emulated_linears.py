"""Each format's linear against its definition, in exact arithmetic where it has one."""

import pytest
import torch
from torch import Tensor

from checkpoints import in_int4
from mtpress.formats import compressed_tensors, int4, nvfp4
from mtpress.formats.fp8 import to_e4m3
from mtpress.quant_config.emulation import BLOCK_FP8, EMULATIONS, EmulatedLinear
from mtpress.rounding.max import round_group

N, K, T = 64, 128, 24
BF16 = torch.bfloat16


def dice(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(N, K, generator=dice(1)).to(BF16)


@pytest.fixture
def x() -> Tensor:
    return (2 * torch.randn(2, T, K, generator=dice(2))).to(BF16)


def modelopt(weight: Tensor, input_scale: float = 2**-8) -> dict[str, Tensor]:
    return round_group({"w": weight})["w"] | {nvfp4.INPUT_SCALE: torch.tensor(input_scale)}


def identity(linear: EmulatedLinear) -> Tensor:
    """The weight, read back by multiplying."""
    return linear(torch.eye(K, dtype=BF16)).t()


def test_nvfp4_weights_are_the_stored_numbers_and_inputs_are_rounded(weight: Tensor, x: Tensor) -> None:
    parts = modelopt(weight)
    linear = EMULATIONS["nvfp4"].make(parts, [parts], True, BF16)
    assert torch.equal(linear.matrix, nvfp4.dequantize(*(parts[name] for name in (nvfp4.WEIGHT, nvfp4.SCALE, nvfp4.SCALE_2))).to(BF16))
    rounded = nvfp4.round_activations(x, parts[nvfp4.INPUT_SCALE])
    assert not torch.equal(rounded, x)
    assert torch.equal(linear(x), rounded @ linear.matrix.t())
    unrounded = EMULATIONS["nvfp4"].make(parts, [parts], False, BF16)
    assert torch.equal(unrounded(x), x @ linear.matrix.t())


def test_rows_in_pieces_are_rounded_as_in_one(monkeypatch: pytest.MonkeyPatch, weight: Tensor, x: Tensor) -> None:
    parts = modelopt(weight)
    whole = EMULATIONS["nvfp4"].make(parts, [parts], True, BF16)
    monkeypatch.setattr("mtpress.quant_config.emulation.PIECE_BYTES", 4 * K * 5)
    pieces = EMULATIONS["nvfp4"].make(parts, [parts], True, BF16)
    assert torch.equal(pieces.matrix, whole.matrix)
    assert whole.rounding is not None and pieces.rounding is not None
    assert torch.equal(pieces.rounding(x)[0], whole.rounding(x)[0])


def test_fused_linears_take_the_largest_of_their_scales(weight: Tensor, x: Tensor) -> None:
    small, large = modelopt(weight, 2**-9), modelopt(weight * 3, 2**-7)
    assert float(large[nvfp4.SCALE_2]) > float(small[nvfp4.SCALE_2])
    linear = EMULATIONS["nvfp4"].make(small, [small, large], True, BF16)
    assert torch.equal(linear.matrix, nvfp4.dequantize(small[nvfp4.WEIGHT], small[nvfp4.SCALE], large[nvfp4.SCALE_2]).to(BF16))
    assert linear.rounding is not None
    assert torch.equal(linear.rounding(x)[0], nvfp4.round_activations(x, large[nvfp4.INPUT_SCALE]))


def test_compressed_tensors_is_modelopt_by_its_reciprocals(weight: Tensor, x: Tensor) -> None:
    def renamed(parts: dict[str, Tensor]) -> dict[str, Tensor]:
        made = {compressed_tensors.OF_MODELOPT[name]: tensor for name, tensor in parts.items()}
        for name in (compressed_tensors.GLOBAL_SCALE, compressed_tensors.INPUT_GLOBAL_SCALE):
            made[name] = compressed_tensors.reciprocal(made[name]).reshape(1)
        return made

    def power_of_two(parts: dict[str, Tensor]) -> dict[str, Tensor]:
        return parts | {nvfp4.SCALE_2: 2.0 ** parts[nvfp4.SCALE_2].log2().round()}  # whose reciprocal comes back

    one, other = power_of_two(modelopt(weight, 2**-9)), power_of_two(modelopt(weight * 8, 2**-7))
    alone = EMULATIONS["nvfp4-pack-quantized"].make(renamed(one), [renamed(one)], True, BF16)
    theirs = EMULATIONS["nvfp4"].make(one, [one], True, BF16)
    assert torch.equal(alone.matrix, theirs.matrix)
    assert torch.equal(alone(x), theirs(x))
    # vLLM takes the largest of what is stored, which of reciprocals is the smallest scale
    fused = EMULATIONS["nvfp4-pack-quantized"].make(renamed(other), [renamed(one), renamed(other)], True, BF16)
    assert torch.equal(fused.matrix, nvfp4.dequantize(other[nvfp4.WEIGHT], other[nvfp4.SCALE], one[nvfp4.SCALE_2]).to(BF16))


def test_int4_of_both_layouts_is_the_product_in_bf16(weight: Tensor) -> None:
    codes, scales = in_int4(weight)
    expected = (codes.double() - 8).view(*scales.shape, -1) * scales.to(BF16).double().unsqueeze(-1)
    expected = expected.view(N, K).to(BF16)
    gptq = EMULATIONS["gptq"].make(int4.tensors(codes, scales), [], False, BF16)
    assert torch.equal(gptq.matrix, expected)
    assert torch.equal(identity(gptq), expected)
    packed = {"weight_packed": int4.pack(codes).t().contiguous(), "weight_scale": scales}
    assert torch.equal(EMULATIONS["pack-quantized"].make(packed, [], False, BF16).matrix, expected)


def test_int4_zero_points_of_compressed_tensors_are_those_stored(weight: Tensor) -> None:
    codes, scales = in_int4(weight)
    zeros = torch.randint(0, 16, scales.shape, generator=dice(3), dtype=torch.uint8)
    packed = {
        "weight_packed": int4.pack(codes).t().contiguous(), "weight_scale": scales,
        "weight_zero_point": pack_rows(zeros),
    }  # fmt: skip
    expected = ((codes.double().view(*scales.shape, -1) - zeros.double().unsqueeze(-1)) * scales.to(BF16).double().unsqueeze(-1)).to(BF16)
    assert torch.equal(EMULATIONS["pack-quantized"].make(packed, [], False, BF16).matrix, expected.view(N, K))


def pack_rows(zeros: Tensor) -> Tensor:
    """int32 [N/8, groups] of zero points uint8 [N, groups]: eight rows to a word, the first in the lowest bits."""
    words = torch.zeros(len(zeros) // 8, zeros.shape[1], dtype=torch.int64)
    for place in range(8):
        words |= zeros[place::8].long() << 4 * place
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("per_row", [True, False])
def test_fp8_multiplies_rounded_numbers(weight: Tensor, x: Tensor, static: bool, per_row: bool) -> None:
    scale = weight.float().abs().amax(1, keepdim=True) / 448 if per_row else weight.float().abs().max() / 448
    stored = to_e4m3(weight, scale)
    parts = {"weight": stored, "weight_scale": scale}
    if static:
        parts["input_scale"] = torch.tensor(3 / 448)  # smaller than the largest input: it saturates
    linear = EMULATIONS["fp8"].make(parts, [parts], True, BF16)
    step = parts["input_scale"].double() if static else x.float().abs().amax(-1, keepdim=True).double() / 448
    rounded = (x.double() / step).clamp(-448, 448).float().to(torch.float8_e4m3fn).double() * step
    expected = rounded @ (stored.double() * scale.double()).t()
    error = (linear(x).double() - expected).norm() / expected.norm()
    assert error < 4e-3  # two roundings to BF16
    assert (linear(x).double() - x.double() @ weight.double().t()).norm() / expected.norm() > 0.02


def test_fused_fp8_is_rounded_again_under_the_largest_scale(weight: Tensor) -> None:
    def stored(w: Tensor) -> dict[str, Tensor]:
        scale = w.float().abs().max() / 448
        return {"weight": to_e4m3(w, scale), "weight_scale": scale, "input_scale": torch.tensor(1.0)}

    one, other = stored(weight), stored(weight * 3)
    linear = EMULATIONS["fp8"].make(one, [one, other], True, BF16)
    expected = to_e4m3(one["weight"].float() * one["weight_scale"], other["weight_scale"])
    assert torch.equal(linear.matrix, expected.to(BF16))
    assert not torch.equal(linear.matrix, one["weight"].to(BF16))
    assert linear.output_scale is not None and torch.equal(linear.output_scale, other["weight_scale"])


def test_fp8_in_blocks_has_a_scale_for_each() -> None:
    """The last block of rows is not whole; one group of inputs is zero, so its scale is the least there is."""
    n, k = 296, 384
    rows = torch.randn(n, k, generator=dice(1)).to(BF16)
    rows[:128] *= 50
    inputs = torch.randn(2, T, k, generator=dice(2)).mul_(torch.rand(2, T, 1, generator=dice(4)) * 9).to(BF16)
    inputs[0, 0, :128] = 0
    places = [(slice(r, r + 128), slice(c, c + 128)) for r in range(0, len(rows), 128) for c in range(0, k, 128)]
    scales = torch.stack([rows[place].float().abs().max() / 448 for place in places]).view(-1, k // 128)
    whole = scales.repeat_interleave(128, 0)[: len(rows)].repeat_interleave(128, 1)
    stored = to_e4m3(rows, whole)
    linear = BLOCK_FP8.make({"weight": stored, "weight_scale_inv": scales}, [], True, BF16)
    groups = inputs.double().view(*inputs.shape[:-1], -1, 128)
    steps = (groups.abs().amax(-1, keepdim=True) / 448).float().double().clamp(min=1e-9)
    rounded = (groups / steps).float().to(torch.float8_e4m3fn).double() * steps
    expected = rounded.flatten(-2) @ (stored.double() * whole.double()).t()
    assert linear(inputs).dtype == BF16
    assert (linear(inputs).double() - expected).norm() / expected.norm() < 3e-3  # one rounding to BF16
    exact = inputs.double() @ rows.double().t()
    assert 0.01 < (expected - exact).norm() / exact.norm() < 0.06
