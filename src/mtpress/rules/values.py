"""Rules on the numbers of a checkpoint: what no training leaves behind.

In: a `Survey`. Out: problems that name the tensors. Leaves out: small changes, which only a source can show (rules/against_source.py).

The limits lie far outside of what is known of trained models: mtpress-tiny, and what the makers of loaders publish of Qwen3.5 to 3.8.
"""

import re
import statistics as numbers
from collections import defaultdict
from collections.abc import Iterator

from mtpress.models.qwen3_5.names import MTP_PREFIX, VISION_PREFIX
from mtpress.rules.rule import QUANTIZE_AGAIN, Problem, Rule
from mtpress.terminal import count
from mtpress.values.statistics import Statistics
from mtpress.values.survey import Survey

FETCH = "compare it with its source: mtpress check CKPT --base SRC; fetch or make it again"
# RMS times √fan-in. Initial weights have 0.02 · √5120 = 1.4 or less; trained linears of mtpress-tiny 0.15 to 2.4. Random numbers of
# variance 1 have √fan-in, 16 and more; FP8 codes without their scales some 100 times that.
LARGEST_GAIN, LEAST_GAIN = 10.0, 0.003
LARGEST_GAIN_OTHERS = 60.0  # of embeddings and of the vision tower, whose rows are added and not multiplied with a normed state
LEAST_FAN_IN = 32  # conv1d, with 4, is free
CODES_AT_LEAST = 16.0  # a matrix on the grid of E4M3 whose largest number is larger holds codes: trained weights stay below 16
# Norms that multiply by 1 + w. Trained w lie around 0, by 0.3 in mtpress-tiny; of Qwen3.6's norms the mean is −0.02, of layer 0 of
# Qwen3.5-9B the RMS 0.12. Stored as 1 + w no number is below 0 and the median is near 1.
CENTRED = ("input_layernorm.weight", "post_attention_layernorm.weight", "q_norm.weight", "k_norm.weight")
CENTRED_ELSEWHERE = ("norm.weight", "pre_fc_norm_embedding.weight", "pre_fc_norm_hidden.weight")
PLAIN_NORM = "linear_attn.norm.weight"
SHIFTED_MEDIAN, SHIFTED_NEGATIVES = 0.6, 0.01  # of all norms together: the median of their medians, the share of numbers below 0
SHIFT_OF_ONE = 0.7  # by which the median of one norm lies above that of the same norm of the other layers
PLAIN_MEDIAN = (0.02, 20.0)  # of the gain of the gated norm, which multiplies as it is: 0.85 to 1.1 in mtpress-tiny
# exp(A_log) is how fast a head forgets: log of 1 to 16 at first, −1.4 to 2.8 in mtpress-tiny. From exp(8) on nothing outlives one token,
# below exp(−25) nothing is ever forgotten. dt_bias goes through softplus: 1 at first, 0.9 to 1.1 there.
A_LOG, DT_BIAS = (-25.0, 8.0), (-40.0, 40.0)
A_LOG_MEDIAN, DT_BIAS_MEDIAN = (-15.0, 5.0), (-15.0, 10.0)
MANY_ZERO_ROWS = 0.5  # of an embedding, whose rows for tokens that never occur may be zero


def not_finite(found: Survey) -> Iterator[Problem]:
    bad = {name: s for name, s in found.statistics.items() if s.not_finite or s.bad_scales}
    if bad:
        codes, scales = sum(s.not_finite for s in bad.values()), sum(s.bad_scales for s in bad.values())
        said = " and ".join(count(number, noun) for number, noun in ((codes, "number"), (scales, "block scale")) if number)
        yield Problem(f"{said} NaN or infinite in {count(len(bad), 'tensor')}", tuple(bad))


def _matrices(found: Survey) -> dict[str, Statistics]:
    return {name: s for name, s in found.statistics.items() if len(s.shape) > 1}


def constant(found: Survey) -> Iterator[Problem]:
    names = tuple(name for name, s in _matrices(found).items() if s.looked_at > 1 and s.is_constant)
    if names:
        kinds = "zero" if all(found.statistics[name].is_zero for name in names) else "one number, or one row, everywhere"
        yield Problem(f"{count(len(names), 'matrix' if len(names) == 1 else 'matrice')} {kinds}", names)


def scales_constant(found: Survey) -> Iterator[Problem]:
    names = tuple(name for name, s in found.statistics.items() if s.num_scales >= 64 and s.equal_scales and not s.is_constant)
    if names:
        yield Problem(f"{count(len(names), 'quantized matrix' if len(names) == 1 else 'quantized matrice')} with one block scale", names)


