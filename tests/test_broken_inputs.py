"""Forty broken inputs: each gets exit code 2 and one line that names the trouble; nothing half-written, the source untouched."""

import hashlib
import json
import os
import resource
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mtpress.builtin import BUILTIN_MODEL
from mtpress.cli import main

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
LAYER = "model.language_model.layers.0."


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrites the JSON header of a safetensors file, leaving the data as it is."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def set_header(d: Path, name: str, key: str, value: Any) -> None:
    edit_header(d / WEIGHTS, lambda h: h[name].__setitem__(key, value))


def set_text(d: Path, key: str, value: Any) -> None:
    edit_json(d / CONFIG, lambda c: c["text_config"].__setitem__(key, value))


def drop_tensor(d: Path, *names: str) -> None:
    """Removes tensors from the file and the index alike: a checkpoint that is sound but lacks them."""
    from safetensors.torch import load_file, save_file

    kept = {n: t for n, t in load_file(d / WEIGHTS).items() if n not in names}
    save_file(kept, d / WEIGHTS, metadata={"format": "pt"})
    edit_json(d / INDEX, lambda i: [i["weight_map"].pop(n) for n in names])


def set_tensor(d: Path, name: str, change: Callable[[Any], Any]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(d / WEIGHTS)
    tensors[name] = change(tensors[name])
    save_file(tensors, d / WEIGHTS, metadata={"format": "pt"})
    edit_json(d / INDEX, lambda i: i["weight_map"].__setitem__(name, WEIGHTS))


def with_nan(tensor: Any) -> Any:
    tensor[0, 0] = float("nan")
    return tensor


def truncate(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


# what is broken → (how, a word that the message must hold)
CHECKPOINTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda d: (d / CONFIG).unlink(), "config.json"),
    "config not JSON": (lambda d: (d / CONFIG).write_text("{"), "not valid JSON"),
    "config a list": (lambda d: (d / CONFIG).write_text("[]"), "JSON object"),
    "config not UTF-8": (lambda d: (d / CONFIG).write_bytes(b"\xff\xfe{}"), "not valid JSON"),
    "config with a key twice": (lambda d: (d / CONFIG).write_text('{"a": 1, "a": 2}'), "twice"),
    "config deeply nested": (lambda d: (d / CONFIG).write_text("[" * 100_000), "not valid JSON"),
    "unknown model type": (lambda d: edit_json(d / CONFIG, lambda c: c.__setitem__("model_type", "llama")), "llama"),
    "text_config not an object": (lambda d: edit_json(d / CONFIG, lambda c: c.__setitem__("text_config", 3)), "config"),
    "layers not a number": (lambda d: set_text(d, "num_hidden_layers", "four"), "num_hidden_layers"),
    "layer_types too short": (lambda d: set_text(d, "layer_types", ["full_attention"]), "layer_types"),
    "hidden size negative": (lambda d: set_text(d, "hidden_size", -256), "hidden_size"),
    "hidden size of another model": (lambda d: set_text(d, "hidden_size", 512), "config.json calls for"),
    "more layers than stored": (lambda d: set_text(d, "num_hidden_layers", 8) or set_text(d, "layer_types", None), "missing"),
    "fewer layers than stored": (
        lambda d: set_text(d, "num_hidden_layers", 3) or set_text(d, "layer_types", ["linear_attention"] * 3),
        "more than config.json",
    ),
    "two draft layers": (lambda d: set_text(d, "mtp_num_hidden_layers", 2), "mtp_num_hidden_layers"),
    "head not declared": (lambda d: set_text(d, "mtp_num_hidden_layers", 0), "mtp_num_hidden_layers"),
    "quantized already": (lambda d: edit_json(d / CONFIG, lambda c: c.__setitem__("quantization_config", {})), "quantized already"),
    "weights missing": (lambda d: (d / WEIGHTS).unlink(), WEIGHTS),
    "weights empty": (lambda d: truncate(d / WEIGHTS, 0), "header"),
    "weights cut in the header": (lambda d: truncate(d / WEIGHTS, 100), "header"),
    "weights cut in the data": (lambda d: truncate(d / WEIGHTS, 1_000_000), "end at byte"),
    "weights with a tail": (lambda d: (d / WEIGHTS).write_bytes((d / WEIGHTS).read_bytes() + b"tail"), "end at byte"),
    "header length lies": (lambda d: (d / WEIGHTS).write_bytes(b"\xff" * 8 + (d / WEIGHTS).read_bytes()[8:]), "claims"),
    "header not JSON": (lambda d: (d / WEIGHTS).write_bytes(struct.pack("<Q", 8) + b"notjson!"), "not JSON"),
    "dtype unknown": (lambda d: set_header(d, "lm_head.weight", "dtype", "BF17"), "dtype"),
    "dtype lies": (lambda d: set_header(d, "lm_head.weight", "dtype", "F32"), "needs"),
    "shape lies": (lambda d: set_header(d, "lm_head.weight", "shape", [1280, 255]), "needs"),
    "shape negative": (lambda d: set_header(d, "lm_head.weight", "shape", [-1280, 256]), "shape"),
    "offsets overlap": (
        lambda d: edit_header(d / WEIGHTS, lambda h: h["mtp.norm.weight"].__setitem__("data_offsets", h["mtp.fc.weight"]["data_offsets"])),
        "needs",
    ),
    "offsets descend": (lambda d: set_header(d, "lm_head.weight", "data_offsets", [9, 3]), "ascending"),
    "index outside the directory": (
        lambda d: edit_json(d / INDEX, lambda i: i["weight_map"].__setitem__("lm_head.weight", "../other.safetensors")),
        "outside the directory",
    ),
    "index names a missing file": (
        lambda d: edit_json(d / INDEX, lambda i: i["weight_map"].__setitem__("lm_head.weight", "model-2.safetensors")),
        "not on disk",
    ),
    "index names a missing tensor": (
        lambda d: edit_json(d / INDEX, lambda i: i["weight_map"].__setitem__("model.ghost.weight", WEIGHTS)),
        "does not hold it",
    ),
    "index without a map": (lambda d: (d / INDEX).write_text('{"metadata": {}}'), "weight_map"),
    "tensor not indexed": (lambda d: edit_json(d / INDEX, lambda i: i["weight_map"].pop("mtp.fc.weight")), "not in the index"),
    "head not whole": (lambda d: drop_tensor(d, "mtp.fc.weight"), "graft"),
    "layer tensor missing": (lambda d: drop_tensor(d, f"{LAYER}mlp.up_proj.weight"), "missing"),
    "tensor of no component": (lambda d: add_tensor(d, "model.language_model.rotary.inv_freq"), "component"),
    "source in float64": (lambda d: set_tensor(d, f"{LAYER}mlp.up_proj.weight", lambda t: t.double()), "no engine computes"),
    "weights hold NaN": (lambda d: set_tensor(d, f"{LAYER}mlp.up_proj.weight", with_nan), "damaged"),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json"),
    "tokenizer not JSON": (lambda d: (d / "tokenizer.json").write_text("{"), "tokenizer.json"),
    "tokenizer of another kind": (lambda d: (d / "tokenizer.json").write_text('{"version": "1.0"}'), "tokenizer"),
    "tokenizer_config not JSON": (lambda d: (d / "tokenizer_config.json").write_text("nope"), "tokenizer_config.json"),
    "template not Jinja": (lambda d: (d / "chat_template.jinja").write_text("{% if %}"), "template"),
}


