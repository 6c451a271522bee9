"""Which format each linear gets: the recipe's map of components, then its overrides, the later over the earlier.

In: the names of a checkpoint's linears and a recipe. Out: module → format, without those that stay in BF16. Leaves out: whether a
format takes the shape of a linear (plan/plan.py). Refused here: a pattern that matches nothing, and a fused linear of two formats, which
vLLM loads as one (modelopt.py, _resolve_quant_algo: ValueError).

A pattern of `overrides` is a module's name within the body ("layers.5.mlp.down_proj"), the name of what holds modules ("layers.0"),
a range of layers ("layers.60-63.mlp"), or has wildcards ("*.linear_attn.out_proj"). What stays in BF16 by the recipe's map, no pattern
brings back: it can only change the format of what is quantized, or take it out.
"""

import difflib
import re
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any

from mtpress.errors import InputError
from mtpress.models import family
from mtpress.models.qwen3_5.names import AB_LINEARS, FUSED, QUANTIZABLE
from mtpress.plan.recipe import Recipe

LM_HEAD, BF16 = "lm_head", "bf16"
LAYER_RANGE = re.compile(r"layers\.(\d{1,4})-(\d{1,4})(?=\.|$)")
NUM_NEAR = 3
NEED_INPUT = ("nvfp4", "fp8")
LM_HEAD_ONLY = "it is nvfp4_w4a16 or bf16: calibration ends before it, so there is no input_scale for it"


def formats_of(names: Iterable[str], recipe: Recipe, prefix: str, model_type: str) -> dict[str, str]:
    """Module → format, in the order of the names, which are those of tensors; prefix: of the body's.

    InputError for a pattern that matches none of the modules, and for a fused linear that would be of two formats.
    """
    chosen = dict(_by_component(names, recipe, prefix, model_type))
    if recipe.component_formats.get(LM_HEAD, BF16) != BF16 and LM_HEAD not in chosen:
        raise InputError(f"recipe {recipe.name}: lm_head is tied to the embeddings and stays in BF16; leave it out of `formats`")
    short = {module.removeprefix(prefix): module for module in chosen}
    for pattern, wanted in recipe.overrides.items():
        for one in _each_layer(pattern.removeprefix(prefix)):
            found = [module for name, module in short.items() if fnmatchcase(name, one) or fnmatchcase(name, f"{one}.*")]
            if not found:
                raise InputError(f"recipe {recipe.name}: overrides: {pattern[:80]!r} matches no quantized linear{_near(one, short)}")
            if LM_HEAD in found and wanted in NEED_INPUT:
                raise InputError(f"recipe {recipe.name}: overrides: {pattern[:80]!r} makes lm_head {wanted}; {LM_HEAD_ONLY}")
            chosen |= dict.fromkeys(found, wanted)
    _refuse_split(chosen, recipe)
    return {module: wanted for module, wanted in chosen.items() if wanted != BF16}


def _by_component(names: Iterable[str], recipe: Recipe, prefix: str, model_type: str) -> Iterator[tuple[str, str]]:
    """The recipe's map, module by module; what it leaves in BF16 is not there."""
    model: Any = family(model_type)
    formats = {part: wanted for part, wanted in recipe.component_formats.items() if wanted != BF16}
    by_linear = {linear: formats[part] for part in formats if part in QUANTIZABLE for linear in QUANTIZABLE[part]}
    if recipe.in_proj_ab != BF16:
        by_linear |= dict.fromkeys(AB_LINEARS, recipe.in_proj_ab)
    for name in names:
        module, _, last = name.rpartition(".")
        linear = module.removeprefix(f"{prefix}layers.{model.layer_index(name)}.")
        wanted = formats.get(LM_HEAD) if module == LM_HEAD else by_linear.get(linear)
        if last == "weight" and wanted is not None:
            yield module, wanted


def _each_layer(pattern: str) -> list[str]:
    """A pattern with a range of layers as one pattern a layer."""
    found = LAYER_RANGE.search(pattern)
    if found is None:
        return [pattern]
    first, last = int(found[1]), int(found[2])
    if last < first:
        raise InputError(f"overrides: {pattern[:80]!r}: a range of layers goes upwards, layers.{last}-{first}")
    return [f"{pattern[: found.start()]}layers.{layer}{pattern[found.end() :]}" for layer in range(first, last + 1)]


def _near(pattern: str, names: Iterable[str]) -> str:
    """What may have been meant, of names, of what holds them, and of linears in every layer."""
    known: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        known |= dict.fromkeys(".".join(parts[:end]) for end in range(1, len(parts) + 1))
        known |= {f"*.{'.'.join(parts[2:])}": None} if len(parts) > 2 else {}
    near = difflib.get_close_matches(pattern[:80], [name for name in known if name != "layers"], n=NUM_NEAR, cutoff=0.5)
    return f"; near: {', '.join(near)}" if near else "; they are called layers.0.mlp.down_proj and the like"


def _refuse_split(chosen: dict[str, str], recipe: Recipe) -> None:
    for module in chosen:
        for fused, parts in FUSED.items():
            start = module.removesuffix(parts[0])
            if start == module:
                continue
            formats = {part: chosen.get(f"{start}{part}", BF16) for part in parts}
            if len(set(formats.values())) > 1:
                said = ", ".join(f"{part.rpartition('.')[2]} {wanted}" for part, wanted in formats.items())
                raise InputError(
                    f"recipe {recipe.name}: vLLM loads {start}{fused} as one linear of one format, here: {said}; override all of them"
                )
