"""inspect: what a checkpoint holds, from its headers alone.

In: a directory or Hub id. Out: an `InspectResult`: tensors, parameters and bytes by component, the quantization that the
config files declare and whether it is what is stored, the state of the draft head, and what each shipped recipe would
make of it and where that fits. Leaves out: judging the whole (`mtpress check`); no weight is read, no torch imported.
"""

import argparse
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtpress import terminal
from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.checkpoint.safetensors import TensorInfo
from mtpress.engine.memory import fit
from mtpress.engine.memory.served_model import num_params, stored_bits
from mtpress.errors import InputError
from mtpress.models.qwen3_5.names import COMPONENT_TITLES, COMPONENTS
from mtpress.plan.plan import make_plan
from mtpress.plan.recipe import load_recipe, shipped
from mtpress.progress import human_bytes
from mtpress.quant_config import stored
from mtpress.quant_config.view import Subject
from mtpress.rules import draft_head, ignore_lists, names, quantization
from mtpress.rules.rule import apply
from mtpress.terminal import count

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Component:
    """num_params counts what the model computes with: a 4-bit weight is one, a scale is none. dtypes: name → tensors.

    bits: what one parameter takes, with its share of the scales. formats: stored format → bytes of its modules.
    """

    num_tensors: int
    num_params: int
    num_bytes: int
    dtypes: dict[str, int]
    bits: float | None
    formats: dict[str, int]


@dataclass(frozen=True)
class Quantization:
    """declared: config file → format; modules: stored format → how many; problems: where these differ.

    bits, group_size, symmetric, packing: of what is declared; None where modules differ, or it is no format that mtpress knows.
    """

    declared: dict[str, str]
    kv_cache: str
    bits: int | None
    group_size: int | None
    symmetric: bool | None
    packing: str | None
    modules: dict[str, int]
    agrees: bool
    problems: tuple[str, ...]


@dataclass(frozen=True)
class DraftHead:
    """state: "whole", or the first of what is wrong: missing, misplaced, unindexed, quantized, not-ignored, …, none.

    ignored: whether the ignore list spares all of it; None where nothing is declared quantized.
    """

    state: str
    num_layers_declared: int
    num_tensors: int
    ignored: bool | None
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Build:
    """What a recipe would make: its bytes and, by GPU memory, the tokens of context there is room for; or why it cannot."""

    num_bytes: int | None
    context_tokens: dict[str, int] | None
    refusal: str | None


@dataclass(frozen=True)
class InspectResult:
    """Everything `mtpress inspect` knows. as_it_is: the checkpoint itself as a build."""

    path: str
    architecture: str
    layers: dict[str, int]
    num_tensors: int
    num_params: int
    num_bytes: int
    num_shards: int
    num_unindexed: int
    names: tuple[str, ...]
    components: dict[str, Component]
    quantization: Quantization | None
    draft_head: DraftHead
    as_it_is: Build
    recipes: dict[str, Build]

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"fit_rule": fit.RULE}


def inspect(path: str | Path) -> InspectResult:
    """Describes a checkpoint of a family that mtpress knows; InputError where headers or config cannot be read."""
    checkpoint = Checkpoint.open(path)
    subject = Subject(checkpoint)
    components = _components(subject)
    config = checkpoint.config
    kv_cache_dtype = "fp8" if subject.declared is not None and subject.declared.kv_cache == "fp8" else "auto"
    return InspectResult(
        path=str(checkpoint.path),
        architecture=subject.architecture,
        layers=dict(Counter(subject.model.layer_types(config))),
        num_tensors=len(checkpoint.tensors),
        num_params=sum(part.num_params for part in components.values()),
        num_bytes=checkpoint.num_bytes,
        num_shards=len(checkpoint.shards),
        num_unindexed=len(checkpoint.unindexed),
        names=tuple(finding.message for finding in apply(names.RULES, subject)),
        components=components,
        quantization=_quantization(subject),
        draft_head=_draft_head(subject),
        as_it_is=_build(checkpoint.num_bytes, config, kv_cache_dtype, bool(subject.stored_vision)),
        recipes={name: _recipe_build(checkpoint, name, bool(subject.stored_vision)) for name in shipped()},
    )


