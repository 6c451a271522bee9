"""lm-evaluation-harness, imported once and asked many times; engine/drivers/loop.py runs it under the python that has it.

It imports nothing but lm_eval. Requests:

    {"prepare": {tasks, include_path, limit}}      → {"tasks": [{name, output_type, num_docs}], "generating": names, "comparing": names}
                                                    or {"refused": reason}
    {"measure": {generating, comparing, include_path, limit, num_fewshot, url, authorization, model, tokenizer, max_length, streams,
    gen_kwargs, output}}
                                                    → {"scores", "samples", "subtasks"}; before it, news {"total": n} and {"done": 1}

scores   [{task, metric, filter, value, stderr, higher_is_better, num_fewshot, num_docs, version, is_group}]; stderr null where lm_eval
         has none
samples  task → "metric,filter" → [[doc_id, value]], of metrics that are one number a document
subtasks group → names of its tasks

Tasks that generate go to /v1/chat/completions, few-shot examples as turns, and the server's own template; those that compare
likelihoods go to /v1/completions as token ids, without a template, as they are published. A group of both kinds is asked task by task.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

REQUEST_SECONDS = 7200
MAX_RETRIES = 3
NUM_NEAR = 3
GENERATES = "generate_until"


def load() -> tuple[str, Callable[[dict[str, Any], Callable[[Any], None]], dict[str, Any]]]:
    """lm_eval's version, and what answers a request."""
    from importlib.metadata import version

    import aiohttp  # noqa: F401  # of lm_eval's extra "api", without which its models fail late
    import tenacity  # noqa: F401
    from lm_eval import simple_evaluate  # noqa: F401

    def answer(request: dict[str, Any], say: Callable[[Any], None]) -> dict[str, Any]:
        return prepare(**request["prepare"]) if "prepare" in request else measure(say=say, **request["measure"])

    return version("lm_eval"), answer


def prepare(tasks: list[str], include_path: str | None, limit: int | None) -> dict[str, Any]:
    """What the names stand for, their data sets fetched."""
    manager = task_manager(include_path)
    found: dict[str, dict[str, Any]] = {}
    generating: dict[str, None] = {}
    comparing: dict[str, None] = {}
    for name in tasks:
        if name not in manager.all_tasks:
            return {"refused": f"{name}: no task, group or tag of lm-eval{nearest(name, manager.all_tasks)}"}
        try:
            loaded = manager.load([name])["tasks"]
        except Exception as error:
            return {"refused": f"{name}: lm-eval cannot load it: {' '.join(f'{type(error).__name__}: {error}'.split())[:400]}"}
        for leaf, task in loaded.items():
            if getattr(task, "UNSAFE_CODE", False):
                return {"refused": f"{leaf}: it runs code that the model writes; run lm-eval itself where that is safe"}
            count = len(list(task.eval_docs))
            kind = str(task.get_config("output_type") or task.OUTPUT_TYPE)
            found[leaf] = {"name": leaf, "output_type": kind, "num_docs": min(count, limit or count)}
        generates = {leaf: found[leaf]["output_type"] == GENERATES for leaf in loaded}
        for asked in [name] if len(set(generates.values())) == 1 else generates:
            (generating if generates.get(asked, any(generates.values())) else comparing)[asked] = None
    return {"tasks": list(found.values()), "generating": list(generating), "comparing": list(comparing)}


def task_manager(include_path: str | None) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


