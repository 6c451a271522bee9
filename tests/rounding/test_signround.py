"""Sign-gradient rounding against plain PyTorch: a fake-quantized linear as auto-round writes it, with autograd through it."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtpress.errors import InputError
from mtpress.rounding import signround, signround_kernel
from mtpress.rounding.signround import Settings, TunedLinear, steps, tune

SIZES = (24, 384)


def weights(n: int = SIZES[0], k: int = SIZES[1], seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    made = torch.randn(n, k, generator=random) * torch.logspace(-3, 1, n).unsqueeze(1)
    made[0, :128] = 0  # a dead group
    made[1, 128:256] = made[1, 128:256].abs()  # its scale is negative
    made[2, :128] = -made[2, :128].abs()
    made[3, 0], made[3, 1:128] = -5.0, made[3, 1:128].clamp(-4, 4)
    made[3, 1] = 5.0  # as large as the smallest
    return made.bfloat16()


def fake_quantized(weight: Tensor, v: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The weight and scales of quant_tensor_sym, written anew in float64 but for the FP16 scale; everything is differentiable."""
    groups = weight.double().unflatten(1, (-1, 128))
    lowest, highest = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    low_abs, high_abs = -(lowest * low), highest * high
    exact = torch.where(high_abs < low_abs, 1.0, -1.0) * torch.maximum(low_abs, high_abs) / 8
    clamped = torch.where(exact.half() < 0, exact.clamp(max=-1.0014e-05), exact.clamp(min=1.0014e-05))
    scale = clamped + (clamped.half().double() - clamped).detach()
    free = groups / scale.unsqueeze(-1) + v
    code = (free + (free.round() - free).detach()).clamp(-8, 7)
    return (code * scale.unsqueeze(-1)).flatten(1), scale


@pytest.fixture(params=["eager", *signround_kernel.KERNELS])
def way(request, monkeypatch):
    monkeypatch.setattr(signround_kernel, "KERNELS", () if request.param == "eager" else (request.param,))
    return request.param


def moved_linear(seed: int = 1) -> TunedLinear:
    """In the midst of tuning: offsets between -0.5 and 0.5, factors down to 0.8."""
    random = torch.Generator().manual_seed(seed)
    linear = TunedLinear(weights())
    linear.offset.copy_(torch.randint(-20_000, 20_001, SIZES, generator=random))
    linear.factors.copy_(torch.randint(-8000, 1, linear.factors.shape, generator=random))
    linear.factors[:, 3] = 0
    linear._set_scales()
    return linear


def test_one_step_is_that_of_autograd(way):
    linear = moved_linear()
    v = (linear.offset.double() / signround.UNITS).unflatten(1, (-1, 128)).requires_grad_()
    low, high = ((1 + f.double() / signround.UNITS).requires_grad_() for f in linear.factors)
    weight, scale = fake_quantized(linear.weight, v, low, high)
    assert torch.equal(scale.float(), linear.scale)
    assert torch.equal(weight.float().bfloat16(), linear.dequantized())

    x = torch.randn(40, SIZES[1], generator=torch.Generator().manual_seed(2)).bfloat16()
    grad_out = torch.randn(40, SIZES[0], generator=torch.Generator().manual_seed(3)).bfloat16()
    grad = grad_out.mT @ x
    weight.backward(grad.double())
    offset, factors, size = linear.offset.clone(), linear.factors.clone(), 150
    scale_before = linear.scale
    sums = signround.step(linear.weight, linear.offset.clone(), scale_before, grad, size)
    linear.step_from(grad_out, x, size)
    assert torch.equal(linear.offset - offset, (-size * v.grad.sign()).short().flatten(1))
    assert 0 < int((v.grad == 0).sum()) < v.numel() // 4  # some codes are clipped
    for factor, before, now in zip((low, high), factors, linear.factors, strict=True):
        expected = (before - size * factor.grad.sign()).clamp(max=0)
        # where the sum over a group cancels, float32 may see another sign than float64
        clear = factor.grad.abs() > 1e-4 * factor.grad.abs().mean()
        assert torch.equal(now[clear].double(), expected[clear].double())
        assert clear.float().mean() > 0.3
    assert bool(torch.isfinite(sums).all())


