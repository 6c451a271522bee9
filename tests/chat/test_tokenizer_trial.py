"""Tokenizers of strangers: one that does harm does it in a process of its own."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mtpress.bench.prompt_mix import load_prompts
from mtpress.builtin import BUILTIN_DIR
from mtpress.chat import tokenizer_trial
from mtpress.chat.encoder import ChatEncoder
from mtpress.chat.tokenizer_trial import refuse_hostile
from mtpress.errors import InputError

TINY = BUILTIN_DIR / "mtpress-tiny"


@pytest.fixture
def spoiled(tmp_path: Path) -> Callable[..., Path]:
    def make(**changes: Any) -> Path:
        folder = shutil.copytree(TINY, tmp_path / "c", ignore=shutil.ignore_patterns("*.safetensors"))
        content = json.loads((folder / "tokenizer.json").read_text()) | changes
        (folder / "tokenizer.json").write_text(json.dumps(content))
        return folder

    return make


def replacing(pattern: Any, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


DOUBLING = {"type": "Sequence", "normalizers": [replacing({"String": "a"}, "aa")] * 40}
HARMFUL = {
    "doubling": {"normalizer": DOUBLING},
    "rare letter": {"normalizer": {"type": "Sequence", "normalizers": [replacing({"String": "ẞ"}, "ẞẞ")] * 40}},
    "growing": {"normalizer": replacing({"String": "a"}, "xyz" * 100_000)},
    "precompiled": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAAgA=="}},
    "expression": {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a|aa)+$(?<=b)"}, "behavior": "Isolated", "invert": False}},
}


@pytest.mark.parametrize("how", HARMFUL)
def test_harm_is_one_line(how: str, spoiled: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_trial, "MAX_SECONDS", 2.0)
    folder = spoiled(**HARMFUL[how])
    with pytest.raises(InputError, match="its tokenizer does not load") as raised:
        ChatEncoder(folder) if how != "growing" else load_prompts("mix").longest_tokens(folder / "tokenizer.json")
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500


@pytest.mark.parametrize("name", ["tokenizer.json", "merges.txt", "vocab.json"])
def test_giants_and_pipes(name: str, spoiled: Callable[..., Path]) -> None:
    folder = spoiled()
    (folder / name).unlink(missing_ok=True)
    with (folder / name).open("wb") as file:
        file.truncate(8_000_000_000)
    with pytest.raises(InputError, match=r"8,000 MB, over"):
        ChatEncoder(folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(InputError, match="it is not a file"):
        ChatEncoder(folder)


def test_a_sound_one_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_hostile(TINY)
    monkeypatch.setattr(tokenizer_trial, "_process", None)
    refuse_hostile(TINY)
