"""What stands beside the weights of a quantized checkpoint: config files, tokenizer, template, processor files.

In: a plan. Out: file names and contents. Leaves out: the record (checkpoint/record.py) and the index (checkpoint/writer.py).
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mtpress.chat.template import template
from mtpress.chat.template_origin import Origin, origin
from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.checkpoint.json_files import read_json_object
from mtpress.checkpoint.record import RECORD_NAME
from mtpress.errors import InputError
from mtpress.json_files import json_bytes
from mtpress.models import family
from mtpress.plan.plan import Plan
from mtpress.plan.recipe import Recipe, SignRound
from mtpress.quant_config.tokenizer_files import (
    END,
    GENERATION,
    HOLD_TEMPLATES,
    SAMPLING,
    TEXT_END,
    marks,
    templates,
    token_ids,
)
from mtpress.quant_config.view import Subject
from mtpress.quantization.source_faults import lacks_tower

# Written anew, or left behind: the source's card, record and quantization config do not describe the output.
NOT_CARRIED = {"config.json", "tokenizer_config.json", "hf_quant_config.json", "quantization_config.json", "README.md", RECORD_NAME}
MAX_CARRIED_BYTES = 200_000_000
TEMPLATE, TEMPLATE_KEY = "chat_template.jinja", "chat_template"
NAMED_TEMPLATES = "additional_chat_templates"  # transformers': a folder of NAME.jinja beside the default one


def carried_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Files beside the weights that go over byte for byte, and tokenizer_config.json without what newer libraries add."""
    carried: dict[str, bytes] = {}
    total = 0
    for path in (*checkpoint.other_files(), *sorted((checkpoint.path / NAMED_TEMPLATES).glob("*.jinja"))):
        if path.name in NOT_CARRIED or path.name.startswith(".") or path.suffix in (".bin", ".pt", ".pth", ".pkl", ".py", ".gguf"):
            continue
        try:
            total += (size := path.stat().st_size)
            if size > MAX_CARRIED_BYTES:
                raise InputError(f"{path}: {size / 1e6:.0f} MB beside the weights; move it out of the checkpoint")
            if total > MAX_CARRIED_BYTES:
                raise InputError(f"{checkpoint.path}: over {MAX_CARRIED_BYTES // 1_000_000} MB of files beside the weights; move them out")
            carried[str(path.relative_to(checkpoint.path))] = path.read_bytes()
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
    return json_bytes(config)


def chosen_files(recipe: Recipe, checkpoint: Checkpoint, carried: dict[str, bytes]) -> dict[str, bytes]:
    """The carried files with the template and the sampling that the recipe names; all others byte for byte."""
    files = dict(carried)
    if recipe.chat_template == "mtpress":
        install_template(files)
    if recipe.generation_config is not None:
        config = json.loads(files[GENERATION]) if GENERATION in files else end_tokens(checkpoint)
        files[GENERATION] = json_bytes(config | recipe.generation_config.said())
    return files


@dataclass(frozen=True)
class TemplateChoice:
    """ours: whether our template is installed. source: what the source's is (chat/template_origin.py). note: what is to be said before."""

    ours: bool
    source: Origin
    note: str | None = None

    def record(self) -> dict[str, str]:
        return asdict(self.source)


def template_choice(recipe: Recipe, checkpoint: Checkpoint) -> TemplateChoice:
    """Whose template the output gets; InputError where that would be one that does not work."""
    subject = Subject(checkpoint)
    name, text = next(iter(templates(subject).items()), ("", None))
    source = origin(text, bool(subject.stored_vision), marks(subject)) if name else Origin("none", "it has none")
    wanted = recipe.chat_template != "source"
    if source.kind == "broken" and not wanted:
        raise InputError(f"{checkpoint.path / name}: {source.what}; take --chat-template mtpress, or mend it")
    if not wanted or source.kind in ("none", "ours", "official"):
        return TemplateChoice(wanted, source)
    if source.kind == "own" and recipe.chat_template == "mtpress":
        return TemplateChoice(False, source, (
            f"{name}: the source's template is its author's own and is kept ({source.what}); chat_template: source says so without this "
            "line, --chat-template replace installs mtpress's"
        ))  # fmt: skip
    return TemplateChoice(True, source, f"{name}: mtpress's template replaces the source's, {REPLACED[source.kind]} ({source.what}); "
                          "chat_template: source keeps it")  # fmt: skip


