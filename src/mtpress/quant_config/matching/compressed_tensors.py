"""Which linears a compressed-tensors config quantizes, and how: vLLM's matching of targets and ignore as pure functions.

In: a quantization_config of compressed-tensors as it stands, and the class that the engine builds. Out: a verdict and a
scheme for each linear. Leaves out: what is stored, transforms, and whether there is a kernel.

An entry is a whole name or, after `re:`, a regular expression held against the start of a name; names with a dot are renamed
as weights are, expressions and names without a dot are not (`lm_head` is not `language_model.lm_head`). `ignore` comes first:
it may name a fused linear or all of its shards. Then the targets: a name, then the shards of a fused linear, then a part of
the name of the class (`Linear` is part of every one but ParallelLMHead).
Source: vLLM 0.32, compressed_tensors/compressed_tensors.py (from_config, apply_vllm_mapper, get_scheme_dict),
compressed_tensors/utils.py, utils/config_utils.py; compressed-tensors 0.17, quant_args.py (the strategy that a group_size implies).
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from mtpress.models.qwen3_5.engine import RENAMES, EngineLinear, layer_class, packed
from mtpress.quant_config.matching import expressions
from mtpress.quant_config.matching.matcher import FP8_BLOCK, Scheme, Verdict
from mtpress.quant_config.matching.names import every_name, rename, shards_of

EXPRESSION = "re:"
PACK_QUANTIZED = "pack-quantized"
# Formats under which vLLM asks for input_activations wherever weights are integers.
WITH_ACTIVATIONS = ("naive-quantized", "int-quantized", "float-quantized", "nvfp4-pack-quantized")


def matches(name: str, entry: str) -> bool:
    """Whether an entry is the name or, after `re:`, an expression that its start matches."""
    if entry.startswith(EXPRESSION):
        return expressions.matches(entry.removeprefix(EXPRESSION), name)
    return entry == name


def _matches_class(name: str, target: str) -> bool:
    return matches(name, target) if target.startswith(EXPRESSION) else target.lower() in name.lower()


def scheme_of(group: Mapping[str, Any], layout: Any) -> Scheme:
    """What a config group says of the linears it targets; layout: the `format` of the whole config, used where it has none."""
    weights, inputs = group.get("weights"), group.get("input_activations")
    weights = weights if isinstance(weights, Mapping) else {}
    size, bits = weights.get("group_size"), weights.get("num_bits", 8)
    size, bits = (value if type(value) is int else None for value in (size, bits))
    implied = "block" if weights.get("block_structure") else "tensor" if size is None else "group" if size > 0 else "channel"
    strategy = weights.get("strategy") or implied
    symmetric, kind = weights.get("symmetric", True) is True, weights.get("type", "int")
    said = Scheme("other", bits or 0, size or -1, symmetric, bool(inputs))
    if kind == "float" and (bits, size, strategy, symmetric) == (4, 16, "tensor_group", True):
        return Scheme("nvfp4", 4, 16, True, bool(inputs))
    whole = (group.get("format") if group.get("format") is not None else layout) == PACK_QUANTIZED and strategy in ("group", "channel")
    if kind == "int" and whole and not inputs and bits and not weights.get("dynamic"):
        return Scheme("int", bits, said.group_size, symmetric)
    if kind == "float" and bits == 8 and symmetric and not weights.get("dynamic"):
        return _fp8_scheme(group, layout, weights, strategy) or said
    return said


def _fp8_scheme(group: Mapping[str, Any], layout: Any, weights: Mapping[str, Any], strategy: Any) -> Scheme | None:
    """FP8 as vLLM has a scheme for it: E4M3 under a scale a tensor, row or block; None for what it refuses."""
    inputs, block = group.get("input_activations"), weights.get("block_structure")
    if (group.get("format") if group.get("format") is not None else layout) not in WITH_ACTIVATIONS:
        return None
    size = (block[0], block[1]) if isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block) else None
    if strategy not in ("tensor", "channel", "block") or (strategy == "block") != (size is not None):
        return None
    static = False
    if inputs:
        if not isinstance(inputs, Mapping) or inputs.get("type", "int") != "float" or inputs.get("num_bits", 8) != 8:
            return None
        static = not inputs.get("dynamic")
        if static and (inputs.get("strategy", "tensor") != "tensor" or inputs.get("symmetric", True) is not True or strategy == "block"):
            return None
    return Scheme("fp8", 8, -1, True, bool(inputs), strategy, static, size or FP8_BLOCK)


class ConfigGroups:
    """The groups and the ignore list of a compressed-tensors config."""

    def __init__(self, content: Mapping[str, Any], architecture: str) -> None:
        self.architecture = architecture
        odd: list[str] = []
        entries = content.get("ignore", [])
        if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
            odd.append("ignore must be a list of strings")
            entries = [entry for entry in entries if isinstance(entry, str)] if isinstance(entries, list) else []
        self.ignore = {entry: self._renamed(entry) for entry in entries}
        targets = _targets(content, odd)
        self.targets = {self._renamed(target): scheme for target, scheme in targets.items()}
        self.written = {self._renamed(target): target for target in targets}
        entries = (*self.ignore, *self.targets)
        self.expressions = tuple(entry.removeprefix(EXPRESSION) for entry in entries if entry.startswith(EXPRESSION))
        odd += [f"{EXPRESSION + text[:80]!r} is no regular expression" for text in self.expressions if not expressions.is_expression(text)]
        self.malformed = tuple(odd)

    def _renamed(self, entry: str) -> str:
        return rename(entry, RENAMES[self.architecture]) if "." in entry and not entry.startswith(EXPRESSION) else entry

    def _ignored(self, linear: EngineLinear) -> list[bool]:
        """For each shard, or for the linear as a whole, whether an entry names it."""
        if any(matches(linear.prefix, entry) for entry in self.ignore.values()):
            return [True]
        shards = shards_of(linear.prefix, packed(linear.part, self.architecture))
        return [any(matches(shard, entry) for entry in self.ignore.values()) for shard in shards] or [False]

    def _target(self, linear: EngineLinear) -> str | None:
        for target in self.targets:
            if matches(linear.prefix, target):
                return target
        table = packed(linear.part, self.architecture)
        fused = next((name for name in table if linear.prefix.endswith(name)), None)
        if fused is not None:
            shards = [linear.prefix.replace(fused, shard) for shard in table[fused]]
            found = [next((target for target in self.targets if matches(shard, target)), None) for shard in shards]
            if all(found):
                return found[0]
        return next((target for target in self.targets if _matches_class(layer_class(linear), target)), None)

    def verdict(self, linear: EngineLinear) -> Verdict:
        """What becomes of the linear; "split" is the ValueError "different quantization schemes for the shards"."""
        ignored = self._ignored(linear)
        if any(ignored):
            return "ignored" if all(ignored) else "split"
        return "ignored" if self._target(linear) is None else "quantized"

    def scheme(self, linear: EngineLinear) -> Scheme | None:
        target = self._target(linear)
        return self.targets[target] if target is not None and self.verdict(linear) == "quantized" else None

    def idle(self, linears: Iterable[EngineLinear], others: Collection[str]) -> list[str]:
        linears = tuple(linears)
        names = every_name(linears, self.architecture, others)
        classes = {layer_class(linear) for linear in linears}

        def works(held: str) -> bool:
            return any(matches(name, held) for name in names) if held.startswith(EXPRESSION) else held in names

        targets = [target for target in self.targets if not works(target) and not any(_matches_class(name, target) for name in classes)]
        return [*(entry for entry, held in self.ignore.items() if not works(held)), *(self.written[target] for target in targets)]


def _targets(content: Mapping[str, Any], odd: list[str]) -> dict[str, Scheme]:
    """Target → its scheme, in the order of the config. A group for attention alone is one of the KV cache, and passed over."""
    found: dict[str, Scheme] = {}
    groups = content.get("config_groups", {})
    if not isinstance(groups, Mapping):
        odd.append("config_groups must be an object")
        groups = {}
    for name, group in groups.items():
        targets = group.get("targets") if isinstance(group, Mapping) else None
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            odd.append(f"config_groups.{str(name)[:40]}.targets must be a list of strings")
        elif not (len(targets) == 1 and targets[0].endswith("Attention")):
            if not isinstance(group.get("weights"), Mapping):
                odd.append(f"config_groups.{str(name)[:40]}.weights must be an object")
            elif _lacks_activations(group, content.get("format")):
                odd.append(f"config_groups.{str(name)[:40]}: integer weights without input_activations are of format {PACK_QUANTIZED}")
            found |= dict.fromkeys(targets, scheme_of(group, content.get("format")))
    return found


def _lacks_activations(group: Mapping[str, Any], layout: Any) -> bool:
    said = group.get("format") if group.get("format") is not None else layout
    return said in WITH_ACTIVATIONS and not group.get("input_activations") and group["weights"].get("type", "int") != "float"
