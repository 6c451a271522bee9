"""mtpress-tiny is what its card says: small, whole, trained. The figures themselves are tiny/evaluate.py's."""

from pathlib import Path

import pytest

from evaluate import PROMISES, evaluate
from mtpress.builtin import BUILTIN_MODEL
from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.models.qwen3_5.names import COMPONENTS, MTP_TENSORS, component, layer_types

MAX_BYTES = 16_000_000


@pytest.fixture(scope="module")
def judged() -> dict:
    """The judging script on a third of its material."""
    return evaluate(BUILTIN_MODEL, share=1 / 3)


def test_it_has_every_component_of_the_real_model() -> None:
    checkpoint = Checkpoint.open(BUILTIN_MODEL)
    assert {component(name) for name in checkpoint.tensors} == set(COMPONENTS)
    assert layer_types(checkpoint.config) == ["linear_attention"] * 3 + ["full_attention"]
    assert set(MTP_TENSORS) <= set(checkpoint.tensors)
    assert {info.dtype for info in checkpoint.tensors.values()} == {"BF16"}
    assert checkpoint.config["tie_word_embeddings"] is False
    for name in (
        "tokenizer.json",
        "chat_template.jinja",
        "generation_config.json",
        "preprocessor_config.json",
        "video_preprocessor_config.json",
    ):
        assert (BUILTIN_MODEL / name).is_file()
    template = Path(__file__).parents[2] / "src/mtpress/chat/qwen3_5.jinja"
    assert (BUILTIN_MODEL / "chat_template.jinja").read_text() == template.read_text()


def test_it_is_small() -> None:
    assert sum(file.stat().st_size for file in BUILTIN_MODEL.iterdir()) <= MAX_BYTES


@pytest.mark.parametrize("promise", list(PROMISES))
def test_it_keeps_its_promises(promise: str, judged: dict) -> None:
    low, high = PROMISES[promise]
    slack = 0.1 if promise == "sums_right" else 0.0  # three standard errors of 67 sums stay inside
    assert low - slack <= judged[promise] <= high + slack


def test_drafts_do_not_change_its_text(judged: dict) -> None:
    assert judged["same_text_with_and_without_drafts"]
