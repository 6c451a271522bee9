"""Recipes: what a build is, in one screen of YAML.

In: the name of a shipped recipe or a YAML file. Out: a validated `Recipe`. Leaves out: which tensors that means (plan/plan.py).
An unknown key or value is an InputError that lists the valid ones.
"""

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, field_validator, model_validator

from mtpress.errors import InputError

RECIPES_DIR = Path(__file__).parent / "recipes"
LEAST_TEMPERATURE = 0.01  # vLLM's own: it raises what is lower to this
MAX_RECIPE_BYTES = 64_000  # one screen of YAML; the parser reads 100 kB a second


class PlainLoader(yaml.SafeLoader):
    """YAML without what a recipe does not need: aliases, which can stand for billions of items, and keys that stand twice."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="a recipe has no aliases", problem_mark=self.peek_event().start_mark)  # type: ignore[no-untyped-call]
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        found = super().construct_mapping(node, deep=deep)
        if len(found) != len(node.value):
            raise yaml.MarkedYAMLError(problem="a key stands twice", problem_mark=node.start_mark)
        return found


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class CalibrationSource(Strict):
    """Where calibration samples come from, unless --calibration names files: a Hub data set, or "builtin"."""

    dataset: str = Field(
        "builtin", description="a Hub data set id, or a set that ships with mtpress: builtin, builtin-images, builtin-mixed"
    )
    subset: str | None = Field(None, description="the configuration of the Hub data set")
    split: str = Field("train", description="its split")
    num_samples: int = Field(20, ge=1, le=100_000, description="how many samples, from the first")
    max_seq_len: int = Field(8192, ge=1, le=1_000_000, description="tokens kept of each sample")


def _number(value: Any) -> str:
    return SEVERAL if isinstance(value, list | tuple) else ONE


# By the value's own form and not by trial, so that an error names the key that is wrong.
ONE, SEVERAL = "one source", "several sources"
Sources = Annotated[
    Annotated[CalibrationSource, Tag(ONE)] | Annotated[tuple[CalibrationSource, ...], Tag(SEVERAL), Field(min_length=1)],
    Discriminator(_number),
]


class SignRound(Strict):
    """Settings of sign-gradient rounding; auto-round 0.16.1's own, which calls them iters and batch_size."""

    iterations: int = Field(200, ge=1, le=20_000, description="steps of the rounding of each layer")
    batch_size: int = Field(8, ge=1, le=10_000, description="samples a step")


class Gptq(Strict):
    """Settings of rounding gptq."""

    scales: Literal["hessian", "sweep", "four-over-six", "max", "search", "rtn"] = Field(
        description="how its scales are chosen, the codes aside"
    )
    damping: float = Field(0.05, gt=0, le=1, description="added to the diagonal of the Hessian, as a share of its mean")


class GenerationConfig(Strict):
    """What the output's generation_config.json says of sampling; what is not named here stays as the source has it.

    Greedy decoding is refused: models of this family go on repeating themselves under it. A request can still ask for it.
    """

    temperature: float | None = Field(None, ge=0, le=2, description="divides the logits")
    top_p: float | None = Field(None, gt=0, le=1, description="the likeliest tokens that have this share together")
    top_k: int | None = Field(None, ge=1, le=1_000_000, description="this many of the likeliest tokens")
    min_p: float | None = Field(None, ge=0, le=1, description="no token below this share of the likeliest one's")
    repetition_penalty: float | None = Field(None, ge=0.5, le=2, description="divides the logits of tokens that are there already")
    presence_penalty: float | None = Field(None, ge=-2, le=2, description="taken from the logits of tokens that are there already")
    frequency_penalty: float | None = Field(None, ge=-2, le=2, description="the same, once for each time that a token is there")
    max_new_tokens: int | None = Field(None, ge=1, le=10_000_000, description="the longest answer where a request names no length")
    do_sample: bool = Field(True, description="true: false would be greedy")

    @model_validator(mode="after")
    def _never_greedy(self) -> Self:
        for key, value, greedy in (
            ("temperature", self.temperature, self.temperature is not None and self.temperature < LEAST_TEMPERATURE),
            ("do_sample", self.do_sample, not self.do_sample),
            ("top_k", self.top_k, self.top_k == 1),
        ):
            if greedy:
                raise ValueError(
                    f"generation_config.{key}: {value} is greedy decoding, under which these models repeat themselves without end; "
                    "ask for it in the request that wants it"
                )
        return self

    def said(self) -> dict[str, Any]:
        """What the recipe sets, as generation_config.json names it."""
        return self.model_dump(mode="json", exclude_none=True)


