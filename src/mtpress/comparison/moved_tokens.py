"""Tokens that a fine-tune's tokenizer has under another id than its ancestor's, while the rows of the embeddings stayed.

In: the subject of a checkpoint and its open base. Out: the tokens, each with both ids. Leaves out: tokens that are new or gone, and
judging (rules/against_source.py). Some rows of both embeddings are read. Where the row went with its token, the two belong together and
nothing is told: that is a vocabulary in another order.
"""

from collections.abc import Iterator
from dataclasses import replace

from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.checkpoint.safetensors import TensorInfo, read_tensor
from mtpress.comparison.tokenizer import token_ids
from mtpress.json_files import shown
from mtpress.quant_config.stored import PLAIN_DTYPES
from mtpress.quant_config.tokenizer_files import TOKENIZER
from mtpress.quant_config.view import Subject

MOST_READ = 256  # tokens whose rows are read, evenly over all that moved
NEARER = 0.5  # of the distance to the row that the token had: trained rows move by a few percent, two tokens' are far apart


def moved_tokens(subject: Subject, base: Checkpoint) -> list[str]:
    """The moved tokens whose row here is the ancestor's of that id, in words; of very many, those that were looked at."""
    other = Subject(base)
    if subject.text(TOKENIZER) == other.text(TOKENIZER):
        return []
    here, there = (token_ids(one.json(TOKENIZER) or {}) for one in (subject, other))
    mine, theirs = _embeddings(subject), _embeddings(other)
    if mine is None or theirs is None or mine.shape[1:] != theirs.shape[1:]:
        return []
    rows = min(mine.shape[0], theirs.shape[0])
    moved = [token for token, number in there.items() if token in here and here[token] != number]
    moved = [token for token in moved if 0 <= here[token] < rows and 0 <= there[token] < rows]
    looked_at = moved[:: -(-len(moved) // MOST_READ)] if moved else []
    return list(_stayed(looked_at, here, there, mine, theirs))


def _stayed(tokens: list[str], here: dict[str, int], there: dict[str, int], mine: TensorInfo, theirs: TensorInfo) -> Iterator[str]:
    for token in tokens:
        row, same_id, same_token = (
            read_tensor(_row(info, number)).float() for info, number in ((mine, here[token]), (theirs, here[token]), (theirs, there[token]))
        )
        if float((row - same_id).norm()) < NEARER * float((row - same_token).norm()):
            yield f"{shown(token)} at {here[token]}, the ancestor has it at {there[token]}"


def _row(info: TensorInfo, number: int) -> TensorInfo:
    row_bytes = info.num_bytes // info.shape[0]
    return replace(info, shape=info.shape[1:], offset=info.offset + number * row_bytes, num_bytes=row_bytes)


def _embeddings(subject: Subject) -> TensorInfo | None:
    """The matrix [tokens, hidden] where it is stored in 16 or 32 bits."""
    named = (info for name, info in subject.tensors.items() if subject.model.component(name) == "embeddings")
    return next((info for info in named if len(info.shape) == 2 and info.dtype in PLAIN_DTYPES), None)