REPLACED = {"official-like": "which is none of the official ones", "own": "which is its author's own", "broken": "which does not work"}


def install_template(files: dict[str, bytes]) -> None:
    """Puts ours into a checkpoint's files, and takes every other out, so that all engines find the same."""
    files[TEMPLATE] = template().encode()
    for name in [name for name in files if name == "chat_template.json" or name.startswith(f"{NAMED_TEMPLATES}/")]:
        del files[name]
    for name in HOLD_TEMPLATES:
        if name in files and TEMPLATE_KEY in (content := json.loads(files[name])):
            files[name] = json_bytes({key: value for key, value in content.items() if key != TEMPLATE_KEY})


def end_tokens(checkpoint: Checkpoint) -> dict[str, Any]:
    """The end and padding tokens of the chat format, for a source without generation_config.json."""
    ids = token_ids(Subject(checkpoint))
    ends = [ids[token] for token in (END, TEXT_END) if token in ids]
    return ({"eos_token_id": ends} if ends else {}) | ({"pad_token_id": ids[TEXT_END]} if TEXT_END in ids else {})


def template_of(recipe: Recipe, files: dict[str, bytes]) -> str:
    """Which template is written, in the words of the recipe: "mtpress", "source", or "none" where the source has none."""
    inside = any(TEMPLATE_KEY in json.loads(files[name]) for name in HOLD_TEMPLATES if name in files)
    named = any(name.startswith(f"{NAMED_TEMPLATES}/") for name in files)
    if not (inside or named or TEMPLATE in files or "chat_template.json" in files):
        return "none"
    return recipe.chat_template


def sampling_of(files: dict[str, bytes]) -> dict[str, Any]:
    """The sampling that an engine takes from generation_config.json where a request names none."""
    content = json.loads(files[GENERATION]) if GENERATION in files else {}
    return {key: content[key] for key in (*SAMPLING, "max_new_tokens") if content.get(key) is not None}


def config_files(plan: Plan) -> dict[str, bytes]:
    """config.json, which declares what is quantized, and the file of the format that says the same."""
    model = family(plan.source.model_type)
    config = model.untied_config(plan.source.config, plan.source.tensors)  # said, for engines that go by config.json alone
    if plan.recipe.vision == "drop" or lacks_tower(plan.source):
        config = model.text_only_config(config)
    declared, file, content = DECLARATIONS[plan.recipe.format](plan)
    contents = {"config.json": {**config, "quantization_config": declared}, file: content}
    return {name: json_bytes(content) for name, content in contents.items()}


Declared = tuple[dict[str, Any], str, dict[str, Any]]  # config.json's quantization_config, the other file, its content


def _modelopt(plan: Plan) -> Declared:
    from mtpress.formats import nvfp4

    ignore, fp8 = list(plan.ignore), plan.recipe.kv_cache != "auto"
    return nvfp4.quantization_config(ignore, fp8), "hf_quant_config.json", nvfp4.hf_quant_config(ignore, fp8)


def _mixed(plan: Plan) -> Declared:
    from mtpress.formats import mixed_precision

    content, file, beside = _modelopt(plan)
    return mixed_precision.quantization_config(content, plan.formats), file, mixed_precision.hf_quant_config(beside, plan.formats)


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


DECLARATIONS: dict[str, Callable[[Plan], Declared]] = {"nvfp4": _modelopt, "int4": _autoround, "mixed": _mixed}