def add_tensor(d: Path, name: str) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    save_file({**load_file(d / WEIGHTS), name: torch.ones(4)}, d / WEIGHTS, metadata={"format": "pt"})
    edit_json(d / INDEX, lambda i: i["weight_map"].__setitem__(name, WEIGHTS))


RECIPE = "name: mine\nsummary: mine\nformat: nvfp4\nquantize: [mlp]\n"
RECIPES = {
    "misspelt key": (RECIPE + "in_proj_abs: bf16\n", "did you mean in_proj_ab"),
    "misspelt calibration key": (RECIPE + "calibration: {num_sample: 3}\n", "num_samples"),
    "value of no list": (RECIPE.replace("nvfp4", "nvfp8"), "nvfp4"),
    "component unknown": (RECIPE.replace("[mlp]", "[mpl]"), "mlp"),
    "key missing": (RECIPE.replace("format: nvfp4\n", ""), "format"),
    "not YAML": (RECIPE + "  - ][\n", "not valid YAML"),
    "a list": ("- a\n- b\n", "map of keys"),
    "count as text": (RECIPE + "calibration: {num_samples: many}\n", "num_samples"),
    "a Python object": ("!!python/object/apply:os.system ['true']\n", "not valid YAML"),
}
LINES = {
    "line not JSON": ('{"text": "fine"}\n{"text": \n', ":2: not JSON"),
    "line a list": ("[1]\n", "must be an object"),
    "neither messages nor text": ('{"prompt": "x"}\n', "messages"),
    "messages empty": ('{"messages": []}\n', "messages"),
    "role unknown": ('{"messages": [{"role": "narrator", "content": "x"}]}\n', "role"),
    "content a number": ('{"messages": [{"role": "user", "content": 3}]}\n', "content"),
    "image missing": (
        '{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "/nowhere.png"}}]}]}\n', "does not open"),
    "image not an image": (
        '{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}]}\n',
        "does not open"),
    "image from the web": (
        '{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}]}]}\n',
        "web address"),
    "file empty": ("\n", "no calibration samples"),
}  # fmt: skip


