"""Ways to break calibration samples: the lines, the conversations in them, the pictures they name.

In: a `Case`. Out: the same with one line broken, at a random place among sound ones, or with a broken picture. Oracles:
JSON's own parser for torn lines, Pillow's own decoder for torn pictures; the rest is wrong by construction.
"""

import base64
import json
import os
import struct
import zlib
from io import BytesIO
from typing import Any

from broken import CALIBRATED, JUNK, Case, not_json, picture_part, sound_rows, way
from PIL import Image

LINES, TALKS, PICTURES = "calibration lines", "conversations", "pictures"


def put(case: Case, line: bytes) -> None:
    """Writes the samples with `line` among them."""
    lines = [json.dumps(row).encode() for row in sound_rows(case.picture)]
    lines.insert(case.rng.randrange(len(lines) + 1), line)
    case.samples.write_bytes(b"\n".join(lines) + case.rng.choice((b"", b"\n")))


def put_row(case: Case, row: Any) -> str:
    put(case, json.dumps(row).encode())
    return json.dumps(row)[:100]


@way(LINES, CALIBRATED)
def line_torn(case: Case) -> str:
    raw = json.dumps(case.rng.choice(sound_rows(case.picture))).encode()
    at = case.rng.randrange(1, len(raw))
    noise = bytes(case.rng.choice([b for b in range(256) if b != 10]) for _ in range(case.rng.randint(1, 4)))
    line = case.rng.choice((raw[:at], raw[:at] + noise + raw[at:], raw[at:], raw + raw, raw[:at] + b"\n" + raw[at:]))
    put(case, line)
    return f"torn at {at}" if any(part.strip() and not_json(part) for part in line.split(b"\n")) else ""


@way(LINES, CALIBRATED)
def line_not_json(case: Case) -> str:
    r = case.rng
    n = r.randint(2_000, 400_000)
    line = r.choice(
        [b"\0" * n, b"\xff\xfe" + b'{"text": "a"}'.replace(b"", b"\0"), b'{"text": "\xff\xfe"}', b'{"text": "\xc3"}', b"[" * n,
        b'{"a":' * n,
         b'{"text": "' + b"x" * n, b'{"text": "a\0b"}', b'{"text": "a\tb"}', b"9" * n, b"text", b"- text: a", b"<text>", b"{'text': 'a'}",
         b'{"text": "a",}', b'{"text": "a"} // fine', b'{"text": undefined}']
    )  # fmt: skip
    put(case, line)
    return repr(line[:30]) if any(part.strip() and not_json(part) for part in line.split(b"\n")) else ""


