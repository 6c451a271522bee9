"""Checkpoints of the trained model in the real vLLM: each is asked the same questions once, and what came back is counted.

In: a name — BF16, a shipped recipe, or a checkpoint that was added. Out: answers, and how often drafts were accepted. The BF16
run is what everything is held against: test processes that run side by side share one. Leaves out: any judgement.
"""

import fcntl
import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fp8_cache import skip_if_declared
from questions import ANSWERS, PICTURES, STORIES, Question, picture_questions, text_questions

from mtpress.plan.recipe import load_recipe, shipped
from mtpress.stages.quantize import quantize

Probe = Callable[[Path, dict[str, Any], Path], dict[str, Any]]
BF16 = "bf16"
NUM_DRAFT_TOKENS = 3
NUM_CANDIDATES = 20  # as many as vLLM gives
MAX_TOKENS = 96
PROBE_TIMEOUT_SECONDS = 600  # a start takes 20 s of one core; this leaves room for a busy machine


def run_probe(engine_python: Path, checkpoint: Path, request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The result of mtpress.engine.plugins.probe; request and result stay in the folder, which image paths are relative to."""
    skip_if_declared(checkpoint)
    name = f"{checkpoint.name}-mtp{request.get('mtp', 0)}"
    asked, answered = folder / f"{name}.request.json", folder / f"{name}.result.json"
    asked.write_text(json.dumps(request), encoding="utf-8")
    command = [str(engine_python), "-m", "mtpress.engine.plugins.probe", str(checkpoint), str(asked), str(answered)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_TIMEOUT_SECONDS)
    assert done.returncode == 0, f"vLLM on {checkpoint}:\n{done.stderr[-4000:]}"
    return json.loads(answered.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Added:
    """A checkpoint that is no recipe's. tracked: vLLM refuses it if a tensor is missing; groups: the questions it is asked."""

    path: Path
    tracked: bool = True
    groups: tuple[str, ...] = (ANSWERS, STORIES)


@dataclass(repr=False)
class Runs:
    """Builds and vLLM runs, each made once when it is first asked for. `shared` is one folder for all test processes."""

    probe: Probe
    source: Path
    folder: Path
    shared: Path
    done: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)
    added: dict[str, Added] = field(default_factory=dict)
    questions: list[Question] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.questions = [*text_questions(), *picture_questions(self.folder)]

    def build(self, name: str) -> Path:
        if name == BF16:
            return self.source
        if name in self.added:
            return self.added[name].path
        out = self.folder / name
        if not out.exists():
            quantize(self.source, out, name, calibration=["builtin"], device="cpu", silent=True)
        return out

    def text_only(self, name: str) -> bool:
        return name in shipped() and load_recipe(name).vision != "keep"

    def asked(self, name: str) -> list[Question]:
        """The questions a build is asked: no pictures where the tower is stripped."""
        if name in self.added:
            return [q for q in self.questions if q.group in self.added[name].groups]
        return [q for q in self.questions if q.group != PICTURES or not self.text_only(name)]

    def result(self, name: str, mtp: int) -> dict[str, Any]:
        if (name, mtp) not in self.done:
            self.done[name, mtp] = self._shared(name, mtp) if name == BF16 else self._probed(name, mtp)
        return self.done[name, mtp]

    def _shared(self, name: str, mtp: int) -> dict[str, Any]:
        """The result that another test process left, or one that is left for it."""
        kept = self.shared / f"{name}-mtp{mtp}.json"
        with kept.with_suffix(".flock").open("w") as flock:
            fcntl.flock(flock, fcntl.LOCK_EX)
            if not kept.exists():
                kept.write_text(json.dumps(self._probed(name, mtp)), encoding="utf-8")
        return json.loads(kept.read_text(encoding="utf-8"))

    def _probed(self, name: str, mtp: int) -> dict[str, Any]:
        request = {
            "prompts": [q.as_prompt() for q in self.asked(name)],
            "mtp": mtp,
            "max_tokens": MAX_TOKENS,
            "logprobs": NUM_CANDIDATES,
            "language_model_only": self.text_only(name),
            "enable_weights_track": name not in self.added or self.added[name].tracked,
            "engine": {"max_num_seqs": 16},
        }
        return self.probe(self.build(name), request, self.folder)

    def texts(self, name: str, group: str) -> list[str]:
        """Answers with the draft head at work, as users run it."""
        outputs = self.result(name, NUM_DRAFT_TOKENS)["outputs"]
        return [o["text"].strip() for q, o in zip(self.asked(name), outputs, strict=True) if q.group == group]

    def right(self, name: str, group: str) -> float:
        """The share of a group's questions answered word for word."""
        answers = [q.answer for q in self.asked(name) if q.group == group]
        pairs = zip(self.texts(name, group), answers, strict=True)
        return sum(text == answer for text, answer in pairs) / len(answers)

    def acceptance(self, name: str) -> list[float]:
        """Per draft position: accepted / drafts, over the text questions and stories."""
        metrics = self.result(name, NUM_DRAFT_TOKENS)["metrics"]
        counted = [metrics[group] for group in (ANSWERS, STORIES) if group in metrics]
        drafts = sum(counts["drafts"] for counts in counted)
        per_position = zip(*(counts["accepted_per_position"] for counts in counted), strict=True)
        return [sum(accepted) / drafts for accepted in per_position]

    def acceptance_rate(self, name: str) -> float:
        """Accepted / drafted tokens."""
        return sum(self.acceptance(name)) / NUM_DRAFT_TOKENS
