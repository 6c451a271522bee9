"""Loads a checkpoint in the real vLLM, generates, and writes down what happened.

    python -m mtpress.engine.plugins.probe CHECKPOINT REQUEST.json RESULT.json

In: a checkpoint directory and a request. Out: a result. Leaves out: any judgement of it. It runs under the engine's own
python and imports nothing but vLLM. The request:

    prompts               each with one of
                            token_ids   [int, …]
                            text        str, tokenized as it stands
                            messages    chat messages; a content part may be {"type": "image", "path": "file.png"}
                          and, optionally, "group": str. The prompts of a group go in as one batch, group after group
    max_tokens            16
    mtp                   number of speculative tokens; 0 is off
    language_model_only   false
    enable_weights_track  true: a checkpoint that lacks tensors is refused
    kv_cache_dtype        "auto"
    max_model_len         512
    logprobs              0: how many candidates are given for each generated token
    prompt_logprobs       false: give the log-probability of each prompt token
    sampling              {}: further SamplingParams; greedy unless it says otherwise
    engine                {}: further arguments of vllm.LLM
    chat                  {}: further arguments of LLM.chat

Image paths are relative to the request file. The result:

    outputs   per prompt: prompt_token_ids, token_ids, text, finish_reason; with logprobs, per generated token a map from
              token id (a string) to log-probability; with prompt_logprobs, one number a prompt token (the first is null)
    metrics   per group: drafts, draft_tokens, accepted_tokens, accepted_per_position; null with mtp 0
    linears   target and draft: per linear, by the prefix that vLLM gives it, the class that computes it
    kv_cache  requested; resolved by vLLM from the checkpoint; by layer the dtypes of the tensors in use, and the scales of K and V
    engine    vllm's version, platform, load_seconds, generate_seconds

Exit status 0 means that a result was written. Otherwise the reason is on stderr and there is no result file.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DEFAULTS: dict[str, Any] = {
    "prompts": None, "max_tokens": 16, "mtp": 0, "language_model_only": False, "enable_weights_track": True,
    "kv_cache_dtype": "auto", "max_model_len": 512, "logprobs": 0, "prompt_logprobs": False,
    "sampling": {}, "engine": {}, "chat": {},
}  # fmt: skip
PROMPT_KINDS = ("token_ids", "text", "messages")

# Where the caller set nothing. One process and one thread: with three processes a start takes three times as long, and
# two OpenMP threads that spin on a busy machine are many times slower than one.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "OMP_NUM_THREADS": "1",
}


def read_request(path: Path) -> dict[str, Any]:
    """The request with its defaults filled in; SystemExit says what is wrong with it."""
    request = json.loads(path.read_text(encoding="utf-8"))
    if unknown := sorted(set(request) - set(DEFAULTS)):
        raise SystemExit(f"probe: {path}: unknown keys {', '.join(unknown)}; known: {', '.join(DEFAULTS)}")
    request = {**DEFAULTS, **request}
    if not request["prompts"]:
        raise SystemExit(f"probe: {path}: no prompts")
    for number, prompt in enumerate(request["prompts"]):
        if sum(kind in prompt for kind in PROMPT_KINDS) != 1:
            raise SystemExit(f"probe: {path}: prompt {number} must have one of {', '.join(PROMPT_KINDS)}")
    return request


def load_images(messages: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """The messages with each local image as LLM.chat takes it."""
    from PIL import Image

    def load(part: Any) -> Any:
        if not isinstance(part, dict) or part.get("type") != "image":
            return part
        with Image.open(folder / part["path"]) as image:
            return {"type": "image_pil", "image_pil": image.convert("RGB")}

    return [{**m, "content": [load(p) for p in m["content"]]} if isinstance(m["content"], list) else m for m in messages]


def start(checkpoint: Path, request: dict[str, Any]) -> Any:
    """The engine, up and loaded."""
    from vllm import LLM

    arguments: dict[str, Any] = {
        "model": str(checkpoint),
        "enforce_eager": True,
        "enable_prefix_caching": False,  # its align mode for hybrid models needs a Triton kernel
        "disable_log_stats": False,  # without it there are no metrics
        "max_num_seqs": 8,
        "seed": 0,
        "kv_cache_dtype": request["kv_cache_dtype"],
        "max_model_len": request["max_model_len"],
        "language_model_only": request["language_model_only"],
    }
    if request["enable_weights_track"]:
        arguments["model_loader_extra_config"] = {"enable_weights_track": True}
    if request["mtp"]:
        arguments["speculative_config"] = {"method": "mtp", "num_speculative_tokens": request["mtp"]}
    return LLM(**{**arguments, **request["engine"]})


def groups(request: dict[str, Any]) -> dict[str, list[int]]:
    """Prompt numbers by group, in the order in which the groups first appear."""
    found: dict[str, list[int]] = {}
    for number, prompt in enumerate(request["prompts"]):
        found.setdefault(prompt.get("group", "all"), []).append(number)
    return found


def generate(llm: Any, numbers: list[int], request: dict[str, Any], folder: Path) -> dict[int, dict[str, Any]]:
    """Runs the prompts of one group; outputs by prompt number."""
    from vllm import SamplingParams

    sampling: dict[str, Any] = {"temperature": 0.0, "max_tokens": request["max_tokens"]}
    if request["logprobs"]:
        sampling["logprobs"] = request["logprobs"]
    if request["prompt_logprobs"]:
        sampling["prompt_logprobs"] = 0  # 0: the prompt's own tokens only
    params = SamplingParams(**{**sampling, **request["sampling"]})
    plain: dict[int, Any] = {}
    chats: dict[int, Any] = {}
    for number in numbers:
        prompt = request["prompts"][number]
        if "token_ids" in prompt:
            plain[number] = {"prompt_token_ids": prompt["token_ids"]}
        elif "text" in prompt:
            plain[number] = {"prompt": prompt["text"]}
        else:
            chats[number] = load_images(prompt["messages"], folder)
    answers: dict[int, Any] = {}
    if plain:
        answers |= zip(plain, llm.generate(list(plain.values()), params, use_tqdm=False), strict=True)
    if chats:
        answers |= zip(chats, llm.chat(list(chats.values()), params, use_tqdm=False, **request["chat"]), strict=True)
    return {number: describe(answer) for number, answer in answers.items()}


def describe(answer: Any) -> dict[str, Any]:
    """One RequestOutput as plain data."""
    first = answer.outputs[0]
    output: dict[str, Any] = {
        "prompt_token_ids": list(answer.prompt_token_ids),
        "token_ids": list(first.token_ids),
        "text": first.text,
        "finish_reason": first.finish_reason,
    }
    if first.logprobs is not None:
        output["logprobs"] = [{str(token): entry.logprob for token, entry in at.items()} for at in first.logprobs]
    if answer.prompt_logprobs is not None:
        pairs = zip(answer.prompt_logprobs, answer.prompt_token_ids, strict=True)
        output["prompt_logprobs"] = [None if at is None else at[token].logprob for at, token in pairs]
    return output


def read_counters(llm: Any) -> dict[str, Any]:
    """The speculative decoding counters since the start."""
    found = {m.name: list(m.values) if hasattr(m, "values") else getattr(m, "value", None) for m in llm.get_metrics()}
    prefix = "vllm:spec_decode_num_"
    return {
        "drafts": found[prefix + "drafts"],
        "draft_tokens": found[prefix + "draft_tokens"],
        "accepted_tokens": found[prefix + "accepted_tokens"],
        "accepted_per_position": found[prefix + "accepted_tokens_per_pos"],
    }


def counted_since(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What the counters gained between two readings."""

    def gained(key: str) -> Any:
        if isinstance(after[key], list):
            return [b - a for a, b in zip(before[key] or [0] * len(after[key]), after[key], strict=True)]
        return after[key] - before[key]

    return {key: gained(key) for key in after}