def test_the_kernels_give_the_bits_of_the_definition(monkeypatch):
    made = {}
    for kernel in ("eager", *signround_kernel.KERNELS):
        monkeypatch.setattr(signround_kernel, "KERNELS", () if kernel == "eager" else (kernel,))
        linear = moved_linear()
        linear.offset[5] = 32767 - 10  # saturates
        grad = torch.randn(SIZES, generator=torch.Generator().manual_seed(4)).bfloat16()
        grad[:, ::7] = 0
        packed = torch.empty(SIZES[0], SIZES[1] // 2, dtype=torch.uint8)
        signround.pack_codes(linear.weight, linear.offset, linear.scale, packed)
        made[kernel] = [
            linear.dequantized().clone(),
            packed,
            signround.step(linear.weight, linear.offset, linear.scale, grad, 77),
            linear.offset,
        ]
    for kernel, tensors in made.items():
        for ours, defined in zip(tensors, made["eager"], strict=True):
            assert torch.equal(ours, defined), kernel
    assert "avx2" in made or "generic" in made or not signround_kernel.KERNELS


def test_rounded_is_what_tuning_multiplied_by(way):
    linear = moved_linear()
    linear.keep_best()
    best = linear.best()
    assert best.codes.dtype == torch.uint8
    assert int(best.codes.max()) == 15
    assert torch.equal(best.dequantized(), linear.dequantized())


def test_pieces_of_rows_and_of_batches_make_the_same_step(monkeypatch):
    x, grad_out = torch.randn(32, SIZES[1]).bfloat16(), torch.randn(32, SIZES[0]).bfloat16()
    whole, by_rows, by_batches = moved_linear(), moved_linear(), moved_linear()
    whole.step_from(grad_out, x, 100)
    monkeypatch.setattr(signround, "ROWS_BYTES", 2 * SIZES[1] * 5)
    by_rows.step_from(grad_out, x, 100)
    for some in (slice(0, 20), slice(20, 32)):
        by_batches.collect(grad_out[some], x[some])
    by_batches.step_collected(100)
    assert torch.equal(whole.offset, by_rows.offset)
    assert torch.equal(whole.factors, by_rows.factors)
    assert (whole.offset == by_batches.offset).float().mean() > 0.99  # two BF16 roundings instead of one


@pytest.mark.parametrize("iterations", [1, 2, 7, 200, 300, 1000])
def test_steps_fall_linearly(iterations):
    sizes = steps(iterations)
    assert len(sizes) == iterations
    assert all(abs(size - signround.UNITS * (1 - i / iterations) / iterations) <= 1 for i, size in enumerate(sizes)) or iterations == 1
    if iterations == 200:
        assert sizes == list(range(200, 0, -1))


class TwoLinears(nn.Module):
    """A block of its own: num_samples samples of 16 tokens; the samples of a batch one piece each if `by_samples`."""

    def __init__(self, num_samples: int = 12, by_samples: bool = False) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(5)
        self.up, self.down = nn.Linear(128, 256, bias=False).bfloat16(), nn.Linear(256, 128, bias=False).bfloat16()
        for linear in (self.up, self.down):
            linear.weight = nn.Parameter(0.1 * torch.randn(linear.weight.shape, generator=random).bfloat16(), requires_grad=False)
        mix = torch.randn(128, 128, generator=random)
        self.x = (torch.randn(num_samples, 16, 128, generator=random) @ mix).bfloat16()
        self.num_samples, self.by_samples = num_samples, by_samples
        with torch.no_grad():
            self.y = self(self.x)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.up(x)))

    @property
    def linears(self) -> dict[str, nn.Linear]:
        return {"up": self.up, "down": self.down}

    def pieces(self, batch):
        return [[i] for i in batch] if self.by_samples else [batch]

    def loss(self, piece, batch):
        return (self(self.x[piece]).float() - self.y[piece].float()).square().sum() / self.y[batch].numel()

    def error(self, rounded: dict[str, signround.Rounded], x: Tensor) -> float:
        with torch.no_grad():
            expected = self(x)
            signround.install(self.linears, rounded)
            return float((self(x).float() - expected.float()).square().mean())


def plain(block: TwoLinears) -> dict[str, signround.Rounded]:
    found = {}
    for name, linear in block.linears.items():
        state = TunedLinear(linear.weight)
        state.keep_best()
        found[name] = state.best()
    return found


@pytest.mark.parametrize("by_samples", [False, True])
def test_tuning_beats_plain_rounding_on_other_samples(by_samples):
    held_out = (torch.randn(64, 128) @ torch.linalg.qr(torch.randn(128, 128))[0]).bfloat16() * 10
    block = TwoLinears(by_samples=by_samples)
    before = block.error(plain(block), held_out)
    block = TwoLinears(by_samples=by_samples)
    weight = block.up.weight.clone()
    rounded, losses = tune(block.linears, block, Settings(iterations=60, batch_size=4))
    assert torch.equal(block.up.weight, weight)
    assert "forward" not in block.up.__dict__
    assert losses.best < 0.8 * losses.before
    assert losses.best_iteration > 5
    assert block.error(rounded, held_out) < 0.95 * before


def test_the_same_seed_gives_the_same_bytes():
    made = []
    for seed in (1, 1, 2):
        block = TwoLinears()
        rounded, losses = tune(block.linears, block, Settings(iterations=40, batch_size=4, seed=seed))
        made.append((rounded, losses))
    for name in ("up", "down"):
        assert torch.equal(made[0][0][name].packed, made[1][0][name].packed)
        assert torch.equal(made[0][0][name].scales, made[1][0][name].scales)
        assert not torch.equal(made[0][0][name].packed, made[2][0][name].packed)
    assert made[0][1] == made[1][1]


def test_what_cannot_be_tuned_is_named():
    block = TwoLinears()
    block.down.weight.data[0, 0] = torch.nan
    with pytest.raises(InputError, match=r"down.weight: .*NaN"):
        tune(block.linears, block, Settings())
    with pytest.raises(InputError, match="multiple of 128"):
        TunedLinear(torch.zeros(4, 100, dtype=torch.bfloat16))
    with pytest.raises(InputError, match="iterations"):
        tune({}, block, Settings(iterations=0))
