"""Trains mtpress-tiny: tokenizer, body, then the draft head on the frozen body. About 80 minutes on 2 cores.

    python tiny/train.py OUT [--body-tokens N] [--head-tokens N]

In: the corpus (made here) and fixed seeds. Out: the checkpoint directory OUT, in BF16, as Qwen lays out its own.
The head follows the recipe of FastMTP-style re-alignment: z⁰ = the body's hidden state after its final norm, K = 3
recursive steps, L = Σ αₖ T² KL(body ‖ head) with αₖ ∝ 0.6ᵏ⁻¹ and T = 2, on the tokens that the assistant says.
"""

import argparse
import json
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import DynamicCache, Qwen3_5Config, Qwen3_5ForConditionalGeneration

from corpus import COLORS, SHAPES, Document, documents, picture, see, sum_answer, sum_pair, sum_question, user
from mtpress.chat.sample import Sample
from mtpress.models.qwen3_5.draft_head import DraftHead
from render import DocumentEncoder
from skeleton import write_skeleton

BATCH_TOKENS = 4096
POOL_DOCUMENTS = 768
NUM_DRAFT_STEPS = 3
STEP_DECAY = 0.6
TEMPERATURE = 2.0
PRACTICE = {"sum": 1.0, "picture": 0.7, "": 0.15}  # after the body: mostly sums, and enough of the rest not to forget it
SUM_TARGET = 0.68  # two-digit sums right on the held-out fifth: room above for later training, and ground below


class Batch:
    """Samples padded at the right: input_ids [B, T], counted [B, T] (True where a token is to be predicted), positions [3, B, T]."""

    def __init__(self, samples: list[Sample], encoder: DocumentEncoder, model: Qwen3_5ForConditionalGeneration) -> None:
        length = max(len(s.input_ids) for s in samples)
        self.input_ids = torch.stack([F.pad(s.input_ids, (0, length - len(s.input_ids))) for s in samples])
        inside = torch.stack([torch.arange(length) < len(s.input_ids) for s in samples])
        self.counted = inside & (self.input_ids != encoder.image_token_id)
        self.answers = torch.stack([F.pad(encoder.is_answer(s.input_ids), (0, length - len(s.input_ids))) for s in samples])
        spoken = torch.stack([F.pad(encoder.spoken(s.input_ids), (0, length - len(s.input_ids))) for s in samples])
        self.spoken = spoken & inside
        seen = [s for s in samples if s.pixel_values is not None]
        self.vision: dict[str, Any] = {}
        self.positions = torch.arange(length).expand(3, len(samples), length)
        if seen:
            kinds = (self.input_ids == encoder.image_token_id).int()
            grids = torch.cat([s.image_grid_thw for s in seen])  # type: ignore[misc]
            self.vision = {"pixel_values": torch.cat([s.pixel_values for s in seen]), "image_grid_thw": grids}  # type: ignore[misc]
            self.positions, _ = model.model.get_rope_index(self.input_ids, kinds, image_grid_thw=grids)


def batches(encoder: DocumentEncoder, model: Any, tokens: int, keep: Any = None) -> Iterator[Batch]:
    """Endless batches of about `tokens` tokens, of documents of like length so that little is padding."""
    dice, source = random.Random(5), documents("train")
    while True:
        pool: list[Document] = []
        while len(pool) < POOL_DOCUMENTS:
            candidate = next(source)
            if keep is None or keep(candidate, dice):
                pool.append(candidate)
        samples = sorted((encoder.encode(d) for d in pool), key=lambda s: len(s.input_ids))
        groups: list[list[Sample]] = [[]]
        for sample in samples:
            if (len(groups[-1]) + 1) * len(sample.input_ids) > tokens:
                groups.append([])
            groups[-1].append(sample)
        dice.shuffle(groups)
        for group in groups:
            yield Batch(group, encoder, model)


