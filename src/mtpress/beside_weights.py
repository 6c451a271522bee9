"""What stands beside the weights of a quantized checkpoint: config files, tokenizer, template, processor files.

In: a plan. Out: file names and contents. Leaves out: the record (record.py) and the index (checkpoint_writer.py).
"""

import json
from pathlib import Path

from mtpress.checkpoint import Checkpoint, read_json_object
from mtpress.errors import InputError
from mtpress.models import family
from mtpress.plan import Plan
from mtpress.record import RECORD_NAME

# Written anew, or left behind: the source's card, record and quantization config do not describe the output.
NOT_CARRIED = {"config.json", "tokenizer_config.json", "hf_quant_config.json", "README.md", RECORD_NAME}
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
    """config.json and hf_quant_config.json, both naming every module that stays BF16."""
    from mtpress.formats import nvfp4

    ignore, fp8 = list(plan.ignore), plan.recipe.kv_cache == "fp8_cast"
    config = dict(plan.source.config)
    if plan.recipe.vision == "drop":
        config = family(plan.source.model_type).text_only_config(config)
    config["quantization_config"] = nvfp4.quantization_config(ignore, fp8)
    contents = {"config.json": config, "hf_quant_config.json": nvfp4.hf_quant_config(ignore, fp8)}
    return {name: (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode() for name, content in contents.items()}
