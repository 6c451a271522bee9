"""Each rule on what the engine did fires on a trial made for it, and a sound trial fires none."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mtpress.engine.server.metrics import SpecDecode
from mtpress.engine.trial.canaries import picture_canaries, text_canaries, tool_canaries
from mtpress.engine.trial.trial import Answer, Closeness, Difference, Run, Trial
from mtpress.rules.registry import ENGINE_RULES
from mtpress.rules.rule import apply


def answers(wrong: str = "", of_wrong: float = 1.0) -> tuple[Answer, ...]:
    def judged() -> Iterator[Answer]:
        for canaries in (text_canaries(), tool_canaries(), picture_canaries()):
            for number, canary in enumerate(canaries):
                right = canary.kind != wrong or number >= of_wrong * len(canaries)
                yield Answer(canary, "as asked" if right else "nonsense", right)

    return tuple(judged())


def counted(first: float, drafts: int = 400) -> SpecDecode:
    accepted = tuple(int(drafts * share) for share in (first, first * 0.9, first * 0.8))
    return SpecDecode(drafts, 3 * drafts, sum(accepted), accepted)


DRAFTED = Run(3, None, answers(), spec_decode=counted(0.9))
BASE = Run(3, None, answers(), spec_decode=counted(0.92))
SOUND = Trial(
    "vLLM 0", "modelopt NVFP4 (W4A4)", DRAFTED, Run(0), BASE,
    differences=(Difference(0, 7, 0.4),), num_stories_compared=6, closeness=Closeness(600, 0.01, 0.5, 0.98), logs=Path("logs"),
)  # fmt: skip

CASES: dict[str, Trial] = {
    "engine-refuses": replace(SOUND, drafted=None, plain=Run(0, "ValueError: no")),
    "engine-refuses-drafts": replace(SOUND, drafted=Run(3, "AssertionError"), plain=Run(0, None, answers())),
    "engine-text": replace(SOUND, drafted=replace(DRAFTED, answers=answers("text"))),
    "engine-pictures": replace(SOUND, drafted=replace(DRAFTED, answers=answers("picture", 0.7))),
    "engine-tools": replace(SOUND, drafted=replace(DRAFTED, answers=answers("tool"))),
    "engine-acceptance": replace(SOUND, drafted=replace(DRAFTED, spec_decode=counted(0.01)), base=None, closeness=None),
    "engine-acceptance-base": replace(SOUND, drafted=replace(DRAFTED, spec_decode=counted(0.80))),
    "engine-drafts-change-text": replace(SOUND, differences=(Difference(0, 7, 0.6),)),
    "engine-logits": replace(SOUND, closeness=Closeness(600, 0.4, 3.0, 0.95)),
    "engine-base": replace(SOUND, base=None, base_refusal="it needs 55 GB", closeness=None),
}


def found(trial: Trial) -> dict[str, str]:
    return {finding.id: finding.message for finding in apply(ENGINE_RULES, trial)}


def test_a_sound_trial_has_no_finding() -> None:
    assert found(SOUND) == {}
    assert found(replace(SOUND, base=None, closeness=None)) == {}


def test_every_rule_has_a_case() -> None:
    assert set(CASES) == {rule.id for rule in ENGINE_RULES}


@pytest.mark.parametrize("rule", CASES)
def test_exactly_one_rule_fires(rule: str) -> None:
    assert set(found(CASES[rule])) == {rule}


def test_findings_carry_their_evidence() -> None:
    assert "1.0% of 400 drafts" in found(CASES["engine-acceptance"])["engine-acceptance"]
    assert "ValueError: no" in found(CASES["engine-refuses"])["engine-refuses"]
    assert "nonsense" in found(CASES["engine-text"])["engine-text"]
    assert "80.0%" in found(CASES["engine-acceptance-base"])["engine-acceptance-base"]


def test_few_drafts_are_no_evidence_against_the_base() -> None:
    """0.80 against 0.92 over 40 drafts is within three standard errors."""
    few = replace(SOUND, drafted=replace(DRAFTED, spec_decode=counted(0.80, 40)), base=replace(BASE, spec_decode=counted(0.92, 40)))
    assert found(few) == {}


def test_what_the_base_does_not_know_is_not_asked_of_the_checkpoint() -> None:
    ignorant = replace(SOUND, base=replace(BASE, answers=answers("text")), drafted=replace(DRAFTED, answers=answers("text")))
    assert found(ignorant) == {}


def test_bf16_has_narrower_near_ties() -> None:
    assert set(found(replace(SOUND, format="BF16"))) == {"engine-drafts-change-text"}


def test_the_floor_is_the_users() -> None:
    assert set(found(replace(SOUND, acceptance_floor=0.95))) == {"engine-acceptance"}