def nearest(name: str, known: Iterable[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, list(known), n=NUM_NEAR)
    return f"; did you mean {' or '.join(near)}?" if near else "; `lm_eval ls tasks` lists them, --include-path adds your own"


def measure(
    say: Callable[[Any], None],
    generating: list[str],
    comparing: list[str],
    include_path: str | None,
    limit: int | None,
    num_fewshot: int | None,
    url: str,
    authorization: str | None,
    model: str,
    tokenizer: str | None,
    max_length: int,
    streams: int,
    gen_kwargs: dict[str, Any],
    output: str | None,
) -> dict[str, Any]:
    """Asks the server at `url` all of it. output: a file for lm-eval's own results, the samples among them."""
    from lm_eval import simple_evaluate
    from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

    manager = task_manager(include_path)
    headers = {"header": {"Authorization": authorization}} if authorization else {}
    shared = {
        "model": model,
        **headers,
        "num_concurrent": streams,
        "max_retries": MAX_RETRIES,
        "timeout": REQUEST_SECONDS,
        "max_length": max_length,
    }
    results: list[dict[str, Any]] = []
    if generating:
        chat = told(LocalChatCompletion, say)(base_url=f"{url}/v1/chat/completions", eos_string="<|im_end|>", **shared)
        results.append(
            simple_evaluate(
                chat, tasks=generating, task_manager=manager, limit=limit, num_fewshot=num_fewshot, gen_kwargs=gen_kwargs,
                apply_chat_template=True, fewshot_as_multiturn=True,
            )
        )  # fmt: skip
    if comparing:
        backend = {"tokenizer": tokenizer, "tokenizer_backend": "huggingface"} if tokenizer else {}
        plain = told(LocalCompletionsAPI, say)(base_url=f"{url}/v1/completions", **backend, **shared)
        results.append(simple_evaluate(plain, tasks=comparing, task_manager=manager, limit=limit, num_fewshot=num_fewshot))
    if output is not None:
        Path(output).write_text(json.dumps(results, default=str, ensure_ascii=False) + "\n", encoding="utf-8")
    return {
        "scores": [score for result in results for score in scores(result)],
        "samples": {task: sampled(kept) for result in results for task, kept in result["samples"].items()},
        "subtasks": {group: list(names) for result in results for group, names in result.get("group_subtasks", {}).items() if names},
    }


def told(model: Any, say: Callable[[Any], None]) -> Any:
    """The model class, saying how many requests there are and each one that is answered."""

    class Told(model):  # type: ignore[misc]
        def generate_until(self, requests: Any, **more: Any) -> Any:
            say({"total": len(requests)})
            return super().generate_until(requests, **more)

        def _loglikelihood_tokens(self, requests: Any, **more: Any) -> Any:
            say({"total": len(requests)})
            return super()._loglikelihood_tokens(requests, **more)

        def model_call(self, *given: Any, **more: Any) -> Any:
            answered = super().model_call(*given, **more)
            say({"done": 1})
            return answered

        async def amodel_call(self, *given: Any, **more: Any) -> Any:
            answered = await super().amodel_call(*given, **more)
            say({"done": 1})
            return answered

    return Told


def scores(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Every metric of every task and group, with its standard error."""
    found = []
    groups = result.get("groups") or {}
    for task, metrics in {**result["results"], **groups}.items():
        for key, value in metrics.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = metrics.get(f"{metric}_stderr,{chosen}")
            found.append(
                {
                    "task": task, "metric": metric, "filter": chosen, "value": float(value),
                    "stderr": float(stderr) if isinstance(stderr, int | float) else None,
                    "higher_is_better": (result.get("higher_is_better", {}).get(task) or {}).get(metric),
                    "num_fewshot": result.get("n-shot", {}).get(task), "version": result.get("versions", {}).get(task),
                    "num_docs": result.get("n-samples", {}).get(task, {}).get("effective"), "is_group": task in groups,
                }
            )  # fmt: skip
    return found


def sampled(kept: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Of the metrics that are one number a document, that number."""
    found: dict[str, list[tuple[int, float]]] = {}
    for sample in kept:
        for metric in sample.get("metrics", []):
            value = sample.get(metric)
            if isinstance(value, int | float):
                found.setdefault(f"{metric},{sample.get('filter', 'none')}", []).append((int(sample["doc_id"]), float(value)))
    return found
