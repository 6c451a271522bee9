"""Which linears a modelopt config leaves unquantized: vLLM's matching of ignore lists, and of mixed precision, as pure functions.

In: the entries of `ignore` (config.json) or `exclude_modules` (hf_quant_config.json) and of `quantized_layers` as they stand there,
and the class that the engine builds. Out: for each linear whether it is ignored, quantized, or refused because a fused group is split.
Leaves out: what is stored.

The order is vLLM's: a trailing `X*` becomes `X` and `X.*`; starts are renamed; then an exact match, for a fused linear
over the names of its shards; then any entry that is part of the name; then fnmatch. Globs are never held against shards.
Source: vLLM 0.32, layers/quantization/modelopt.py (apply_vllm_mapper, is_layer_excluded), utils/quant_utils.py
(is_layer_skipped). Its rule for experts is left out: the family here has none.

Mixed precision: what the list does not spare is looked up in `quantized_layers` by its own name, then by those of its shards (one that
is named stands for all; two of different algorithms are refused), then as the start of a name; what is not there is in 16 bits.
Source: the same file, ModelOptMixedPrecisionConfig._resolve_quant_algo.
"""

from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatch
from typing import Any

from mtpress.models.qwen3_5.engine import RENAMES, EngineLinear, packed
from mtpress.quant_config.matching.matcher import Scheme, Verdict
from mtpress.quant_config.matching.names import rename, shards_of

WILDCARDS = frozenset("*?[")
GROUP_SIZE = 16
FP8 = Scheme("fp8", 8, -1, activations=True, static=True)
FP8_ALGOS = {
    "FP8": FP8,
    "FP8_PER_CHANNEL_PER_TOKEN": Scheme("fp8", 8, -1, activations=True, scale_of="channel"),
    "FP8_PB_WO": Scheme("fp8", 8, -1, activations=True, scale_of="block"),
}
NVFP4, W4A16 = (Scheme("nvfp4", 4, GROUP_SIZE, activations=activations) for activations in (True, False))
ALGOS = {"NVFP4": NVFP4, "W4A16_NVFP4": W4A16, **FP8_ALGOS}
OTHER_ALGOS = ("MXFP8",)  # which vLLM knows and mtpress does not check


def split_star(entry: str) -> tuple[str, ...]:
    """`X*` as the engine holds it: `X` and `X.*`; anything else as it is."""
    if len(entry) >= 2 and entry[-1] == "*" and entry[-2] != ".":
        return entry[:-1], f"{entry[:-1]}.*"
    return (entry,)


class IgnoreList:
    """An ignore list of modelopt. whole: how the linears that it does not name are stored."""

    expressions: tuple[str, ...] = ()
    malformed: tuple[str, ...] = ()  # a list has nothing that could be; whether it is one, its reader says

    def __init__(self, entries: Iterable[str], architecture: str, whole: Scheme = NVFP4) -> None:
        self.architecture = architecture
        self.held = {entry: tuple(rename(part, RENAMES[architecture]) for part in split_star(entry)) for entry in entries}
        everything = [part for parts in self.held.values() for part in parts]
        self.exact = frozenset(everything)
        self.globs = [part for part in everything if WILDCARDS & set(part)]
        self.whole = whole

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


class QuantizedLayers(IgnoreList):
    """A mixed-precision config. layers: its `quantized_layers`, as it stands there."""

    def __init__(self, layers: Any, entries: Iterable[str], architecture: str) -> None:
        super().__init__(entries, architecture)
        found = layers.items() if isinstance(layers, Mapping) else ()
        sound = {name: e["quant_algo"] for name, e in found if isinstance(e, Mapping) and isinstance(e.get("quant_algo"), str)}
        odd = [name for name, _ in found if name not in sound]
        self.malformed = (f"quantized_layers: the entry of {odd[0][:80]!r} has no quant_algo",) if odd else ()
        if not sound and not odd:
            self.malformed = ("quantized_layers must name at least one module with its quant_algo",)
        self.written = {name: rename(name, RENAMES[architecture]) for name in sound}
        self.algos = {self.written[name]: algo.upper() for name, algo in sound.items()}

    def _algos(self, linear: EngineLinear) -> set[str]:
        """The algorithms that the engine finds for a linear: none, one, or several, which it refuses."""
        names = _other_names(linear.prefix)
        for name in names:
            if name in self.algos:
                return {self.algos[name]}
        start, _, last = linear.prefix.rpartition(".")
        shards = packed(linear.part, self.architecture).get(last, ())
        found = {self.algos[name] for base in _other_names(start) for shard in shards if (name := f"{base}.{shard}") in self.algos}
        if found:
            return found
        inside = (algo for name in names for key, algo in self.algos.items() if key.startswith(f"{name}."))
        return set(list(inside)[:1])

    def verdict(self, linear: EngineLinear) -> Verdict:
        """As of a list; "split" is also the ValueError "Mixed quant_algo within fused layer"."""
        verdict = super().verdict(linear)
        if verdict != "quantized":
            return verdict
        algos = self._algos(linear)
        if len(algos) > 1:
            return "split"
        return "quantized" if algos & {*ALGOS, *OTHER_ALGOS} else "ignored"

    def scheme(self, linear: EngineLinear) -> Scheme | None:
        if self.verdict(linear) != "quantized":
            return None
        (algo,) = self._algos(linear)
        return ALGOS.get(algo, Scheme("other", 8, -1))

    def idle(self, linears: Iterable[EngineLinear], others: Collection[str]) -> list[str]:
        known = {"lm_head"}
        linears = list(linears)
        for linear in linears:
            known.update((linear.prefix, *shards_of(linear.prefix, packed(linear.part, self.architecture))))
        return super().idle(linears, others) + [name for name, renamed in self.written.items() if renamed not in known]


def _other_names(prefix: str) -> tuple[str, ...]:
    """The names under which vLLM looks for a linear."""
    names = [prefix, *(["lm_head"] if prefix.endswith(".lm_head") else [])]
    for one, other in (("language_model.model.", "model.language_model."), ("model.language_model.", "language_model.model.")):
        if prefix.startswith(one):
            names.append(other + prefix.removeprefix(one))
    return tuple(names)
