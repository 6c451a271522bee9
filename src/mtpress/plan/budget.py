"""A format for each fused linear, so that the output keeps a byte budget and loses least by what was measured.

In: a checkpoint's headers and a recipe with `budget`; the error of each fused linear in each format (quantization/sensitivity.py). Out:
what can be reached, the choice, and the recipe with `formats` and `overrides` that says it: from there on a run is like any other.
Leaves out: measuring.

What is minimized is the sum of the errors. It is a knapsack with one choice a fused linear, solved exactly by dynamic programming over
the bytes above the smallest output: in steps of the greatest common divisor of what the choices add, where that makes at most MAX_STEPS
of them; else what they add is rounded up to one of MAX_STEPS equal steps, which keeps the budget and leaves at most a step for each
linear unused: the sum is no larger than the least one of a budget smaller by that.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.checkpoint.shard_writer import OutputTensor
from mtpress.errors import InputError
from mtpress.models.qwen3_5.names import FUSED_OF
from mtpress.plan.module_formats import BF16
from mtpress.plan.plan import LAYOUTS, Job, Plan, make_plan
from mtpress.plan.recipe import Formats, Recipe
from mtpress.progress import human_bytes

MAX_STEPS = 250_000
NUM_MEASURED = 16  # samples that formats are measured with


@dataclass(frozen=True)
class Group:
    """What vLLM loads as one linear: its layer, its name there, its members by full name, its bytes by candidate format."""

    layer: int
    linear: str
    modules: tuple[str, ...]
    component: str
    bytes: Mapping[str, int]
    num_params: int

    @property
    def title(self) -> str:
        return f"layers.{self.layer}.{self.linear}"


@dataclass(frozen=True)
class Choices:
    """All that a recipe with `budget` can make of a checkpoint. plans: candidate that is not bf16 → the plan with it throughout."""

    recipe: Recipe
    plans: Mapping[str, Plan]
    groups: tuple[Group, ...]

    @property
    def budget(self) -> int:
        assert self.recipe.budget is not None
        return self.recipe.budget.bytes

    @cached_property
    def kept_bytes(self) -> int:
        """What no choice changes."""
        name, plan = next(iter(self.plans.items()))
        return plan.output_bytes - sum(group.bytes[name] for group in self.groups)

    @property
    def least_bytes(self) -> int:
        return self.kept_bytes + sum(min(group.bytes.values()) for group in self.groups)

    @property
    def most_bytes(self) -> int:
        return self.kept_bytes + sum(max(group.bytes.values()) for group in self.groups)

    @property
    def least(self) -> Plan:
        """The plan of the smallest output."""
        return min(self.plans.values(), key=lambda plan: plan.output_bytes)

    def range_record(self) -> dict[str, Any]:
        return {"bytes": self.budget, "least_bytes": self.least_bytes, "most_bytes": self.most_bytes}


def choices(source: Checkpoint, recipe: Recipe) -> Choices:
    """InputError where no choice keeps the budget, or where BF16 does."""
    assert recipe.budget is not None
    candidates = recipe.budget.candidates
    quantized = [name for name in candidates if name != BF16]
    plans: dict[str, Plan] = {name: make_plan(source, with_formats(recipe, dict.fromkeys(recipe.quantize, name), {})) for name in quantized}
    some = plans[quantized[0]]
    groups = tuple(
        _group(job, step.layer, some.prefix, candidates)
        for step in some.steps
        if step.layer is not None
        for job in step.jobs
        if job.kind == "quantize"
    )
    found = Choices(recipe, plans, groups)
    least, most = (f"{size} bytes ({human_bytes(size)})" for size in (found.least_bytes, found.most_bytes))
    reach = f"outputs from {least} to {most} can be reached"
    if found.budget < found.least_bytes:
        raise InputError(f"recipe {recipe.name}: budget.bytes {found.budget} is too small: {reach}")
    if BF16 in candidates and found.budget >= found.most_bytes:
        raise InputError(f"recipe {recipe.name}: budget.bytes {found.budget} holds all of it in BF16, nothing is to be quantized: {reach}")
    return found


def _group(job: Job, layer: int, prefix: str, candidates: Sequence[str]) -> Group:
    modules = tuple(info.name.removesuffix(".weight") for info in job.sources)
    linear = modules[0].removeprefix(f"{prefix}layers.{layer}.")
    params = sum(info.num_params for info in job.sources)
    sizes = {name: job_bytes(job, name) for name in candidates}
    return Group(layer, FUSED_OF.get(linear, linear), modules, job.component, sizes, params)


def job_bytes(job: Job, name: str) -> int:
    """Bytes of a job's outputs, were it of this format."""
    if name == BF16:
        return sum(info.num_bytes for info in job.sources)
    made = (LAYOUTS[name].tensors(*info.shape) for info in job.sources)
    return sum(OutputTensor(*tensor).num_bytes for tensors in made for tensor in tensors)


