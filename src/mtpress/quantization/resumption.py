"""What a stopped run has left, held against the plan and the journal before anything is added to it.

In: a plan, and the writer that has taken a partial directory up. Out: nothing, or a PartialError: the directory stays as it is, and is
not gone on with. Leaves out: whether it is the same run (checkpoint/journal.py), and a shard that is half written, which is read when it is
opened again (checkpoint/shard_writer.py).
"""

import hashlib
from collections.abc import Sequence

from mtpress.checkpoint.journal import PartialError
from mtpress.checkpoint.shard_writer import ShardWriter
from mtpress.models.hidden_states import refuse_other_states
from mtpress.plan.plan import Plan
from mtpress.progress import Progress
from mtpress.quantization.rounders import unfinished_steps


def refuse_damage(plan: Plan, writer: ShardWriter, lengths: Sequence[int], silent: bool) -> None:
    """Reads what is finished again: the steps, the finished shards, the samples' states. lengths: tokens of each; none if weight-only."""
    assert writer.journal is not None
    _refuse_other_steps(plan, writer, in_order=bool(lengths))
    ends = {file: writer.journal.finished(file)[-1].end for file in writer.sha256}
    layer = next((step.layer for step in unfinished_steps(plan, writer) if step.layer is not None), None) or 0
    hidden_size = plan.source.text_config["hidden_size"]
    said = writer.states[next(step.title for step in plan.steps if step.layer == layer - 1)] if lengths and layer else {}
    if lengths and layer and not said:
        raise PartialError(f"{writer.directory}: its journal does not tell of hidden states; delete it to start over")
    total = sum(ends.values()) + len(said) * 2 * sum(lengths) * hidden_size
    with Progress("resume", total, silent=silent) as progress:
        for file, sha256 in writer.sha256.items():
            writer.hash_again(file, ends[file], sha256, hashlib.sha256(), lambda count, file=file: progress.advance(count, file))  # type: ignore[misc]
        refuse_other_states(
            writer.journal.directory, layer, lengths, hidden_size, said, lambda count: progress.advance(count, "hidden states")
        )


def _refuse_other_steps(plan: Plan, writer: ShardWriter, in_order: bool) -> None:
    """PartialError where a shard's lines are not the first of its steps, each with the matrices that it quantizes; in_order: and the
    finished steps not the first of all."""
    assert writer.journal is not None
    titles = [step.title for step in plan.steps if step.outputs]
    if in_order and writer.finished != set(titles[: len(writer.finished)]):
        raise PartialError(f"{writer.journal.directory}: lacks steps in between; delete {writer.directory} to start over")
    for file, tensors in writer.shards.items():
        places = {tensor.name: place for place, tensor in enumerate(tensors, 1)}
        steps = [step for step in plan.steps if step.outputs and step.outputs[0].name in places]
        planned = [(step.title, places[step.outputs[-1].name], set(step.quantized)) for step in steps]
        found = [(line.step, line.num_tensors, set(line.sources)) for line in writer.journal.finished(file)]
        if found != planned[: len(found)]:
            path = writer.journal.directory / f"{file}.jsonl"
            raise PartialError(f"{path}: is not what mtpress wrote for this plan; delete {writer.directory} to start over")
