"""Which linears an AutoRound config quantizes, and how: the matching of vLLM's INC as pure functions.

In: a quantization_config of AutoRound as it stands, and the class that the engine builds. Out: a verdict and a scheme for
each linear. Leaves out: what is stored, and whether there is a kernel.

A key of `extra_config` is renamed as weights are, then holds for the linear of that name, for a linear whose name ends in
`.key`, for one shard of a fused linear, or, where it has a character that is special in expressions, for every name that
re.search finds it in. A linear without an entry is quantized if its name starts with an entry of `block_name_to_quantize`;
without that key, whatever it is: vision tower and draft head too. lm_head is quantized only where an entry says so.
Source: vLLM 0.32, layers/quantization/inc/inc.py (from_config, apply_vllm_mapper, get_quant_method), inc/config_parser.py.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from mtpress.models.qwen3_5.engine import RENAMES, EngineLinear, layer_class, packed
from mtpress.quant_config.matching import expressions
from mtpress.quant_config.matching.matcher import Scheme, Verdict
from mtpress.quant_config.matching.names import every_name, rename

SPECIAL = frozenset(r"*+?^$()[]{}|\\")
WHOLE_BITS = 16
Settings = tuple[int, Any, Any]  # bits, group_size, sym


class LayerConfig:
    """extra_config and block_name_to_quantize, with what holds for every other linear."""

    def __init__(self, content: Mapping[str, Any], architecture: str) -> None:
        self.architecture = architecture
        odd: list[str] = []
        self.bits, self.group_size, self.sym = content.get("bits"), content.get("group_size"), content.get("sym", True)
        if type(self.bits) is not int:
            odd.append("bits must be a number")
            self.bits = 4
        self.integer = content.get("data_type", "int") == "int"
        self.blocks = {name: rename(name, RENAMES[architecture]) for name in _block_names(content, odd)}
        extra = content.get("extra_config") or {}
        if not isinstance(extra, Mapping):
            odd.append("extra_config must be an object")
            extra = {}
        odd += [f"extra_config: {key[:80]!r} must be an object" for key, said in extra.items() if not isinstance(said, Mapping)]
        odd += [f"extra_config: bits of {key[:80]!r} must be a number" for key, said in extra.items() if _odd_bits(said)]
        self.keys = {
            key: rename(key, RENAMES[architecture]) for key, said in extra.items() if isinstance(said, Mapping) and not _odd_bits(said)
        }
        self.extra: dict[str, Mapping[str, Any]] = {self.keys[key]: extra[key] for key in self.keys}
        self.endings = {f".{key}": key for key in self.extra}
        self.expressions = tuple(key for key in self.extra if SPECIAL & set(key))
        self.resolved: dict[EngineLinear, Settings | None] = {}
        self.malformed = tuple(odd)

    def _named(self, name: str) -> Mapping[str, Any] | None:
        """The entry of a name: its own, else the first expression found in it."""
        if name in self.extra:
            return self.extra[name]
        return next((self.extra[key] for key in self.expressions if _found(key, name)), None)

    def _settings(self, name: str, quantized: bool) -> Settings:
        said = self._named(name) or {}
        whole = (self.bits, self.group_size, self.sym) if quantized else (WHOLE_BITS, -1, True)
        return said.get("bits", whole[0]), said.get("group_size", whole[1]), said.get("sym", whole[2])

    def _resolve(self, linear: EngineLinear) -> Settings | None:
        """What holds for the linear; None for a fused one whose shards differ."""
        if linear not in self.resolved:
            self.resolved[linear] = self._find(linear)
        return self.resolved[linear]

    def _find(self, linear: EngineLinear) -> Settings | None:
        prefix = linear.prefix
        if prefix in self.extra:
            return self._settings(prefix, True)
        ending = next((key for dotted, key in self.endings.items() if prefix.endswith(dotted)), None)
        if ending is not None:
            return self._settings(ending, True)
        quantized = layer_class(linear) != "ParallelLMHead"
        if self.blocks:
            quantized = any(prefix.startswith(name) for name in self.blocks.values())
        if self.extra:
            for fused, parts in packed(linear.part, self.architecture).items():
                if prefix.count(fused) == 1:
                    shards = [prefix.replace(fused, part) for part in parts]
                    if any(self._named(shard) is not None for shard in shards):
                        found = [self._settings(shard, quantized) for shard in shards]
                        return found[0] if all(settings == found[0] for settings in found) else None
        return self._settings(prefix, quantized)

    def verdict(self, linear: EngineLinear) -> Verdict:
        """What becomes of the linear; "split" is the ValueError "requires consistent quant config"."""
        for name in (linear.prefix, f"model.{linear.prefix}"):
            if name in self.extra and self.extra[name].get("bits", WHOLE_BITS) >= WHOLE_BITS:
                return "ignored"
        found = self._resolve(linear)
        if found is None:
            return "split"
        return "quantized" if found[0] < WHOLE_BITS else "ignored"

    def scheme(self, linear: EngineLinear) -> Scheme | None:
        found = self._resolve(linear)
        if found is None or self.verdict(linear) != "quantized":
            return None
        bits, size, sym = found
        return Scheme("int" if self.integer and type(size) is int else "other", bits, size if type(size) is int else -1, bool(sym))

    def idle(self, linears: Iterable[EngineLinear], others: Collection[str]) -> list[str]:
        linears = tuple(linears)
        prefixes = {linear.prefix for linear in linears}
        names = every_name(linears, self.architecture, others)

        def works(key: str) -> bool:
            named = key in names or key.removeprefix("model.") in prefixes
            return named or any(name.endswith(f".{key}") for name in (*prefixes, *others)) or any(_found(key, name) for name in names)

        return [
            *(entry for entry, key in self.keys.items() if not works(key)),
            *(entry for entry, start in self.blocks.items() if not any(prefix.startswith(start) for prefix in prefixes)),
        ]


def _found(key: str, name: str) -> bool:
    return bool(SPECIAL & set(key)) and expressions.matches(key, name, "search")


def _odd_bits(said: Any) -> bool:
    return isinstance(said, Mapping) and type(said.get("bits", WHOLE_BITS)) is not int


def _block_names(content: Mapping[str, Any], odd: list[str]) -> list[str]:
    """block_name_to_quantize as a list; older configs call it to_quant_block_names. Nothing is stripped at the commas."""
    key = next((key for key in ("block_name_to_quantize", "to_quant_block_names") if key in content), None)
    names = content[key] if key is not None else None
    if isinstance(names, str):
        return names.split(",")
    if names is not None and (not isinstance(names, list) or not all(isinstance(name, str) for name in names)):
        odd.append(f"{key} must be a string or a list of strings")
        return []
    return names or []
