"""Which linears a modelopt NVFP4 config leaves unquantized: vLLM's matching of ignore lists as pure functions.

In: the entries of `ignore` (config.json) or `exclude_modules` (hf_quant_config.json) as they stand there, and the class that
the engine builds. Out: for each linear whether it is ignored, quantized, or refused because a fused group is split.
Leaves out: what is stored.

The order is vLLM's: a trailing `X*` becomes `X` and `X.*`; starts are renamed; then an exact match, for a fused linear
over the names of its shards; then any entry that is part of the name; then fnmatch. Globs are never held against shards.
Source: vLLM 0.32, layers/quantization/modelopt.py (apply_vllm_mapper, is_layer_excluded), utils/quant_utils.py
(is_layer_skipped). Its rule for experts is left out: the family here has none.
"""

from collections.abc import Collection, Iterable
from fnmatch import fnmatch

from mtpress.matching.matcher import Scheme, Verdict
from mtpress.matching.names import rename, shards_of
from mtpress.models.qwen3_5_engine import RENAMES, EngineLinear, packed

WILDCARDS = frozenset("*?[")
GROUP_SIZE = 16


def split_star(entry: str) -> tuple[str, ...]:
    """`X*` as the engine holds it: `X` and `X.*`; anything else as it is."""
    if len(entry) >= 2 and entry[-1] == "*" and entry[-2] != ".":
        return entry[:-1], f"{entry[:-1]}.*"
    return (entry,)


class IgnoreList:
    """An ignore list of modelopt. activations: whether the linears that it does not name take NVFP4 activations (W4A4)."""

    malformed: tuple[str, ...] = ()  # a list has nothing that could be; whether it is one, its reader says

    def __init__(self, entries: Iterable[str], architecture: str, *, activations: bool = True) -> None:
        self.architecture = architecture
        self.held = {entry: tuple(rename(part, RENAMES[architecture]) for part in split_star(entry)) for entry in entries}
        everything = [part for parts in self.held.values() for part in parts]
        self.exact = frozenset(everything)
        self.globs = [part for part in everything if WILDCARDS & set(part)]
        self.whole = Scheme("nvfp4", 4, GROUP_SIZE, activations=activations)

    def verdict(self, linear: EngineLinear) -> Verdict:
        """What becomes of the linear; "split" is the ValueError "some but not all shards"."""
        prefix = linear.prefix
        shards = shards_of(prefix, packed(linear.part, self.architecture))
        if prefix in self.exact:
            return "ignored"
        if shards:
            named = [shard in self.exact for shard in shards]
            if any(named):
                return "ignored" if all(named) else "split"
        if any(part in prefix for part in self.exact) or any(fnmatch(prefix, glob) for glob in self.globs):
            return "ignored"
        return "quantized"

    def scheme(self, linear: EngineLinear) -> Scheme | None:
        return self.whole if self.verdict(linear) == "quantized" else None

    def idle(self, linears: Iterable[EngineLinear], others: Collection[str]) -> list[str]:
        names: list[str] = list(others)
        known: set[str] = set(others)
        for linear in linears:
            names.append(linear.prefix)
            known.update((linear.prefix, *shards_of(linear.prefix, packed(linear.part, self.architecture))))
        everything = "\n".join(names)

        def works(part: str) -> bool:
            return part in known or part in everything or (bool(WILDCARDS & set(part)) and any(fnmatch(n, part) for n in names))

        return [entry for entry, parts in self.held.items() if not any(works(part) for part in parts)]
