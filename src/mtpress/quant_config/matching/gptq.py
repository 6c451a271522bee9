"""Which linears a GPTQ config quantizes: vLLM's matching as pure functions.

In: a quantization_config of GPTQ as it stands, the class that the engine builds, and the dtypes of everything stored. Out: a
verdict and a scheme for each linear. Leaves out: whether there is a kernel.

`modules_in_block_to_quantize` holds parts of names, renamed as weights are; where it is not there, every module that has a
tensor of another dtype than float16, bfloat16 or float32 stands for it, and where that leaves nothing, everything is quantized.
`dynamic` comes on top: its keys are expressions held against the start of an engine name; `-:` leaves a linear in BF16, `+:`
changes how it is stored, and the first that matches counts. lm_head is quantized only where `lm_head` is true. A `-:` key with
`mtp` in it takes the whole draft layer out, whatever it matches; mtp.fc goes by the rules above.
Source: vLLM 0.32, layers/quantization/auto_gptq.py, utils/gptq_utils.py, models/qwen3_5_mtp.py.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from mtpress.models.qwen3_5.engine import RENAMES, EngineLinear, layer_class, packed
from mtpress.quant_config.matching import expressions
from mtpress.quant_config.matching.expressions import is_expression
from mtpress.quant_config.matching.matcher import Scheme, Verdict
from mtpress.quant_config.matching.names import every_name, rename, shards_of

WHOLE_DTYPES = ("F16", "BF16", "F32")
NOT, AND = "-:", "+:"


def quantized_modules(dtypes: Mapping[str, str]) -> list[str]:
    """The modules that vLLM takes as quantized where the config does not say: tensor name → safetensors dtype."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name, dtype in dtypes.items() if dtype not in WHOLE_DTYPES))


class ModuleList:
    """modules_in_block_to_quantize, said or derived, and dynamic."""

    def __init__(self, content: Mapping[str, Any], architecture: str, dtypes: Mapping[str, str]) -> None:
        self.architecture = architecture
        odd: list[str] = []
        self.bits, self.group_size, self.sym = content.get("bits"), content.get("group_size"), content.get("sym")
        self.lm_head = bool(content.get("lm_head", False))
        said = _flat(content.get("modules_in_block_to_quantize") or [])
        if said is None:
            odd.append("modules_in_block_to_quantize must be a list of strings, or of lists of them")
        self.said = {name: rename(name, RENAMES[architecture]) for name in said or []}
        self.modules = list(self.said.values()) or [rename(name, RENAMES[architecture]) for name in quantized_modules(dtypes)]
        dynamic = content.get("dynamic", {})
        if not isinstance(dynamic, Mapping):
            odd.append("dynamic must be an object, or not be there")
            dynamic = {}
        odd += [f"dynamic: {key[:80]!r} is no regular expression" for key in dynamic if not is_expression(_expression(key))]
        odd += [f"dynamic: {key[:80]!r} must be an object" for key, value in dynamic.items() if not isinstance(value, Mapping)]
        self.dynamic = {key: value if isinstance(value, Mapping) else {} for key, value in dynamic.items()}
        self.malformed = tuple(odd)
        self.expressions = tuple(map(_expression, dynamic))

    def _override(self, prefix: str) -> tuple[str, Mapping[str, Any]] | None:
        return next((entry for entry in self.dynamic.items() if _starts(entry[0], prefix)), None)

    def verdict(self, linear: EngineLinear) -> Verdict:
        """What becomes of the linear; "split" is the ValueError "some but not all shards"."""
        if (
            linear.part == "draft"
            and linear.prefix.startswith("mtp.layers.")
            and any(k.startswith(NOT) and "mtp" in k for k in self.dynamic)
        ):
            return "ignored"
        if layer_class(linear) == "ParallelLMHead" and not self.lm_head:
            return "ignored"
        names = shards_of(linear.prefix, packed(linear.part, self.architecture)) or (linear.prefix,)
        named = [not self.modules or any(part in name for part in self.modules) for name in names]
        if any(named) and not all(named):
            return "split"
        override = self._override(linear.prefix)
        return "quantized" if named[0] and not (override is not None and override[0].startswith(NOT)) else "ignored"

    def scheme(self, linear: EngineLinear) -> Scheme | None:
        if self.verdict(linear) != "quantized":
            return None
        override = self._override(linear.prefix)
        said = override[1] if override is not None else {}
        bits, size = (
            value if type(value) is int else 0 for value in (said.get("bits", self.bits), said.get("group_size", self.group_size))
        )
        return Scheme("int", bits, size, said.get("sym", self.sym) is True)

    def idle(self, linears: Iterable[EngineLinear], others: Collection[str]) -> list[str]:
        linears = tuple(linears)
        everything = "\n".join(every_name(linears, self.architecture, others))
        names = [*(linear.prefix for linear in linears), *others]
        return [
            *(entry for entry, held in self.said.items() if held not in everything),
            *(key for key in self.dynamic if not any(_starts(key, name) for name in names) and not (key.startswith(NOT) and "mtp" in key)),
        ]


def _expression(key: str) -> str:
    return key.removeprefix(NOT) if key.startswith(NOT) else key.removeprefix(AND)


def _starts(key: str, name: str) -> bool:
    return expressions.matches(_expression(key), name)


def _flat(names: Any) -> list[str] | None:
    """A list of strings, or of lists of strings, as one list; None for anything else."""
    if not isinstance(names, list):
        return None
    if names and all(isinstance(name, list) for name in names):
        names = [name for inner in names for name in inner]
    return names if all(isinstance(name, str) for name in names) else None
