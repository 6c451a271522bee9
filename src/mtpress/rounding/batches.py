"""Which samples go together through a layer that is tuned by gradients, and what autograd keeps of them.

In: lengths of samples, sizes of a layer. Out: batches in a seeded order, each in pieces that fit into memory. Leaves out: the samples
(calibration/signround.py) and the tuning (rounding/signround.py). quantization/preflight.py asks here for what a run will do.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

PIECE_BYTES = 1_500_000_000  # of what autograd keeps; a batch that needs more goes through in pieces, and its gradients are summed


def batches(num_samples: int, batch_size: int, seed: int | str) -> Iterator[list[int]]:
    """auto-round's IndexSampler: shuffled, cut into batches, shuffled anew where what is left is no whole batch."""
    shuffled, order = random.Random(seed), list(range(num_samples))
    size = min(batch_size, num_samples)
    while True:
        shuffled.shuffle(order)
        for start in range(0, num_samples - size + 1, size):
            yield order[start : start + size]


def pieces(lengths: Sequence[int], batch: Sequence[int], limit: int) -> list[list[int]]:
    """As few parts of a batch as `limit` tokens a part allow, samples of like length together; a longer sample stands alone.

    The samples of a part are filled up to its longest, which counts.
    """
    longest_first = sorted(batch, key=lambda i: -lengths[i])
    starts = [0]
    for at in range(1, len(longest_first)):
        if (at - starts[-1] + 1) * lengths[longest_first[starts[-1]]] > limit:
            starts.append(at)
    return [longest_first[a:b] for a, b in pairwise([*starts, len(longest_first)])]


def piece_tokens(d: Mapping[str, int]) -> int:
    """How many tokens PIECE_BYTES have room for; d: the sizes of config.json's text_config."""
    return PIECE_BYTES // kept_bytes(d)


def kept_bytes(d: Mapping[str, int]) -> int:
    """What autograd keeps of a token in the layer of either kind that keeps more: BF16 inputs of every linear, float32 of every norm.

    d: config.json's text_config.
    """
    hidden, mlp = d["hidden_size"], d["intermediate_size"]
    keys = d["linear_num_key_heads"] * d["linear_key_head_dim"]
    values = d["linear_num_value_heads"] * d["linear_value_head_dim"]
    queries = d["num_attention_heads"] * d["head_dim"]
    around = 2 * (4 + 4 + 2 + 2) * hidden  # two norms in float32 and what they read and give, in BF16
    gated = 2 * 4 * mlp  # gate, its activation, up, and their product
    gdn = 2 * (3 * (2 * keys + values) + 2 * values) + (4 * 3 + 2 * 4) * values
    attention = 2 * 8 * queries + 4 * 4 * queries
    return around + gated + max(gdn, attention)
