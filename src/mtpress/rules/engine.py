"""Rules on what the engine did with a checkpoint (engine/trial/trial.py): it loads, answers, sees, calls tools, its drafts are accepted.

Limits: a canary kind fails when fewer than half of it is right, against the base when it knows clearly less than the base does. The
acceptance floor is what the seeds' worst position-1 figure leaves far below (0.87; a random head is at about 0). 5 points against the
base are what the published 4-bit builds lose at most; three standard errors are asked for on top, as few hundred drafts are seen.
"""

import math
from collections.abc import Iterator

from mtpress.engine.trial.trial import Run, Trial
from mtpress.rules.rule import Problem, Rule
from mtpress.terminal import count

ACCEPTANCE_POINTS = 0.05
NUM_ERRORS = 3
# vLLM computes logits in BF16. The largest are between 16 and 32, where two BF16 numbers are 1/8 apart, and checking several drafted
# tokens at once adds up in another order than one token at a time. With W4A4 an activation that moves so may also take the next
# FP4 code.
NEAR_TIE, NEAR_TIE_W4A4 = 0.25, 0.5
MAX_KL, MIN_AGREEMENT = 0.1, 0.9
KINDS = {"text": "text questions", "picture": "pictures", "tool": "tool calls"}


def not_loaded(trial: Trial) -> Iterator[Problem]:
    if trial.plain.refusal is not None:
        yield Problem(f"the engine does not serve it: {trial.plain.refusal}", _logs(trial))


def drafts_not_loaded(trial: Trial) -> Iterator[Problem]:
    if trial.drafted is not None and trial.drafted.refusal is not None and trial.plain.refusal is None:
        yield Problem(f"with drafts the engine does not serve it (without them it does): {trial.drafted.refusal}", _logs(trial))


def text_wrong(trial: Trial) -> Iterator[Problem]:
    yield from _judged(trial, "text")


def pictures_wrong(trial: Trial) -> Iterator[Problem]:
    yield from _judged(trial, "picture")


def tools_wrong(trial: Trial) -> Iterator[Problem]:
    yield from _judged(trial, "tool")


def acceptance_low(trial: Trial) -> Iterator[Problem]:
    found = _first_position(trial.drafted)
    if found is not None and found[0] < trial.acceptance_floor:
        random = "; a head that is missing or of random weights is at about 0" if found[0] < 0.1 else ""
        seen = f"{found[0]:.1%} of {_drafts(trial.drafted)}"
        yield Problem(f"the first drafted token is accepted in {seen}, the floor is {trial.acceptance_floor:.0%}{random}")


def acceptance_below_base(trial: Trial) -> Iterator[Problem]:
    found, base = _first_position(trial.drafted), _first_position(trial.base)
    if found is None or base is None:
        return
    (ours, our_error), (theirs, their_error) = found, base
    error = NUM_ERRORS * math.hypot(our_error, their_error)
    if theirs - ours > max(ACCEPTANCE_POINTS, error):
        yield Problem(f"the first drafted token is accepted in {ours:.1%}, with the base in {theirs:.1%} (± {error:.1%})")


def drafts_change_text(trial: Trial) -> Iterator[Problem]:
    bound = NEAR_TIE_W4A4 if "NVFP4" in trial.format else NEAR_TIE
    far = [difference for difference in trial.differences if difference.margin > bound]
    if far:
        largest = max(difference.margin for difference in far)
        yield Problem(
            f"{len(far)} of {count(trial.num_stories_compared, 'greedy text')} differ with drafts by more than a near tie "
            f"(largest margin {largest:.2f} nat, near ties are up to {bound})"
        )


def logits_far_from_base(trial: Trial) -> Iterator[Problem]:
    seen = trial.closeness
    if seen is not None and (seen.mean_kl > MAX_KL or seen.top1_agreement < MIN_AGREEMENT):
        yield Problem(
            f"KL from the base {seen.mean_kl:.3f} nat a token (limit {MAX_KL}), the same first choice at {seen.top1_agreement:.1%} of "
            f"{count(seen.num_tokens, 'token')} (limit {MIN_AGREEMENT:.0%})"
        )


