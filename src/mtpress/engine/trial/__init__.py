"""Starts a checkpoint in the engine once and asks it a few questions whose answers are known."""
