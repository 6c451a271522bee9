"""What a published benchmark must say of itself: machine, checkpoint, prompts and command, without paths or keys.

In: what bench was called with. Out: plain dictionaries and text for bench.json. Leaves out: what was measured.
"""

import hashlib
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mtpress.bench.prompt_mix import NO_ACCEPTANCE, PromptMix
from mtpress.checkpoint.safetensors import MAX_HEADER_BYTES
from mtpress.engine.memory.hardware import Hardware
from mtpress.engine.memory.served_model import ServedModel
from mtpress.errors import InputError


def prompt_facts(mix: PromptMix) -> dict[str, Any]:
    if mix.kind == "random":
        return {"source": mix.source, "short": mix.source, "no_acceptance": NO_ACCEPTANCE}
    short = f"{len(mix.prompts)} prompts of {'its shipped mix' if mix.kind == 'mix' else mix.source.partition(',')[0]}"
    return {"source": mix.source, "short": short, "num_prompts": len(mix.prompts), "num_left_out": mix.num_left_out, "sha256": mix.sha256}


def describe_machine(hardware: Hardware) -> dict[str, Any]:
    names = (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name"))
    gpus = [asdict(gpu) for gpu in hardware.gpus]
    cpu = next(names, platform.processor() or platform.machine())
    return {"gpus": gpus, "cpu": cpu, "num_cores": hardware.num_cores, "memory_bytes": hardware.memory_bytes, "system": platform.platform()}


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def identity(model: ServedModel) -> dict[str, Any]:
    """headers_sha256: over the names and headers of its safetensors files in order, which name every tensor, dtype and shape."""
    digest = hashlib.sha256()
    for shard in sorted(path for path in model.path.glob("*.safetensors") if path.is_file()):
        try:
            with shard.open("rb") as file:
                size = file.read(8)
                digest.update(shard.name.encode(errors="surrogateescape") + size)
                digest.update(file.read(min(int.from_bytes(size, "little"), MAX_HEADER_BYTES)))
        except OSError as error:
            raise InputError(f"{shard}: cannot be read ({error.strerror or error})") from None
    return {
        "name": model.name,
        "format": model.format,
        "num_params": model.num_params,
        "weight_bytes": sum(model.weight_bytes.values()),
        "config_sha256": hashlib.sha256((model.path / "config.json").read_bytes()).hexdigest(),
        "headers_sha256": digest.hexdigest(),
    }
