"""Checkpoints on disk: reading headers and tensors, writing shards, where an output may stand, what a stopped run left."""
