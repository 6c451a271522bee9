"""Headers and a recipe in, the whole output out: a job for every source tensor, before any weight is read.

In: an open Checkpoint and a Recipe. Out: a `Plan`: steps in the order they stream (embeddings, vision tower, final
norm and lm_head, draft head, decoder layers), jobs in each, shard files, the ignore list, sizes. Leaves out: reading
weights (quantization/rounders.py). Whatever cannot work is refused here, in the first second.

The MTP invariant: every `mtp.` tensor of the source is kept bit for bit and its modules are named in the ignore list.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.checkpoint.safetensors import TensorInfo
from mtpress.checkpoint.shard_writer import OutputTensor
from mtpress.checkpoint.writer import split_into_shards
from mtpress.errors import InputError
from mtpress.formats import kv_cache
from mtpress.models import family
from mtpress.plan.module_formats import formats_of
from mtpress.plan.recipe import Recipe
from mtpress.quant_config.misnamed import refuse_misnamed
from mtpress.quant_config.view import Subject

NVFP4_GROUP_SIZE, INT4_GROUP_SIZE = 16, 128


@dataclass(frozen=True)
class Layout:
    """What a format makes of a linear [N, K], and what it takes. formats/ has it too, with torch; tests/plan holds them together.

    A linear that does not fit is refused, or kept in BF16 with the rest of its fused group (engines refuse mixed ones).
    """

    title: str
    n_multiple: int
    k_multiple: int
    keeps_misfits: bool
    tensors: Callable[[int, int], tuple[tuple[str, str, tuple[int, ...]], ...]]  # (suffix, safetensors dtype, shape) of each


LAYOUTS = {
    "nvfp4": Layout(
        "NVFP4", n_multiple=1, k_multiple=NVFP4_GROUP_SIZE, keeps_misfits=False,
        tensors=lambda n, k: (
            ("weight", "U8", (n, k // 2)), ("weight_scale", "F8_E4M3", (n, k // NVFP4_GROUP_SIZE)),
            ("weight_scale_2", "F32", ()), ("input_scale", "F32", ()),
        ),
    ),
    "nvfp4_w4a16": Layout(
        "NVFP4 W4A16", n_multiple=1, k_multiple=NVFP4_GROUP_SIZE, keeps_misfits=False,
        tensors=lambda n, k: (
            ("weight", "U8", (n, k // 2)), ("weight_scale", "F8_E4M3", (n, k // NVFP4_GROUP_SIZE)), ("weight_scale_2", "F32", ()),
        ),
    ),
    "fp8": Layout(
        "FP8", n_multiple=1, k_multiple=1, keeps_misfits=False,
        tensors=lambda n, k: (("weight", "F8_E4M3", (n, k)), ("weight_scale", "F32", ()), ("input_scale", "F32", ())),
    ),
    "int4": Layout(
        "INT4", n_multiple=32, k_multiple=INT4_GROUP_SIZE, keeps_misfits=True,
        tensors=lambda n, k: (
            ("qweight", "I32", (k // 8, n)), ("qzeros", "I32", (k // INT4_GROUP_SIZE, n // 8)),
            ("scales", "F16", (k // INT4_GROUP_SIZE, n)),
        ),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """What becomes of the tensors of one module group.

    keep: one tensor, copied bit for bit. quantize: the weights of the linears that share their scales. drop: left out.
    measure: scales that only the samples tell, of no stored tensor.
    """

    kind: Literal["keep", "quantize", "drop", "measure"]
    sources: tuple[TensorInfo, ...]
    outputs: tuple[OutputTensor, ...]
    component: str
    format: str = "bf16"  # a key of LAYOUTS for what is quantized


@dataclass(frozen=True)
class Step:
    """Jobs that stream together: all of one decoder layer, or what stands before or after the layers."""

    title: str
    layer: int | None
    jobs: tuple[Job, ...]

    @cached_property
    def outputs(self) -> list[OutputTensor]:
        return [tensor for job in self.jobs for tensor in job.outputs]

    @cached_property
    def quantized(self) -> list[str]:
        """Names of the stored matrices that are quantized."""
        return [info.name for job in self.jobs if job.kind == "quantize" for info in job.sources]

    @property
    def weighted(self) -> list[Job]:
        """Whose linears rounding hessian weights by what they read; FP8 has one scale, and nothing to choose."""
        return [job for job in self.jobs if job.kind == "quantize" and job.format != "fp8"]

    @cached_property
    def read_bytes(self) -> int:
        return sum(info.num_bytes for job in self.jobs if job.kind != "drop" for info in job.sources)

    def effort(self, calibrated: bool) -> int:
        """What share of the run's time this step takes, in bytes read: a forward outweighs everything else by far."""
        return 0 if calibrated and self.layer is None else self.read_bytes


