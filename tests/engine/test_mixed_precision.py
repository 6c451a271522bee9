"""Mixed precision in the real vLLM: NVFP4, weight-only NVFP4 and FP8 linears in one model, with a draft head that is accepted as before.

FP8 runs on vLLM's own CPU kernel, W4A4 on its emulation; W4A16, which it knows for Marlin alone, on the plugin's
(engine/plugins/nvfp4_cpu.py). vLLM 0.32 counts an input_scale for weight-only linears that modelopt does not write, so its check for
missing weights refuses every W4A16 checkpoint of modelopt; that build is loaded without it.
"""

import json
from pathlib import Path

import pytest
from acceptance import BF16, NUM_DRAFT_TOKENS, Added, Runs
from questions import ANSWERS, STORIES

from mtpress.plan.recipe import parse_recipe
from mtpress.stages.quantize import quantize

pytestmark = pytest.mark.engine

MIXED, W4A16, BUDGET = "nvfp4-fp8-vlm", "w4a16-fp8-vlm", "budget"
BY_BUDGET = parse_recipe(
    {"name": BUDGET, "summary": "x", "calibration": {"num_samples": 8, "max_seq_len": 96}, "budget": {"bytes": "7.5 MB"}}, "here"
)
ACCEPTANCE_POINTS = 0.05
QUANTIZED = {"qkv_proj", "o_proj", "in_proj_qkvz", "out_proj", "gate_up_proj", "down_proj"}


@pytest.fixture(scope="module")
def mixed(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    for name in (MIXED, W4A16, BUDGET):
        out = tmp_path_factory.mktemp("mixed") / name
        quantize(runs.source, out, BY_BUDGET if name == BUDGET else name, calibration=["builtin"], device="cpu", silent=True)
        runs.added[f"{name}-text"] = Added(Path(out), tracked=name != W4A16, groups=(ANSWERS, STORIES))
    return runs


def test_formats_that_a_budget_chose_are_those_that_the_engine_runs(mixed: Runs) -> None:
    """Linear by linear, BF16 ones among them; and it answers as BF16 does."""
    build = f"{BUDGET}-text"
    record = json.loads((mixed.added[build].path / "mtpress.json").read_text())
    chosen = {group["linear"]: group["format"] for group in record["budget"]["groups"]}
    assert set(chosen.values()) == {"nvfp4", "fp8", "bf16"}
    methods = mixed.result(build, NUM_DRAFT_TOKENS)["linears"]["target"]
    ran = {prefix[prefix.index("layers.") :]: method for prefix, method in methods.items() if ".layers." in prefix}
    for linear, form in chosen.items():
        (method,) = {method for prefix, method in ran.items() if prefix == linear}
        assert (method == "UnquantizedLinearMethod") == (form == "bf16"), (linear, form, method)
    assert mixed.right(build, ANSWERS) > 0.5, mixed.texts(build, ANSWERS)
    lost = [was - now for was, now in zip(mixed.acceptance(BF16), mixed.acceptance(build), strict=True)]
    assert max(lost) <= ACCEPTANCE_POINTS


@pytest.mark.parametrize("name", [MIXED, W4A16])
def test_it_answers_and_drafts_as_bf16_does(name: str, mixed: Runs) -> None:
    build = f"{name}-text"
    assert mixed.right(build, ANSWERS) > 0.5, mixed.texts(build, ANSWERS)
    pairs = list(zip(mixed.texts(build, ANSWERS), mixed.texts(BF16, ANSWERS), strict=True))
    assert sum(ours == bf16 for ours, bf16 in pairs) / len(pairs) >= 0.7
    lost = [was - now for was, now in zip(mixed.acceptance(BF16), mixed.acceptance(build), strict=True)]
    assert mixed.acceptance(BF16)[0] > 0 and max(lost) <= ACCEPTANCE_POINTS
    linears = mixed.result(build, NUM_DRAFT_TOKENS)["linears"]
    quantized = {prefix.rpartition(".")[2] for prefix, method in linears["target"].items() if method == "ModelOptLinearMethod"}
    assert quantized == QUANTIZED | ({"lm_head"} if name == W4A16 else set())
    drafted = {prefix for prefix, method in linears["draft"].items() if method == "ModelOptLinearMethod"}
    assert all(prefix.endswith("lm_head") for prefix in drafted) and bool(drafted) == (name == W4A16)
