"""Block scales under another global scale, against float64 tables and exhaustive search."""

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from mtpress.formats import nvfp4
from mtpress.formats.nvfp4_rescale import SIZES, Member, best_shared_scale, energies, reexpress

ALL_SIZES = torch.arange(127, dtype=torch.uint8).view(1, 127)


def f32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()


def matrix(seed: int, n: int = 32, k: int = 256, size: float = 0.05) -> tuple[Tensor, Tensor, Tensor]:
    """(packed codes, block scales, global scale) of a random matrix, quantized alone."""
    weight = (size * torch.randn(n, k, generator=torch.Generator().manual_seed(seed))).to(torch.bfloat16)
    scale_2 = nvfp4.global_scale(nvfp4.amax(weight))
    return *nvfp4.quantize(weight, scale_2), scale_2


def values(packed: Tensor, scales: Tensor, scale_2: float | Tensor) -> Tensor:
    """float64 weights, without any rounding."""
    blocks = nvfp4.decode(nvfp4.unpack(packed)).double().unflatten(-1, (-1, 16))
    return (blocks * (scales.double() * float(scale_2)).unsqueeze(-1)).flatten(-2)


def member(packed: Tensor, scales: Tensor, scale_2: float | Tensor) -> Member:
    return Member(float(scale_2), energies(scales, packed))


def test_energies_count_each_block_under_its_scale() -> None:
    packed, scales, _ = matrix(0, n=5, k=64)
    found = energies(scales, packed)
    squares = nvfp4.decode(nvfp4.unpack(packed)).double().square().unflatten(-1, (-1, 16)).sum(-1)
    for byte in range(256):
        assert found[byte] == squares[scales.view(torch.uint8) == byte].sum()
    assert energies(scales).sum() == scales.numel()


@pytest.mark.parametrize("shift", [-3, -1, 0, 1, 4])
def test_a_power_of_two_is_exact_in_the_normal_range(shift: int) -> None:
    packed, scales, scale_2 = matrix(1)
    scales = scales.double().clamp(1 / 4, 28).to(torch.float8_e4m3fn)  # room on both sides
    new = reexpress(scales, scale_2, scale_2 * 2.0**shift, packed)
    assert new.exact and new.relative_error == 0
    assert torch.equal(new.scales.double() * 2.0**shift, scales.double())


def test_a_lucky_ratio_is_exact_only_where_significands_allow() -> None:
    scales = torch.tensor([[8.0, 10.0, 0.0]]).to(torch.float8_e4m3fn)
    assert reexpress(scales, 1.5, 1.0).scales.double().tolist() == [[12.0, 15.0, 0.0]]
    assert reexpress(scales, 1.5, 1.0).exact
    assert not reexpress(torch.tensor([[9.0]]).to(torch.float8_e4m3fn), 1.5, 1.0).exact  # 13.5 is between 13 and 14


@pytest.mark.parametrize("ratio", [0.3, 0.77, 0.99, 1.01, 1.9, 3000.0, 1e-4])
def test_rounds_to_the_nearest_of_all_e4m3_numbers(ratio: float) -> None:
    own, shared = f32(0.01), f32(0.01 / ratio)
    new = reexpress(ALL_SIZES.view(torch.float8_e4m3fn), own, shared)
    wanted = SIZES * Fraction(own).__float__() / shared
    distance = (wanted.view(-1, 1) - SIZES).abs()
    assert torch.equal((new.scales.double().view(-1) - wanted).abs(), distance.amin(dim=1))
    error = ((new.scales.double() * shared - SIZES * own).square().sum() / (SIZES * own).square().sum()).sqrt()
    assert new.relative_error == pytest.approx(error.item(), rel=1e-9)


def test_the_error_is_that_of_the_weights() -> None:
    packed, scales, scale_2 = matrix(2)
    shared = scale_2 * f32(1.3)
    new = reexpress(scales, scale_2, shared, packed)
    before, after = values(packed, scales, scale_2), values(packed, new.scales, shared)
    assert not new.exact and 0.005 < new.relative_error < 0.04
    assert new.relative_error == pytest.approx(((after - before).norm() / before.norm()).item(), rel=1e-6)