@dataclass(frozen=True)
class Choices:
    """What goes with a format; the first rounding is the one that is taken if the recipe names none."""

    rounding: tuple[str, ...]
    in_proj_ab: tuple[str, ...]
    kv_cache: tuple[str, ...]


CHOICES = {
    "nvfp4": Choices(
        rounding=("max", "four-over-six", "sweep", "hessian", "gptq"),
        in_proj_ab=("bf16", "nvfp4"),
        kv_cache=("auto", "fp8_cast", "fp8"),
    ),
    "int4": Choices(rounding=("signround", "search", "hessian", "gptq", "rtn"), in_proj_ab=("bf16",), kv_cache=("auto",)),
}
# Of rounding gptq, by format; the first is taken if the recipe names none. rounding/gptq.py has what they do.
GPTQ_SCALES: dict[str, tuple[str, ...]] = {
    "nvfp4": ("hessian", "sweep", "four-over-six", "max"),
    "int4": ("hessian", "search", "rtn"),
}
CHOICES["mixed"] = replace(CHOICES["nvfp4"], rounding=("max", "four-over-six", "sweep", "hessian"))  # the same layout, with `formats`


LinearFormat = Literal["nvfp4", "nvfp4_w4a16", "fp8", "bf16"]


class Formats(Strict):
    """The format of each component: NVFP4 with activations (W4A4) or without (W4A16), FP8 with a static scale, or BF16."""

    mlp: LinearFormat = Field("bf16", description="gate_proj, up_proj, down_proj")
    attention: LinearFormat = Field("bf16", description="q_proj, k_proj, v_proj, o_proj of full attention")
    gdn: LinearFormat = Field("bf16", description="in_proj_qkv, in_proj_z, out_proj of Gated DeltaNet")
    lm_head: Literal["nvfp4_w4a16", "bf16"] = Field("bf16", description="the output projection, which the draft head shares")

    @property
    def quantized(self) -> tuple[str, ...]:
        """What `quantize` would name."""
        return tuple(part for part in ("attention", "gdn", "mlp") if getattr(self, part) != "bf16")


SIZE = re.compile(r"(\d{1,20}(?:\.\d{1,20})?(?:e\+?\d{1,2})?) ?([kMGT]?)(i?)B?")


class Budget(Strict):
    """How large the output may be, in place of `formats`: what each fused linear gets is measured (plan/budget.py)."""

    bytes: int = Field(gt=0, description="of all tensors of the output; 21900000000 or 21.9 GB")
    candidates: tuple[LinearFormat, ...] = Field(("nvfp4", "fp8", "bf16"), description="the formats to choose from")

    @field_validator("bytes", mode="before")
    @classmethod
    def _with_unit(cls, said: Any) -> Any:
        if isinstance(said, float) and said.is_integer():
            return int(said)
        if not isinstance(said, str):
            return said
        if (found := SIZE.fullmatch(said.strip())) is None:
            raise ValueError(f"budget.bytes: {said[:40]!r} is no size; write 21.9 GB, 20.4 GiB or a count of bytes")
        return round(float(found[1]) * (1024 if found[3] else 1000) ** " kMGT".index(found[2] or " "))

    @field_validator("candidates", mode="before")
    @classmethod
    def _from_list(cls, said: Any) -> Any:
        return tuple(said) if isinstance(said, list) else said

    @model_validator(mode="after")
    def _a_choice(self) -> Self:
        if len(set(self.candidates)) < max(2, len(self.candidates)):
            raise ValueError("budget.candidates: name at least two formats, each once; with one there is nothing to choose")
        if {"nvfp4", "nvfp4_w4a16"} <= set(self.candidates):
            raise ValueError("budget.candidates: nvfp4 and nvfp4_w4a16 take the same bytes; name the one that the engine shall run")
        return self