@way(LINES, CALIBRATED)
def line_too_long(case: Case) -> str:
    """Over 16 MB, with or without an end."""
    n = case.rng.randint(17_000_000, 40_000_000)
    line = case.rng.choice(
        (
            b'{"text": "' + b"ab " * (n // 3) + b'"}',
            b" " * n + b'{"text": "a"}',
            b"[]," * (n // 3),
            b"\0" * n,
            b"[" + b"[]," * (n // 3) + b"[]]",
        )
    )
    put(case, line)
    return f"{len(line)} bytes: {line[:12]!r}"


@way(LINES, CALIBRATED)
def row_of_another_form(case: Case) -> str:
    r = case.rng
    return put_row(
        case,
        r.choice(
            [
                r.choice([v for v in JUNK if v != {"a": 1}]), {"prompt": "x"}, {"text": ""}, {"text": " \n\t"}, {"messages": {}},
                {"messages": "hi"},
                {"text": r.choice([v for v in JUNK if not isinstance(v, str)])}, {"messages": r.choice(JUNK)},
                {"conversations": [{"from": "human"}]},
                {"messages": [], "text": None}, {"Messages": [{"role": "user", "content": "x"}]},
            ]
        ),
    )  # fmt: skip


@way(LINES, CALIBRATED)
def not_unicode(case: Case) -> str:
    """Half of a surrogate pair, which JSON can spell and UTF-8 cannot."""
    text = "a" * case.rng.randrange(20) + case.rng.choice(("\ud800", "\udfff", "\udc80 b", "\ude00\ud83d"))
    return put_row(case, case.rng.choice([{"text": text}, {"messages": [{"role": "user", "content": text}]}]))


@way(LINES, CALIBRATED)
def samples_not_a_file(case: Case) -> str:
    path = case.samples
    path.unlink()
    what = case.rng.choice(("missing", "directory", "empty", "blank", "loop", "pipe"))
    if what == "directory":
        path.mkdir()
    elif what == "loop":
        path.symlink_to(path)
    elif what == "pipe":
        os.mkfifo(path)
    elif what != "missing":
        path.write_bytes(b"" if what == "empty" else b"\n \n\t\n" * case.rng.randint(1, 1000))
    return what


@way(TALKS, CALIBRATED)
def role_wrong(case: Case) -> str:
    role = case.rng.choice([*JUNK, "narrator", "User", "user ", "human", "gpt", "function", "<|im_start|>"])
    turns: list[dict[str, Any]] = [{"role": "user", "content": "a"}, {"role": role, "content": "b"}]
    if case.rng.random() < 0.2:
        del turns[1]["role"]
    return put_row(case, {"messages": turns})


@way(TALKS, CALIBRATED)
def message_wrong(case: Case) -> str:
    message = case.rng.choice([v for v in JUNK if v != {"a": 1}] + [["user", "a"], {"content": "a"}, {"user": "a"}])
    return put_row(case, {"messages": [{"role": "user", "content": "a"}, message]})


@way(TALKS, CALIBRATED)
def content_wrong(case: Case) -> str:
    content = case.rng.choice([True, {}, {"a": 1}, 1.5, -1, 10**30, [1], [None], [["a"]], [True], {"type": "text", "text": "a"}])
    return put_row(case, {"messages": [{"role": case.rng.choice(("user", "assistant", "system", "tool")), "content": content}]})


@way(TALKS, CALIBRATED)
def part_wrong(case: Case) -> str:
    part = case.rng.choice(
        [
            {}, {"type": "audio", "audio": "a.wav"}, {"type": "input_audio"}, {"type": "video", "video": "a.mp4"}, {"type": "video_url"},
            {"video": ["a.png", "b.png"]}, {"type": "file", "file": "a"}, {"type": 3}, {"type": None}, {"type": ["text"]}, {"type": "text"},
            {"type": "text", "text": None}, {"type": "text", "text": 3}, {"type": "text", "text": ["a"]}, {"text": {"a": 1}},
            {"type": "tool_use"},
            {"type": "image"}, {"type": "image_url"}, {"type": "image_url", "image_url": None}, {"type": "image_url", "image_url": {}},
            {"type": "image_url", "image_url": 3}, {"type": "image", "image": []}, {"type": "image", "image": {"path": "a.png"}},
            {"type": "text", "text": "a", "image": None},
        ]
    )  # fmt: skip
    return put_row(case, {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, part]}]})


@way(TALKS, CALIBRATED)
def picture_without_source(case: Case) -> str:
    """A picture part that does not say which picture, beside one that does."""
    part = {"type": "image_url", "image_url": case.rng.choice([{}, {"url": ""}, {"detail": "low"}, {"url": 3}])}
    return put_row(case, {"messages": [{"role": "user", "content": [picture_part(str(case.picture)), part]}]})


@way(TALKS, CALIBRATED)
def tools_wrong(case: Case) -> str:
    r = case.rng
    call: Any = r.choice(
        [3, "weather", {"function": {"name": "f", "arguments": "{}"}}, {"function": {"name": "f", "arguments": [1]}}, [["f"]], True]
    )
    row = r.choice(
        [
            {"tools": r.choice([v for v in JUNK if v is not None and not isinstance(v, list)])},
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b", "tool_calls": call if r.random() < 0.2 and call else [call]},
                ]
            },
        ]
    )
    return put_row(case, {"messages": [{"role": "user", "content": "a"}]} | row)


@way(TALKS, CALIBRATED)
def picture_in_a_system_message(case: Case) -> str:
    return put_row(case, {"messages": [{"role": case.rng.choice(("system", "developer")), "content": [picture_part(str(case.picture))]}]})


# ---- pictures


def put_picture(case: Case, raw: bytes, name: str = "broken.png") -> None:
    """A sample with this picture, by its path or as a data URI."""
    url = str(case.picture.with_name(name))
    if case.rng.random() < 0.3:
        url = f"data:image/{name.rpartition('.')[2]};base64,{base64.b64encode(raw).decode()}"
    else:
        case.picture.with_name(name).write_bytes(raw)
    put_row(case, {"messages": [{"role": "user", "content": [picture_part(url)]}]})


def pillow_refuses(raw: bytes) -> bool:
    try:
        with Image.open(BytesIO(raw)) as image:
            image.convert("RGB")
    except Exception:  # decoders raise errors of every kind
        return True
    return False


