"""demo: the whole line on the model that ships with mtpress, as a user would type it, then what the result says.

In: nothing. Out: the four commands with their own output, and a table: size, error, draft acceptance, the same text with
and without the draft head. Needs no network and no engine; the generator is the reference one (models/qwen3_5/generate.py).
"""

import argparse
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtpress import terminal
from mtpress.builtin import BUILTIN_MODEL, EVALUATION_FILE
from mtpress.cli import run_stage
from mtpress.errors import InputError
from mtpress.terminal import quoted

if TYPE_CHECKING:
    from mtpress.chat.encoder import ChatEncoder
    from mtpress.chat.sample import Sample
    from mtpress.models.qwen3_5.generate import Generator

RECIPE = "nvfp4-mtp-vlm"
NUM_DRAFTS = 3
MAX_NEW_TOKENS = 160
NUM_EVALUATION_ROWS = 24
PROMPTS = (
    "Which river is Brook on?",
    "Tell me a story about Ivy, Max and a green kite in Tarn.",
    "How do I make tea?",
    "How many words are in this list: lamp, rope, bell, key",
    "Write a Python function that adds a and b.",
    "What is 41 + 26?",
    "Number these words: lamp, rope, bell",
    "Tell me about Velden.",
)
PICTURE_QUESTION = "What is in the image?"


@dataclass(frozen=True)
class Spoken:
    """One prompt answered by both builds. same_text: greedy text is the same with and without drafts, per build."""

    prompt: str
    bf16: str
    nvfp4: str
    same_text: dict[str, bool]


@dataclass(frozen=True)
class DemoResult:
    """bytes: size of the weights. kl: mean KL(BF16 ‖ NVFP4) in nats over built-in evaluation text. acceptance: per position."""

    bytes: dict[str, int]
    kl: float
    top1_agreement: float
    tokens_per_step: dict[str, float]
    acceptance: dict[str, list[float]]
    answers: tuple[Spoken, ...]

    @property
    def sound(self) -> bool:
        return all(all(a.same_text.values()) for a in self.answers)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="DIR", type=Path, help="keep the quantized checkpoint here (default: a temporary directory)")


