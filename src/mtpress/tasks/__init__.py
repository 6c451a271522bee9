"""Benchmark tasks of lm-evaluation-harness, asked of the served model."""