@way(PICTURES, CALIBRATED)
def picture_torn(case: Case) -> str:
    r = case.rng
    kind = r.choice(("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"))
    made = BytesIO()
    noise = Image.frombytes("RGB", (40, 32), r.randbytes(40 * 32 * 3))
    noise.save(made, kind)
    raw = made.getvalue()
    at = r.randrange(len(raw))
    noise_bytes = r.randbytes(r.randint(1, 20))
    new = r.choice((raw[:at], raw[:at] + noise_bytes + raw[at + len(noise_bytes) :], raw[at:], raw[:at] + raw[at + 7 :]))
    if not pillow_refuses(new):
        return ""
    put_picture(case, new, f"broken.{kind.lower()}")
    return f"{kind} torn at {at}"


@way(PICTURES, CALIBRATED)
def no_picture(case: Case) -> str:
    r = case.rng
    raw = r.choice(
        [b"", b"\0" * r.randint(1, 100_000), r.randbytes(r.randint(1, 5000)), b"just text", b"<svg xmlns='http://www.w3.org/2000/svg'/>",
         b"%PDF-1.4\n", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", b"<!doctype html>404", b"\x89PNG\r\n\x1a\n",
         b"GIF89a", b"\xff\xd8\xff\xe0", b"RIFF\xff\xff\xff\x7fWEBPVP8 ", b"II*\0\x08\0\0\0\xff\xff"]
    )  # fmt: skip
    if not pillow_refuses(raw):
        return ""
    put_picture(case, raw, r.choice(("broken.png", "broken.jpg", "broken.webp")))
    return f"no picture: {raw[:20]!r}"


def png(width: int, height: int, data: bytes, more: bytes = b"") -> bytes:
    """A PNG of 8-bit RGB with this header, whatever the data are."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + more + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@way(PICTURES, CALIBRATED)
def sizes_declared(case: Case) -> str:
    """More pixels than any picture has, with or without the data for them; no side at all; sides too unequal for the processor."""
    r = case.rng
    width, height = r.choice(
        [(2**31 - 1, 2**31 - 1), (100_000, 100_000), (65_535, 65_535), (12_000, 12_000), (20_000, 5_000), (1, 2**31 - 1), (0, 10), (10, 0),
         (2**31 - 1, 1), (1, 1000), (5000, 2)]
    )  # fmt: skip
    real = width * height <= 200_000_000
    rows = zlib.compressobj(1)
    data = (
        b"".join([rows.compress(b"\0" * (1 + 3 * width)) for _ in range(height)] + [rows.flush()]) if real else zlib.compress(b"\0" * 1000)
    )
    put_picture(case, png(width, height, data))
    return f"PNG of {width}×{height}, {len(data)} bytes of data"


@way(PICTURES, CALIBRATED)
def text_bomb(case: Case) -> str:
    """A PNG whose text chunk holds 200 MB when unpacked; Pillow refuses to unpack it."""
    content = b"Comment\0\0" + zlib.compress(b"\0" * 200_000_000, 1)
    bomb = struct.pack(">I", len(content)) + b"zTXt" + content + struct.pack(">I", zlib.crc32(b"zTXt" + content))
    raw = png(8, 8, zlib.compress((b"\0" + b"\0" * 24) * 8), bomb)
    put_picture(case, raw)
    return "zTXt of 200 MB" if pillow_refuses(raw) else ""


@way(PICTURES, CALIBRATED)
def data_uri_wrong(case: Case) -> str:
    good = base64.b64encode(case.picture.read_bytes()).decode()
    at = case.rng.randrange(30, len(good))
    url = case.rng.choice(
        ["data:", "data:image/png;base64", "data:image/png;base64,", "data:image/png;base64,????",
        f"data:image/png;base64,{good[:at]}*{good[at:]}",
         f"data:image/png,{case.picture.read_bytes()[:20]!r}", f"data:image/png;base64,{good[:20]}", f"data:image/png;base64 {good}",
         f"data:image/png;base64,{good[1:]}", "data:text/plain;base64,aGVsbG8="]
    )  # fmt: skip
    return put_row(case, {"messages": [{"role": "user", "content": [picture_part(url)]}]})


@way(PICTURES, CALIBRATED)
def path_to_no_picture(case: Case) -> str:
    r = case.rng
    pipe = case.picture.with_name("pipe.png")
    os.mkfifo(pipe)
    url = r.choice(
        ["", "/nowhere.png", str(case.source), str(pipe), "/dev/zero", "/dev/null", "/dev/stdin", "/proc/self/mem", "a\0b.png", "x" * 5000,
         "file://" + str(case.source), "file:///nowhere.png", "ftp://example.org/a.png", "HTTPS://example.org/a.png",
         "https://example.org/a.png",
         "\ud800.png", str(case.samples), str(case.source / "config.json"), "~/a.png", "s3://bucket/a.png", "/etc/passwd", "."]
    )  # fmt: skip
    return put_row(case, {"messages": [{"role": "user", "content": [picture_part(url)]}]})