def run(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    if not (BUILTIN_MODEL / "config.json").is_file():
        raise InputError(f"{BUILTIN_MODEL}: the built-in model is missing; install mtpress again")
    with tempfile.TemporaryDirectory(prefix="mtpress-demo-") as scratch:
        out = options.out or Path(scratch) / "mtpress-tiny-NVFP4"
        quantize = ["quantize", str(BUILTIN_MODEL), str(out), "--recipe", RECIPE, "--calibration", "builtin"]
        for command in (["inspect", str(BUILTIN_MODEL)], quantize, ["check", str(out), "--base", str(BUILTIN_MODEL)]):
            code = _type(command, options.json)
            if code:
                return code, {"command": command, "exit_code": code}
        result = speak(out)
    if not options.json:
        show(result)
    return (0 if result.sound else 1), result.as_json()


def _type(command: list[str], as_json: bool) -> int:
    """Runs one command of the line, showing what a user would type."""
    if as_json:
        return run_stage([*command, "--json"])[0]
    shown = [Path(part).name if part.startswith("/") else part for part in command]
    print(f"\n$ mtpress {' '.join(map(quoted, shown))}\n", flush=True)
    return run_stage(command)[0]


def speak(out: Path) -> DemoResult:
    """Both builds on the same prompts, with and without the draft head."""
    from mtpress.chat.encoder import ChatEncoder
    from mtpress.checkpoint.checkpoint import Checkpoint
    from mtpress.models.qwen3_5.generate import Generator

    checkpoints = {"BF16": Checkpoint.open(BUILTIN_MODEL), "NVFP4": Checkpoint.open(out)}
    encoder = ChatEncoder(BUILTIN_MODEL)
    generators = {name: Generator(checkpoint) for name, checkpoint in checkpoints.items()}
    samples = {text: encoder.encode([{"role": "user", "content": text}], add_generation_prompt=True) for text in PROMPTS}
    parts = [{"type": "image", "image": drawn_circle()}, {"type": "text", "text": PICTURE_QUESTION}]
    samples[f"[picture of a red circle] {PICTURE_QUESTION}"] = encoder.encode(
        [{"role": "user", "content": parts}], add_generation_prompt=True
    )
    answers, rates, per_step = [], {}, {}
    spoken: dict[str, dict[str, tuple[str, bool]]] = {text: {} for text in samples}
    for name, generator in generators.items():
        texts, rates[name], per_step[name] = _speak_all(generator, encoder, samples)
        for text, answer in texts.items():
            spoken[text][name] = answer
    for text, by_build in spoken.items():
        same = {name: alike for name, (_, alike) in by_build.items()}
        answers.append(Spoken(text, by_build["BF16"][0], by_build["NVFP4"][0], same))
    kl, agreement = divergence(generators["BF16"], generators["NVFP4"], encoder)
    sizes = {name: checkpoint.num_bytes for name, checkpoint in checkpoints.items()}
    return DemoResult(sizes, kl, agreement, per_step, rates, tuple(answers))


def _speak_all(
    generator: "Generator", encoder: "ChatEncoder", samples: "dict[str, Sample]"
) -> tuple[dict[str, tuple[str, bool]], list[float], float]:
    """(prompt → (text, the same without drafts), acceptance per position, tokens a step) of one build, greedy."""
    stop = frozenset({encoder.tokenizer.eos_token_id})
    texts, accepted, drafts, tokens, steps = {}, [0] * NUM_DRAFTS, 0, 0, 0
    for text, sample in samples.items():
        found = generator.generate(sample, MAX_NEW_TOKENS, num_drafts=NUM_DRAFTS, stop_ids=stop)
        plain = generator.generate(sample, MAX_NEW_TOKENS, stop_ids=stop)
        texts[text] = (encoder.tokenizer.decode(found.token_ids, skip_special_tokens=True), found.token_ids == plain.token_ids)
        accepted = [a + b for a, b in zip(accepted, found.accepted, strict=True)]
        drafts, tokens, steps = drafts + found.num_drafts, tokens + len(found.token_ids), steps + found.num_steps
    return texts, [a / max(drafts, 1) for a in accepted], tokens / max(steps, 1)


def divergence(base: "Generator", other: "Generator", encoder: "ChatEncoder") -> tuple[float, float]:
    """(mean KL(base ‖ other) in nats, top-1 agreement) over the first rows of the built-in evaluation set, teacher-forced."""
    import torch

    from mtpress.calibration.samples import encode_row, read_jsonl

    total, agreed, count = 0.0, 0, 0
    for number, (where, row) in enumerate(read_jsonl(EVALUATION_FILE)):
        if number == NUM_EVALUATION_ROWS:
            break
        ids = encode_row(encoder, row, where).input_ids[None]
        with torch.no_grad():
            p, q = (g.logits(g.body(input_ids=ids, use_cache=False).last_hidden_state).log_softmax(-1) for g in (base, other))
        total += float((p.exp() * (p - q)).sum())
        agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
        count += ids.shape[1]
    return total / count, agreed / count


def drawn_circle() -> Any:
    """A red circle on grey, 64 pixels wide."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (64, 64), (120, 120, 120))
    ImageDraw.Draw(image).ellipse((8, 8, 56, 56), fill=(214, 40, 40))
    return image


def show(result: DemoResult) -> None:
    from rich.table import Table

    from mtpress.progress import human_bytes

    console = terminal.console()
    said = Table(title="what they say, greedy", show_lines=True)
    for heading in ("prompt", "BF16", "NVFP4"):
        said.add_column(heading, overflow="fold")
    for answer in result.answers:
        said.add_row(answer.prompt, answer.bf16, "the same" if answer.nvfp4 == answer.bf16 else answer.nvfp4)
    console.print()
    console.print(said)
    table = Table(title="before and after")
    for heading in ("", "BF16", "NVFP4"):
        table.add_column(heading, justify="left" if not heading else "right")
    table.add_row("weights", *(human_bytes(size) for size in result.bytes.values()))
    table.add_row("KL to BF16, nats a token", "0", f"{result.kl:.4f}")
    table.add_row("same most likely token", "100%", f"{result.top1_agreement:.1%}")
    for k in range(NUM_DRAFTS):
        table.add_row(f"draft accepted at position {k + 1}", *(f"{rates[k]:.0%}" for rates in result.acceptance.values()))
    table.add_row("tokens a step with 3 drafts", *(f"{value:.2f}" for value in result.tokens_per_step.values()))
    kept = [all(a.same_text[name] for a in result.answers) for name in result.bytes]
    table.add_row("same text with and without drafts", *("yes" if same else "NO" for same in kept))
    console.print(table)
