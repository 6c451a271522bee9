"""Streams of small checkpoints over a few documents, for the tests of this folder: what eval does, without figures."""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from mtpress.chat.encoder import ChatEncoder
from mtpress.evaluation.bodies import open_bodies
from mtpress.evaluation.documents import Documents, load
from mtpress.evaluation.layers import LayerError, Stream, run_layers
from mtpress.evaluation.vocabulary import TokenFigures, compare_logits
from mtpress.progress import Progress

CPU = torch.device("cpu")
SILENT = Progress("test", 1, silent=True)
TEXTS = ("A red kite over Brook.", "12 + 30 = 42. 7 + 8 = 15.", "Mia and Tom", "the tools are old, the hands are new", "so it goes, and on")


def write_texts(path: Path, texts: Sequence[str] = TEXTS) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@dataclass
class Ran:
    """streams: the base's first, behind their final norms; figures: of all of them."""

    documents: Documents
    streams: list[Stream]
    errors: dict[str, list[LayerError]]
    figures: list[TokenFigures]


@contextmanager
def run(base: Path, checkpoints: Sequence[Path], folder: Path, *, data: Path | None = None, kv_cache: str = "auto") -> Iterator[Ran]:
    """Everything up to the logits, with transformers' own delta rule, whose bits are those of its whole model."""
    folder.mkdir()
    source, others = open_bodies(base, checkpoints, kv_cache)
    data = data or write_texts(folder / "documents.jsonl")
    documents = load(ChatEncoder(base), source.checkpoint.config, [str(data)], 2048)
    with ExitStack() as stack:
        streams = [
            stack.enter_context(closing(Stream(body, documents, folder / str(i), CPU, body.no_draft_head is None)))
            for i, body in enumerate((source, *others))
        ]
        for stream in streams:
            stream.mover._own_delta_rule = False
        errors = run_layers(streams[0], streams[1:], folder, SILENT)
        yield Ran(documents, streams, errors, compare_logits(streams[0], streams[1:], SILENT))
