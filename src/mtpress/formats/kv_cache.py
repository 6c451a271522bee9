"""The scales of an FP8 KV cache: their names and dtype, as vLLM reads them of each full-attention layer."""

from mtpress.checkpoint.shard_writer import OutputTensor

K_PROJ, V_PROJ = "self_attn.k_proj", "self_attn.v_proj"
K_SCALE, V_SCALE = f"{K_PROJ}.k_scale", f"{V_PROJ}.v_scale"  # within a layer


E4M3_MAX = 448.0


def outputs(layer: str) -> tuple[OutputTensor, ...]:
    """The scales of one full-attention layer, whose tensors begin with `layer`."""
    return tuple(OutputTensor(f"{layer}{name}", "F32", ()) for name in (K_SCALE, V_SCALE))
