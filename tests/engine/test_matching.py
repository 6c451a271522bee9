"""mtpress.quant_config.matching against vLLM's own matchers: hundreds of configs of each format, every linear, target and draft."""

import json
import subprocess
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
from quantization_configs import configs, stored_as_gptq

from checkpoints import PREFIX, small_config
from mtpress.models.qwen3_5.engine import TEXT_ARCHITECTURE, VL_ARCHITECTURE, EngineLinear, layer_class, linears
from mtpress.quant_config.declaration import Declaration
from mtpress.quant_config.matching import Matcher, Scheme, matcher_of

pytestmark = pytest.mark.engine

SCRIPT = Path(__file__).with_name("ask_matcher.py")
FORMATS = ("nvfp4", "modelopt-mixed", "compressed-tensors", "fp8", "auto-round", "gptq")
BUILDS = [(VL_ARCHITECTURE, PREFIX), (TEXT_ARCHITECTURE, PREFIX), (TEXT_ARCHITECTURE, "model.")]
Linears = tuple[list[EngineLinear], list[EngineLinear]]


def both(architecture: str, prefix: str) -> Linears:
    """The linears of target and draft."""
    config = small_config()
    found = list(linears(config if architecture == VL_ARCHITECTURE else config["text_config"], architecture, prefix))
    return [linear for linear in found if linear.part != "draft"], [linear for linear in found if linear.part == "draft"]


def question(kind: str, architecture: str, prefix: str) -> dict[str, Any]:
    target, draft = both(architecture, prefix)
    names = list(dict.fromkeys(module for linear in (*target, *draft) for module in linear.modules))
    sides = {"target": target, "draft": draft}
    asked = {side: [[linear.prefix, layer_class(linear)] for linear in found] for side, found in sides.items()}
    return asked | {"architecture": architecture, "format": kind, "configs": configs(kind, names), "dtypes": stored_as_gptq(names)}


@pytest.fixture(scope="module")
def answers(engine_python: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    """(format, architecture, prefix) → what vLLM says to each config."""
    folder = tmp_path_factory.mktemp("matching")
    keys = [(kind, *build) for kind in FORMATS for build in BUILDS]
    (folder / "asked.json").write_text(json.dumps([question(*key) for key in keys]))
    command = [str(engine_python), str(SCRIPT), str(folder / "asked.json"), str(folder / "answered.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(zip(keys, json.loads((folder / "answered.json").read_text()), strict=True))


def ours(held: Matcher, found: list[EngineLinear], kind: str) -> dict[str, list[Any]]:
    said = {}
    for linear in found:
        scheme = held.scheme(linear)
        said[linear.prefix] = [held.verdict(linear), None if scheme is None or kind == "nvfp4" else told(scheme)]
    return said


def told(scheme: Scheme) -> list[Any]:
    """A scheme as ask_matcher.py has it: what is of FP8 alone, of FP8 alone."""
    whole = [list(value) if isinstance(value, tuple) else value for value in astuple(scheme)]
    return whole if scheme.kind == "fp8" else whole[:5]


def takes_the_draft_out(content: dict[str, Any]) -> bool:
    """vLLM decides this where it builds the draft, not in the matcher that is asked here; test_linears.py has it."""
    return any(key.startswith("-:") and "mtp" in key for key in content.get("dynamic", {}))


@pytest.mark.parametrize(("architecture", "prefix"), BUILDS)
@pytest.mark.parametrize("kind", FORMATS)
def test_every_verdict_is_that_of_vllm(kind: str, architecture: str, prefix: str, answers: dict[tuple[str, str, str], Any]) -> None:
    asked = question(kind, architecture, prefix)
    target, draft = both(architecture, prefix)
    seen = set()
    for content, answer in zip(asked["configs"], answers[kind, architecture, prefix], strict=True):
        held = matcher_of(Declaration("config.json", content), architecture, asked["dtypes"])
        assert held is not None
        assert ("error" in answer) == bool(held.malformed), (content, answer)
        if held.malformed:
            continue
        said = {"target": ours(held, target, kind), "draft": ours(held, draft, kind)}
        if takes_the_draft_out(content):
            for prefix_, verdict in said["draft"].items():
                if prefix_.startswith("mtp.layers."):
                    assert verdict == ["ignored", None]
                    answer["draft"][prefix_] = verdict
        assert said == answer, content
        seen |= {(side, verdict) for side in said for verdict, _ in said[side].values()}
    assert seen == {(side, verdict) for side in ("target", "draft") for verdict in ("ignored", "quantized", "split")}
