"""The run that makes a checkpoint: preflight, layer by layer rounding, worker processes, resuming, the files beside the weights."""
