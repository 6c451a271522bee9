"""Benchmark tasks of lm-evaluation-harness, asked of a served model."""
