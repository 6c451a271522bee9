"""Which linears a config of quant_method fp8 quantizes, and how: the matching of vLLM's Fp8Config as pure functions.

In: a quantization_config as Qwen's FP8 releases have it, and the class that the engine builds. Out: a verdict and a scheme for each
linear. Leaves out: what is stored.

Every linear but lm_head is FP8, unless `ignored_layers` or, where that is empty, `modules_to_not_convert` names it whole, after starts
are renamed as weights are. A fused linear is spared by its own name, or by those of all of its shards. With weight_block_size each block
has a scale, weight_scale_inv, and the engine makes those of the activations; without it each tensor has one.
Source: vLLM 0.32, layers/quantization/fp8.py (from_config, get_quant_method), utils/quant_utils.py (is_layer_skipped, "exact").
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from mtpress.models.qwen3_5.engine import RENAMES, EngineLinear, layer_class, packed
from mtpress.quant_config.matching.matcher import FP8_BLOCK, SCALE, SCALE_INV, Scheme, Verdict
from mtpress.quant_config.matching.names import every_name, rename, shards_of

LISTS = ("ignored_layers", "modules_to_not_convert")  # vLLM reads the first that has an entry
ACTIVATION_SCHEMES = ("static", "dynamic")


class ModulesToNotConvert:
    """The list, with how every linear that it does not name is stored."""

    expressions: tuple[str, ...] = ()  # names are compared whole

    def __init__(self, content: Mapping[str, Any], architecture: str) -> None:
        self.architecture = architecture
        odd: list[str] = []
        key = next((key for key in LISTS if content.get(key)), LISTS[1])
        entries = content.get(key) or []
        if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
            odd.append(f"{key} must be a list of strings")
            entries = [entry for entry in entries if isinstance(entry, str)] if isinstance(entries, list) else []
        self.held = {entry: rename(entry, RENAMES[architecture]) for entry in entries}
        self.names = frozenset(self.held.values())
        activations, block = content.get("activation_scheme"), content.get("weight_block_size")
        if activations not in ACTIVATION_SCHEMES:
            odd.append(f"activation_scheme must be one of {', '.join(ACTIVATION_SCHEMES)}")
        if block is not None and not (isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
            odd.append("weight_block_size must be two numbers")
            block = None
        if block is not None and activations == "static":
            odd.append("weight_block_size goes with the dynamic activation_scheme alone")
        size = (block[0], block[1]) if block is not None else None
        scale_of, name = ("tensor", SCALE) if size is None else ("block", SCALE_INV)
        static = activations == "static" and size is None
        self.whole = Scheme("fp8", 8, -1, True, True, scale_of, static, size or FP8_BLOCK, name)  # type: ignore[arg-type]
        self.malformed = tuple(odd)

    def verdict(self, linear: EngineLinear) -> Verdict:
        """What becomes of the linear; "split" is the ValueError "some but not all shards"."""
        if layer_class(linear) == "ParallelLMHead" or linear.prefix in self.names:
            return "ignored"
        named = [shard in self.names for shard in shards_of(linear.prefix, packed(linear.part, self.architecture))]
        if any(named):
            return "ignored" if all(named) else "split"
        return "quantized"

    def scheme(self, linear: EngineLinear) -> Scheme | None:
        return self.whole if self.verdict(linear) == "quantized" else None

    def idle(self, linears: Iterable[EngineLinear], others: Collection[str]) -> list[str]:
        names = every_name(linears, self.architecture, others) | {"lm_head"}  # never quantized, under whatever name
        return [entry for entry, held in self.held.items() if held not in names]
