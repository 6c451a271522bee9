"""A checkpoint against a base: what the base is to it, how near the weights are, and what the files beside them mean."""
