"""Names of linears as vLLM turns them: from the checkpoint's into its own, and from a fused linear's into its shards'.

Source: vLLM 0.32, models/utils.py (WeightsMapper), layers/quantization/utils/quant_utils.py, config_utils.py, gptq_utils.py.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence

from mtpress.models.qwen3_5.engine import EngineLinear, packed

Renames = Sequence[tuple[str, str]]
Packed = Mapping[str, tuple[str, ...]]


def rename(name: str, renames: Renames) -> str:
    """A checkpoint name as the engine's; one rename after the other."""
    for old, new in renames:
        if name.startswith(old):
            name = name.replace(old, new, 1)
    return name


def shards_of(prefix: str, packed: Packed) -> tuple[str, ...]:
    """The names under which the shards of a fused linear would stand; empty for a linear that is not fused."""
    last = prefix.rpartition(".")[2]
    return tuple(prefix.replace(last, shard) for shard in packed.get(last, ()))


def every_name(linears: Iterable[EngineLinear], architecture: str, others: Collection[str]) -> set[str]:
    """The names that an entry may hold: linears, shards of fused ones, and the modules that no config decides."""
    known = set(others)
    for linear in linears:
        known.update((linear.prefix, *shards_of(linear.prefix, packed(linear.part, architecture))))
    return known
