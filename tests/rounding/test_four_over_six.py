"""Four over six: the better of two scales for every block, by errors in float64."""

import pytest
import torch
from nvfp4_samples import BLOCK, SHAPES, blocks, error_of, laplace, normal, relative_mse

from mtpress.formats import nvfp4
from mtpress.rounding import four_over_six, scale_search
from mtpress.rounding.max import round_group


@pytest.mark.parametrize("shape", SHAPES)
def test_each_block_has_the_better_of_two(shape: str) -> None:
    weight = {"up": blocks(shape, 400)}
    chosen = four_over_six.group_scales(weight)
    amax = weight["up"].abs().amax(-1, keepdim=True).float()
    errors = []
    for top in (6.0, 4.0):
        scales = (amax / (top * chosen.scale_2)).clamp(2**-9, 448).to(torch.float8_e4m3fn)
        parts = scale_search.nearest_codes(weight, chosen._replace(scales={"up": scales}))["up"]
        errors.append(error_of(weight["up"], parts).square().sum(-1))
    found = error_of(weight["up"], scale_search.nearest_codes(weight, chosen)["up"]).square().sum(-1)
    torch.testing.assert_close(found, torch.minimum(*errors), rtol=1e-5, atol=0)
    assert (errors[1] < errors[0] * 0.99).any() or shape == "outlier"


TOLERANCE = 3e-5  # samples differ by 1e-5, and by as much where their largest number puts the block scales between E4M3's


@pytest.mark.parametrize(("draw", "plain", "better"), [(normal, 0.00903, 0.00755), (laplace, 0.00861, 0.00759)])
def test_error_on_known_distributions(draw: object, plain: float, better: float) -> None:
    weight = {"up": draw(512_000).bfloat16().view(-1, 64 * BLOCK)}  # type: ignore[operator]
    assert abs(relative_mse(weight["up"], round_group(weight)["up"]) - plain) < TOLERANCE
    found = scale_search.nearest_codes(weight, four_over_six.group_scales(weight))["up"]
    assert abs(relative_mse(weight["up"], found) - better) < TOLERANCE


def test_the_largest_block_can_move_up() -> None:
    weight = torch.full((1, BLOCK), 5.0, dtype=torch.bfloat16)
    weight[0, 0] = 6.0
    chosen = four_over_six.group_scales({"up": weight})
    assert chosen.scale_2 == torch.tensor(6.0) / (6 * 256)
    assert chosen.scales["up"].float() == 384 and nvfp4.quantize(weight, chosen.scale_2)[1].float() == 256
