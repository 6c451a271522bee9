"""`mtpress eval --tasks`: the real lm-evaluation-harness asks the real vLLM, on tasks of the built-in model's own arithmetic."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoTokenizer, Qwen3_5ForConditionalGeneration

from mtpress.cli import main
from real_exports import peer_python

pytestmark = pytest.mark.engine
NUM_QUESTIONS = 40
REFERENCED = 5  # questions whose likelihoods are computed here too
LIKELIHOOD = 0.15  # nats: BF16 logits between 8 and 16 are 1/16 apart


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with two tasks and their group: sums to be said, and sums to be chosen."""
    folder = tmp_path_factory.mktemp("tasks")
    drawn = random.Random(5)
    with (folder / "sums.jsonl").open("w") as file:
        for _ in range(NUM_QUESTIONS):
            a, b, place = drawn.randint(10, 99), drawn.randint(10, 99), drawn.randrange(3)
            choices = [a + b + off for off in drawn.sample([-20, -10, -2, -1, 1, 2, 10, 20], 2)]
            choices.insert(place, a + b)
            file.write(json.dumps({"a": a, "b": b, "sum": a + b, "choices": [str(c) for c in choices], "place": place}) + "\n")
    shared = {
        "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "sums.jsonl")}}, "test_split": "test",
        "metadata": {"version": 1.0},
    }  # fmt: skip
    said = shared | {
        "task": "sums_said", "output_type": "generate_until", "doc_to_text": "What is {{a}} + {{b}}?", "doc_to_target": "{{sum}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 24},
        "filter_list": [
            {"name": "result", "filter": [{"function": "regex", "regex_pattern": r"= (\d+)"}, {"function": "take_first"}]}
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    chosen = shared | {
        "task": "sums_chosen", "output_type": "multiple_choice", "doc_to_text": "{{a}} + {{b}} =", "doc_to_choice": "{{choices}}",
        "doc_to_target": "place", "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    for task in (said, chosen, {"group": "sums", "task": ["sums_said", "sums_chosen"]}):
        (folder / f"{task.get('task') if 'group' not in task else 'group'}.yaml").write_text(yaml.safe_dump(task))
    return folder


@pytest.fixture(scope="module")
def harness() -> Path:
    """The python of .envs/lmeval."""
    return peer_python("lmeval")


@pytest.fixture(scope="module")
def asked(
    engine_python: Path, harness: Path, bf16_model: Path, tasks: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The result of the command, and lm-eval's own: of what generates, of what compares."""
    folder = tmp_path_factory.mktemp("asked")
    with pytest.MonkeyPatch.context() as patch, pytest.MonkeyPatch.context() as output:
        patch.setenv("OMP_NUM_THREADS", "1")
        printed: list[str] = []
        output.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
        code = main(
            ["eval", str(bf16_model), "--tasks", "sums", "--include-path", str(tasks), "--engine", str(engine_python), "--lm-eval",
             str(harness), "--lm-eval-results", str(folder / "own"), "--markdown", str(folder / "tasks.md"), "--json"]
        )  # fmt: skip
    assert code == 0
    result = json.loads(printed[-1])
    assert "| sums_said | exact_match, result | 40 |" in (folder / "tasks.md").read_text()
    return result, json.loads((folder / "own" / f"{bf16_model.name}.json").read_text())


def score(result: dict[str, Any], task: str) -> dict[str, Any]:
    (model,) = result["checkpoints"].values()
    (found,) = [score for score in model["scores"] if score["task"] == task]
    return dict(found)


def test_what_is_said_is_the_models_answer(asked: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    """Each answer is read here too; thoughts, a wrong template or a cut answer would not look like these."""
    result, (said, _) = asked
    samples = said["samples"]["sums_said"]
    answers = [sample["resps"][0][0] for sample in samples]
    right = 0
    for sample, answer in zip(samples, answers, strict=True):
        a, b = sample["doc"]["a"], sample["doc"]["b"]
        assert answer.startswith(f"{a} + {b} = "), answer
        right += answer == f"{a} + {b} = {a + b}."
    found = score(result, "sums_said")
    assert found["num_docs"] == len(samples) == NUM_QUESTIONS
    assert found["value"] == pytest.approx(right / NUM_QUESTIONS)
    assert found["value"] > 0.6  # the model was trained on sums
    share = found["value"]
    assert found["stderr"] == pytest.approx((share * (1 - share) / (NUM_QUESTIONS - 1)) ** 0.5)


def test_likelihoods_are_those_of_transformers(asked: tuple[dict[str, Any], list[dict[str, Any]]], bf16_model: Path) -> None:
    result, (_, chosen) = asked
    model = Qwen3_5ForConditionalGeneration.from_pretrained(bf16_model, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(bf16_model)
    samples = chosen["samples"]["sums_chosen"]
    for sample in samples[:REFERENCED]:
        for (context, continuation), ((found, _),) in zip(sample["arguments"], sample["resps"], strict=True):
            prompt = tokenizer(context).input_ids
            whole = tokenizer(context + continuation).input_ids
            assert whole[: len(prompt)] == prompt
            with torch.inference_mode():
                logits = model(torch.tensor([whole])).logits[0].float().log_softmax(-1)
            expected = sum(float(logits[i - 1, whole[i]]) for i in range(len(prompt), len(whole)))
            assert found == pytest.approx(expected, abs=LIKELIHOOD * (len(whole) - len(prompt)))
    assert score(result, "sums_chosen")["value"] > 0.8


def test_a_name_that_is_no_task_starts_nothing(
    engine_python: Path, harness: Path, bf16_model: Path, tasks: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["--include-path", str(tasks), "--engine", str(engine_python), "--lm-eval", str(harness)]
    assert main(["eval", str(bf16_model), "--tasks", "sums_sayd", *options]) == 2
    assert "sums_sayd: no task, group or tag of lm-eval; did you mean sums_said" in capfd.readouterr().err