class Recipe(Strict):
    """One build. Field names are the keys of the YAML file."""

    name: str = Field(description="lower-case name of the build", pattern=r"^[a-z0-9][a-z0-9._-]*$")
    summary: str = Field(description="one line for `mtpress recipes`")
    format: Literal["nvfp4", "int4", "mixed"] = Field(description="the 4-bit format of the body; mixed where `formats` says it")
    quantize: tuple[Literal["attention", "gdn", "mlp"], ...] = Field(description="components whose linears are quantized")
    formats: Formats | None = Field(None, description="in place of `format` and `quantize`: a format for each component")
    overrides: dict[str, LinearFormat] = Field(
        default_factory=dict, description="module pattern or layer range → format, over that of the component; the later wins"
    )
    budget: Budget | None = Field(None, description="in place of `formats`: the bytes of the output; formats are chosen by measuring")
    in_proj_ab: Literal["bf16", "nvfp4"] = Field("bf16", description="the small GDN projections in_proj_a and in_proj_b")
    vision: Literal["keep", "drop"] = Field("keep", description="the vision tower: BF16 in the output, or left out")
    kv_cache: Literal["auto", "fp8_cast", "fp8"] = Field(
        "auto", description="what the checkpoint declares for the KV cache; fp8 with scales from the samples, fp8_cast without"
    )
    rounding: Literal["max", "four-over-six", "sweep", "hessian", "gptq", "signround", "search", "rtn"] = Field(
        description="how scales and codes are chosen: max, four-over-six, sweep (NVFP4), signround, search, rtn (INT4), hessian, gptq"
    )
    signround: SignRound = Field(default_factory=SignRound, description="settings of rounding signround")
    gptq: Gptq | None = Field(None, description="settings of rounding gptq")
    constant_input_scale: float | None = Field(
        None, gt=0, le=1e4, description="weight-only: this input_scale for every linear, no calibration data"
    )
    calibration: Sources = Field(default_factory=CalibrationSource, description="one source of samples, or a list of them")
    chat_template: Literal["replace", "source", "mtpress"] = Field(
        "source",
        description="the template of the output: the source's; mtpress's in place of an official one; replace: mtpress's in place of any",
    )
    dequantize: bool = Field(False, description="of a source in block-FP8: make BF16 of it first; without, it is refused")
    generation_config: GenerationConfig | None = Field(None, description="sampling that the output's generation_config.json asks for")

    @field_validator("overrides", mode="before")
    @classmethod
    def _from_pairs(cls, said: Any) -> Any:
        """canonical() writes them as pairs: their order counts, and that of a JSON object does not."""
        pairs = isinstance(said, list) and all(isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) for pair in said)
        return dict(said) if pairs else said

    @model_validator(mode="after")
    def _together(self) -> Self:
        for key, valid in vars(CHOICES[self.format]).items():
            if (said := getattr(self, key)) not in valid:
                raise ValueError(f"{key}: {said!r} does not go with format {self.format}; valid: {', '.join(valid)}")
        if self.budget is not None:
            self._refuse_beside_budget()
        named = self.formats.quantized if self.formats is not None else None
        if (self.budget is None and (named is None) != (self.format != "mixed")) or (named is not None and named != self.quantize):
            raise ValueError("`formats` stands in place of `format` and `quantize`; leave these two out, or `formats`")
        wanted = {*self.component_formats.values(), *self.overrides.values(), "bf16"}
        if self.format != "mixed" and not wanted <= {self.format, "bf16"}:
            raise ValueError(f"overrides: a recipe with format {self.format} has no other but bf16; name the components in `formats`")
        if self.constant_input_scale and "fp8" in wanted:
            raise ValueError("constant_input_scale is an amax divided by 2688, FP8 divides by 448; calibrate, or leave fp8 out")
        if self.constant_input_scale and self.format == "int4":
            raise ValueError(
                f"constant_input_scale does not go with format {self.format}, which rounds no activations; "
                "rounding search or rtn needs no data"
            )
        if self.constant_input_scale and self.rounding == "hessian":
            raise ValueError("constant_input_scale does not go with rounding hessian, which needs samples; take rounding sweep")
        if self.constant_input_scale and self.kv_cache == "fp8":
            raise ValueError("kv_cache: 'fp8' takes its scales from samples, constant_input_scale does without; take fp8_cast")
        if self.rounding != "signround" and "signround" in self.model_fields_set:
            raise ValueError(f"signround has settings of rounding signround, not of {self.rounding}; leave it out")
        if self.gptq and self.rounding != "gptq":
            raise ValueError(f"gptq has settings of rounding gptq, not of {self.rounding}; leave it out")
        if self.gptq and self.gptq.scales not in (valid := GPTQ_SCALES[self.format]):
            raise ValueError(f"gptq.scales: {self.gptq.scales!r} does not go with format {self.format}; valid: {', '.join(valid)}")
        if self.rounding == "gptq" and self.constant_input_scale:
            raise ValueError("constant_input_scale needs no samples, rounding gptq is by samples; leave one of them out")
        return self

    def _refuse_beside_budget(self) -> None:
        if self.format != "mixed" or self.formats is not None or self.overrides:
            raise ValueError("budget chooses the format of every linear; leave `format`, `formats` and `overrides` out, or `budget`")
        if self.in_proj_ab != "bf16":
            raise ValueError("budget leaves in_proj_a and in_proj_b in BF16; leave in_proj_ab out")
        if self.constant_input_scale:
            raise ValueError("budget chooses by what samples show, constant_input_scale needs none; leave one of them out")
        if not self.quantize:
            raise ValueError("budget: `quantize` names no component to choose formats for; leave it out, and all are chosen for")

    @property
    def calibration_sources(self) -> tuple[CalibrationSource, ...]:
        return (self.calibration,) if isinstance(self.calibration, CalibrationSource) else self.calibration

    @property
    def needs_samples(self) -> bool:
        """Whether activations of calibration samples decide anything in the output."""
        by_samples = self.rounding in ("signround", "hessian", "gptq") or self.budget is not None
        return by_samples or (self.rounds_activations and not self.constant_input_scale)

    @property
    def component_formats(self) -> dict[str, str]:
        """Component → format, "bf16" among them; lm_head is one here."""
        if self.formats is not None:
            return self.formats.model_dump()
        return dict.fromkeys(self.quantize, self.format)

    @property
    def rounds_activations(self) -> bool:
        """Whether some linear's input is rounded by the engine, so that it needs an input_scale."""
        formats = {*self.component_formats.values(), *self.overrides.values(), self.in_proj_ab}
        return bool(formats & {"nvfp4", "fp8"})

    def canonical(self) -> dict[str, Any]:
        """The recipe as plain data, for the record and for comparing two runs. Keys that change nothing in it are left out, so that runs
        begun before a key was known are still the same."""
        idle = {
            "signround": self.rounding != "signround", "gptq": self.gptq is None, "chat_template": self.chat_template == "source",
            "generation_config": True, "formats": self.formats is None, "overrides": not self.overrides,
            "budget": self.budget is None, "dequantize": not self.dequantize,
        }  # fmt: skip
        content = self.model_dump(mode="json", exclude={key for key, leave in idle.items() if leave})
        content |= {"overrides": [list(pair) for pair in self.overrides.items()]} if self.overrides else {}
        return content | ({"generation_config": self.generation_config.said()} if self.generation_config else {})


