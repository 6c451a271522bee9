"""Runs under the engine's python: asks vLLM's own matcher about many ignore lists.

    ask_matcher.py ASKED.json ANSWERED.json

In: {"architecture": class name, "lists": [[entry, …], …], "target": [prefix, …], "draft": [prefix, …]}. Out: for each list
{"target": {prefix: "ignored" | "quantized" | "split"}, "draft": {…}}. One config object goes through target and draft, as
it does when vLLM loads a checkpoint with its draft head.
"""

import json
import sys
from pathlib import Path

from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config
from vllm.model_executor.model_loader.utils import configure_quant_config
from vllm.model_executor.models import qwen3_5
from vllm.model_executor.models.qwen3_5_mtp import Qwen3_5MTP


def verdicts(config, prefixes):
    found = {}
    for prefix in prefixes:
        try:
            found[prefix] = "ignored" if config.is_layer_excluded(prefix) else "quantized"
        except ValueError as error:
            assert "some but not all shards" in str(error)
            found[prefix] = "split"
    return found


def main():
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    answers = []
    for entries in asked["lists"]:
        config = ModelOptNvFp4Config.from_config({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": entries})
        configure_quant_config(config, getattr(qwen3_5, asked["architecture"]))
        target = verdicts(config, asked["target"])
        configure_quant_config(config, Qwen3_5MTP)
        answers.append({"target": target, "draft": verdicts(config, asked["draft"])})
    Path(sys.argv[2]).write_text(json.dumps(answers), encoding="utf-8")


main()