@dataclass(frozen=True)
class Plan:
    """Everything about the output that follows from headers and recipe."""

    recipe: Recipe
    source: Checkpoint
    prefix: str
    steps: tuple[Step, ...]
    ignore: tuple[str, ...]
    misfits: tuple[str, ...] = ()  # linears that stay in BF16 for the shape of their fused group alone

    @property
    def jobs(self) -> Iterator[Job]:
        return (job for step in self.steps for job in step.jobs)

    @cached_property
    def shards(self) -> dict[str, list[OutputTensor]]:
        return split_into_shards([step.outputs for step in self.steps])

    @cached_property
    def bytes_by_component(self) -> dict[str, int]:
        sizes: Counter[str] = Counter()
        for job in self.jobs:
            sizes[job.component] += sum(tensor.num_bytes for tensor in job.outputs)
        return dict(sizes)

    @cached_property
    def bytes_by_format(self) -> dict[str, dict[str, int]]:
        """The same by format within each component; what is kept counts as bf16."""
        sizes: dict[str, Counter[str]] = {part: Counter() for part in self.bytes_by_component}
        for job in self.jobs:
            sizes[job.component][job.format] += sum(tensor.num_bytes for tensor in job.outputs)
        return {part: {name: size for name, size in found.items() if size} for part, found in sizes.items()}

    @property
    def output_bytes(self) -> int:
        return sum(self.bytes_by_component.values())

    @property
    def read_bytes(self) -> int:
        return sum(step.read_bytes for step in self.steps)

    @property
    def quantized_modules(self) -> list[str]:
        model = family(self.source.model_type)
        return [model.module_of(info.name) for job in self.jobs if job.kind == "quantize" for info in job.sources]

    @property
    def formats(self) -> dict[str, str]:
        """Quantized module → its format, layers first, in the order of the plan."""
        model = family(self.source.model_type)
        jobs = [job for step in sorted(self.steps, key=lambda step: step.layer is None) for job in step.jobs]
        return {model.module_of(info.name): job.format for job in jobs if job.kind == "quantize" for info in job.sources}

    @property
    def kept_linears(self) -> list[str]:
        """Of `ignore`, what is a matrix that multiplies: no norm, no convolution, no embeddings."""
        shapes = {tensor.name: tensor.shape for job in self.jobs for tensor in job.outputs}
        kept = [module for module in self.ignore if len(shapes.get(f"{module}.weight", (1, 1))) == 2]
        return [module for module in kept if not module.endswith("_embed") and not module.endswith("embed_tokens")]


