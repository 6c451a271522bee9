"""Checkpoints, engines and machines to compose launches from, without any of them being here."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from mtpress.engine.launch import profiles
from mtpress.engine.launch.installed import Engine
from mtpress.engine.launch.launch import Launch, compose
from mtpress.engine.launch.profiles import GIB, Platform
from mtpress.engine.memory.hardware import Gpu, Hardware
from mtpress.engine.memory.served_model import ServedModel

BUILTIN_MODEL = Path(__file__).parents[2] / "src/mtpress/builtin/mtpress-tiny"
NVFP4: dict[str, Any] = {"format": "modelopt NVFP4 (W4A4)", "quant_method": "modelopt_fp4"}


@cache
def tiny() -> ServedModel:
    return ServedModel.read(BUILTIN_MODEL)


def model(**changes: Any) -> ServedModel:
    """The built-in model with room for long contexts, and what else is to be different."""
    return replace(tiny(), **{"max_position_embeddings": 262144, **changes})


def engine(version: str = "0.32.0", platform: Platform = "cuda", plugins: tuple[str, ...] = ()) -> Engine:
    return Engine(Path("python"), ("/env/bin/vllm",), version, platform, plugins)


def machine(profile: str) -> Hardware:
    """The hardware that a profile was written for."""
    return profiles.named(profile).hardware.as_hardware()


def card(name: str, memory_gib: float, capability: tuple[int, int], *, count: int = 1, unified: bool = False) -> Hardware:
    memory = int(memory_gib * GIB)
    return Hardware((Gpu(name, memory, memory, capability, unified),) * count, 128 * GIB, 100 * GIB, 16)


def launch(
    on: str | Hardware = "rtx-pro-6000-256k",
    *,
    version: str = "0.32.0",
    plugins: tuple[str, ...] = (),
    served: ServedModel | None = None,
    **asked: Any,
) -> Launch:
    """A launch on a profile's hardware or another; the platform follows from it."""
    hardware = machine(on) if isinstance(on, str) else on
    built: Platform = "cuda" if hardware.gpus else "cpu"
    given = {"port": 8000, "environ": {}} | asked
    return compose(served or model(), engine(version, built, plugins), hardware, **given)


def flags(launch: Launch) -> dict[str, str | None]:
    """Flag or variable → its value, as the settings say."""
    return {setting.flag: setting.value for setting in launch.settings}