def shipped() -> Iterator[str]:
    """Names of the recipes that ship with mtpress, in order."""
    for path in sorted(RECIPES_DIR.glob("*.yaml")):
        yield path.stem


def recipe_file(name_or_file: str | Path) -> Path:
    """The YAML file of a shipped recipe by name, or the path itself; InputError lists the shipped ones."""
    text = str(name_or_file)
    path = Path(text)
    if path.suffix in (".yaml", ".yml") or "/" in text:
        return path
    path = RECIPES_DIR / f"{text}.yaml"
    if not path.is_file():
        near = difflib.get_close_matches(text, list(shipped()), n=1)
        hint = f"did you mean {near[0]}?" if near else "a file needs the ending .yaml."
        raise InputError(f"no recipe {text[:80]!r}; {hint} Shipped: {', '.join(shipped())}")
    return path


def load_recipe(name_or_file: str | Path) -> Recipe:
    """A shipped recipe by name, or a YAML file by path."""
    path = recipe_file(name_or_file)
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: is not a file; name a YAML file, or a shipped recipe (`mtpress recipes`)")
        if path.stat().st_size > MAX_RECIPE_BYTES:
            raise InputError(f"{path}: too large for a recipe; `mtpress recipes nvfp4-mtp-vlm` shows one")
        content = yaml.load(path.read_text(encoding="utf-8"), PlainLoader)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); `mtpress recipes` lists the shipped ones") from None
    except InputError:
        raise
    except Exception as error:  # YAML's constructors of numbers, dates and truth values raise errors of every kind
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or (str(error).splitlines() or [type(error).__name__])[0][:100]
        raise InputError(f"{path}: not valid YAML{line} ({reason})") from None
    return parse_recipe(content, str(path))


