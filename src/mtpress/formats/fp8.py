"""FP8: E4M3 weights with one float32 scale a tensor, activations by one static scale (modelopt's "FP8").

In: a BF16 matrix [N, K] and a scale. Out: float8_e4m3fn [N, K]. Leaves out: which linears share a scale (rounding/fp8.py), and
where the tensors go.

Arithmetic, bit for bit modelopt 0.47 (torch/export/quant_utils.py, to_quantized_weight; unified_export_hf.py):
    scale = amax / 448, in float32; of an amax that is zero: 1, as modelopt takes for a linear that never saw an activation
    code  = E4M3(BF16(w / scale)): the quotient of a BF16 matrix and a scalar is BF16 in PyTorch, so it is rounded twice
"""

import torch

E4M3_MAX = 448.0
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


def dequantize(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float32 [N, K] of codes [N, K] and their scale."""
    return codes.float().mul_(scale.float())


def to_e4m3(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x as an FP8 kernel sees it: float8_e4m3fn of x over a float32 scale, what is beyond ±448 clamped.

    Source: vLLM 0.32, model_executor/layers/quantization/input_quant_fp8.py, QuantFP8.forward_native.
    """
    return (x.float() * scale.float().reciprocal()).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def round_activations(x: torch.Tensor, input_scale: torch.Tensor) -> torch.Tensor:
    """to_e4m3() and back, in x's dtype."""
    return (to_e4m3(x, input_scale).float() * input_scale.float()).to(x.dtype)
