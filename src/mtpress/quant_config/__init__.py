"""What a checkpoint says of its own quantization: the declaration, the stored tensors, the ignore list, and how vLLM matches them."""
