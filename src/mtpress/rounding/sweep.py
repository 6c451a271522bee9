"""Scales by the exact sweep: of all E4M3 numbers the one that leaves a block the least squared error.

In: the matrices that share a global scale. Out: that scale and block scales. Leaves out: codes (formats/nvfp4.py).

11 of the 126 numbers are tried, from 3 codes below the one that takes the largest magnitude to 6 to 7 above it: the others are never
better (scale_search.py, and tests/rounding/test_sweep.py, which tries them all).
"""

from collections.abc import Mapping

import torch

from mtpress.rounding import scale_search

WINDOW = scale_search.Window(below=3, above=7)


def group_scales(weights: Mapping[str, torch.Tensor]) -> scale_search.GroupScales:
    """Of the matrices of a fused group, by name."""
    return scale_search.group_scales(weights, WINDOW)
