"""The choice of formats under a byte budget: against every choice there is, and as the recipe that says it."""

import itertools
import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from mtpress.builtin import BUILTIN_MODEL
from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.errors import InputError
from mtpress.models.qwen3_5.names import FUSED
from mtpress.plan import budget as format_choice
from mtpress.plan.budget import Choices, choice_record, choices, choose, choose_formats, chosen_recipe
from mtpress.plan.plan import make_plan
from mtpress.plan.recipe import Recipe, load_recipe, parse_recipe, shipped

LEAST, MOST = 6_119_288, 9_887_408  # of mtpress-tiny; BF16 is its own size


def recipe(size: int | str = 6_600_000, **more: Any) -> Recipe:
    return parse_recipe({"name": "mine", "summary": "x", "budget": {"bytes": size, **more}}, "here")


@pytest.fixture(scope="module")
def source() -> Checkpoint:
    return Checkpoint.open(BUILTIN_MODEL)


@pytest.fixture(scope="module")
def found(source: Checkpoint) -> Choices:
    return choices(source, recipe())


def instance(draw: random.Random, unit: int = 1) -> tuple[list[dict[str, int]], list[dict[str, float]]]:
    sizes, errors = [], []
    for _ in range(draw.randint(1, 6)):
        low, weight = draw.randint(1, 40) * unit, draw.choice((0.0, 1e-4, 1.0, 3.0))
        sizes.append({"a": low, "b": low + draw.randint(0, 30) * unit, "c": low + draw.randint(0, 90) * unit})
        errors.append({"a": weight * draw.random(), "b": weight * draw.random() / 4, "c": 0.0})
    return sizes, errors


def total(values: Sequence[Mapping[str, Any]], chosen: Sequence[str]) -> Any:
    return sum(value[name] for value, name in zip(values, chosen, strict=True))


def best(sizes: Sequence[Mapping[str, int]], errors: Sequence[Mapping[str, float]], budget: int) -> float:
    """By trying all."""
    every = itertools.product("abc", repeat=len(sizes))
    return min(total(errors, chosen) for chosen in every if total(sizes, chosen) <= budget)


@pytest.mark.parametrize("seed", range(40))
def test_no_choice_within_the_budget_is_better(seed: int) -> None:
    draw = random.Random(seed)
    sizes, errors = instance(draw, unit=draw.choice((1, 7, 4096)))
    least, most = (sum(of(size.values()) for size in sizes) for of in (min, max))
    last = float("inf")
    for budget in sorted({least, most, most + 5, *(draw.randint(least, most) for _ in range(6))}):
        chosen = choose(sizes, errors, budget)
        assert total(sizes, chosen) <= budget
        assert total(errors, chosen) == pytest.approx(best(sizes, errors, budget), rel=1e-12, abs=1e-15)
        assert total(errors, chosen) <= last * (1 + 1e-12)  # more bytes are never worse
        last = total(errors, chosen)
        assert chosen == choose(sizes, errors, budget)


