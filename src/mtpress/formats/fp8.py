"""FP8: E4M3 weights. Made here with one float32 scale a tensor, activations by one static scale (modelopt's "FP8"); read with a scale
a tensor, a row or a block, as every layout stores them.

In: a BF16 matrix [N, K] and a scale. Out: float8_e4m3fn [N, K], or the numbers that stored codes stand for. Leaves out: which linears
share a scale (rounding/fp8.py), and where the tensors go.

Arithmetic, bit for bit modelopt 0.47 (torch/export/quant_utils.py, to_quantized_weight; unified_export_hf.py):
    scale = amax / 448, in float32; of an amax that is zero: 1, as modelopt takes for a linear that never saw an activation
    code  = E4M3(BF16(w / scale)): the quotient of a BF16 matrix and a scalar is BF16 in PyTorch, so it is rounded twice
"""

from collections.abc import Iterator

import torch

E4M3_MAX = 448.0
BLOCK = (128, 128)  # rows and columns under one scale, as Qwen releases FP8
ROWS_BYTES = 32 << 20  # working set: rows are quantized in pieces of about this size
WEIGHT, SCALE, INPUT_SCALE = "weight", "weight_scale", "input_scale"


def output_tensors(shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Suffix → (safetensors dtype, shape) of what a linear of shape [N, K] becomes."""
    return {WEIGHT: ("F8_E4M3", shape), SCALE: ("F32", ()), INPUT_SCALE: ("F32", ())}


def scale(amax: torch.Tensor) -> torch.Tensor:
    """weight_scale or input_scale, float32 scalar, of an amax."""
    found = amax.float() / E4M3_MAX
    return torch.where(found == 0, 1.0, found)


def quantize(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float8_e4m3fn [N, K] of a BF16 matrix [N, K] none of whose |w| is above 448 times the float32 scale."""
    n, k = weight.shape
    codes = torch.empty(n, k, dtype=torch.float8_e4m3fn, device=weight.device)
    rows = max(1, ROWS_BYTES // (4 * k))
    for start in range(0, n, rows):
        codes[start : start + rows] = (weight[start : start + rows] / scale).to(torch.float8_e4m3fn)
    return codes


def dequantize(codes: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] = BLOCK) -> torch.Tensor:
    """float32 [N, K] of codes [N, K] and their scale: one, one a row ([N] or [N, 1]) or one a block ([N/128, K/128], modelopt's
    [N/128, 1, K/128, 1]), the last blocks being what is left. ValueError for a scale of another shape.
    """
    n, k = codes.shape
    if scale.numel() == 1:
        return codes.float().mul_(scale.float().reshape(()))
    if scale.shape in ((n,), (n, 1)):
        return codes.float().mul_(scale.float().reshape(n, 1))
    rows, columns = -(-n // block[0]), -(-k // block[1])
    if scale.shape not in ((rows, columns), (rows, 1, columns, 1)):
        raise ValueError(f"scales {list(scale.shape)} are none of a matrix {[n, k]}")
    return codes.float().mul_(spread(scale.float().reshape(rows, columns), n, k, block))


def spread(scales: torch.Tensor, n: int, k: int, block: tuple[int, int] = BLOCK) -> torch.Tensor:
    """[N, K] of one scale a block."""
    return scales.repeat_interleave(block[0], 0)[:n].repeat_interleave(block[1], 1)[:, :k]


def to_bf16(codes: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] = BLOCK) -> tuple[torch.Tensor, bool]:
    """dequantize() rounded to BF16, and whether no number was rounded: E4M3 has 4 significant bits and BF16 has 8, so a scale of
    4 (1, 0.5, 0.375, …) always fits, and float32 has taken every product of a BF16 scale exactly. Some rows at a time.
    """
    made = torch.empty(codes.shape, dtype=torch.bfloat16, device=codes.device)
    exact = True
    for rows, part, scales in pieces(codes, scale, block):
        product = dequantize(part, scales, block)
        made[rows] = product
        exact = exact and bool((made[rows].float() == product).all())
    return made, exact


def pieces(codes: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] = BLOCK) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Some rows at a time, none of a block alone: which rows, their codes, and the scales of these."""
    by_row = scale.numel() > 1 and scale.shape[0] == len(codes)
    step = block[0] * max(1, ROWS_BYTES // (4 * block[0] * codes.shape[1]))
    for start in range(0, len(codes), step):
        rows = slice(start, min(start + step, len(codes)))
        own = rows if by_row else slice(start // block[0], -(-rows.stop // block[0]))
        yield rows, codes[rows], scale if scale.numel() == 1 else scale[own]


def to_e4m3(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x as an FP8 kernel sees it: float8_e4m3fn of x over a float32 scale, what is beyond ±448 clamped.

    Source: vLLM 0.32, model_executor/layers/quantization/input_quant_fp8.py, QuantFP8.forward_native.
    """
    return (x.float() * scale.float().reciprocal()).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def round_activations(x: torch.Tensor, input_scale: torch.Tensor) -> torch.Tensor:
    """to_e4m3() and back, in x's dtype."""
    return (to_e4m3(x, input_scale).float() * input_scale.float()).to(x.dtype)