def copy_model(to: Path) -> Path:
    to.mkdir()
    for file in BUILTIN_MODEL.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def digests(directory: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir()}


def refused(arguments: list[str], out: Path, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs the command line: exit code 2, one line on stderr that holds `word`, nothing at `out` or beside it."""
    code = main(arguments)
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.strip() and not line.startswith("quantize  ")]  # progress
    assert code == 2, captured.err
    assert len(lines) == 1, captured.err
    assert word in lines[0]
    assert len(lines[0]) < 600
    assert captured.out == ""
    assert not out.exists()
    assert not out.with_name(out.name + ".partial").exists()


@pytest.mark.parametrize("trouble", list(CHECKPOINTS))
def test_broken_checkpoints(trouble: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, word = CHECKPOINTS[trouble]
    source, out = copy_model(tmp_path / "source"), tmp_path / "out"
    damage(source)
    before = digests(source)
    refused(
        ["quantize", str(source), str(out), "--recipe", "nvfp4-kvfp8-vlm", "--calibration", "builtin"], out, word, capsys
    )  # its own template
    assert digests(source) == before


@pytest.mark.parametrize("trouble", list(RECIPES))
def test_broken_recipes(trouble: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, word = RECIPES[trouble]
    (tmp_path / "mine.yaml").write_text(text)
    out = tmp_path / "out"
    refused(["quantize", str(BUILTIN_MODEL), str(out), "--recipe", str(tmp_path / "mine.yaml")], out, word, capsys)


@pytest.mark.parametrize("trouble", list(LINES))
def test_broken_calibration_files(trouble: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, word = LINES[trouble]
    (tmp_path / "lines.jsonl").write_text(text)
    out = tmp_path / "out"
    arguments = ["quantize", str(BUILTIN_MODEL), str(out), "--recipe", "nvfp4-mtp-vlm", "--calibration", str(tmp_path / "lines.jsonl")]
    refused(arguments, out, word, capsys)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["quantize", "/nowhere", "OUT", "--recipe", "nvfp4-mtp-vlm"], "no such directory"),
        (["quantize", "MODEL", "OUT", "--recipe", "nvfp4-mtp-vml"], "did you mean nvfp4-mtp-vlm"),
        (["quantize", "MODEL", "OUT", "--recipe", "nowhere.yaml"], "cannot be read"),
        (["quantize", "MODEL", "OUT", "--recipe", "nvfp4-mtp-vlm", "--calibration", "nowhere.jsonl"], "cannot be read"),
        (["quantize", "MODEL", "OUT", "--recipe", "nvfp4-mtp-vlm", "--weight-only", "-1"], "positive"),
        (["quantize", "MODEL/config.json", "OUT", "--recipe", "nvfp4-mtp-vlm"], "is a file"),
    ],
)  # fmt: skip
def test_broken_calls(arguments: list[str], word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    filled = [a.replace("OUT", str(out)).replace("MODEL", str(BUILTIN_MODEL)) for a in arguments]
    refused(filled, out, word, capsys)


def test_a_full_disk(tmp_path: Path) -> None:
    """The system refuses bytes beyond 2 MB a file: one line, exit code 2, no partial directory."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))

    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "mtpress",
        "quantize",
        str(BUILTIN_MODEL),
        str(out),
        "--recipe",
        "nvfp4-mtp-vlm",
        "--weight-only",
        "0.01",
    ]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, env=environment, check=False)
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and "cannot be written" in lines[0]
    assert not out.exists() and not out.with_name("out.partial").exists()
