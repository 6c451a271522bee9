"""What stands beside the weights of a quantized checkpoint: config files, tokenizer, template, processor files.

In: a plan. Out: file names and contents. Leaves out: the record (record.py) and the index (checkpoint_writer.py).
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mtpress.checkpoint import Checkpoint, read_json_object
from mtpress.errors import InputError
from mtpress.models import family
from mtpress.plan import Plan
from mtpress.recipe import SignRound
from mtpress.record import RECORD_NAME

# Written anew, or left behind: the source's card, record and quantization config do not describe the output.
NOT_CARRIED = {"config.json", "tokenizer_config.json", "hf_quant_config.json", "quantization_config.json", "README.md", RECORD_NAME}
MAX_CARRIED_BYTES = 200_000_000


def carried_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Files beside the weights that go over byte for byte, and tokenizer_config.json without what newer libraries add."""
    carried: dict[str, bytes] = {}
    for path in checkpoint.other_files():
        if path.name in NOT_CARRIED or path.name.startswith(".") or path.suffix in (".bin", ".pt", ".pth", ".pkl", ".py", ".gguf"):
            continue
        try:
            if path.stat().st_size > MAX_CARRIED_BYTES:
                raise InputError(f"{path}: {path.stat().st_size / 1e6:.0f} MB beside the weights; move it out of the checkpoint")
            carried[path.name] = path.read_bytes()
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    for name in carried:
        if name.endswith(".json"):
            read_json_object(checkpoint.path / name)
    if "tokenizer.json" not in carried and "vocab.json" not in carried:
        raise InputError(f"{checkpoint.path}: no tokenizer.json; a served checkpoint needs its tokenizer, fetch it from the release")
    if (checkpoint.path / "tokenizer_config.json").exists():
        carried["tokenizer_config.json"] = clean_tokenizer_config(checkpoint.path / "tokenizer_config.json")
    return carried


def clean_tokenizer_config(path: Path) -> bytes:
    """tokenizer_config.json byte for byte, unless it has the `backend` key or the class that only transformers 5 knows."""
    config = read_json_object(path)
    if "backend" not in config and config.get("tokenizer_class") != "TokenizersBackend":
        return path.read_bytes()
    config.pop("backend", None)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "Qwen2TokenizerFast"
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def config_files(plan: Plan) -> dict[str, bytes]:
    """config.json, which declares what is quantized, and the file of the format that says the same."""
    config = dict(plan.source.config)
    if plan.recipe.vision == "drop":
        config = family(plan.source.model_type).text_only_config(config)
    declared, file, content = DECLARATIONS[plan.recipe.format](plan)
    contents = {"config.json": {**config, "quantization_config": declared}, file: content}
    return {name: (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode() for name, content in contents.items()}


Declared = tuple[dict[str, Any], str, dict[str, Any]]  # config.json's quantization_config, the other file, its content


def _modelopt(plan: Plan) -> Declared:
    from mtpress.formats import nvfp4

    ignore, fp8 = list(plan.ignore), plan.recipe.kv_cache == "fp8_cast"
    return nvfp4.quantization_config(ignore, fp8), "hf_quant_config.json", nvfp4.hf_quant_config(ignore, fp8)


def _autoround(plan: Plan) -> Declared:
    """auto-round 0.16.1 leaves out what is its default: 200 iterations, batches of 8."""
    from mtpress.formats import int4

    said, default = plan.recipe.signround, SignRound()
    tuning = {"iters": said.iterations, "batch_size": said.batch_size} if plan.recipe.rounding == "signround" else {"iters": 0}
    defaults = {"iters": default.iterations, "batch_size": default.batch_size}
    content = int4.quantization_config(
        plan.kept_linears, f"{plan.prefix}layers", **{key: value for key, value in tuning.items() if value != defaults[key]}
    )
    return content, "quantization_config.json", content


DECLARATIONS: dict[str, Callable[[Plan], Declared]] = {"nvfp4": _modelopt, "int4": _autoround}
