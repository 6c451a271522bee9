"""What tests of serving share: launches of the real engine and of a fake one, what is left of them, and a storm of requests."""

import base64
import contextlib
import io
import json
import os
import random
import socket
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import psutil
from PIL import Image, ImageDraw

from mtpress.engine.launch.launch import Launch
from mtpress.engine.server.server import Server

ROOT = Path(__file__).resolve().parents[1]
BUILTIN_MODEL = ROOT / "src/mtpress/builtin/mtpress-tiny"
FAKE_ENGINE = ROOT / "tests/engine/fake_engine.py"
REAL_FLAGS = [
    *("--max-model-len", "2048", "--max-num-seqs", "8", "--enforce-eager", "--no-enable-prefix-caching"),
    *("--enable-auto-tool-choice", "--tool-call-parser", "qwen3_xml", "--reasoning-parser", "qwen3"),
]
REAL_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(command: list[str], port: int, *, mtp: int = 0, **environment: str) -> Launch:
    return Launch(
        command=tuple(command),
        environment=environment,
        settings=(),
        warnings=(),
        host="127.0.0.1",
        port=port,
        url=f"http://127.0.0.1:{port}",
        served_model_name="tiny",
        num_speculative_tokens=mtp,
        language_model_only=False,
        estimate=None,  # type: ignore[arg-type]
    )


def real_launch(engine_python: Path, *flags: str, mtp: int = 3, port: int | None = None, **environment: str) -> Launch:
    """The real engine on the built-in model."""
    port = port or free_port()
    command = [str(engine_python.with_name("vllm")), "serve", str(BUILTIN_MODEL), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--served-model-name", "tiny", *REAL_FLAGS]
    if mtp:
        command += ["--speculative-config", json.dumps({"method": "mtp", "num_speculative_tokens": mtp})]
    return launch([*command, *flags], port, mtp=mtp, **{**REAL_ENVIRONMENT, **environment})


def fake_launch(*words: str, python: str, port: int | None = None, **environment: str) -> Launch:
    """fake_engine.py, which imports nothing and does what the words say."""
    port = port or free_port()
    return launch([python, "-I", "-S", str(FAKE_ENGINE), str(port), *words], port, **environment)


@dataclass
class Family:
    """The processes of a server, remembered while it runs, to see what becomes of them."""

    port: int
    members: dict[int, psutil.Process] = field(default_factory=dict)

    def meet(self, server: Server) -> "Family":
        self.members.update({process.pid: process for process in server.processes()})
        return self

    def left(self) -> list[str]:
        """Those that still run, and whatever has the port's number in its command line; waits a moment for the kernel."""
        deadline = time.monotonic() + 5
        while (alive := self._alive()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return alive

    def _alive(self) -> list[str]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                known = process.pid in self.members and self.members[process.pid] == process
                if (
                    (known or str(self.port) in process.cmdline())
                    and process.pid != os.getpid()
                    and process.status() != psutil.STATUS_ZOMBIE
                ):
                    found.append(f"{process.pid} {process.name()}")
        return found

    @property
    def port_is_free(self) -> bool:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", self.port))
            except OSError:
                return False
        return True


def red_circle() -> str:
    """A picture as a data URI."""
    picture = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(picture).ellipse((12, 12, 52, 52), fill="red")
    file = io.BytesIO()
    picture.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def about_picture(uri: str, question: str = "What is in the picture?") -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": question}]
    return [{"role": "user", "content": parts}]


def said(choice: dict[str, Any]) -> str:
    """content or reasoning of a message: mtpress-tiny closes no think block, so the parser may take all for reasoning."""
    message = choice["message"]
    return str(message.get("content") or message.get("reasoning") or "")


HELLO = [{"role": "user", "content": "Tell me a story."}]
MALFORMED: dict[str, bytes | dict[str, Any]] = {
    "bad JSON": b'{"model": "tiny", "messages": [',
    "invalid UTF-8": b'{"model": "tiny", "messages": [{"role": "user", "content": "\xff\xfe\xc3("}]}',
    "empty body": b"",
    "wrong model": {"model": "no-such-model", "messages": HELLO},
    "negative max_tokens": {"messages": HELLO, "max_tokens": -5},
    "huge max_tokens": {"messages": HELLO, "max_tokens": 10**9},
    "too long a prompt": {"messages": [{"role": "user", "content": "story " * 5000}]},
    "broken picture": {"messages": about_picture("data:image/png;base64,AAAA")},
    "no such picture": {"messages": about_picture("data:text/plain,hello")},
    "unknown role": {"messages": [{"role": "wizard", "content": [{"type": "spell", "spell": "x"}]}]},
    "messages are text": {"messages": "hello"},
    "no messages": {"messages": []},
    "temperature below zero": {"messages": HELLO, "temperature": -1},
    "bad tools": {"messages": HELLO, "tools": [{"type": "function"}], "tool_choice": "required"},
}


def storm(server: Server, num: int, *, streams: int = 16, seed: str = "mtpress storm 1") -> Counter[str]:
    """num requests, `streams` at a time; a quarter of them malformed or cancelled in mid-stream. Counts of (kind, outcome)."""
    url, picture = server.launch.url, red_circle()
    outcomes: Counter[str] = Counter()
    with httpx2.Client(timeout=600, limits=httpx2.Limits(max_connections=streams)) as http, ThreadPoolExecutor(streams) as pool:

        def ask(number: int) -> str:
            rng = random.Random(f"{seed}/{number}")
            if number % 4 == 3:
                names = [*MALFORMED, *["cancelled"] * (len(MALFORMED) // 2)]
                name = names[number // 4 % len(names)]
                return _cancel(http, url, rng) if name == "cancelled" else f"{name}: {_malformed(http, url, name)}"
            body: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": rng.randint(1, 48), "temperature": 0}
            if number % 8 == 0:
                body["messages"] = about_picture(picture)
            if number % 3:
                answer = http.post(f"{url}/v1/chat/completions", json=body)
                return f"{'picture' if number % 8 == 0 else 'chat'}: {answer.status_code}"
            with http.stream("POST", f"{url}/v1/chat/completions", json={**body, "stream": True}) as answer:
                lines = [line for line in answer.iter_lines() if line]
            return f"streamed: {answer.status_code if lines[-1] == 'data: [DONE]' else 'cut'}"

        outcomes.update(pool.map(ask, range(num)))
    return outcomes


def _malformed(http: httpx2.Client, url: str, name: str) -> str:
    body = MALFORMED[name]
    content = body if isinstance(body, bytes) else json.dumps({"model": "tiny", **body}).encode()
    answer = http.post(f"{url}/v1/chat/completions", content=content, headers={"Content-Type": "application/json"})
    return str(answer.status_code)


def _cancel(http: httpx2.Client, url: str, rng: random.Random) -> str:
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 1500, "temperature": 0, "ignore_eos": True, "stream": True}
    with http.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
        for count, _ in enumerate(_data(answer)):
            if count >= rng.randint(0, 10):
                return f"cancelled: {answer.status_code}"
    return "cancelled: it had ended"


def _data(answer: httpx2.Response) -> Iterator[str]:
    return (line for line in answer.iter_lines() if line.startswith("data:"))
