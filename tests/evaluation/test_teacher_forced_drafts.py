"""Drafts at every position at once against the same chain made one position after the other."""

from contextlib import closing
from pathlib import Path

import pytest
import torch
from runs import SILENT, Ran, run, write_texts
from torch import Tensor
from transformers import DynamicCache

from mtpress.builtin import BUILTIN_MODEL
from mtpress.evaluation.drafts import Drafts, _chain, draft
from mtpress.evaluation.layers import Stream
from mtpress.models.hidden_states import DiskStates


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:  # type: ignore[misc]
    folder = tmp_path_factory.mktemp("drafts")
    texts = ["85 + 33 = 118.\n36 + 65 = 101.\n31 + 16 = 47.", "Mia and Tom find a red kite in Brook. They take it home and mend it."]
    with run(BUILTIN_MODEL, [], folder / "run", data=write_texts(folder / "texts.jsonl", texts)) as found:
        yield found


def drafts_of(stream: Stream, top1: Tensor, folder: Path) -> Drafts:
    folder.mkdir()
    with closing(DiskStates(folder, stream.documents.lengths, stream.states.hidden_size, stream="hidden-drafts")) as states:
        return draft(stream, top1, states, SILENT)


@torch.no_grad()
def one_by_one(stream: Stream, i: int, t: int, depth: int) -> list[Tensor]:
    """The head's states [hidden] of a chain from position t, as an engine runs it: the document up to t, then a step a draft."""
    head, body = stream.body.draft_head(stream.mover), stream.body
    ids, cache = stream.documents.samples[i].input_ids, DynamicCache()
    lm_head = body.checkpoint.read("lm_head.weight")
    settled = torch.ones(t + 1, t + 1, dtype=torch.bool).tril()[None, None]
    positions = torch.arange(t + 1).expand(3, 1, -1)
    states = stream.states.peek(i)[:, : t + 1]
    z = head(body.embedding_rows(ids[1 : t + 2]).unsqueeze(0), states, stream.mover.rotary(states, positions), settled, cache)[:, -1:]
    found = [z[0, 0]]
    for k in range(1, depth):
        token = (z[0, 0] @ lm_head.t()).float().argmax()
        rope = stream.mover.rotary(z, torch.full((3, 1, 1), t + k))
        seen = torch.ones(1, 1, 1, t + 1 + k, dtype=torch.bool)
        z = head(body.embedding_rows(token.view(1)).unsqueeze(0), z, rope, seen, cache)
        found.append(z[0, 0])
    return found


def test_chains_at_all_positions_are_those_of_an_engine(ran: Ran) -> None:
    stream = ran.streams[0]
    head, lm_head = stream.body.draft_head(stream.mover), stream.body.checkpoint.read("lm_head.weight")
    with torch.no_grad():
        first = _chain(head, stream, 0, [])
        second = _chain(head, stream, 0, [tokens := (first[0] @ lm_head.t()).float().argmax(-1)])
        third = _chain(head, stream, 0, [tokens, (second[0] @ lm_head.t()).float().argmax(-1)])
    same = 0
    for t in (0, 3, 9, 17, ran.documents.lengths[0] - 2):
        alone = one_by_one(stream, 0, t, 3)
        assert torch.allclose(first[0, t].float(), alone[0].float(), atol=0.05, rtol=0.05), t
        if (alone[0] @ lm_head.t()).float().argmax() == tokens[t]:  # else the chains draft something else from here on
            same += 1
            assert torch.allclose(second[0, t].float(), alone[1].float(), atol=0.05, rtol=0.05), t
            if (alone[1] @ lm_head.t()).float().argmax() == (second[0, t] @ lm_head.t()).float().argmax():
                assert torch.allclose(third[0, t].float(), alone[2].float(), atol=0.05, rtol=0.05), t
    assert same >= 4


def test_a_draft_counts_where_the_document_goes_on_as_the_body_would(ran: Ran, tmp_path: Path) -> None:
    stream, lengths = ran.streams[0], ran.documents.lengths
    top1 = ran.figures[0].top1
    found = drafts_of(stream, top1, tmp_path / "states")
    for i, said in enumerate(torch.split(top1, lengths)):
        ids = ran.documents.samples[i].input_ids
        for t in range(lengths[i] - 1):
            for k in (1, 2, 3):
                goes_on = all(said[t + j] == ids[t + j + 1] for j in range(1, k) if t + j + 1 < lengths[i])
                assert bool(found.counted[k - 1][i][t]) == (t + k < lengths[i] and goes_on), (i, t, k)
                if k > 1 and found.held[k - 1][i][t]:
                    assert found.held[k - 2][i][t]
        assert all(
            bool((held <= counted).all()) for held, counted in zip((h[i] for h in found.held), (c[i] for c in found.counted), strict=True)
        )
    first, second = (sum(int(held.sum()) for held in found.held[k]) for k in (0, 1))
    assert first > second > 5
