"""Scales by "four over six": each block's largest magnitude becomes 6 or 4, whichever leaves the block less squared error.

In: the matrices that share a global scale. Out: that scale and block scales. Leaves out: codes (formats/nvfp4.py).

Between 4 and 6 E2M1 has nothing: a block with numbers near 5/6 of its largest loses much there. With the largest at 4 the steps are
1.5 times as coarse below, and half as coarse at the top. Source: "Four Over Six" (arXiv 2512.02010), whose global scale is
g / (6·256), so that 1.5 times the largest block scale is still an E4M3 number.
"""

from collections.abc import Mapping

import torch

from mtpress.rounding import scale_search


def group_scales(weights: Mapping[str, torch.Tensor]) -> scale_search.GroupScales:
    """Of the matrices of a fused group, by name."""
    return scale_search.group_scales(weights, scale_search.SIX_OR_FOUR)