@pytest.mark.parametrize("seed", range(20))
def test_in_coarse_steps_it_is_as_good_as_a_budget_a_step_a_linear_smaller(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(format_choice, "MAX_STEPS", 40)
    draw = random.Random(seed)
    sizes, errors = instance(draw)
    least, most = (sum(of(size.values()) for size in sizes) for of in (min, max))
    budget = (least + most) // 2
    chosen = choose(sizes, errors, budget)
    step = -(-(budget - least) // 40)
    assert total(sizes, chosen) <= budget
    assert total(errors, chosen) <= best(sizes, errors, max(least, budget - step * len(sizes))) * (1 + 1e-12)


def test_of_equal_errors_the_smaller_output_is_taken() -> None:
    assert choose([{"a": 1, "b": 2}] * 3, [{"a": 0.5, "b": 0.5}] * 3, 6) == ["a"] * 3


def test_the_size_of_the_27b_is_chosen_exactly_and_soon() -> None:
    """256 fused linears with the shapes of Qwen3.6-27B: what the choices add has a divisor of which few enough make the whole range."""
    params = [(14336 * 5120, 5120 * 6144)] * 16 + [(16384 * 5120, 5120 * 6144)] * 48 + [(34816 * 5120, 17408 * 5120)] * 64
    sizes = [{"nvfp4": n * 9 // 16, "fp8": n, "bf16": 2 * n} for pair in params for n in pair]
    draw = random.Random(0)
    errors = [{"nvfp4": (e := draw.random()), "fp8": e / 10, "bf16": 0.0} for _ in sizes]
    budget = round(1.2 * sum(size["nvfp4"] for size in sizes))
    chosen = choose(sizes, errors, budget)
    assert 0.9999 * budget < total(sizes, chosen) <= budget
    assert set(chosen) == {"nvfp4", "fp8"} or set(chosen) == {"nvfp4", "fp8", "bf16"}


def even(found: Choices) -> list[dict[str, float]]:
    return [{"nvfp4": 1.0 + i / 100, "fp8": 0.1} for i in range(len(found.groups))]


def test_groups_are_what_vllm_loads_as_one_linear(found: Choices) -> None:
    names = {
        "self_attn.qkv_proj",
        "self_attn.o_proj",
        "linear_attn.in_proj_qkvz",
        "linear_attn.out_proj",
        "mlp.gate_up_proj",
        "mlp.down_proj",
    }
    assert {group.linear for group in found.groups} == names and len(found.groups) == 16
    for group in found.groups:
        parts = FUSED.get(group.linear, (group.linear,))
        assert group.modules == tuple(f"model.language_model.layers.{group.layer}.{part}" for part in parts)


@pytest.mark.parametrize("size", [LEAST, LEAST + 40_000, 6_600_000, 7_262_648, 8_000_000, MOST - 1])
def test_the_plan_has_the_bytes_that_were_chosen_and_fused_linears_whole(source: Checkpoint, size: int) -> None:
    found = choices(source, recipe(size))
    formats = choose_formats(found, even(found))
    chosen = chosen_recipe(found, formats)
    plan = make_plan(source, chosen)  # which refuses a fused linear of two formats
    assert plan.output_bytes == choice_record(found, formats, even(found))["chosen_bytes"] <= size
    for group, name in zip(found.groups, formats, strict=True):
        assert {plan.formats.get(module, "bf16") for module in group.modules} == {name}
    assert Recipe.model_validate_json(json.dumps(chosen.canonical())) == chosen and chosen.budget is None


def test_the_ends_of_the_range(source: Checkpoint) -> None:
    found = choices(source, recipe(LEAST))
    assert (found.least_bytes, found.most_bytes) == (LEAST, MOST) == (found.least.output_bytes, source.num_bytes)
    assert set(choose_formats(found, even(found))) == {"nvfp4"}
    found = choices(source, recipe(MOST + 1, candidates=["nvfp4", "fp8"]))
    assert set(choose_formats(found, even(found))) == {"fp8"}
    found = choices(source, recipe(MOST - 1))
    assert sorted(set(choose_formats(found, even(found)))) == ["bf16", "fp8"]


def test_a_component_that_is_bf16_throughout(source: Checkpoint) -> None:
    found = choices(source, recipe(9_000_000))
    formats = ["bf16" if group.component == "attention" else "nvfp4" for group in found.groups]
    chosen = chosen_recipe(found, formats)
    assert chosen.quantize == ("gdn", "mlp") and not chosen.overrides
    assert not any("self_attn" in module for module in make_plan(source, chosen).formats)


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (LEAST - 1, ["too small", str(LEAST), str(MOST)]),
        (MOST, ["nothing is to be quantized", str(LEAST), str(MOST)]),
    ],
)
def test_budgets_out_of_reach_are_refused_with_what_can_be_reached(source: Checkpoint, size: int, words: list[str]) -> None:
    with pytest.raises(InputError) as refused:
        choices(source, recipe(size))
    assert all(word in str(refused.value) for word in words) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("said", "size"), [("21.9 GB", 21_900_000_000), ("20.4GiB", 21_904_333_210), ("21.9e9", 21_900_000_000), (2.5e9, 2_500_000_000), (7, 7)]
)
def test_sizes_have_the_units_of_disks(said: Any, size: int) -> None:
    budget = recipe(said).budget
    assert budget is not None and budget.bytes == size


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"formats": {"mlp": "nvfp4"}}, "leave `format`, `formats` and `overrides` out"),
        ({"overrides": {"layers.0": "bf16"}}, "leave `format`, `formats` and `overrides` out"),
        ({"format": "nvfp4"}, "leave `format`, `formats` and `overrides` out"),
        ({"in_proj_ab": "nvfp4"}, "leave in_proj_ab out"),
        ({"constant_input_scale": 0.01}, "constant_input_scale needs none"),
        ({"quantize": []}, "names no component"),
        ({"rounding": "gptq"}, "'gptq' does not go with format mixed"),
        ({"gptq": {"scales": "max"}}, "gptq has settings of rounding gptq"),
        ({"budget": {"bytes": "large"}}, "'large' is no size"),
        ({"budget": {"bytes": 0}}, "budget.bytes"),
        ({"budget": {"bytes": 1, "candidates": ["nvfp4"]}}, "at least two formats"),
        ({"budget": {"bytes": 1, "candidates": ["nvfp4", "nvfp4_w4a16"]}}, "the same bytes"),
        ({"budget": {"bytes": 1, "candidates": ["int4", "fp8"]}}, "'int4' is not one of"),
        ({"budget": {"bytes": 1, "size": 1}}, "Valid: bytes, candidates"),
    ],
)
def test_what_does_not_go_with_a_budget(more: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as refused:
        parse_recipe({"name": "mine", "summary": "x", "budget": {"bytes": "7 MB"}, **more}, "here")
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_recipes_of_before_say_nothing_of_a_budget_and_a_recipe_with_one_is_read_back() -> None:
    assert not any("budget" in load_recipe(name).canonical() for name in shipped())
    assert parse_recipe(recipe().canonical(), "a record") == recipe()
    assert recipe().needs_samples
