"""Which linears an engine leaves unquantized, by an ignore list: vLLM's matching as pure functions.

In: the entries of `ignore` (config.json) or `exclude_modules` (hf_quant_config.json) as they stand there, the renames of
checkpoint names into engine names, and the engine's own names of its linears (models/qwen3_5_engine.py). Out: for each
linear whether it is ignored, quantized, or refused because a fused group is split. Leaves out: what is stored.

The order is vLLM's: a trailing `X*` becomes `X` and `X.*`; starts are renamed; then an exact match, for a fused linear
over the names of its shards; then any entry that is part of the name; then fnmatch. Globs are never held against shards.
Source: vLLM 0.32, layers/quantization/modelopt.py (apply_vllm_mapper, is_layer_excluded), utils/quant_utils.py
(is_layer_skipped), models/utils.py (WeightsMapper). Its rule for experts is left out: the family here has none.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatch
from typing import Literal

Verdict = Literal["ignored", "quantized", "split"]
Renames = Sequence[tuple[str, str]]
Packed = Mapping[str, tuple[str, ...]]

WILDCARDS = frozenset("*?[")


def split_star(entry: str) -> tuple[str, ...]:
    """`X*` as the engine holds it: `X` and `X.*`; anything else as it is."""
    if len(entry) >= 2 and entry[-1] == "*" and entry[-2] != ".":
        return entry[:-1], f"{entry[:-1]}.*"
    return (entry,)


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


class IgnoreList:
    """An ignore list as the engine holds it after loading the target, which is what the draft is matched with too."""

    def __init__(self, entries: Iterable[str], renames: Renames) -> None:
        self.held = {entry: tuple(rename(part, renames) for part in split_star(entry)) for entry in entries}
        everything = [part for parts in self.held.values() for part in parts]
        self.exact = frozenset(everything)
        self.globs = [part for part in everything if WILDCARDS & set(part)]

    def verdict(self, prefix: str, packed: Packed) -> Verdict:
        """What becomes of the linear that the engine calls `prefix`; "split" is its ValueError "some but not all shards"."""
        shards = shards_of(prefix, packed)
        if prefix in self.exact:
            return "ignored"
        if shards:
            named = [shard in self.exact for shard in shards]
            if any(named):
                return "ignored" if all(named) else "split"
        if any(part in prefix for part in self.exact) or any(fnmatch(prefix, glob) for glob in self.globs):
            return "ignored"
        return "quantized"

    def idle(self, linears: Iterable[tuple[str, Packed]], others: Collection[str]) -> list[str]:
        """The entries, as written, that have no effect on any of these linears.

        others: engine names of modules whose format no list decides; an entry that names one of them is harmless, not idle.
        """
        names: list[str] = list(others)
        known: set[str] = set(others)
        for prefix, packed in linears:
            names.append(prefix)
            known.update((prefix, *shards_of(prefix, packed)))
        everything = "\n".join(names)

        def works(part: str) -> bool:
            return part in known or part in everything or (bool(WILDCARDS & set(part)) and any(fnmatch(n, part) for n in names))

        return [entry for entry, parts in self.held.items() if not any(works(part) for part in parts)]