def _components(subject: Subject) -> dict[str, Component]:
    bits = stored_bits(subject.declared)
    found: dict[str, list[TensorInfo]] = defaultdict(list)
    for name, info in subject.tensors.items():
        found[subject.model.component(name)].append(info)
    return {part: _component(subject, found[part], bits) for part in (*COMPONENTS, "other") if part in found}


def _component(subject: Subject, infos: list[TensorInfo], bits: int) -> Component:
    params = sum(num_params(info.name.rpartition(".")[2], info, bits) for info in infos)
    size = sum(info.num_bytes for info in infos)
    dtypes = dict(Counter(info.dtype for info in infos).most_common())
    formats: Counter[str] = Counter()
    for info in infos:
        formats[stored.TITLES[subject.form(info.name.rpartition(".")[0])]] += info.num_bytes
    return Component(len(infos), params, size, dtypes, round(8 * size / params, 3) if params else None, dict(formats.most_common()))


def _quantization(subject: Subject) -> Quantization | None:
    declared = subject.declared
    if declared is None and not subject.quantized:
        return None
    files = [d for d in (declared, subject.hf_declared, subject.beside) if d is not None]
    schemes = {(scheme.bits, scheme.group_size, scheme.symmetric) for scheme in subject.schemes.values()}
    bits, group_size, symmetric = schemes.pop() if len(schemes) == 1 else (None, None, None)
    problems = [
        finding.message
        for finding in apply((*quantization.RULES, *ignore_lists.RULES), subject)
        if finding.severity != "note"
    ]  # fmt: skip
    return Quantization(
        declared={d.file: d.title if d.format != "unknown" else d.algo or d.title for d in files},
        kv_cache=declared.kv_cache if declared is not None else "auto",
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        packing=declared.packing if declared is not None else None,
        modules=dict(Counter(stored.TITLES[subject.form(module)] for module in subject.quantized)),
        agrees=not problems,
        problems=tuple(problems),
    )


def _draft_head(subject: Subject) -> DraftHead:
    misplaced = [rule for rule in names.RULES if rule.id == "mtp-misplaced"]
    findings = list(apply((*misplaced, *draft_head.RULES), subject))
    return DraftHead(
        state=findings[0].id.removeprefix("mtp-") if findings else "whole",
        num_layers_declared=subject.model.num_mtp_layers(subject.config),
        num_tensors=len(subject.stored_mtp),
        ignored=_ignored(subject),
        problems=tuple(finding.message for finding in findings),
    )


def _ignored(subject: Subject) -> bool | None:
    """By the engine's matching for modelopt NVFP4; for other formats, whether any exception names the draft head."""
    if subject.declared is None:
        return None
    if subject.covered:
        verdicts = [v for linear, v in subject.verdicts.items() if linear.prefix.startswith(subject.model.MTP_PREFIX)]
        return bool(verdicts) and set(verdicts) == {"ignored"}
    exceptions = subject.declared.content.get("extra_config")
    return any("mtp" in entry for entry in (*subject.declared.ignore, *(exceptions if isinstance(exceptions, Mapping) else ())))


def _build(num_bytes: int, config: Mapping[str, Any], kv_cache_dtype: str, vision: bool) -> Build:
    try:
        return Build(num_bytes, fit.context_tokens(num_bytes, config, kv_cache_dtype, vision=vision), None)
    except InputError as error:
        return Build(num_bytes, None, str(error))


def _recipe_build(checkpoint: Checkpoint, name: str, stored_vision: bool) -> Build:
    recipe = load_recipe(name)
    try:
        plan = make_plan(checkpoint, recipe)
    except InputError as error:
        return Build(None, None, str(error).removeprefix(f"{checkpoint.path}: "))
    kv_cache_dtype = "auto" if recipe.kv_cache == "auto" else "fp8"
    return _build(plan.output_bytes, checkpoint.config, kv_cache_dtype, stored_vision and recipe.vision == "keep")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CKPT", help="a directory or a Hub id")


