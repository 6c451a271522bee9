"""Runs under the engine's python: what vLLM's own log-probabilities of every token of the vocabulary are, at every prompt position.

    prompt_logprobs_on_cpu.py CHECKPOINT TOKENS.json OUT.safetensors

In: lists of token ids. Out: for prompt i, "i": float32 [T − 1, vocabulary], row t being of the token behind position t. No draft head is
loaded. The numbers are vLLM's; only the loop around them is here.
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "OMP_NUM_THREADS": "1",
}  # fmt: skip

import torch
from safetensors.torch import save_file
from vllm import LLM, SamplingParams


def main():
    checkpoint, tokens, out = sys.argv[1:]
    prompts = json.loads(Path(tokens).read_text())
    vocabulary = json.loads((Path(checkpoint) / "config.json").read_text())["text_config"]["vocab_size"]
    llm = LLM(
        model=checkpoint, enforce_eager=True, enable_prefix_caching=False, max_num_seqs=4, max_model_len=1024, max_logprobs=-1, seed=0,
    )  # fmt: skip
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=-1, flat_logprobs=True, detokenize=False)
    answers = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    found = {}
    for number, answer in enumerate(answers):
        flat = answer.prompt_logprobs
        table = torch.full((len(prompts[number]) - 1, vocabulary), float("nan"))
        for row in range(len(table)):  # the first position has none: nothing comes before it
            start, end = flat.start_indices[row + 1], flat.end_indices[row + 1]
            table[row, torch.tensor(flat.token_ids[start:end])] = torch.tensor(flat.logprobs[start:end])
        found[str(number)] = table
    save_file(found, out)


main()
