"""Judges mtpress-tiny on held-out material: perplexity against a bigram model, pictures, sums, draft acceptance.

    python tiny/evaluate.py src/mtpress/builtin/mtpress-tiny [--json FILE]

In: a checkpoint. Out: a table, and exit code 1 if a promise of the model card is not kept. Takes about 3 minutes on 2 cores.
"""

import argparse
import json
import math
import random
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from corpus import Document, documents, see, sum_answer, sum_pair, sum_question, user
from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.models.qwen3_5.generate import Generator
from render import DocumentEncoder, plain_text

NUM_TEXTS, NUM_PICTURES, NUM_SUMS, NUM_PROMPTS = 300, 100, 200, 60
NUM_BIGRAM_DOCUMENTS = 20_000
PROMISES = {
    "perplexity_to_bigram": (0.0, 0.5),
    "pictures_right": (0.90, 1.0),
    "sums_right": (0.40, 0.90),
    "acceptance_1": (0.70, 1.0),
    "acceptance_2": (0.50, 1.0),
    "acceptance_3": (0.35, 1.0),
}


def bigram_perplexity(encoder: DocumentEncoder, held_out: list[list[int]], vocab_size: int) -> float:
    """Perplexity of an interpolated bigram model of the same tokenizer, its weight chosen in its favor on the held-out text."""
    pairs: Counter[tuple[int, int]] = Counter()
    firsts: Counter[int] = Counter()
    singles: Counter[int] = Counter()
    for document in islice(documents("train"), NUM_BIGRAM_DOCUMENTS):
        ids = encoder.chat.encode_text(plain_text(document)).input_ids.tolist()
        pairs.update(pairwise(ids))
        firsts.update(ids[:-1])
        singles.update(ids)
    total = sum(singles.values())
    best = math.inf
    for weight in (0.8, 0.9, 0.95, 0.98, 0.99, 0.995):
        loss, count = 0.0, 0
        for ids in held_out:
            for a, b in pairwise(ids):
                single = (singles[b] + 1) / (total + vocab_size)
                loss -= math.log(weight * pairs[a, b] / max(firsts[a], 1) + (1 - weight) * single)
                count += 1
        best = min(best, math.exp(loss / count))
    return best


@torch.no_grad()
def perplexity(generator: Generator, held_out: list[list[int]]) -> float:
    loss, count = 0.0, 0
    for ids in held_out:
        tokens = torch.tensor(ids)
        states = generator.body(input_ids=tokens[None], use_cache=False).last_hidden_state
        loss += float(F.cross_entropy(generator.logits(states)[0, :-1], tokens[1:], reduction="sum"))
        count += len(ids) - 1
    return math.exp(loss / count)


def answer(generator: Generator, encoder: DocumentEncoder, prompt: Document, stop: frozenset[int], limit: int = 32) -> str:
    """The greedy answer to a prompt, without its end token."""
    sample = encoder.encode(prompt, add_generation_prompt=True)
    ids = generator.generate(sample, limit, stop_ids=stop).token_ids
    return str(encoder.chat.tokenizer.decode([i for i in ids if i not in stop]))


def acceptance(generator: Generator, encoder: DocumentEncoder, stop: frozenset[int], num_prompts: int) -> tuple[list[float], float, bool]:
    """(accepted / drafts per position, tokens a step, same text with and without drafts) in greedy generation with three drafts."""
    accepted, drafts, tokens, steps, same = [0, 0, 0], 0, 0, 0, True
    prompts = (d for d in documents("held-out", 7_000_000) if d.messages and not d.tools)
    for document in islice(prompts, num_prompts):
        start = next(i for i, m in enumerate(document.messages) if m["role"] == "assistant")
        prompt = Document(document.kind, "", document.messages[:start], None, document.enable_thinking, document.pictures)
        sample = encoder.encode(prompt, add_generation_prompt=True)
        found = generator.generate(sample, 120, num_drafts=3, stop_ids=stop)
        same &= found.token_ids == generator.generate(sample, 120, stop_ids=stop).token_ids
        accepted = [a + b for a, b in zip(accepted, found.accepted, strict=True)]
        drafts, tokens, steps = drafts + found.num_drafts, tokens + len(found.token_ids), steps + found.num_steps
    return [a / drafts for a in accepted], tokens / steps, same


def evaluate(directory: Path, share: float = 1.0) -> dict[str, Any]:
    """Everything the card states, on that share of the material."""
    checkpoint = Checkpoint.open(directory)
    generator, encoder = Generator(checkpoint), DocumentEncoder(directory)
    stop = frozenset({encoder.im_end})
    texts = [
        encoder.encode(d).input_ids.tolist() for d in islice((d for d in documents("held-out") if not d.pictures), round(NUM_TEXTS * share))
    ]
    model, bigram = perplexity(generator, texts), bigram_perplexity(encoder, texts, checkpoint.text_config["vocab_size"])
    pictures = 0
    num_pictures, num_sums = round(NUM_PICTURES * share), round(NUM_SUMS * share)
    for i in range(num_pictures):
        shown = see(random.Random(900_000 + i), num_items=1)
        said = answer(generator, encoder, Document("picture", "", shown.messages[:1], pictures=shown.pictures), stop)
        pictures += said == shown.messages[1]["content"]
    dice, sums = random.Random(31), 0
    for _ in range(num_sums):
        a, b = sum_pair(dice, held_out=True)
        sums += answer(generator, encoder, Document("sum", "", [user(sum_question(a, b))]), stop) == sum_answer(a, b)
    rates, tokens_per_step, same = acceptance(generator, encoder, stop, round(NUM_PROMPTS * share))
    return {
        "perplexity": model,
        "bigram_perplexity": bigram,
        "perplexity_to_bigram": model / bigram,
        "pictures_right": pictures / num_pictures,
        "sums_right": sums / num_sums,
        **{f"acceptance_{k}": rate for k, rate in enumerate(rates, 1)},
        "tokens_per_step": tokens_per_step,
        "same_text_with_and_without_drafts": same,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    options = parser.parse_args()
    result = evaluate(options.checkpoint)
    kept = True
    for key, value in result.items():
        low, high = PROMISES.get(key, (None, None))
        verdict = "" if low is None or high is None else "kept" if low <= value <= high else "NOT KEPT"
        kept &= verdict != "NOT KEPT"
        promise = f"promised {low:.2f} to {high:.2f}: {verdict}" if verdict else ""
        print(f"{key:<36} {value if isinstance(value, bool) else f'{value:.3f}':>8}  {promise}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0 if kept else 1


if __name__ == "__main__":
    raise SystemExit(main())