def rows_zero(found: Survey) -> Iterator[Problem]:
    for name, s in _matrices(found).items():
        vocabulary = found.subject.model.component(_tensor(name)) in ("embeddings", "lm_head")
        if s.zero_rows and not s.is_constant and (not vocabulary or s.zero_rows > MANY_ZERO_ROWS * s.rows):
            yield Problem(f"{name}: {s.zero_rows} of {s.rows} rows zero, the first is row {s.first_zero_row}", (name,))


def _tensor(name: str) -> str:
    """The name by which a quantized module's component is known."""
    return name if name.endswith((".weight", ".bias", "A_log", "dt_bias")) else f"{name}.weight"


def _gain(s: Statistics) -> float:
    return float(s.rms * s.num_columns**0.5)


def codes_without_scales(found: Survey) -> Iterator[Problem]:
    names = tuple(name for name, s in _matrices(found).items() if _holds_codes(s))
    if names:
        worst = max(found.statistics[name].high for name in names)
        yield Problem(f"{count(len(names), 'tensor')} of numbers up to {worst:g}, every one of them a code of FP8", names)


def _holds_codes(s: Statistics) -> bool:
    return not s.quantized and s.on_grid and max(-s.low, s.high) >= CODES_AT_LEAST


def magnitude(found: Survey) -> Iterator[Problem]:
    for name, s in _matrices(found).items():
        if s.num_columns < LEAST_FAN_IN or s.is_constant or _holds_codes(s):
            continue
        free = name.startswith(VISION_PREFIX) or found.subject.model.component(_tensor(name)) == "embeddings"
        gain = _gain(s)
        if not LEAST_GAIN <= gain <= (LARGEST_GAIN_OTHERS if free else LARGEST_GAIN):
            yield Problem(f"{name}: its RMS is {s.rms:.3g}, times √{s.num_columns} {gain:.3g}; trained ones have about 1", (name,))


def _centred(found: Survey) -> dict[str, dict[str, Statistics]]:
    """ "body" and "head" → the norms that multiply by 1 + w."""
    groups: dict[str, dict[str, Statistics]] = {"body": {}, "head": {}}
    for name, s in found.statistics.items():
        if s.vector is None or name.startswith(VISION_PREFIX) or name.endswith(PLAIN_NORM):
            continue
        if name.endswith(CENTRED) or (name.endswith(CENTRED_ELSEWHERE) and ".layers." not in name):
            groups["head" if name.startswith(MTP_PREFIX) else "body"][name] = s
    return groups


def _median(s: Statistics) -> float:
    assert s.vector is not None
    return float(s.vector.median())


def norm_shifted(found: Survey) -> Iterator[Problem]:
    """All norms of the body or of the head; one among the same ones of other layers where they are not all so."""
    for part, norms in _centred(found).items():
        if not norms:
            continue
        vectors = [s.vector for s in norms.values() if s.vector is not None]
        negative = sum(int((v < 0).sum()) for v in vectors) / sum(len(v) for v in vectors)
        middle = numbers.median(map(_median, norms.values()))
        if middle > SHIFTED_MEDIAN and negative < SHIFTED_NEGATIVES:
            yield Problem(f"the {count(len(norms), 'norm')} of the {part} lie around {middle:.2f}, as 1 + w does", tuple(norms))
            continue
        others = numbers.median(map(_median, norms.values()))
        for name, s in norms.items():
            same_kind = [_median(o) for n, o in norms.items() if n.rpartition("layers.")[2].partition(".")[2] == _kind(name)]
            centre = numbers.median(same_kind) if len(same_kind) > 2 else others
            if _median(s) - centre > SHIFT_OF_ONE and _median(s) > SHIFTED_MEDIAN and s.low > 0:
                yield Problem(f"{name}: lies around {_median(s):.2f}, the others around {centre:.2f}: it may hold 1 + w", (name,))


def _kind(name: str) -> str:
    return name.rpartition("layers.")[2].partition(".")[2]


def norm_untrained(found: Survey) -> Iterator[Problem]:
    flat = [name for norms in _centred(found).values() for name, s in norms.items() if s.low == s.high and not s.not_finite]
    gated = {name: s for name, s in found.statistics.items() if name.endswith(PLAIN_NORM) and s.vector is not None}
    flat += [name for name, s in gated.items() if s.low == s.high or not PLAIN_MEDIAN[0] <= _median(s) <= PLAIN_MEDIAN[1]]
    if flat:
        yield Problem(f"{count(len(flat), 'norm')} with one number everywhere, or with a gain near 0", tuple(flat))


