"""Known faults of vLLM with this model family, and which of them a launch meets.

In: known_issues.yaml, the engine's version, facts of the launch. Out: the issues that apply, in the file's order. Leaves
out: gathering the facts and acting on what is found (launch.py).
"""

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import Version
from pydantic import Field, field_validator, model_validator

from mtpress.engine.launch.profiles import Items, Strict

KNOWN_ISSUES = Path(__file__).with_name("known_issues.yaml")
FACTS = (
    "platform", "gpu", "compute_capability", "unified", "memory_gib", "avx512", "avx512_bf16", "amx",
    "format", "quant_method", "num_mtp_layers", "needs_language_model_only",
    "kv_cache_dtype", "num_speculative_tokens", "mtp", "max_model_len", "max_num_seqs", "gpu_memory_utilization", "tensor_parallel_size",
    "prefix_caching", "thinking_off_by_default", "think_tags", "tokenizer_backend", "old_backend_variables", "v1_runner",
    "plugins", "architecture", "draft_lm_head_quantization", "rejection_sample_method",
)  # fmt: skip
Scalar = bool | int | float | str
Action = Literal["refuse", "warn", "set", "note"]


class Condition(Strict):
    """On one fact. A fact that is absent (None) fulfils only present: false, not_in and not_matches."""

    is_: Scalar | None = None
    one_of: Annotated[tuple[Scalar, ...], Items] = ()
    not_in: Annotated[tuple[Scalar, ...], Items] = ()
    at_least: float | None = None
    at_most: float | None = None
    matches: str | None = None
    not_matches: str | None = None
    present: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        if isinstance(value, list):
            return {"one_of": value}
        return value if isinstance(value, dict) else {"is_": value}

    @field_validator("matches", "not_matches")
    @classmethod
    def _pattern(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"{value!r} is no pattern: {error}") from None
        return value

    def holds(self, fact: Any) -> bool:
        if self.present is not None:
            return (fact is not None) == self.present
        if self.not_in:
            return fact not in self.not_in
        if self.not_matches is not None:
            return fact is None or re.search(self.not_matches, str(fact)) is None
        if fact is None:
            return False
        if self.at_least is not None or self.at_most is not None:
            return (self.at_least is None or fact >= self.at_least) and (self.at_most is None or fact <= self.at_most)
        if self.matches is not None:
            return re.search(self.matches, str(fact)) is not None
        return bool(fact in self.one_of) if self.one_of else bool(fact == self.is_)


class KnownIssue(Strict):
    """One row. action: refuse, warn, set (`set_` into the command), or note (nothing is wrong, but it should be known)."""

    id: str = Field(pattern=r"^[a-z0-9-]+$")
    sources: Annotated[tuple[str, ...], Items] = Field(min_length=1)
    versions: str = ""
    when: dict[str, Condition]
    effect: str
    remedy: str
    action: Action
    set_: dict[str, str] = Field({}, alias="set")

    @field_validator("versions")
    @classmethod
    def _specifier(cls, value: str) -> str:
        try:
            SpecifierSet(value)
        except InvalidSpecifier:
            raise ValueError(f"{value!r} is no version range") from None
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "KnownIssue":
        unknown = [fact for fact in self.when if fact not in FACTS and not fact.startswith("--")]
        if unknown:
            raise ValueError(f"{self.id}: unknown facts {', '.join(unknown)}")
        if bool(self.set_) != (self.action == "set"):
            raise ValueError(f"{self.id}: `set` belongs to the action of that name")
        return self

    def applies(self, version: Version, facts: Mapping[str, Any]) -> bool:
        """Whether it meets a launch; a flag that facts do not hold is one that the command does not pass.

        A build on the way to a version counts as that version: 0.29.0rc1 as 0.29.0, the nightly 0.28.1rc1.dev5 as 0.28.1.
        """
        if not SpecifierSet(self.versions).contains(version.base_version):
            return False
        return all(condition.holds(facts.get(fact) if fact.startswith("--") else facts[fact]) for fact, condition in self.when.items())

    @property
    def source(self) -> str:
        return ", ".join(self.sources)

    def line(self) -> str:
        """For people: what happens, what to do, who says so."""
        return f"{self.effect}; {self.remedy} ({self.source})"


@functools.cache
def known_issues() -> tuple[KnownIssue, ...]:
    found = tuple(KnownIssue.model_validate(entry) for entry in yaml.safe_load(KNOWN_ISSUES.read_text(encoding="utf-8")))
    assert len({issue.id for issue in found}) == len(found)
    return found