def test_blocks_of_zero_codes_take_any_scale() -> None:
    packed = torch.zeros(1, 16, dtype=torch.uint8)
    packed[0, 8:] = 0x22  # the second block holds weights
    scales = torch.tensor([[9.0, 8.0]]).to(torch.float8_e4m3fn)
    assert reexpress(scales, 1.5, 1.0, packed).exact
    assert not reexpress(scales, 1.5, 1.0).exact
    nothing = member(torch.zeros(1, 16, dtype=torch.uint8), scales, 3.0)
    assert best_shared_scale([nothing, member(packed, scales, 1.5)]).exact
    assert best_shared_scale([nothing, nothing]) == (3.0, True, (0.0, 0.0))


def test_the_sign_of_a_block_scale_stays() -> None:
    scales = torch.tensor([[-8.0, 8.0]]).to(torch.float8_e4m3fn)
    assert reexpress(scales, 2.0, 1.0).scales.double().tolist() == [[-16.0, 16.0]]


def test_a_nan_scale_is_refused() -> None:
    for byte in (0x7F, 0xFF):
        with pytest.raises(ValueError, match="NaN"):
            reexpress(torch.tensor([[byte]], dtype=torch.uint8).view(torch.float8_e4m3fn), 1.0, 2.0)


def test_an_exact_shared_scale_is_found_wherever_there_is_one() -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(50):
        scale_2 = f32(0.001 + torch.rand((), generator=generator).item())
        bins = [torch.zeros(256, dtype=torch.float64) for _ in range(3)]
        ratios = (1.0, 0.75, 2.0)
        for energy, ratio in zip(bins, ratios, strict=True):
            multiples = [8, 12, 16] if ratio == 0.75 else [8, 9, 10, 11, 14]
            for number in multiples:
                energy[torch.tensor(float(number)).to(torch.float8_e4m3fn).view(torch.uint8).int()] += 1
        members = [Member(f32(scale_2 * ratio), energy) for ratio, energy in zip(ratios, bins, strict=True)]
        found = best_shared_scale(members)
        representable = all(Fraction(m.scale_2) == Fraction(scale_2) * Fraction(r) for m, r in zip(members, ratios, strict=True))
        assert found.exact == representable
        if found.exact:
            for m in members:
                used = SIZES[(m.energies > 0).nonzero().view(-1)]
                new = reexpress(used.view(1, -1).to(torch.float8_e4m3fn), m.scale_2, found.scale_2)
                assert new.exact


def test_equal_scales_are_kept() -> None:
    packed, scales, scale_2 = matrix(4)
    assert best_shared_scale([member(packed, scales, scale_2)] * 2) == (float(scale_2), True, (0.0, 0.0))


def test_the_chosen_scale_is_no_worse_than_any_other_tried() -> None:
    matrices = [matrix(5, size=0.05), matrix(6, size=0.031), matrix(7, n=64, size=0.02)]
    found = best_shared_scale([member(*one) for one in matrices])
    assert not found.exact

    def squares(shared: float) -> float:
        news = [reexpress(scales, own, shared, packed) for packed, scales, own in matrices]
        differences = [values(p, new.scales, shared) - values(p, s, own) for new, (p, s, own) in zip(news, matrices, strict=True)]
        return sum(d.square().sum().item() for d in differences)

    best = squares(found.scale_2)
    largest = max(float(own) for _, _, own in matrices)
    others = torch.linspace(0.8, 2.5, 60).tolist()
    assert all(best <= squares(f32(largest * other)) * (1 + 1e-9) for other in [1.0, *others])
    for error, (packed, scales, own) in zip(found.relative_errors, matrices, strict=True):
        assert error == reexpress(scales, own, found.scale_2, packed).relative_error
