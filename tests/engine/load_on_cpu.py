"""Runs under the engine's python: lets vLLM load checkpoints, target and draft, without starting an engine.

    load_on_cpu.py OUT.json [--track] CHECKPOINT…

Out: for each checkpoint {"target": null or the error, "draft": null or the error}; where the target fails, the draft is not
tried. Missing tensors are refused only if vLLM itself refuses them or, with --track, by its enable_weights_track.
"""

import gc
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model
from vllm.plugins import load_general_plugins
from vllm.v1.worker.cpu_model_runner import _set_torch_accelerator_to_noop


def load(checkpoint, rendezvous, track):
    found = {"target": None, "draft": None}
    part = "target"
    try:
        config = EngineArgs(
            model=checkpoint,
            max_model_len=256,
            enforce_eager=True,
            enable_prefix_caching=False,
            model_loader_extra_config={"enable_weights_track": True} if track else {},
            speculative_config={"method": "mtp", "num_speculative_tokens": 2},
        ).create_engine_config()
        with set_current_vllm_config(config):
            if not torch.distributed.is_initialized():
                init_distributed_environment(1, 0, f"file://{rendezvous}", 0, "gloo")
                initialize_model_parallel()
            get_model(vllm_config=config)
            part = "draft"
            get_model(vllm_config=config, model_config=config.speculative_config.draft_model_config)
    except Exception as error:  # every refusal of the engine is an answer
        found[part] = f"{type(error).__name__}: {str(error)[:300]}"
    return found


def main():
    out, *names = (argument for argument in sys.argv[1:] if argument != "--track")
    load_general_plugins()
    _set_torch_accelerator_to_noop()  # as the CPU worker does before it loads a model
    torch.set_default_dtype(torch.bfloat16)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            found.append(load(name, f"{folder}/rendezvous", "--track" in sys.argv))
            gc.collect()
    Path(out).write_text(json.dumps(found, indent=1), encoding="utf-8")


main()