def worker_linears(worker: Any) -> dict[str, dict[str, str]]:
    """Runs in the worker: the quantization method of every linear of the target and of the draft head."""

    def methods(model: Any) -> Iterator[tuple[str, str]]:
        for name, module in model.named_modules():
            method = getattr(module, "quant_method", None)
            if method is not None and hasattr(module, "weight"):
                yield getattr(module, "prefix", "") or name, type(method).__name__

    runner = worker.model_runner
    drafter = getattr(runner, "drafter", None)
    return {"target": dict(methods(runner.model)), "draft": dict(methods(drafter.model)) if drafter else {}}


def worker_kv_dtypes(worker: Any) -> dict[str, str]:
    """Runs in the worker: each attention layer's KV cache dtype, as allocated."""
    layers = worker.model_runner.compilation_config.static_forward_context
    return {
        name: str(layer.kv_cache.dtype).removeprefix("torch.")
        for name, layer in layers.items()
        if hasattr(layer, "kv_cache_dtype") and hasattr(layer.kv_cache, "dtype")
    }


def worker_kv_scales(worker: Any) -> dict[str, list[float]]:
    """Runs in the worker: by what each attention layer divides K and V before they go into its cache."""
    layers = worker.model_runner.compilation_config.static_forward_context
    return {name: [layer._k_scale_float, layer._v_scale_float] for name, layer in layers.items() if hasattr(layer, "_k_scale_float")}


def main() -> None:
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    checkpoint, request_path, result_path = map(Path, sys.argv[1:])
    request = read_request(request_path)
    result_path.unlink(missing_ok=True)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import vllm
    from vllm.platforms import current_platform

    began = time.monotonic()
    llm = start(checkpoint, request)
    loaded = time.monotonic()
    outputs: dict[int, dict[str, Any]] = {}
    metrics: dict[str, Any] = {}
    for group, numbers in groups(request).items():
        before = read_counters(llm) if request["mtp"] else {}
        outputs |= generate(llm, numbers, request, request_path.parent)
        if request["mtp"]:
            metrics[group] = counted_since(before, read_counters(llm))
    finished = time.monotonic()
    result = {
        "outputs": [outputs[number] for number in sorted(outputs)],
        "metrics": metrics or None,
        "linears": llm.collective_rpc(worker_linears)[0],
        "kv_cache": {
            "requested": request["kv_cache_dtype"],
            "resolved": str(llm.llm_engine.vllm_config.cache_config.cache_dtype),
            "tensors": llm.collective_rpc(worker_kv_dtypes)[0],
            "scales": llm.collective_rpc(worker_kv_scales)[0],
        },
        "engine": {
            "vllm": vllm.__version__,
            "platform": current_platform.device_type,
            "load_seconds": round(loaded - began, 2),
            "generate_seconds": round(finished - loaded, 2),
        },
    }
    partial = result_path.with_name(result_path.name + ".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    partial.replace(result_path)


if __name__ == "__main__":
    main()