def make_plan(source: Checkpoint, recipe: Recipe) -> Plan:
    """The plan for a source under a recipe; InputError names the first thing that cannot work, with what to do."""
    assert recipe.budget is None, "plan/budget.py makes a recipe of it first"
    model = family(source.model_type)
    _refuse_unusable(source, recipe)
    prefix = model.body_prefix(source.tensors)
    _refuse_misshapen(source, prefix)
    formats = formats_of(sorted(source.tensors, key=model.natural), recipe, prefix, source.model_type)

    jobs: dict[tuple[int, int], list[Job]] = {}
    done: set[str] = set()
    misfits: list[str] = []
    for name in sorted(source.tensors, key=model.natural):
        if name in done:
            continue
        info, part, layer = source.tensors[name], model.component(name), model.layer_index(name)
        module = model.module_of(name)
        job = Job("keep", (info,), (OutputTensor(name, info.dtype, info.shape),), part)
        if part == "vision" and recipe.vision == "drop":
            job = Job("drop", (info,), (), part)
        elif module in formats and name.endswith(".weight"):
            start = f"{prefix}layers.{layer}."
            linear = module.removeprefix(start)
            members = [f"{start}{member}" for member in model.SAME_INPUT[linear]] if linear in model.SAME_INPUT else [module]
            infos = [source.tensors[f"{member}.weight"] for member in members if formats.get(member) == formats[module]]
            if _fits(infos, LAYOUTS[formats[module]], part):
                job = _quantize_job(infos, formats[module], part)
            else:
                misfits.append(module)
        done.update(source.name for source in job.sources)
        jobs.setdefault(_place(part, layer), []).append(job)
    if recipe.kv_cache == "fp8":
        for name in source.tensors:
            if name.startswith(f"{prefix}layers.") and name.endswith(f".{kv_cache.K_PROJ}.weight"):
                scales = kv_cache.outputs(name.removesuffix(f"{kv_cache.K_PROJ}.weight"))
                jobs[_place("attention", model.layer_index(name))].append(Job("measure", (), scales, "attention"))
    steps = tuple(_step(place, jobs[place]) for place in sorted(jobs))
    if not any(job.kind == "quantize" for step in steps for job in step.jobs):
        if not misfits:
            raise InputError(f"recipe {recipe.name}: `overrides` leaves nothing quantized")
        layout = LAYOUTS[recipe.format]
        raise InputError(
            f"{source.path}: none of its {len(misfits)} linears has N by {layout.n_multiple} and K by {layout.k_multiple}, as "
            f"{layout.title} needs; use a recipe with format nvfp4"
        )
    ignore = model.kept_modules({t.name: t for step in steps for t in step.outputs}, prefix)
    return Plan(recipe, source, prefix, steps, tuple(ignore), tuple(misfits))


# What is copied comes first: it is written while the first layer computes, and nothing is left to write behind the last.
ORDER = {"embeddings": 0, "vision": 1, "norms": 2, "lm_head": 2, "mtp": 3, "layers": 4}
TITLES = {0: "embeddings", 1: "vision tower", 2: "final norm and lm_head", 3: "draft head"}


def _place(part: str, layer: int | None) -> tuple[int, int]:
    return (ORDER["layers"], layer) if layer is not None else (ORDER[part], 0)


def _step(place: tuple[int, int], jobs: list[Job]) -> Step:
    if place[0] == ORDER["layers"]:
        return Step(f"layer {place[1]}", place[1], tuple(jobs))
    return Step(TITLES[place[0]], None, tuple(jobs))


def _fits(infos: Iterable[TensorInfo], layout: Layout, part: str) -> bool:
    """Whether a format takes the linears of one layer that share an input; InputError where it cannot, and keeps none for that."""
    fit = True
    for info in infos:
        if info.dtype != "BF16":
            raise InputError(f"{info.file}: {info.name} is {info.dtype}, the source must be BF16; quantize from the BF16 release")
        n, k = info.shape
        if k % layout.k_multiple and not layout.keeps_misfits:
            raise InputError(
                f"{info.name}: K = {k} is no multiple of {layout.k_multiple}, {layout.title} cannot hold it; leave {part} out of `quantize`"
            )
        fit &= k % layout.k_multiple == 0 and n % layout.n_multiple == 0
    return fit