def parse_recipe(content: Any, where: str) -> Recipe:
    if not isinstance(content, dict):
        raise InputError(f"{where}: a recipe is a map of keys; `mtpress recipes nvfp4-mtp-vlm` shows one")
    # YAML reads lists, the schema holds tuples
    content = content | {key: tuple(content[key]) for key in ("quantize", "calibration") if isinstance(content.get(key), list)}
    if "formats" in content:
        said = content["formats"] if isinstance(content["formats"], dict) else {}
        parts = tuple(part for part in ("attention", "gdn", "mlp") if said.get(part, "bf16") != "bf16")
        content = {"format": "mixed", "quantize": parts, **content}
    if "budget" in content:
        content = {"format": "mixed", "quantize": ("attention", "gdn", "mlp"), **content}
    if (choices := CHOICES.get(str(content.get("format")))) is not None:
        content = {"rounding": choices.rounding[0], **content}
    scales = GPTQ_SCALES.get(str(content.get("format")))
    if content.get("rounding") == "gptq" and scales is not None and isinstance(said := content.get("gptq", {}), dict):
        content = {**content, "gptq": {"scales": scales[0], **said}}
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise InputError(f"{where}: {_explain(error)}") from None


SECTIONS: dict[str, type[Strict]] = {
    "calibration": CalibrationSource, "signround": SignRound, "gptq": Gptq, "generation_config": GenerationConfig,
    "formats": Formats, "budget": Budget,
}  # fmt: skip


def _explain(error: ValidationError) -> str:
    """The first complaint as one sentence that lists what is valid."""
    first = error.errors()[0]
    place = [part for part in first["loc"] if part not in (ONE, SEVERAL)]
    key = ".".join(str(part) for part in place)
    if first["type"] == "extra_forbidden":
        section = SECTIONS.get(str(place[0]), Recipe) if len(place) > 1 else Recipe
        valid = list(section.model_fields)
        near = difflib.get_close_matches(str(place[-1]), valid, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        return f"unknown key {key[:80]!r}; {hint}Valid: {', '.join(valid)}"
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    if first["type"] == "missing":
        return f"the key {key} is missing; every recipe needs it"
    if first["type"] == "literal_error":
        return f"{key}: {_shown(first['input'])} is not one of {first['ctx']['expected']}"
    return f"{key[:80]}: {first['msg']} (got {_shown(first['input'])})"


def _shown(value: Any) -> str:
    try:
        return repr(str(value)[:60])
    except ValueError:  # Python prints no integer of more than 4,300 digits
        return "an integer of thousands of digits"
