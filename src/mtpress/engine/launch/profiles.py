"""Launches by hardware: which one a machine gets, and why.

In: profiles.yaml, a `Hardware`, the engine's platform, the checkpoint. Out: a `Profile`, and in words what it was chosen
by. Leaves out: what else goes into a command (launch.py), and whether it fits (memory_model.py).
"""

import difflib
import functools
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from mtpress.engine.memory.hardware import Gpu, Hardware
from mtpress.engine.memory.served_model import ServedModel
from mtpress.errors import InputError, ResourceError

PROFILES = Path(__file__).with_name("profiles.yaml")
GIB = 1 << 30
Platform = Literal["cuda", "cpu"]
BUILDS: dict[Platform, str] = {"cuda": "CUDA", "cpu": "the CPU"}
Items = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Value(Strict):
    """A setting. value: true is a switch, false its --no- twin; everything else stands behind the flag as text."""

    value: bool | int | float | str
    reason: str
    source: str

    @property
    def text(self) -> str:
        return str(self.value)


class Match(Strict):
    """What a machine and a checkpoint must be. gpu: a pattern in the first GPU's name; memory of the smallest GPU, in GiB."""

    platform: Platform
    gpu: str | None = None
    compute_capabilities: Annotated[tuple[str, ...], Items] = ()
    unified: bool | None = None
    min_gpus: int = 1
    min_memory_gib: float = 0
    max_memory_gib: float | None = None
    quant_methods: Annotated[tuple[str, ...], Items] = ()


class Machine(Strict):
    """The hardware that a profile was written for; a dry run elsewhere is made on it."""

    gpu: str = ""
    count: int = Field(ge=0)
    memory_gib: float = 0
    compute_capability: str = "0.0"
    unified: bool = False
    host_gib: float
    num_cores: int

    def as_hardware(self) -> Hardware:
        """Nothing else runs on it: a desktop's share is for its owner to subtract."""
        memory, host = int(self.memory_gib * GIB), int(self.host_gib * GIB)
        gpu = Gpu(self.gpu, memory, memory, capability(self.compute_capability), self.unified)
        return Hardware((gpu,) * self.count, host, host, self.num_cores)


class Profile(Strict):
    """One launch, as profiles.yaml states it. flags: vLLM's own names."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    summary: str
    source: str
    by_name_only: bool = False
    match: Match
    hardware: Machine
    num_speculative_tokens: Value
    min_available_gib: Value | None = None
    flags: dict[Annotated[str, Field(pattern=r"^--[a-z0-9-]+$")], Value]
    environment: dict[Annotated[str, Field(pattern=r"^[A-Z][A-Z0-9_]*$")], Value] = {}

    @property
    def min_available_bytes(self) -> int | None:
        return int(float(self.min_available_gib.value) * GIB) if self.min_available_gib is not None else None


@functools.cache
def profiles() -> dict[str, Profile]:
    """All of them by name, in the order in which they are tried."""
    found = [Profile.model_validate(entry) for entry in yaml.safe_load(PROFILES.read_text(encoding="utf-8"))]
    assert len({profile.name for profile in found}) == len(found)
    return {profile.name: profile for profile in found}


def named(name: str) -> Profile:
    """The profile of that name; InputError lists them."""
    if name in profiles():
        return profiles()[name]
    near = difflib.get_close_matches(name, profiles(), n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise InputError(f"no profile {name[:80]!r}; {hint}There are: {', '.join(profiles())}")


def choose(hardware: Hardware, platform: Platform, model: ServedModel) -> Profile:
    """The first profile that matches; ResourceError where the engine is built for GPUs and there is none."""
    if platform == "cuda" and not hardware.gpus:
        raise ResourceError(
            "the engine is a CUDA build and no NVIDIA GPU is visible here; check the driver and CUDA_VISIBLE_DEVICES, or name a CPU "
            "build with --engine (`make engine` makes one)"
        )
    for profile in profiles().values():
        if not profile.by_name_only and mismatch(profile, hardware, platform, model) is None:
            return profile
    raise AssertionError("the last profiles match any machine")


def mismatch(profile: Profile, hardware: Hardware, platform: Platform, model: ServedModel | None) -> str | None:
    """Why a profile is not for this machine (and, where one is given, this checkpoint), or None where it is."""
    wanted = profile.match
    if wanted.platform != platform:
        return f"it is for a vLLM built for {BUILDS[wanted.platform]}, this one is built for {BUILDS[platform]}"
    if platform == "cpu":
        return None
    if len(hardware.gpus) < wanted.min_gpus:
        return f"it is for {wanted.min_gpus} GPU{'s' if wanted.min_gpus > 1 else ''}, {len(hardware.gpus)} visible here"
    first = hardware.gpus[0]
    memory_gib = min(gpu.memory_bytes for gpu in hardware.gpus[: wanted.min_gpus]) / GIB
    if wanted.gpu is not None and not re.search(wanted.gpu, first.name):
        return f"it is for {wanted.gpu}, this is {first.name}"
    if wanted.compute_capabilities and capability_text(first) not in wanted.compute_capabilities:
        return f"it is for compute capability {' or '.join(wanted.compute_capabilities)}, this GPU has {capability_text(first)}"
    if wanted.unified is not None and first.unified != wanted.unified:
        return f"it is for {'memory that host and GPU share' if wanted.unified else 'a GPU with memory of its own'}, this GPU has the other"
    if memory_gib < wanted.min_memory_gib or memory_gib > (wanted.max_memory_gib or memory_gib):
        upper = " or more" if wanted.max_memory_gib is None else f" to {wanted.max_memory_gib:g}"
        return f"it is for {wanted.min_memory_gib:g} GiB{upper}, this GPU has {memory_gib:.1f}"
    if model is not None and wanted.quant_methods and model.quant_method not in wanted.quant_methods:
        return f"it is for {', '.join(wanted.quant_methods)} builds, this checkpoint is {model.format}"
    return None


def described(hardware: Hardware) -> str:
    """The hardware in words: "2 × NVIDIA GeForce RTX 5090 (12.0, 31.8 GiB)", "no GPU, 16 cores, 64.0 GiB"."""
    if not hardware.gpus:
        return f"no GPU, {hardware.num_cores} cores, {hardware.memory_bytes / GIB:.1f} GiB"
    first, count = hardware.gpus[0], len(hardware.gpus)
    shared = ", shared with the host" if first.unified else ""
    return f"{f'{count} × ' if count > 1 else ''}{first.name} ({capability_text(first)}, {first.memory_bytes / GIB:.1f} GiB{shared})"


def capability(text: str) -> tuple[int, int]:
    major, minor = text.split(".")
    return int(major), int(minor)


def capability_text(gpu: Gpu) -> str:
    return ".".join(map(str, gpu.compute_capability))


def as_json(profile: Profile) -> dict[str, Any]:
    return {"name": profile.name, "summary": profile.summary, "source": profile.source}