def choose(sizes: Sequence[Mapping[str, int]], errors: Sequence[Mapping[str, float]], budget: int) -> list[str]:
    """One key of each mapping, so that the sizes add up to at most the budget, and the errors to the least.

    Of equal sums the smaller output is taken, of equal outputs the choice whose later entries are earlier in their mappings.
    AssertionError where no choice fits.
    """
    least = [min(size.values()) for size in sizes]
    room = budget - sum(least)
    assert room >= 0, "no choice fits"
    added = [{name: size - low for name, size in one.items()} for one, low in zip(sizes, least, strict=True)]
    room = min(room, sum(max(one.values()) for one in added))
    step = math.gcd(*(size for one in added for size in one.values())) or 1
    if room // step > MAX_STEPS:
        step = -(-room // MAX_STEPS)
    num_states = room // step + 1
    best = np.zeros(num_states)  # the least sum of errors with at most so many steps
    taken = np.zeros((len(sizes), num_states), dtype=np.uint8)
    for row, one, error in zip(taken, added, errors, strict=True):
        after = np.full(num_states, np.inf)
        for number, (name, size) in enumerate(one.items()):
            steps = -(-size // step)
            if steps >= num_states:
                continue
            reached = best[: num_states - steps] + error[name]
            better = reached < after[steps:]
            after[steps:][better] = reached[better]
            row[steps:][better] = number
        best = after
    state = int(np.argmax(best == best[-1]))
    chosen: list[str] = []
    for row, one in zip(taken[::-1], added[::-1], strict=True):
        name = list(one)[row[state]]
        state -= -(-one[name] // step)
        chosen.append(name)
    return chosen[::-1]


def choose_formats(found: Choices, errors: Sequence[Mapping[str, float]]) -> list[str]:
    """The format of each of found.groups. errors: format → what each loses; BF16, which loses nothing, need not be named.

    The few bytes of scalar scales count for BF16 too, so that what choices add has a large common divisor.
    """
    scalars = [max(_scalar_bytes(name) for name in group.bytes) * len(group.modules) for group in found.groups]
    sizes = [
        {name: size - _scalar_bytes(name) * len(group.modules) + spare for name, size in group.bytes.items()}
        for group, spare in zip(found.groups, scalars, strict=True)
    ]
    room = found.budget - found.kept_bytes
    least = sum(min(size.values()) for size in sizes)
    complete = [{name: error.get(name, 0.0) for name in group.bytes} for group, error in zip(found.groups, errors, strict=True)]
    return choose(sizes, complete, max(room, least))


def _scalar_bytes(name: str) -> int:
    if name == BF16:
        return 0
    return sum(OutputTensor(*tensor).num_bytes for tensor in LAYOUTS[name].tensors(1, 16) if not tensor[2])


def with_formats(recipe: Recipe, formats: Mapping[str, str], overrides: Mapping[str, str]) -> Recipe:
    """The recipe with these formats in place of its budget."""
    chosen = Formats.model_validate(dict(formats))
    return recipe.model_copy(update={"budget": None, "formats": chosen, "quantize": chosen.quantized, "overrides": dict(overrides)})


def chosen_recipe(found: Choices, formats: Sequence[str]) -> Recipe:
    """The recipe that gives each group its format: the one that most of a component's linears have for the component, overrides for others.

    A component that is BF16 throughout is so in the map; else the map has a format that is not, for overrides bring nothing back.
    """
    prefix = next(iter(found.plans.values())).prefix
    by_component: dict[str, str] = {}
    for part in found.recipe.quantize:
        wanted = [name for group, name in zip(found.groups, formats, strict=True) if group.component == part and name != BF16]
        by_component[part] = Counter(sorted(wanted)).most_common(1)[0][0] if wanted else BF16
    overrides = {
        module.removeprefix(prefix): name
        for group, name in zip(found.groups, formats, strict=True)
        if name != by_component[group.component]
        for module in group.modules
    }
    return with_formats(found.recipe, by_component, overrides)


def choice_record(found: Choices, formats: Sequence[str], errors: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """What was chosen and why, for the record: bytes and error of each group by format."""
    chosen = found.kept_bytes + sum(group.bytes[name] for group, name in zip(found.groups, formats, strict=True))
    weights = sum(group.num_params for group in found.groups)
    groups = [
        {"linear": group.title, "format": name, "bytes": dict(group.bytes), "error": {key: error.get(key, 0.0) for key in group.bytes}}
        for group, name, error in zip(found.groups, formats, errors, strict=True)
    ]
    return {
        **found.range_record(),
        "chosen_bytes": chosen,
        "bits_per_weight": round(8 * (chosen - found.kept_bytes) / weights, 3),
        "error": sum(error.get(name, 0.0) for name, error in zip(formats, errors, strict=True)),
        "groups": groups,
    }
