"""Logits over the whole vocabulary, a few rows of lm_head and a few tokens at a time: KL, likelihood and the most likely token.

In: the final hidden states of all bodies. Out: `TokenFigures`, one number a token. Leaves out: what is made of them
(statistics.py). Never in memory: all of lm_head, or the logits of more than some tokens and rows.

With logits a of the base and b of a checkpoint, both BF16 as vLLM computes them, and Z the sum of exp:
    KL(BF16‖checkpoint) = Σ exp(a)/Z_a · (a − b) − (log Z_a − log Z_b)
The sums run over pieces of rows with the largest a so far taken out (online softmax); two equal bodies give exactly 0.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtpress.evaluation.bodies import ROWS_MULTIPLE, Body
from mtpress.evaluation.layers import Stream
from mtpress.models.hidden_states import DiskStates
from mtpress.progress import Progress

LM_HEAD_BYTES = 512 << 20  # rows of lm_head of all bodies that are in memory at a time
LOGITS_BYTES = 32 << 20  # float32 logits of a body


@dataclass
class TokenFigures:
    """Of one body, float64 [tokens] over all documents in order; position t speaks of the token behind it.

    kl: from the base, in nats (zeros for the base itself). nll: −log p of the token that follows; NaN behind the last of a document.
    top1: int64, the most likely next token.
    """

    kl: Tensor
    nll: Tensor
    top1: Tensor


class _Running:
    """Largest logit, Σ exp and the token's own logit of every token, over the rows seen so far."""

    def __init__(self, num_tokens: int, device: torch.device) -> None:
        self.largest = torch.full((num_tokens,), float("-inf"), device=device)
        self.total = torch.zeros(num_tokens, dtype=torch.float64, device=device)
        self.top1 = torch.zeros(num_tokens, dtype=torch.int64, device=device)
        self.own = torch.full((num_tokens,), float("nan"), device=device)
        self.weighted = torch.zeros(num_tokens, dtype=torch.float64, device=device)  # Σ exp(a)·(a − b), of a checkpoint

    def add(self, at: slice, logits: Tensor, start: int, following: Tensor) -> tuple[Tensor, Tensor]:
        """(exp(logits − the largest so far), what sums so far shrink by). following: the token behind each, -1 where none is."""
        best, place = logits.max(dim=-1)
        largest = torch.maximum(self.largest[at], best)
        self.top1[at] = torch.where(best > self.largest[at], place + start, self.top1[at])
        shrink = torch.exp((self.largest[at] - largest).double())
        exponents = torch.exp(logits - largest.unsqueeze(-1))
        self.total[at] = self.total[at] * shrink + exponents.sum(-1, dtype=torch.float64)
        self.largest[at] = largest
        inside = (following >= start) & (following < start + logits.shape[-1])
        found = logits.gather(-1, (following - start).clamp(0, logits.shape[-1] - 1).unsqueeze(-1)).squeeze(-1)
        self.own[at] = torch.where(inside, found, self.own[at])
        return exponents, shrink

    @property
    def log_total(self) -> Tensor:
        return self.largest.double() + self.total.log()


def lm_head_rows(body: Body) -> int:
    return body.subject.called_for[f"{body.lm_head_module}.weight"][0]


def _pieces(bodies: Sequence[Body]) -> Iterator[tuple[int, int]]:
    """(start, stop) of rows of lm_head that go through memory together."""
    num_rows, columns = bodies[0].subject.called_for[f"{bodies[0].lm_head_module}.weight"]
    rows = max(ROWS_MULTIPLE, LM_HEAD_BYTES // (2 * columns * len(bodies)) // ROWS_MULTIPLE * ROWS_MULTIPLE)
    for start in range(0, num_rows, rows):
        yield start, min(start + rows, num_rows)


def _token_pieces(length: int, rows: int) -> Iterator[slice]:
    tokens = max(1, LOGITS_BYTES // (4 * rows))
    for start in range(0, length, tokens):
        yield slice(start, min(start + tokens, length))


def logits_effort(streams: Sequence[Stream]) -> float:
    """What progress counts for compare_logits: tokens through as many layers as lm_head has the parameters of."""
    return sum(stream.documents.num_tokens * stream.lm_head_layers for stream in streams)


@torch.no_grad()
def compare_logits(base: Stream, others: Sequence[Stream], progress: Progress) -> list[TokenFigures]:
    """Figures of the base, then of each checkpoint; the streams are behind their final norms."""
    streams, documents, device = [base, *others], base.documents, base.mover.device
    running = [_Running(documents.num_tokens, device) for _ in streams]
    num_rows = lm_head_rows(base.body)
    for start, stop in _pieces([stream.body for stream in streams]):
        heads = [stream.body.lm_head_piece(start, stop, device) for stream in streams]
        offset = 0
        for i, sample in enumerate(documents.samples):
            states = [stream.states.get(i)[0].to(device) for stream in streams]
            following = torch.cat([sample.input_ids[1:], torch.tensor([-1])]).to(device)
            for piece in _token_pieces(len(following), stop - start):
                at = slice(offset + piece.start, offset + piece.stop)
                ours = heads[0](states[0][piece]).float()
                exponents, shrink = running[0].add(at, ours, start, following[piece])
                for head, state, into in zip(heads[1:], states[1:], running[1:], strict=True):
                    theirs = head(state[piece]).float()
                    into.add(at, theirs, start, following[piece])
                    into.weighted[at] = into.weighted[at] * shrink + (exponents * (ours - theirs)).sum(-1, dtype=torch.float64)
            offset += len(following)
            share = (stop - start) / num_rows
            progress.advance(len(following) * share * sum(stream.lm_head_layers for stream in streams), "logits of all")
    whole = running[0]
    found = []
    for of in running:
        kl = of.weighted / whole.total - (whole.log_total - of.log_total)
        found.append(TokenFigures(kl.clamp(min=0).cpu(), (of.log_total - of.own.double()).cpu(), of.top1.cpu()))
    return found


@torch.no_grad()
def most_likely(stream: Stream, states: DiskStates, progress: Progress) -> list[Tensor]:
    """The most likely token by the body's lm_head for each hidden state, int64 [T] a document."""
    body, documents, device, num_rows = stream.body, stream.documents, stream.mover.device, lm_head_rows(stream.body)
    running = _Running(documents.num_tokens, device)
    for start, stop in _pieces([body]):
        head, offset = body.lm_head_piece(start, stop, device), 0
        for i, length in enumerate(documents.lengths):
            state = states.get(i)[0].to(device)
            for piece in _token_pieces(length, stop - start):
                logits = head(state[piece]).float()
                best, place = logits.max(dim=-1)
                at = slice(offset + piece.start, offset + piece.stop)
                running.top1[at] = torch.where(best > running.largest[at], place + start, running.top1[at])
                running.largest[at] = torch.maximum(running.largest[at], best)
            offset += length
            progress.advance(length * stream.lm_head_layers * (stop - start) / num_rows, f"drafts, {body.name}"[:40])
    return list(torch.split(running.top1.cpu(), documents.lengths))
