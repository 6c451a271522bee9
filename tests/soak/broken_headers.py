"""Ways to break safetensors files and their index.

In: a `Case`. Out: the same with one shard or the index broken. Oracles: the safetensors library refuses the file, or the
fault is there by construction (each says which). Leaves out: config.json.
"""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from broken import ALL, CALIBRATED, INDEX, JUNK, LAYER, QUANTIZE, SHARDS, Case, edit_json, swollen, torn, unparsable, way
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

HEADER, FILE, TENSOR, NAMES = "safetensors header", "safetensors file", "tensor", "index"
BITS = {"F64": 64, "F32": 32, "F16": 16, "I64": 64, "I32": 32, "I16": 16, "U16": 16, "U8": 8, "I8": 8, "BOOL": 8, "F8_E4M3": 8, "U64": 64}


def library_refuses(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as file:
            file.keys()
    except (SafetensorError, OSError):
        return True
    return False


def split(path: Path) -> tuple[bytes, bytes]:
    """(header text, data)."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    return raw[8 : 8 + length], raw[8 + length :]


def join(path: Path, text: bytes, data: bytes) -> None:
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def entries(header: dict[str, Any]) -> list[str]:
    return [name for name in header if name != "__metadata__"]


def edit(case: Case, change: Callable[[str, dict[str, Any], dict[str, Any]], str]) -> str:
    """Changes one tensor's entry in one header; the library must then refuse the file, else the draw does not count."""
    path = case.shard
    text, data = split(path)
    header = json.loads(text)
    name = case.rng.choice(entries(header))
    said = change(name, header[name], header)
    join(path, json.dumps(header).encode(), data)
    return f"{path.name}: {name}: {said}" if said and library_refuses(path) else ""


@way(HEADER)
def length_field(case: Case) -> str:
    path = case.shard
    raw = path.read_bytes()
    true = struct.unpack("<Q", raw[:8])[0]
    r = case.rng
    length = r.choice([0, 1, r.randrange(true), true + r.randint(1, 64), len(raw), len(raw) + r.randint(1, 10**6), 10**8, 2**63, 2**64 - 1])
    path.write_bytes(struct.pack("<Q", length) + raw[8:])
    return f"length {length} for {true}" if library_refuses(path) else ""


@way(HEADER)
def json_bytes(case: Case) -> str:
    """The library refuses the file, or a tensor of the index is no longer in it."""
    path = case.shard
    text, data = split(path)
    names = set(entries(json.loads(text)))
    at, count = case.rng.randrange(len(text)), case.rng.randint(1, 6)
    new = bytearray(text)
    new[at : at + count] = bytes(case.rng.randrange(256) for _ in range(case.rng.choice((count, count, 0, 3))))
    join(path, bytes(new), data)
    if library_refuses(path) or not names <= set(entries(json.loads(bytes(new)))):
        return f"{path.name}: header bytes {at} to {at + count} changed"
    return ""


@way(HEADER)
def deep_or_long_json(case: Case) -> str:
    path = case.shard
    _, data = split(path)
    n = case.rng.randint(3_000, 300_000)
    new = case.rng.choice(
        [
            b"[" * n,
            b'{"a":' * n,
            b"[" * n + b"]" * n,
            b'{"a":' + b"1" * n + b"}",
            b"{" + b" " * n,
            b'{"a":NaN}',
            b"9" * n,
            b'"' + b"x" * n + b'"',
        ]
    )
    join(path, new, data)
    return f"{path.name}: {new[:10]!r}…" if library_refuses(path) else ""


@way(HEADER)
def other_top_level(case: Case) -> str:
    path = case.shard
    text, data = split(path)
    new = case.rng.choice([b"[]", b"null", b"3", b'"a"', b"{}", b"[" + text + b"]", b"true", b"", b"   ", text + text, text + b"x"])
    join(path, new, data)
    return f"{path.name}: {new[:10]!r}…" if library_refuses(path) else ""


@way(HEADER)
def key_twice(case: Case) -> str:
    """By construction: the same tensor, or the same word within an entry, stands twice."""
    path = case.shard
    text, data = split(path)
    header = json.loads(text)
    name = case.rng.choice(entries(header))
    if case.rng.random() < 0.5:
        new = text.rstrip()[:-1] + b"," + json.dumps(name).encode() + b":" + json.dumps(header[name]).encode() + b"}"
    else:
        word = case.rng.choice(("dtype", "shape", "data_offsets"))
        entry = json.dumps(header[name]).encode()
        header[name] = "HERE"
        again = entry[:-1] + b"," + json.dumps(word).encode() + b":" + json.dumps(json.loads(entry)[word]).encode() + b"}"
        new = json.dumps(header).encode().replace(b'"HERE"', again)
    join(path, new, data)
    return f"{path.name}: {name} twice"


@way(HEADER)
def metadata_of_another_type(case: Case) -> str:
    path = case.shard
    text, data = split(path)
    header = json.loads(text)
    header["__metadata__"] = case.rng.choice([[], 3, "pt", True, {"format": 3}, {"format": None}, {"format": ["pt"]}, {"a": {"b": "c"}}])
    join(path, json.dumps(header).encode(), data)
    return f"{path.name}: __metadata__ {header['__metadata__']}" if library_refuses(path) else ""


@way(HEADER)
def entry_of_another_form(case: Case) -> str:
    def change(name: str, entry: dict[str, Any], header: dict[str, Any]) -> str:
        what = case.rng.choice(("replaced", "lacking", "renamed"))
        if what == "replaced":
            header[name] = case.rng.choice(JUNK)
        else:
            word = case.rng.choice(("dtype", "shape", "data_offsets"))
            value = entry.pop(word)
            if what == "renamed":
                entry[word.upper()] = value
        return f"entry {what}"

    return edit(case, change)


@way(HEADER)
def dtype_unknown(case: Case) -> str:
    def change(name: str, entry: dict[str, Any], header: dict[str, Any]) -> str:
        entry["dtype"] = case.rng.choice(
            [*JUNK, "BF17", "bf16", "bfloat16", "F4", "FP4", "NVFP4", "float", "C64", "Q4_K", "BF16 ", "B" * 5000]
        )
        return f"dtype {str(entry['dtype'])[:20]!r}"

    return edit(case, change)


@way(HEADER)
def dtype_of_another_width(case: Case) -> str:
    def change(name: str, entry: dict[str, Any], header: dict[str, Any]) -> str:
        entry["dtype"] = case.rng.choice([d for d, bits in BITS.items() if bits != 16])
        return f"dtype {entry['dtype']}"

    return edit(case, change)


@way(HEADER)
def shape_lies(case: Case) -> str:
    def change(name: str, entry: dict[str, Any], header: dict[str, Any]) -> str:
        r, shape = case.rng, list(entry["shape"])
        at = r.randrange(len(shape))
        how = r.randrange(5)
        if how == 0:
            shape[at] += r.choice((1, -1, 16, 1000, 2**31, 2**62))
        elif how == 1:
            shape[at] = r.choice([*JUNK, 0, -shape[at], 2**64, 10**400, float(shape[at]), str(shape[at]), "Infinity"])
        elif how == 2:
            shape.append(r.choice((0, 2, 2**32, "1", None)))
        elif how == 3:
            shape = [2**32, 2**32, shape[0]] + [2**16] * r.randint(0, 8)
        else:
            entry["shape"] = r.choice([*JUNK, shape * 200, [shape], dict.fromkeys(map(str, shape))])
            return "shape of another form"
        entry["shape"] = shape
        return f"shape {str(shape)[:60]}"

    return edit(case, change)


@way(HEADER)
def offsets_lie(case: Case) -> str:
    def change(name: str, entry: dict[str, Any], header: dict[str, Any]) -> str:
        r, (begin, end) = case.rng, entry["data_offsets"]
        other = header[r.choice(entries(header))]["data_offsets"]
        n = r.randint(1, 100)
        entry["data_offsets"] = r.choice(
            [
                [begin - n, end - n], [begin + n, end + n], [begin + n, end], [begin, end - n], [begin, end + n], [end, begin], list(other),
                [begin + 10**9, end + 10**9], [-begin - 1, end], [-end - 1, -begin - 1], [2**63, 2**63 + end - begin],
                [2**64 - 2, 2**64 - 2 + end - begin], [float(begin), float(end)], [begin + 0.5, end], [str(begin), str(end)], [begin], [],
                [begin, end, end], [[begin], [end]], {"begin": begin, "end": end}, [None, None], [True, end], [begin, 10**300], "0-9", None,
            ]
        )  # fmt: skip
        return f"data_offsets {str(entry['data_offsets'])[:60]}"

    return edit(case, change)


@way(HEADER)
def gap(case: Case) -> str:
    """Every tensor from one on lies further back, and the file is that much longer: the library refuses holes."""
    path = case.shard
    text, data = split(path)
    header = json.loads(text)
    start = header[case.rng.choice(entries(header))]["data_offsets"][0]
    n = case.rng.choice((1, 2, 8, 64, 4096))
    for name in entries(header):
        if header[name]["data_offsets"][0] >= start:
            header[name]["data_offsets"] = [p + n for p in header[name]["data_offsets"]]
    join(path, json.dumps(header).encode(), data[:start] + b"\0" * n + data[start:])
    return f"{path.name}: {n} bytes of nothing at {start}" if library_refuses(path) else ""


@way(HEADER)
def tensors_by_the_hundred_thousand(case: Case) -> str:
    """None of them is what the index names."""
    path, num = case.shard, case.rng.randint(50_000, 700_000)
    empty = b'{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    join(path, b"{" + b",".join(b'"%d":%b' % (i, empty) for i in range(num)) + b"}", b"")
    return f"{path.name}: {num} tensors of no bytes"


@way(HEADER)
def name_not_text(case: Case) -> str:
    """Bytes of a name that are no UTF-8."""
    path = case.shard
    text, data = split(path)
    name = case.rng.choice(entries(json.loads(text))).encode()
    at = case.rng.randrange(len(name))
    join(
        path,
        text.replace(b'"' + name + b'"', b'"' + name[:at] + case.rng.choice((b"\xff", b"\xc0\x80", b"\xed\xa0\x80")) + name[at:] + b'"'),
        data,
    )
    return f"{path.name}: {name.decode()}" if library_refuses(path) else ""


@way(FILE)
def cut(case: Case) -> str:
    path = case.shard
    size = case.rng.randrange(path.stat().st_size)
    path.write_bytes(path.read_bytes()[:size])
    return f"{path.name}: cut to {size} bytes"


@way(FILE)
def tail(case: Case) -> str:
    path = case.shard
    n = case.rng.choice((1, 2, 8, case.rng.randint(1, 100_000)))
    path.write_bytes(path.read_bytes() + case.rng.randbytes(n))
    return f"{path.name}: {n} bytes more" if library_refuses(path) else ""


@way(FILE)
def other_content(case: Case) -> str:
    path, r = case.shard, case.rng
    size = path.stat().st_size
    what = r.choice(("zeros", "random", "empty", "zip", "pickle", "LFS", "directory", "dangling", "loop", "HTML", "GGUF"))
    path.unlink()
    if what == "directory":
        path.mkdir()
    elif what in ("dangling", "loop"):
        path.symlink_to(path if what == "loop" else path.with_name("gone"))
    else:
        path.write_bytes(
            {
                "zeros": b"\0" * size,
                "random": b"\xff" * 8 + r.randbytes(size),
                "empty": b"",
                "zip": b"PK\x03\x04" + r.randbytes(size),
                "pickle": b"\x80\x02}q\x00." + b"\0" * size,
                "LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
                "HTML": b"<!doctype html><title>404 not found</title>",
                "GGUF": b"GGUF\x03\0\0\0" + b"\0" * size,
            }[what]
        )
    return f"{path.name}: {what}"


@way(FILE)
def two_shards_swapped(case: Case) -> str:
    """By construction: neither holds what the index says."""
    one, two = case.rng.sample(SHARDS, 2)
    (case.source / one).rename(case.source / "aside")
    (case.source / two).rename(case.source / one)
    (case.source / "aside").rename(case.source / two)
    return f"{one} and {two} swapped"


def rewrite(case: Case, name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> str:
    """Changes one tensor in a file that stays sound as a file; None takes it out, of the index too."""
    file = json.loads((case.source / INDEX).read_text())["weight_map"][name]
    tensors = load_file(case.source / file)
    new = change(tensors.pop(name))
    if new is None:
        edit_json(case.source / INDEX, lambda index: index["weight_map"].pop(name))
    else:
        tensors[name] = new
    save_file(tensors, case.source / file, metadata={"format": "pt"})
    return file


def body_tensor(case: Case, linears: bool = False) -> str:
    names = [n for n in json.loads((case.source / INDEX).read_text())["weight_map"] if n.startswith(LAYER)]
    if linears:
        names = [n for n in names if n.endswith(("proj.weight", "in_proj_qkv.weight", "in_proj_z.weight"))]
    return case.rng.choice(sorted(names))


@way(TENSOR, QUANTIZE)
def linear_not_bf16(case: Case) -> str:
    name = body_tensor(case, linears=True)
    dtype = case.rng.choice(
        (torch.float16, torch.float32, torch.int16, torch.uint8, torch.float64, torch.float8_e4m3fn, torch.bool, torch.int64)
    )
    rewrite(case, name, lambda t: t.to(dtype))
    return f"{name}: {dtype}"


@way(TENSOR, ("weight-only", "calibrated", "check"))
def tensor_taken_out(case: Case) -> str:
    name = body_tensor(case)
    rewrite(case, name, lambda t: None)
    return f"{name} taken out"


@way(TENSOR, ("weight-only", "calibrated", "check"))
def tensor_of_another_shape(case: Case) -> str:
    name = body_tensor(case)
    what = case.rng.choice(("flat", "one more axis", "a row less", "transposed", "none"))

    def change(t: torch.Tensor) -> torch.Tensor:
        flat = {"flat": t.reshape(-1), "one more axis": t.unsqueeze(0), "a row less": t[1:], "transposed": t.movedim(0, -1), "none": t[:0]}
        return flat[what].contiguous()

    before: list[torch.Size] = []
    after: list[torch.Size] = []

    def noted(t: torch.Tensor) -> torch.Tensor:
        new = change(t)
        before.append(t.shape)
        after.append(new.shape)
        return new

    rewrite(case, name, noted)
    return f"{name}: {what}" if before != after else ""


def spoiled(case: Case, t: torch.Tensor) -> torch.Tensor:
    t = t.clone()
    value = case.rng.choice((float("nan"), float("inf"), float("-inf")))
    t.view(-1)[case.rng.randrange(t.numel())] = value
    return t


@way(TENSOR, QUANTIZE)
def kept_tensor_of_integers(case: Case) -> str:
    """By construction: no engine computes with a norm, a convolution or an embedding of integers."""
    dtype = case.rng.choice((torch.int16, torch.uint16, torch.uint8, torch.bool, torch.int64, torch.float8_e4m3fn))
    name = case.rng.choice([f"{LAYER}0.input_layernorm.weight", f"{LAYER}1.linear_attn.conv1d.weight", f"{LAYER}2.linear_attn.A_log"])
    rewrite(case, name, lambda t: t.to(dtype))
    return f"{name}: {dtype}"


@way(TENSOR, QUANTIZE)
def linear_holds_nan(case: Case) -> str:
    name = body_tensor(case, linears=True)
    rewrite(case, name, lambda t: spoiled(case, t))
    return f"{name}: NaN or infinite"


@way(TENSOR, CALIBRATED)
def norm_holds_nan(case: Case) -> str:
    """By construction: the linears behind an input norm read what it gives."""
    name = f"{LAYER}{case.rng.randrange(4)}.{case.rng.choice(('input', 'post_attention'))}_layernorm.weight"
    rewrite(case, name, lambda t: torch.full_like(t, float("nan")))
    return f"{name}: NaN"


@way(NAMES)
def file_outside(case: Case) -> str:
    r, other = case.rng, case.shard.name
    file = r.choice(
        [f"../source/{other}", str(case.source / other), f"./{other}", "..", ".", "", "/etc/passwd", "/dev/zero", "../../x.safetensors",
         f"sub/{other}", "\0", f"{other}\0", "a" * 5000 + ".safetensors", "//x.safetensors", f"..\\{other}", "~/x.safetensors",
         "x/../../y.safetensors", f"{other}/", "\ud800.safetensors", "file:///x.safetensors", "https://example.org/x.safetensors"]
    )  # fmt: skip
    edit_json(case.source / INDEX, lambda i: i["weight_map"].__setitem__(r.choice(sorted(i["weight_map"])), file))
    return f"file {file[:40]!r}"


@way(NAMES)
def file_missing(case: Case) -> str:
    if case.rng.random() < 0.5:
        path = case.shard
        path.unlink()
        return f"{path.name} deleted"
    file = case.rng.choice(("model-00004-of-00003.safetensors", "other.safetensors", SHARDS[0].upper(), CONFIG_NAME, "model.bin"))
    edit_json(case.source / INDEX, lambda i: i["weight_map"].__setitem__(case.rng.choice(sorted(i["weight_map"])), file))
    return f"a tensor said to be in {file}"


CONFIG_NAME = "config.json"


@way(NAMES)
def wrong_file(case: Case) -> str:
    weight_map = json.loads((case.source / INDEX).read_text())["weight_map"]
    name = case.rng.choice(sorted(weight_map))
    other = case.rng.choice([file for file in SHARDS if file != weight_map[name]])
    edit_json(case.source / INDEX, lambda i: i["weight_map"].__setitem__(name, other))
    return f"{name} said to be in {other}"


@way(NAMES)
def ghost(case: Case) -> str:
    name = case.rng.choice(
        ("model.ghost.weight", f"{LAYER}4.mlp.up_proj.weight", "", "x" * 10_000, "\u202e\u0000", "model.visual.blocks.7.norm1.bias")
    )
    edit_json(case.source / INDEX, lambda i: i["weight_map"].__setitem__(name, case.shard.name))
    return f"{name[:40]!r} is nowhere"


@way(NAMES, QUANTIZE)
def tensors_not_named(case: Case) -> str:
    n = case.rng.randint(1, 20)
    edit_json(case.source / INDEX, lambda i: [i["weight_map"].pop(name) for name in case.rng.sample(sorted(i["weight_map"]), n)])
    return f"{n} tensors not in the index"


@way(NAMES)
def map_of_another_type(case: Case) -> str:
    def change(index: dict[str, Any]) -> None:
        r = case.rng
        if r.random() < 0.4:
            index["weight_map"] = r.choice([v for v in JUNK if v != {"a": 1}] + [list(index["weight_map"].items())])
        elif r.random() < 0.3:
            del index["weight_map"]
        else:
            index["weight_map"][r.choice(sorted(index["weight_map"]))] = r.choice([v for v in JUNK if not isinstance(v, str)])

    edit_json(case.source / INDEX, change)
    return "weight_map of another type"


@way(NAMES)
def index_swollen(case: Case) -> str:
    return swollen(case, case.source / INDEX, "weight_map")


@way(NAMES)
def index_torn(case: Case) -> str:
    return torn(case.source / INDEX, case.rng)


@way(NAMES)
def index_unparsable(case: Case) -> str:
    return unparsable(case.source / INDEX, case.rng)


@way(NAMES, ALL)
def index_a_directory(case: Case) -> str:
    (case.source / INDEX).unlink()
    if case.rng.random() < 0.5:
        (case.source / INDEX).mkdir()
        return "a directory"
    (case.source / INDEX).symlink_to(case.source / INDEX)
    return "a link to itself"
