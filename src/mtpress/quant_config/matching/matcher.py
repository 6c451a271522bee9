"""What a matcher answers: of each linear of the engine, whether a quantization config leaves it in BF16.

In: nothing; these are the types. Out: `Matcher`, which every file of this folder has one class for, `Verdict` and `Scheme`.
Leaves out: what is stored, and whether the engine has a kernel for it.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

from mtpress.models.qwen3_5.engine import EngineLinear

ScaleOf = Literal["tensor", "channel", "block"]
FP8_BLOCK = (128, 128)
SCALE, SCALE_INV = "weight_scale", "weight_scale_inv"  # of FP8; quant_method fp8 has the second for blocks, and means the same by it

# "split" is the engine's refusal of a fused linear of which the config names some shards and not the others.
Verdict = Literal["ignored", "quantized", "split"]


@dataclass(frozen=True)
class Scheme:
    """How a config says a linear is stored.

    bits: of one weight. group_size: along K, -1 for one group a row. activations: whether they are quantized too. "other" is
    whatever mtpress does not check: MXFP4, INT8 and the like. Of FP8: what has a scale of its own (the tensor, each row, each
    block), the name of that scale, and whether the scale of activations is stored (static) or made by the engine.
    """

    kind: Literal["nvfp4", "fp8", "int", "other"]
    bits: int
    group_size: int
    symmetric: bool = True
    activations: bool = False
    scale_of: ScaleOf = "tensor"
    static: bool = False
    block: tuple[int, int] = FP8_BLOCK
    scale_name: str = SCALE


class Matcher(Protocol):
    """A quantization config as the engine holds it after loading the target, which is what the draft is matched with too.

    malformed: what in the content is not what the engine reads there, a sentence each; it is taken as if it were not there.
    expressions: the regular expressions of the content, which expressions.py runs within a budget.
    """

    malformed: tuple[str, ...]
    expressions: tuple[str, ...]

    def verdict(self, linear: EngineLinear) -> Verdict:
        """What the engine takes the linear for."""

    def scheme(self, linear: EngineLinear) -> Scheme | None:
        """How the config says the linear is stored; None unless its verdict is "quantized"."""

    def idle(self, linears: Iterable[EngineLinear], others: Collection[str]) -> list[str]:
        """The entries, as written, that have no effect on any of these linears.

        others: engine names of modules whose format no config decides; an entry that names one of them is harmless, not idle.
        """
