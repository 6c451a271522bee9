"""Every shipped recipe, built from the trained model and served by the real vLLM: right text, right pictures, a draft head
that is accepted as often as before, and greedy text that does not depend on it.

MTPRESS_TEST_MODEL names another BF16 checkpoint. Each vLLM start takes about 20 s of one core; there is one a build, and a second
without drafts. `make test` takes the builds that differ in what the engine does; MTPRESS_SOAK=1 takes them all.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from acceptance import BF16, NUM_DRAFT_TOKENS, Runs
from questions import ANSWERS, PICTURES

from mtpress.plan.recipe import load_recipe, shipped

pytestmark = pytest.mark.engine

SOAK = os.environ.get("MTPRESS_SOAK") == "1"
IN_SHORT = ("nvfp4-kvfp8-vlm", "nvfp4-mtp-text", "nvfp4-mtp-vlm")
# INT4 is asked in test_second_hand.py, beside the INT4 of others
RECIPES = {name: recipe for name in shipped() if (recipe := load_recipe(name)).format == "nvfp4" and (SOAK or name in IN_SHORT)}
WITHOUT_DRAFTS = [BF16, *RECIPES] if SOAK else ["nvfp4-mtp-vlm"]
WITH_VISION = [name for name, recipe in RECIPES.items() if recipe.vision == "keep"]
WITH_FP8_KV = [name for name, recipe in RECIPES.items() if recipe.kv_cache == "fp8_cast"]

MAJORITY, MOST, PICTURES_RIGHT = 0.5, 0.7, 0.8
ACCEPTANCE_POINTS = 0.05
# vLLM computes logits in BF16. The largest are between 16 and 32, where two BF16 numbers are 1/8 apart, and checking
# several drafted tokens at once adds up in another order than one token at a time: either candidate may move by a step
# or two. With W4A4 an activation that moves so may also take the next FP4 code.
NEAR_TIE = {BF16: 0.25, "nvfp4": 0.5}


@dataclass(frozen=True)
class Difference:
    """Where greedy text with the draft head first differs: the two tokens, and by how much each run prefers its own."""

    prompt: int
    position: int
    token_off: int
    token_on: int
    margin_off: float
    margin_on: float


def differences(off: list[dict[str, Any]], on: list[dict[str, Any]]) -> Iterator[Difference]:
    """One for each prompt whose tokens are not the same; a margin is infinite where a candidate is not among the first."""
    for prompt, (a, b) in enumerate(zip(off, on, strict=True)):
        assert a["prompt_token_ids"] == b["prompt_token_ids"]
        if a["token_ids"] == b["token_ids"]:
            continue
        position, (x, y) = next((i, p) for i, p in enumerate(zip(a["token_ids"], b["token_ids"], strict=False)) if p[0] != p[1])
        first, second = a["logprobs"][position], b["logprobs"][position]
        yield Difference(
            prompt, position, x, y,
            first[str(x)] - first.get(str(y), float("-inf")),
            second[str(y)] - second.get(str(x), float("-inf")),
        )  # fmt: skip


@pytest.mark.parametrize("build", list(RECIPES))
def test_answers_are_right_and_agree_with_bf16(build: str, runs: Runs) -> None:
    assert runs.right(BF16, ANSWERS) > MAJORITY, "the BF16 model itself does not know the answers"
    assert runs.right(build, ANSWERS) > MAJORITY, runs.texts(build, ANSWERS)
    pairs = list(zip(runs.texts(build, ANSWERS), runs.texts(BF16, ANSWERS), strict=True))
    agreement = sum(ours == bf16 for ours, bf16 in pairs) / len(pairs)
    assert agreement >= MOST, [pair for pair in pairs if pair[0] != pair[1]]


@pytest.mark.parametrize("build", WITH_VISION)
def test_pictures_are_named_right(build: str, runs: Runs) -> None:
    assert runs.right(build, PICTURES) >= PICTURES_RIGHT, (runs.texts(build, PICTURES), runs.right(BF16, PICTURES))


@pytest.mark.parametrize("build", list(RECIPES))
def test_drafts_are_accepted_as_often_as_in_bf16(build: str, runs: Runs) -> None:
    assert runs.acceptance(BF16)[0] > 0
    assert runs.acceptance(build) == pytest.approx(runs.acceptance(BF16), abs=ACCEPTANCE_POINTS)


@pytest.mark.parametrize("build", WITHOUT_DRAFTS)
def test_greedy_text_does_not_depend_on_the_draft_head(build: str, runs: Runs) -> None:
    off, on = runs.result(build, 0)["outputs"], runs.result(build, NUM_DRAFT_TOKENS)["outputs"]
    assert len(off) >= 20
    bound = NEAR_TIE[BF16 if build == BF16 else RECIPES[build].format]
    unexplained = [d for d in differences(off, on) if max(d.margin_off, d.margin_on) > bound]
    assert not unexplained


@pytest.mark.parametrize("build", list(RECIPES))
def test_the_body_runs_in_four_bits_and_the_draft_head_in_bf16(build: str, runs: Runs) -> None:
    linears = runs.result(build, NUM_DRAFT_TOKENS)["linears"]
    four_bit = {name.rpartition(".")[2] for name, method in linears["target"].items() if method == "ModelOptLinearMethod"}
    assert four_bit == {"qkv_proj", "o_proj", "in_proj_qkvz", "out_proj", "gate_up_proj", "down_proj"}
    assert {"mtp.fc", "mtp.layers.0.self_attn.qkv_proj", "mtp.layers.0.mlp.down_proj"} <= set(linears["draft"])
    assert "ModelOptLinearMethod" not in linears["draft"].values()


@pytest.mark.parametrize("build", list(RECIPES))
def test_the_kv_cache_is_what_the_checkpoint_declares(build: str, runs: Runs) -> None:
    cache = runs.result(build, NUM_DRAFT_TOKENS)["kv_cache"]
    fp8 = build in WITH_FP8_KV
    assert cache["resolved"].startswith("fp8") == fp8
    assert set(cache["tensors"].values()) == ({"uint8"} if fp8 else {"bfloat16"})
