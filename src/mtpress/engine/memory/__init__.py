"""The memory that vLLM needs for a checkpoint, by its own arithmetic, and what a GPU has."""
