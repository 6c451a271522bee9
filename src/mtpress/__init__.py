"""mtpress: a BF16 Qwen3.5-class checkpoint in, a 4-bit checkpoint with a working draft head out."""

__version__ = "0.1.0"