def run(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """The stage as the command line calls it: (exit code, result for --json). inspect describes, so the code is 0."""
    result = inspect(options.checkpoint)
    if not options.json:
        show(result)
    return 0, result.as_json()


def show(result: InspectResult) -> None:
    """The result as text and tables on stdout."""

    console = terminal.console()
    layers = ", ".join(f"{number} {kind.replace('_', ' ')}" for kind, number in result.layers.items())
    console.print(f"{result.path}: {result.architecture}, {sum(result.layers.values())} layers ({layers})", soft_wrap=True)
    console.print(_component_table(result))
    if result.num_unindexed:
        console.print(f"{count(result.num_unindexed, 'tensor')} stored but not in the index: engines skip them", soft_wrap=True)
    for line in result.names:
        console.print(f"{line}; mtpress repair renames what can be", markup=False, soft_wrap=True)
    for line in (*_quantization_lines(result.quantization), *_draft_head_lines(result.draft_head)):
        console.print(line, soft_wrap=True)
    console.print(_fit_table(result))
    for refusal in dict.fromkeys(build.refusal for build in result.recipes.values() if build.refusal):
        names = ", ".join(name for name, build in result.recipes.items() if build.refusal == refusal)
        console.print(f"{names}: {refusal}", soft_wrap=True)
    console.print(fit.RULE, style="dim", soft_wrap=True)


def _component_table(result: InspectResult) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table("component", box=box.SIMPLE_HEAD)
    for heading in ("tensors", "parameters", "bytes", "bits"):
        table.add_column(heading, justify="right")
    table.add_column("stored as")
    for part, holds in result.components.items():
        table.add_row(
            COMPONENT_TITLES[part],
            str(holds.num_tensors),
            f"{holds.num_params:,}",
            human_bytes(holds.num_bytes),
            f"{holds.bits:.3g}" if holds.bits is not None else "",
            ", ".join(f"{human_bytes(size)} {title}" for title, size in holds.formats.items()),
        )
    files = count(result.num_shards, "file")
    bits = f"{8 * result.num_bytes / result.num_params:.3g}" if result.num_params else ""
    table.add_row("all", str(result.num_tensors), f"{result.num_params:,}", human_bytes(result.num_bytes), bits, files, style="bold")
    return table


def _quantization_lines(found: Quantization | None) -> list[str]:
    if found is None:
        return ["quantization: none declared, none stored"]
    says = "; ".join(f"{file} says {title}" for file, title in found.declared.items()) or "no config file declares any"
    holds = ", ".join(f"{number} modules as {title}" for title, number in found.modules.items()) or "nothing quantized is stored"
    cache = f", KV cache {found.kv_cache}" if found.kv_cache != "auto" else ""
    cache += f" (packed as {found.packing})" if found.packing is not None else ""
    verdict = "they agree" if found.agrees else "they do not agree, `mtpress check` says what to do:"
    return [f"quantization: {says}{cache}; {holds}; {verdict}", *(f"  {problem}" for problem in found.problems)]


def _draft_head_lines(head: DraftHead) -> list[str]:
    listed = {None: "", True: ", in the ignore list", False: ", not in the ignore list"}[head.ignored]
    if head.state == "whole":
        return [f"draft head: whole, {head.num_tensors} tensors in 16 bits{listed}"]
    return [f"draft head: {head.state}, {count(head.num_tensors, 'tensor')}{listed}:", *(f"  {problem}" for problem in head.problems)]


def _fit_table(result: InspectResult) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table("build", title="context by GPU memory (GB)", title_justify="right", box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    for heading in ("bytes", *(str(memory.gb) for memory in fit.MEMORIES)):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, build in {"as it is": result.as_it_is, **result.recipes}.items():
        if build.num_bytes is not None and build.context_tokens is not None:
            table.add_row(name, human_bytes(build.num_bytes), *(_thousands(tokens) for tokens in build.context_tokens.values()))
    return table


def _thousands(tokens: int) -> str:
    if tokens >= 1_000_000:
        return f"{tokens / 1e6:.1f}M"
    return f"{tokens // 1000}k" if tokens else "–"
