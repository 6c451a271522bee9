"""What a mutation is: one sound input, one seeded way to break it, the commands that must refuse it.

In: a seed. Out: a `Case` on disk whose input is certainly broken, and the command line for it. Leaves out: the ways to
break it (broken_headers.py, broken_configs.py, broken_tokenizers.py, broken_samples.py, broken_recipes.py).

A way returns what it did, or "" where this draw happens to have left the input valid: then another is drawn.
"""

import importlib
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file

from checkpoints import small_config, small_files, small_tensors

TEMPLATE = Path(__file__).parents[2] / "src" / "mtpress" / "chat" / "qwen3_5.jinja"
INDEX, CONFIG = "model.safetensors.index.json", "config.json"
SHARDS = tuple(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))
RECIPE = "name: mine\nsummary: mine\nformat: nvfp4\nquantize: [gdn, attention, mlp]\n"
LAYER = "model.language_model.layers."

# The stages that a broken input is given to. check may find fault (exit code 1) where the others refuse (2).
ALL = ("weight-only", "calibrated", "inspect", "check")
QUANTIZE = ("weight-only", "calibrated")
CALIBRATED = ("calibrated",)
WEIGHT_ONLY = ("weight-only",)

JUNK: tuple[Any, ...] = (None, True, "12", "", [], {}, [1], {"a": 1}, 1.5, -1, 10**30, "\x00", float("nan"))


@dataclass(frozen=True)
class Case:
    """The files of one mutation, all sound at first. rng: every choice comes from it."""

    rng: random.Random
    source: Path
    recipe: Path
    samples: Path

    @property
    def picture(self) -> Path:
        return self.samples.with_name("picture.png")

    @property
    def shard(self) -> Path:
        return self.source / self.rng.choice(SHARDS)

    def arguments(self, stage: str, out: Path) -> list[str]:
        if stage in ("inspect", "check"):
            return [stage, str(self.source)]
        quantize = ["quantize", str(self.source), str(out), "--recipe", str(self.recipe)]
        return [*quantize, *(["--calibration", str(self.samples)] if stage == "calibrated" else ["--weight-only", "0.01"])]


@dataclass(frozen=True)
class Way:
    """One way to break an input. kind: what is broken; stages: who must refuse it."""

    kind: str
    name: str
    stages: tuple[str, ...]
    apply: Callable[[Case], str]


_WAYS: list[Way] = []


def way(kind: str, stages: tuple[str, ...] = ALL) -> Callable[[Callable[[Case], str]], Callable[[Case], str]]:
    """Registers a function as a way to break an input of `kind`."""

    def register(apply: Callable[[Case], str]) -> Callable[[Case], str]:
        _WAYS.append(Way(kind, apply.__name__, stages, apply))
        return apply

    return register


def all_ways() -> list[Way]:
    """Every way of every file, in one order."""
    for name in ("broken_headers", "broken_configs", "broken_tokenizers", "broken_samples", "broken_recipes"):
        importlib.import_module(name)
    return sorted(_WAYS, key=lambda way: (way.kind, way.name))


