"""How often the draft head's tokens are what the body itself would say, teacher-forced over the documents.

In: a body's final hidden states, its embeddings, its most likely tokens. Out: for each document and depth whether the drafts
hold. Leaves out: sampling, and drafts behind a draft that was refused, which no engine makes.

At position t the head reads the body's state h_t and the token behind it, and drafts the token after that; drafts of depth 2 and 3
come from its own state and its own draft, chained as vLLM chains them: attention goes to what the head has made of the document up to t,
and to the chain's own earlier steps. A draft of depth k holds if it and all before it are the body's most likely tokens. What the body
says behind drafts is known from the document alone, and so depth k is counted where the document goes on as the body would for
k − 1 tokens: there this is greedy acceptance exactly, elsewhere it cannot be known without running the body on.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from mtpress.evaluation.layers import Stream
from mtpress.evaluation.vocabulary import most_likely
from mtpress.models.hidden_states import DiskStates
from mtpress.models.qwen3_5.draft_head import DraftHead
from mtpress.progress import Progress

MAX_DEPTH = 3


@dataclass
class Drafts:
    """bool [T − 1] a document, for each depth (the first has index 0): where depth k can be counted, and where it holds."""

    counted: list[list[Tensor]]
    held: list[list[Tensor]]


def drafts_effort(stream: Stream) -> float:
    """What progress counts for draft: tokens through layers."""
    if stream.body.no_draft_head is not None:
        return 0.0
    return stream.documents.num_tokens * sum(k + 1 + stream.lm_head_layers for k in range(MAX_DEPTH))


@torch.no_grad()
def draft(stream: Stream, top1: Tensor, head_states: DiskStates, progress: Progress) -> Drafts:
    """Drafts at every position. top1: of the body, int64 [tokens] over all documents. head_states: room for the head's own states."""
    documents = stream.documents
    head = stream.body.draft_head(stream.mover)
    drafted: list[list[Tensor]] = []  # by depth, then by document
    for k in range(MAX_DEPTH):
        for i in range(len(documents.samples)):
            head_states.put(i, _chain(head, stream, i, [tokens[i] for tokens in drafted]))
            progress.advance(documents.lengths[i] * (k + 1), f"drafts, {stream.body.name}"[:40])
        head_states.advance()
        drafted.append(most_likely(stream, head_states, progress))
    found = Drafts([[] for _ in range(MAX_DEPTH)], [[] for _ in range(MAX_DEPTH)])
    for i, said in enumerate(torch.split(top1, documents.lengths)):
        following, allowed = documents.samples[i].input_ids[1:], documents.counted[i]
        counted = allowed.clone()  # the token that the first draft stands on is of the document
        held = torch.ones_like(counted)
        for k in range(1, MAX_DEPTH + 1):
            inside = torch.zeros_like(counted)
            inside[: max(0, len(counted) - k + 1)] = True  # the body has a state at position t + k
            if k > 1:
                counted = counted & _ahead(allowed & (said[:-1] == following), k - 1)
            held = held & (drafted[k - 1][i][:-1] == _ahead(said, k)[:-1])
            found.counted[k - 1].append(counted & inside)
            found.held[k - 1].append(held & counted & inside)
    return found


def _ahead(values: Tensor, steps: int) -> Tensor:
    """values[t + steps] at t; zeros behind the end."""
    moved = torch.zeros_like(values)
    if steps < len(values):
        moved[: len(values) - steps] = values[steps:]
    return moved


def _chain(head: DraftHead, stream: Stream, i: int, drafts: list[Tensor]) -> Tensor:
    """The head's states [1, T, hidden] at the depth that comes after these drafts, for every position at once.

    The last position has no token behind it: what stands there is no draft, and nothing before it sees it.
    """
    assert stream.embeddings is not None
    device = stream.mover.device
    embedded = stream.embeddings.peek(i).to(device)
    length = embedded.shape[1]
    following = torch.cat([embedded[:, 1:], embedded[:, -1:]], dim=1)
    states, positions = stream.states.peek(i).to(device), stream.mover.positions[i].to(device)
    cache = DynamicCache()
    past = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    own = torch.eye(length, dtype=torch.bool, device=device)
    for k in range(len(drafts) + 1):
        mask = torch.cat([past, *[own] * k], dim=1)[None, None]
        rope = stream.mover.rotary(states, positions + k)
        states = head(following, states, rope, mask, cache)
        if k < len(drafts):
            following = stream.body.embedding_rows(drafts[k]).to(device, states.dtype).unsqueeze(0)
    return states