def base_not_served(trial: Trial) -> Iterator[Problem]:
    why = trial.base_refusal or (trial.base.refusal if trial.base is not None else None)
    if why is not None:
        yield Problem(f"the base was not served, so nothing is held against it: {why}")


def _judged(trial: Trial, kind: str) -> Iterator[Problem]:
    run, base = trial.answering, trial.base
    asked, right = run.num_asked(kind), run.num_right(kind)
    if not asked:
        return
    known = base.num_right(kind) if base is not None and base.num_asked(kind) == asked else None
    if right < (asked if known is None else known) / 2:
        wrong = next(answer for answer in run.answers if answer.canary.kind == kind and not answer.right)
        against = "" if known is None else f", the base {known}"
        yield Problem(f"{right} of {asked} {KINDS[kind]} right{against}; {wrong.canary.question!r} was answered {wrong.said[:80]!r}")


def _first_position(run: Run | None) -> tuple[float, float] | None:
    """(share accepted at position 1, its standard error); None where no drafts were counted."""
    counted = run.spec_decode if run is not None else None
    if counted is None or not counted.num_drafts or not counted.per_position:
        return None
    share = counted.per_position[0]
    return share, math.sqrt(max(share * (1 - share), 1 / counted.num_drafts) / counted.num_drafts)


def _drafts(run: Run | None) -> str:
    return count(run.spec_decode.num_drafts if run is not None and run.spec_decode is not None else 0, "draft")


def _logs(trial: Trial) -> tuple[str, ...]:
    return (str(trial.logs),) if trial.logs is not None else ()


RULES = (
    Rule(
        "engine-refuses",
        "error",
        "vLLM does not come up with the checkpoint, or dies on it. Missing tensors count: its check for them is on.",
        "the findings above name the cause where it is known; the engine's log has the rest",
        not_loaded,
    ),
    Rule(
        "engine-refuses-drafts",
        "error",
        "vLLM serves the checkpoint, but not with its draft head.",
        "put the source's head back: mtpress graft CKPT OUT --from SRC; until then serve with --mtp 0",
        drafts_not_loaded,
    ),
    Rule(
        "engine-text",
        "error",
        "Most plain questions are answered wrong: scales or weights are not what the engine takes them for.",
        "compare with the source: mtpress check CKPT --base SRC",
        text_wrong,
    ),
    Rule(
        "engine-pictures",
        "error",
        "Most pictures of one shape are named wrong: the vision tower or its processor files are not those of the source.",
        "restore them: mtpress repair CKPT OUT --base SRC",
        pictures_wrong,
    ),
    Rule(
        "engine-tools",
        "error",
        "Most tool calls do not come out as calls: the chat template and the tool parser do not fit, or the model lost them.",
        "restore chat_template.jinja from the source; serve with --tool-call-parser qwen3_xml, as mtpress serve does",
        tools_wrong,
    ),
    Rule(
        "engine-acceptance",
        "error",
        "Drafts are rarely accepted: the head is missing, of random weights, or not the one of this model.",
        "put the source's head back: mtpress graft CKPT OUT --from SRC --replace-head",
        acceptance_low,
    ),
    Rule(
        "engine-acceptance-base",
        "error",
        "Drafts are accepted less often than with the base, by more than counting explains.",
        "put the source's head back: mtpress graft CKPT OUT --from SRC --replace-head; or quantize with another rounding or calibration",
        acceptance_below_base,
    ),
    Rule(
        "engine-drafts-change-text",
        "error",
        "Greedy text depends on whether drafts are used: drafts that are checked must change nothing.",
        "a fault of the engine or of a kernel: try another version, --enforce-eager, or serve with --mtp 0",
        drafts_change_text,
    ),
    Rule(
        "engine-logits",
        "error",
        "On the same tokens the checkpoint's probabilities are far from the base's.",
        "mtpress check CKPT --base SRC names the matrices; quantize again with another recipe or calibration",
        logits_far_from_base,
    ),
    Rule(
        "engine-base",
        "warning",
        "The base could not be served on this machine.",
        "run the check on a machine that holds it, or without --base",
        base_not_served,
    ),
)