def make_sound(directory: Path, layers: int = 4, **sizes: int) -> Case:
    """The sound input: a checkpoint of three shards with the real template, a recipe, samples with tools and a picture.

    sizes: in place of those of the small model's text_config.
    """
    source = directory / "source"
    source.mkdir(parents=True)
    config = small_config()
    config["text_config"] |= {"num_hidden_layers": layers, **sizes}
    config["vision_config"]["out_hidden_size"] = config["text_config"]["hidden_size"]
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25, "mrope_interleaved": True}
    config["text_config"] |= {
        "hidden_act": "silu", "rms_norm_eps": 1e-6, "layer_types": [*["linear_attention"] * 3, "full_attention"] * (layers // 4),
        "rope_parameters": rope | {"mrope_section": [2, 1, 1]},
    }  # fmt: skip
    (source / CONFIG).write_text(json.dumps(config, indent=1))
    for name, content in (small_files() | {"chat_template.jinja": TEMPLATE.read_text()}).items():
        (source / name).write_text(content)
    write_shards(source, small_tensors(config))
    (directory / "recipe.yaml").write_text(RECIPE)
    Image.effect_noise((24, 20), 80).convert("RGB").save(directory / "picture.png")
    case = Case(random.Random(0), source, directory / "recipe.yaml", directory / "samples.jsonl")
    case.samples.write_text("\n".join(json.dumps(row) for row in sound_rows(case.picture)) + "\n")
    return case


def write_shards(source: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Tensors into three shards and their index."""
    names = sorted(tensors)
    files = {name: SHARDS[i * len(SHARDS) // len(names)] for i, name in enumerate(names)}
    for file in SHARDS:
        save_file({n: tensors[n] for n in names if files[n] == file}, source / file, metadata={"format": "pt"})
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    (source / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": files}))


def sound_rows(picture: Path) -> list[dict[str, Any]]:
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    tool = {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": parameters}}
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Nimes"}}}
    return [
        {"text": "Ruby lives in Nimes."},
        {"messages": [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hello!"}]},
        {"messages": [{"role": "user", "content": [picture_part(str(picture)), {"type": "text", "text": "What is it?"}]}]},
        {
            "messages": [
                {"role": "user", "content": "Rain?"},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "content": "no"},
            ],
            "tools": [tool],
        },
    ]


def picture_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def copy_of(sound: Case, directory: Path, rng: random.Random) -> Case:
    """The sound input anew, in `directory`, which is emptied first; names of files within it are those of the copy."""
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(sound.source.parent, directory)
    case = Case(rng, directory / "source", directory / "recipe.yaml", directory / "samples.jsonl")
    case.samples.write_text("\n".join(json.dumps(row) for row in sound_rows(case.picture)) + "\n")
    return case


def not_json(raw: bytes) -> bool:
    """By Python's own parser, strict about repeated keys or not."""
    try:
        json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError):
        return True
    return False


def torn(path: Path, rng: random.Random) -> str:
    """Cuts a JSON file somewhere, puts bytes in, takes bytes out, or changes some, until it is JSON no more."""
    raw = path.read_bytes()
    for _ in range(100):
        at, count = rng.randrange(len(raw)), rng.randint(1, 8)
        what = rng.choice(("cut", "insert", "remove", "change"))
        noise = bytes(rng.randrange(256) for _ in range(count))
        new = {
            "cut": raw[:at],
            "insert": raw[:at] + noise + raw[at:],
            "remove": raw[:at] + raw[at + count :],
            "change": raw[:at] + noise + raw[at + count :],
        }[what]
        if not_json(new):
            path.write_bytes(new)
            return f"{path.name}: {what} {count} bytes at {at}"
    return ""


def unparsable(path: Path, rng: random.Random) -> str:
    """Puts content in place of a JSON file that no parser takes for an object."""
    name, content = rng.choice(
        [
            ("empty", b""),
            ("NUL bytes", b"\0" * rng.randint(1, 5000)),
            ("random bytes", b"\xff" + rng.randbytes(rng.randint(1, 5000))),
            ("nested lists", b"[" * rng.randint(2_000, 200_000)),
            ("nested objects", b'{"a":' * rng.randint(2_000, 200_000)),
            ("a number of many digits", b'{"a": ' + b"9" * rng.randint(5_000, 50_000) + b"}"),
            ("UTF-16", path.read_bytes().decode(errors="replace").encode("utf-16")),
            ("UTF-8 with a mark", b"\xef\xbb\xbf" + path.read_bytes()),
            ("a list", b"[]"),
            ("a string", b'"config"'),
            ("a number", b"3"),
            ("null", b"null"),
            ("NaN", b"NaN"),
            ("HTML", b"<!doctype html><title>404</title>"),
            ("a Git LFS pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
            ("a key twice", b""),
        ]
    )
    if name == "a key twice":
        first = next(iter(json.loads(path.read_bytes())))
        content = b"{" + json.dumps(first).encode() + b": 0, " + path.read_bytes().lstrip()[1:]
    path.write_bytes(content)
    return f"{path.name}: {name}, {len(content)} bytes"


def swollen(case: Case, path: Path, key: str) -> str:
    """A JSON object without what it must hold, and with millions of small things, or a file too large for that."""
    n = case.rng.randint(500_000, 12_000_000)
    junk = case.rng.choice((b"[" + b"[]," * n + b"0]", b"[" + b"{}," * n + b"0]", b'"' + b"x" * n + b'"', b"[" + b"1," * n + b"0]"))
    path.write_bytes(b'{"junk": ' + junk + b', "' + key.encode() + b'": {}}')
    return f"{path.name}: {path.stat().st_size} bytes"


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
