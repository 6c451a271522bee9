"""The dense Qwen3.5 family: names and shapes of its tensors, its layers, its draft head, how vLLM builds it."""