def _quantize_job(infos: Iterable[TensorInfo], name: str, part: str) -> Job:
    outputs = [
        OutputTensor(f"{info.name.removesuffix('.weight')}.{suffix}", dtype, shape)
        for info in infos
        for suffix, dtype, shape in LAYOUTS[name].tensors(*info.shape)
    ]
    return Job("quantize", tuple(infos), tuple(outputs), part, name)


def _refuse_unusable(source: Checkpoint, recipe: Recipe) -> None:
    model = family(source.model_type)
    where = source.path
    if "quantization_config" in source.config or (where / "hf_quant_config.json").exists():
        raise InputError(f"{where}: is quantized already; quantize from its BF16 source")
    subject = Subject(source)
    refuse_misnamed(subject)
    if subject.config_problem:
        raise InputError(f"{where}: {subject.config_problem}")
    if subject.unindexed_mtp:
        file, _ = next(iter(subject.unindexed_mtp.values()))
        raise InputError(f"{where}: its draft head is stored in {file}, but not in the index; take it in first: mtpress repair {where} OUT")
    if source.unindexed:
        name = next(iter(source.unindexed))
        raise InputError(
            f"{where}: {len(source.unindexed)} tensors are stored but not in the index ({name}, …), engines skip them; rebuild the index"
        )
    unknown = [name for name in source.tensors if model.component(name) == "other"]
    if unknown:
        raise InputError(
            f"{where}: {len(unknown)} tensors belong to no known component ({unknown[0]}, …); engines refuse such a checkpoint"
        )
    heads = [name for name in source.tensors if name.startswith(model.MTP_PREFIX)]
    if model.num_mtp_layers(source.config) > 1:
        raise InputError(
            f"{where}: config.json has mtp_num_hidden_layers {model.num_mtp_layers(source.config)}; mtpress knows heads of one layer"
        )
    missing = [name for name in model.MTP_TENSORS if name not in source.tensors]
    if (model.num_mtp_layers(source.config) or heads) and missing:
        raise InputError(
            f"{where}: the draft head lacks {len(missing)} of {len(model.MTP_TENSORS)} tensors ({missing[0]}, …); "
            "put it back from the base model first: mtpress graft CKPT OUT --from BASE"
        )
    if heads and not model.num_mtp_layers(source.config):
        raise InputError(
            f"{where}: holds a draft head, but config.json has no mtp_num_hidden_layers, so engines would not use it; set it to 1"
        )
    if set(recipe.component_formats.values()) <= {"bf16"}:
        key = "quantize" if recipe.formats is None else "formats"
        raise InputError(f"recipe {recipe.name}: `{key}` names no component")


def _refuse_misshapen(source: Checkpoint, prefix: str) -> None:
    """Compares the headers with what config.json promises."""
    model = family(source.model_type)
    expected = dict(model.body_shapes(source.config, prefix, source.tensors))
    if model.num_mtp_layers(source.config):
        expected |= model.mtp_shapes(source.config)
    if any(model.component(name) == "vision" for name in source.tensors):
        expected |= model.vision_shapes(source.config)
    missing = [name for name in expected if name not in source.tensors]
    if missing:
        raise InputError(
            f"{source.path}: {len(missing)} tensors that config.json calls for are missing ({missing[0]}, …); fetch the checkpoint again"
        )
    for name, shape in expected.items():
        if source.tensors[name].shape != shape:
            raise InputError(
                f"{source.path}: {name} is {list(source.tensors[name].shape)}, config.json calls for {list(shape)}; they are of two models"
            )
        if (info := source.tensors[name]).dtype not in ("BF16", "F16", "F32"):
            raise InputError(f"{info.file}: {name} is {info.dtype}, no engine computes with that; quantize from the BF16 release")
    extra = [n for n in source.tensors if n not in expected and model.component(n) not in ("vision", "mtp")]
    if extra and extra != ["lm_head.weight"]:
        raise InputError(f"{source.path}: {len(extra)} tensors are more than config.json calls for ({extra[0]}, …); engines refuse them")