def decay_outside(found: Survey) -> Iterator[Problem]:
    for suffix, (low, high), (least, most) in ((".A_log", A_LOG, A_LOG_MEDIAN), (".dt_bias", DT_BIAS, DT_BIAS_MEDIAN)):
        for name, s in found.statistics.items():
            known = name.endswith(suffix) and s.vector is not None and s.looked_at
            if known and not (low <= s.low and s.high <= high and least <= _median(s) <= most):
                yield Problem(f"{name}: from {s.low:.3g} to {s.high:.3g}, median {_median(s):.3g}", (name,))


def head_copied(found: Survey) -> Iterator[Problem]:
    for names in found.copies:
        head = [name for name in names if name.startswith(MTP_PREFIX)]
        body = [name for name in names if not name.startswith(MTP_PREFIX)]
        if head and body:
            yield Problem(f"{head[0]} is {body[0]}, bit for bit: the head was never trained", (*head, *body))


def layers_copied(found: Survey) -> Iterator[Problem]:
    """Pairs of layers, each named once, with what they share."""
    shared: dict[str, list[tuple[str, ...]]] = defaultdict(list)
    for names in found.copies:
        apart = [name for name in names if not name.startswith(MTP_PREFIX)]
        around = {found.subject.model.component(_tensor(name)) for name in apart} <= {"embeddings", "lm_head"}  # tied, and stored twice
        if len(apart) > 1 and not around:
            shared[" and ".join(sorted({_home(name) for name in apart}))].append(tuple(apart))
    for homes, groups in shared.items():
        yield Problem(f"{homes}: {count(len(groups), 'matrix' if len(groups) == 1 else 'matrice')} bit for bit the same", groups[0])


def _home(name: str) -> str:
    """The layer, or the block of the tower, that a tensor is in; its own name outside of them."""
    found = re.search(r"(layer|block)s\.(\d+)\.", name)
    return f"{found[1]} {found[2]}" if found else name


def not_read(found: Survey) -> Iterator[Problem]:
    if found.not_read:
        yield Problem(f"{count(len(found.not_read), 'tensor or module')} in no form that is known", tuple(found.not_read))


RULES = (
    Rule("values-not-finite", "error", "NaN or infinite numbers, or block scales: one of them spoils every answer.", FETCH, not_finite),
    Rule("constant", "error", "A matrix is zero, or holds one number or one row everywhere: nothing was learned in it.", FETCH, constant),
    Rule("scales-constant", "error", "Every block of a quantized matrix has the same scale: the scales were overwritten.",
         QUANTIZE_AGAIN, scales_constant),
    Rule("rows-zero", "warning", "Rows of a matrix are zero: channels are lost, or were pruned.", FETCH, rows_zero),
    Rule("codes-without-scales", "error", "A 16-bit matrix holds the codes of FP8: it was cast without its scales.",
         "make the 16-bit checkpoint anew, by codes times scales", codes_without_scales),
    Rule("magnitude", "error", "A matrix is far larger or smaller than any trained one: random numbers, or a lost scale.",
         FETCH, magnitude),
    Rule("norm-shifted", "error", "Norms that multiply by 1 + w are stored as 1 + w, as MLX stores them: every one counts twice.",
         "subtract 1 from them, or take them from the source: mtpress repair CKPT OUT --base SRC", norm_shifted),
    Rule("norm-untrained", "warning", "Norms that hold one number everywhere, or the gated norm with a gain near 0: they were never "
         "trained, or were overwritten.", FETCH, norm_untrained),
    Rule("decay-outside", "error", "A_log or dt_bias outside of what a Gated DeltaNet layer can use: it forgets everything or nothing.",
         FETCH, decay_outside),
    Rule("head-copied", "error", "Matrices of the draft head are those of a layer of the body: its drafts are rarely accepted.",
         "mtpress graft CKPT OUT --from BASE --replace-head", head_copied),
    Rule("layers-copied", "warning", "Layers hold the same matrices, bit for bit: a merge stacked them, or one was written twice.",
         FETCH, layers_copied),
    Rule("values-not-read", "note", "Tensors whose numbers were not looked at.", "nothing can be done here", not_read),
)  # fmt: skip
