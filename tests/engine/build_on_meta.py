"""Runs under the engine's python: builds vLLM's own target and draft models without weights, so that vLLM itself decides for
every linear, by its name, whether a checkpoint's config quantizes it.

    build_on_meta.py OUT.json CHECKPOINT… [--language-model-only CHECKPOINT…]

Out: for each checkpoint {"target": {prefix: [layer class, method class]}, "draft": {…}, "exclude": modelopt's ignore list as
vLLM's name map leaves it}, or {"error": …} where vLLM refuses the list.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"}

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.plugins import load_general_plugins


def methods(model):
    return {
        getattr(module, "prefix", "") or name: [type(module).__name__, type(module.quant_method).__name__]
        for name, module in model.named_modules()
        if isinstance(module, (LinearBase, VocabParallelEmbedding))
    }


def build(checkpoint, language_model_only, rendezvous):
    config = EngineArgs(
        model=checkpoint,
        max_model_len=256,
        enforce_eager=True,
        enable_prefix_caching=False,
        language_model_only=language_model_only,
        speculative_config={"method": "mtp", "num_speculative_tokens": 3},
    ).create_engine_config()
    with set_current_vllm_config(config):
        if not torch.distributed.is_initialized():
            init_distributed_environment(1, 0, f"file://{rendezvous}", 0, "gloo")
            initialize_model_parallel()
        with torch.device("meta"):
            try:
                target = initialize_model(config)
                exclude = list(getattr(config.quant_config, "exclude_modules", []))
                draft = initialize_model(config, model_config=config.speculative_config.draft_model_config)
            except ValueError as error:
                return {"error": str(error)}
    return {"target": methods(target), "draft": methods(draft), "exclude": exclude}


def main():
    out, *names = sys.argv[1:]
    language_model_only, found = False, []
    load_general_plugins()
    torch.set_default_dtype(torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            if name == "--language-model-only":
                language_model_only = True
            else:
                found.append(build(name, language_model_only, f"{folder}/rendezvous"))
    Path(out).write_text(json.dumps(found, indent=1), encoding="utf-8")


main()
