"""Samples, and what is measured while they pass through the model: largest inputs, Hessians, KV-cache scales."""
