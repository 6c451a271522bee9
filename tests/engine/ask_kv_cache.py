"""Runs under the engine's python: asks vLLM, for each of several launches, what it makes of its KV cache.

    python ask_kv_cache.py LAUNCHES.json ANSWERS.json

LAUNCHES.json: a list of {"model": directory, …} whose other keys are arguments of vllm.LLM. ANSWERS.json: for each, the figures of
the two lines that vLLM logs ("KV cache size", "Maximum concurrency"), its blocks and its block size. All launches run in this one
process, whose imports take longer than a start of a small model.
"""

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", OMP_NUM_THREADS="1")


def ask(launch: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(**launch, enforce_eager=True, disable_log_stats=True, seed=0)
    cache = llm.llm_engine.vllm_config.cache_config
    answer = {
        "num_tokens": cache.kv_cache_size_tokens,
        "max_concurrency": cache.kv_cache_max_concurrency,
        "num_blocks": cache.num_gpu_blocks,
        "block_size": cache.block_size,
    }
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return answer


def main() -> None:
    launches = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(sys.argv[2]).write_text(json.dumps([ask(launch) for launch in launches]), encoding="utf-8")


if __name__ == "__main__":
    main()