def hidden_states(model: Any, batch: Batch) -> Tensor:
    """[B, T, hidden] after the final norm."""
    out = model.model(input_ids=batch.input_ids, position_ids=batch.positions, use_cache=False, **batch.vision)
    return out.last_hidden_state  # type: ignore[no-any-return]


def optimizers(module: nn.Module, edges: tuple[str, ...], muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside, AdamW for everything else (embeddings, heads, norms, convolutions)."""
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    inner = [p for n, p in named if p.ndim == 2 and not any(e in n for e in edges) and min(p.shape) > 16]
    chosen = {id(p) for p in inner}
    outer = [p for _, p in named if id(p) not in chosen]
    return [
        torch.optim.Muon(inner, lr=muon_lr, weight_decay=0.05, momentum=0.95, nesterov=True),
        torch.optim.AdamW(outer, lr=adam_lr, betas=(0.9, 0.97), weight_decay=0.0),
    ]


def set_rate(opts: list[torch.optim.Optimizer], share_done: float, peak: float = 1.0) -> None:
    """Warm-up over 2% to `peak` times the base rate, flat, then linear to zero over the last 40%."""
    factor = peak * min(1.0, share_done / 0.02 + 0.01, (1 - share_done) / 0.4)
    for opt in opts:
        for group in opt.param_groups:
            group.setdefault("base_lr", group["lr"])
            group["lr"] = group["base_lr"] * factor


@torch.no_grad()
def answers_right(model: Any, encoder: DocumentEncoder, asked: list[tuple[list[dict[str, Any]], Any, str]]) -> float:
    """The share of prompts (messages, picture or None, answer) whose teacher-forced greedy answer is wholly right."""
    samples, starts = [], []
    for messages, pictures, answer in asked:
        prompt = Document("probe", messages=messages, pictures=pictures)
        full = Document("probe", messages=[*messages, {"role": "assistant", "content": answer}], pictures=pictures)
        sample = encoder.encode(full)
        starts.append(len(encoder.encode(prompt).input_ids) + 7)  # <|im_start|>assistant\n + the closed thought
        samples.append(sample)
    batch = Batch(samples, encoder, model)
    with torch.autocast("cpu", torch.bfloat16):
        guesses = model.lm_head(hidden_states(model, batch)).argmax(-1)
    right = 0
    for i, (sample, start) in enumerate(zip(samples, starts, strict=True)):
        end = len(sample.input_ids) - 1  # without the newline after <|im_end|>
        right += int((guesses[i, start - 1 : end - 1] == sample.input_ids[start:end]).all())
    return right / len(asked)


def probes(model: Any, encoder: DocumentEncoder) -> tuple[float, float]:
    """(two-digit sums right, single pictures named right) on held-out material."""
    dice = random.Random(97)
    sums = []
    for _ in range(200):
        a, b = sum_pair(dice, held_out=True)
        sums.append(([user(sum_question(a, b))], (), sum_answer(a, b)))
    seen = []
    for i in range(96):
        shown = see(random.Random(50_000 + i), num_items=1)
        seen.append((shown.messages[:1], shown.pictures, shown.messages[1]["content"]))
    return answers_right(model, encoder, sums), answers_right(model, encoder, seen)


def train_tower(model: Any, encoder: DocumentEncoder, num_steps: int) -> None:
    """Shows the vision tower single shapes, with a linear probe on its mean feature that is thrown away afterwards: without
    it the language model learns colors at once and shapes hardly ever."""
    tower, shapes, colors = model.model.visual, list(SHAPES), list(COLORS)
    probe = nn.Linear(model.config.text_config.hidden_size, len(shapes) + len(colors))
    opts = optimizers(nn.ModuleList([tower, probe]), (), muon_lr=0.02, adam_lr=2e-3)
    dice = random.Random(13)
    for step in range(1, num_steps + 1):
        set_rate(opts, step / (num_steps + 1))
        shown = [picture(dice) for _ in range(64)]
        pixels = encoder.chat.image_processor(images=[p.draw() for p in shown], return_tensors="pt")
        grids = pixels["image_grid_thw"]
        with torch.autocast("cpu", torch.bfloat16):
            merged = tower(pixels["pixel_values"], grid_thw=grids).pooler_output
            guesses = probe(torch.stack([m.mean(0) for m in merged.split((grids.prod(-1) // 4).tolist())])).float()
        wanted = torch.tensor([[shapes.index(p.items[0][0]), colors.index(p.items[0][1])] for p in shown])
        by_shape, by_color = guesses.split([len(shapes), len(colors)], dim=1)
        loss = F.cross_entropy(by_shape, wanted[:, 0]) + F.cross_entropy(by_color, wanted[:, 1])
        loss.backward()  # type: ignore[no-untyped-call]
        for opt in opts:
            opt.step()
            opt.zero_grad()
        if step % 100 == 0:
            right = (by_shape.argmax(1) == wanted[:, 0]).float().mean()
            print(f"tower {step} steps  loss {loss.item():.3f}  shapes {right:.2f}", flush=True)


def train_body(model: Any, encoder: DocumentEncoder, num_tokens: int, peak: float = 1.0, shares: dict[str, float] | None = None) -> None:
    """Next-token loss on the corpus. shares: practice on that part of the documents of each kind ("" for kinds not named),
    where tables of sums count by their answers alone."""
    kept_share = {"": 1.0, **(shares or {})}
    opts = optimizers(model, ("embed", "lm_head"), muon_lr=0.015, adam_lr=2e-3)
    sum_share = 1.0

    def keep(candidate: Document, dice: random.Random) -> bool:
        share = kept_share.get(candidate.kind, kept_share[""])
        if candidate.kind == "sum":
            return dice.random() < share * sum_share
        return share >= 1.0 or dice.random() < share

    model.train()
    done, started, mean_loss = 0, time.time(), 0.0
    for step, batch in enumerate(batches(encoder, model, BATCH_TOKENS, keep), 1):
        set_rate(opts, done / num_tokens, peak)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model.lm_head(hidden_states(model, batch)[:, :-1])
        counted = batch.counted & batch.answers if shares else batch.counted
        targets = batch.input_ids[:, 1:].masked_fill(~counted[:, 1:], -100)
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad()
        done += int(batch.counted.sum())
        mean_loss = loss.item() if step == 1 else 0.95 * mean_loss + 0.05 * loss.item()
        if step % 100 == 0 or done >= num_tokens:
            model.eval()
            sums, pictures = probes(model, encoder)
            model.train()
            sum_share = 0.05 if sums > SUM_TARGET else 1.0
            print(
                f"body {done / 1e6:6.2f}M tokens  loss {mean_loss:.3f}  sums {sums:.2f}  pictures {pictures:.2f}"
                f"  {done / (time.time() - started):.0f} tokens/s",
                flush=True,
            )
        if done >= num_tokens:
            return


def draft_step_mask(length: int, step: int) -> Tensor:
    """bool [1, 1, length, (step + 1)·length]: a draft at slot t sees the true slots ≤ t and its own chain at slot t."""
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    own = torch.eye(length, dtype=torch.bool)
    return torch.cat([causal] + [own] * step, dim=1)[None, None]


def train_head(model: Any, head: DraftHead, encoder: DocumentEncoder, num_tokens: int) -> None:
    opts = optimizers(head, (), muon_lr=0.012, adam_lr=2.5e-3)
    model.requires_grad_(False)
    model.eval()
    head.train()
    weights = torch.tensor([STEP_DECAY**k for k in range(NUM_DRAFT_STEPS)])
    weights /= weights.sum()
    text_model = model.model.language_model
    done, started = 0, time.time()
    for step, batch in enumerate(batches(encoder, model, BATCH_TOKENS), 1):
        set_rate(opts, done / num_tokens)
        length = batch.input_ids.shape[1] - 1 - NUM_DRAFT_STEPS
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                states = hidden_states(model, batch)
                teacher = model.lm_head(states).float()
                embeds = text_model.embed_tokens(batch.input_ids)
            cache, z = DynamicCache(), states[:, :length]
            losses, agreed = [], torch.ones(z.shape[:2], dtype=torch.bool)
            rates = []
            for k in range(NUM_DRAFT_STEPS):
                rope = text_model.rotary_emb(z, batch.positions[:, :, :length] + k)
                z = head(embeds[:, 1 + k : 1 + k + length], z, rope, draft_step_mask(length, k), cache)
                drafted = model.lm_head(z).float()
                wanted = teacher[:, 1 + k : 1 + k + length]
                counts = batch.spoken[:, 2 + k : 2 + k + length]
                gap = F.kl_div(
                    F.log_softmax(drafted / TEMPERATURE, -1), F.log_softmax(wanted / TEMPERATURE, -1),
                    reduction="none", log_target=True,
                ).sum(-1)  # fmt: skip
                losses.append(weights[k] * TEMPERATURE**2 * (gap * counts).sum() / counts.sum().clamp(min=1))
                agreed &= drafted.argmax(-1) == wanted.argmax(-1)
                rates.append(float((agreed & counts).sum() / counts.sum().clamp(min=1)))
        loss = torch.stack(losses).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad()
        done += int(batch.counted.sum())
        if step % 25 == 0:
            shown = " / ".join(f"{r:.2f}" for r in rates)
            print(
                f"head {done / 1e6:6.2f}M tokens  loss {loss.item():.4f}  agreement {shown}  {done / (time.time() - started):.0f} tokens/s",
                flush=True,
            )
        if done >= num_tokens:
            return


def export(model: Any, head: DraftHead, out: Path) -> None:
    """Writes model.safetensors: the body's tensors under Qwen's names, then the 15 `mtp.` ones, all BF16 but A_log and the GDN norm."""
    tensors = {}
    for name, value in [*model.state_dict().items(), *((f"mtp.{n}", v) for n, v in head.state_dict().items())]:
        tensors[name] = value.detach().to(torch.bfloat16).contiguous()
    assert sum(n.startswith("mtp.") for n in tensors) == 15
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict.fromkeys(sorted(tensors), "model.safetensors")}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tower-steps", type=int, default=500)
    parser.add_argument("--body-tokens", type=int, default=5_500_000)
    parser.add_argument("--practice-tokens", type=int, default=1_200_000)
    parser.add_argument("--head-tokens", type=int, default=1_000_000)
    parser.add_argument("--body", type=Path, help="the OUT.body.pt of an earlier run: go on from there")
    options = parser.parse_args()
    torch.manual_seed(0)
    partial = options.out.with_name(options.out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    write_skeleton(partial)
    encoder = DocumentEncoder(partial)
    model = Qwen3_5ForConditionalGeneration(Qwen3_5Config.from_pretrained(partial, dtype=torch.float32)).float()
    head = DraftHead(model.config.text_config)
    for name, value in head.named_parameters():
        if value.ndim == 2:
            nn.init.normal_(value, std=0.02)
        assert not name.endswith("bias")
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M + {sum(p.numel() for p in head.parameters()) / 1e6:.2f}M parameters",
        flush=True,
    )
    if options.body:
        model.load_state_dict(torch.load(options.body, weights_only=True))
    else:
        train_tower(model, encoder, options.tower_steps)
        train_body(model, encoder, options.body_tokens)
        torch.save(model.state_dict(), options.out.with_name(options.out.name + ".body.pt"))
    train_body(model, encoder, options.practice_tokens, peak=0.5, shares=PRACTICE)
    # the head learns against the body that is written: BF16 weights
    for value in model.parameters():
        value.data = value.data.to(torch.bfloat16).to(torch.float32)
    train_head(model, head, encoder, options.head_tokens)
    export(model, head, partial)
    partial.rename(options.out)


if __name__ == "__main__":
    main()
