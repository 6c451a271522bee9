"""Expressions of strangers: Python's answers, and none that takes for ever."""

import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtpress.models.qwen3_5.engine import VL_ARCHITECTURE
from mtpress.quant_config.matching import expressions
from mtpress.quant_config.matching.auto_round import LayerConfig
from mtpress.quant_config.matching.compressed_tensors import ConfigGroups
from mtpress.quant_config.matching.expressions import is_endless, is_expression, matches
from mtpress.quant_config.matching.gptq import ModuleList

NAME = "language_model.model.layers.0.mlp.gate_up_proj"
ENDLESS = (
    r"(([a-z_.0-9])+)+!$",
    r"([^!]|[^!].|mlp)*!",
    r"(.*)*(.*)*(.*)*!",
    r"(?:(?:(?:.{0,100}){0,100}){0,100}){0,100}!",
    r"(.?){46}(.?){46}(.?){46}!",
    r"(?=((.+)+)!)x",
)


@pytest.fixture(autouse=True)
def anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(expressions, "MAX_SECONDS", 0.3)
    monkeypatch.setattr(expressions, "_spent", {})
    monkeypatch.setattr(expressions, "_endless", set())
    return iter([None])


@pytest.mark.parametrize("text", ENDLESS)
def test_one_that_does_not_end_matches_nothing_and_is_known(text: str) -> None:
    assert not matches(text, NAME)
    assert is_endless(text)
    assert not matches(text, "!")  # which it would match
    assert matches(".*gate_up_proj", NAME)
    assert not is_endless(".*gate_up_proj")


def test_many_of_them_cost_no_more_than_the_whole_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expressions, "MAX_ALL_SECONDS", 0.6)
    texts = [f"(([a-z_.0-9])+)+!{i}$" for i in range(100)]
    assert not any(matches(text, NAME) for text in texts)
    assert all(map(is_endless, texts))
    assert len(expressions._spent) <= 4


def test_in_another_thread_a_process_of_its_own_is_asked() -> None:
    found: list[Any] = []

    def ask() -> None:
        found.extend(matches(text, NAME) for text in (".*up_proj$", ".*mlp", r"(([a-z_.0-9])+)+!$", "x*y"))

    thread = threading.Thread(target=ask)
    expressions.MAX_SECONDS = 20.0 if not found else 0.3
    thread.start()
    thread.join()
    assert found == [True, True, False, False]


@given(
    st.sampled_from([".*", "mlp", r"\.", "[a-z]+", "(gate|up)", "^", "$", "?", "lan", "{2}"]).flatmap(
        lambda a: st.lists(st.just(a), max_size=3)
    ),
    st.booleans(),
)
def test_answers_are_pythons(parts: list[str], search: bool) -> None:
    text = "".join(parts)
    try:
        wanted = (re.search if search else re.match)(text, NAME) is not None
    except re.error:
        wanted = False
        assert not is_expression(text)
    assert matches(text, NAME, "search" if search else "match") is wanted


@pytest.mark.parametrize("text", ["(", "a" * 10 + "{9999999999999}", "(?P<a>x)(?P<a>y)", "[z-a]", "(" * 5000])
def test_what_is_none(text: str) -> None:
    assert not is_expression(text)
    assert not matches(text, NAME)


def test_every_format_hands_its_expressions_over() -> None:
    bad = ENDLESS[0]
    group = {"targets": [f"re:{bad}x"], "weights": {"num_bits": 4}}
    compressed = ConfigGroups({"ignore": [f"re:{bad}"], "config_groups": {"group_0": group}}, VL_ARCHITECTURE)
    assert compressed.expressions == (bad, f"{bad}x")
    assert LayerConfig({"bits": 4, "extra_config": {bad: {"bits": 16}}}, VL_ARCHITECTURE).expressions == (bad,)
    assert ModuleList({"bits": 4, "dynamic": {f"-:{bad}": {}}}, VL_ARCHITECTURE, {}).expressions == (bad,)
