"""A hostile server behind an address: every answer of it ends in one line, soon, and in little memory."""

import base64
import gzip
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from mtpress.engine.server import client as client_module
from mtpress.engine.server import exchange
from mtpress.engine.server.client import Client
from mtpress.engine.server.metrics import Metrics
from mtpress.errors import EngineError, InputError, MtpressError
from serving import HELLO

DEEP = b"[" * 100_000
MODELS = json.dumps({"data": [{"id": "m", "max_model_len": 4096}]}).encode()


class Hostile(BaseHTTPRequestHandler):
    """`answer` decides; every request is kept."""

    protocol_version = "HTTP/1.1"
    answer: Callable[["Hostile"], None]
    logins: list[str | None]

    def do_GET(self) -> None:
        self.logins.append(self.headers["Authorization"])
        type(self).answer(self)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

    def log_message(self, format: str, *args: Any) -> None:
        pass


def send(body: bytes, status: int = 200, **headers: str) -> Callable[[Hostile], None]:
    def answer(to: Hostile) -> None:
        to.send_response(status)
        for name, value in headers.items():
            to.send_header(name.replace("_", "-"), value)
        to.send_header("Content-Length", str(len(body)))
        to.end_headers()
        to.wfile.write(body)

    return answer


def endless(piece: bytes, start: bytes = b"", pause: float = 0.0, head: bytes | None = None) -> Callable[[Hostile], None]:
    """Until the other side hangs up. head: in place of a whole one."""

    def answer(to: Hostile) -> None:
        to.close_connection = True
        try:
            to.wfile.write(head if head is not None else b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
            to.wfile.write(start)
            while True:
                to.wfile.write(piece)
                to.wfile.flush()
                time.sleep(pause)
        except OSError:
            pass

    return answer


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Client]]:
    for module, name, value in (
        (client_module, "FACTS_SECONDS", 1.0),
        (client_module, "MAX_FACTS_BYTES", 1 << 20),
        (exchange, "LINE_SECONDS", 1.0),
        (exchange, "BODY_SECONDS", 1.0),
        (exchange, "WATCH_SECONDS", 0.05),
        (exchange, "MAX_LINE_BYTES", 1 << 20),
    ):
        monkeypatch.setattr(module, name, value)
    running: list[tuple[ThreadingHTTPServer, Client]] = []

    def start(answer: Callable[[Hostile], None], login: str = "", key: str | None = None) -> Client:
        handler = type("Fresh", (Hostile,), {"answer": answer, "logins": []})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        client = Client(f"http://{login}127.0.0.1:{server.server_port}", key, timeout_seconds=20)
        running.append((server, client))
        return client

    yield start
    for server, client in running:
        client.close()
        server.shutdown()
        server.server_close()


FACTS = {
    "endless": (endless(b"[" * 65536, start=b'{"data": "'), "answers with over 1 MiB"),
    "slow body": (endless(b" ", pause=0.05), "did not answer in time"),
    "slow head": (endless(b"x", pause=0.05, head=b"HTTP/1.1 200 OK\r\nX-A: "), "did not answer in time"),
    "silent": (lambda to: time.sleep(3), "did not answer in time"),
    "bomb": (send(gzip.compress(b" " * (1 << 26)), Content_Encoding="gzip"), "answers compressed"),
    "deep": (send(DEEP), "no JSON object"),
    "long number": (send(b'{"data": ' + b"9" * 5000 + b"}"), "no JSON object"),
    "charset": (send(b"abc", 500, Content_Type="application/json; charset=hex"), "answers 500: abc"),
    "redirect": (send(b"", 302, Location="file:///etc/passwd"), "answers 302: nothing"),
    "deep error": (send(DEEP, 500), r"answers 500: \[\["),
    "endless error": (endless(b"x" * 65536, head=b"HTTP/1.1 500 No\r\nConnection: close\r\n\r\n"), "answers 500: xxx"),
    "ids": (send(b'{"data": [{"id": 5}, null, {"id": ["x"]}, {"id": ""}]}'), "serves no model"),
    "no list": (send(b'{"data": {"id": "m"}}'), "serves no model"),
    "long id": (send(json.dumps({"data": [{"id": "m" * 1000}]}).encode()), "over 256 characters"),
    "list": (send(b"[1]"), "no JSON object"),
}


@pytest.mark.parametrize("how", FACTS)
def test_facts(how: str, serve: Callable[..., Client]) -> None:
    answer, said = FACTS[how]
    with pytest.raises(EngineError, match=said) as raised:
        _ = serve(answer).model
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 1000


@pytest.mark.parametrize("length", ["9" * 4000, "-1", "0", '"4096"', "4096.5", "true", "null"])
def test_a_context_that_is_none(length: str, serve: Callable[..., Client]) -> None:
    with pytest.raises(EngineError, match="how long its context is"):
        _ = serve(send(b'{"data": [{"id": "m", "max_model_len": ' + length.encode() + b"}]}")).max_model_len


STREAMS = {
    **{text: (send(f"data: {text}\n\n".encode()), "a chunk that is no JSON object") for text in ("5", "[1]", '"error"', "null", "{")},
    "deep": (send(b"data: " + DEEP + b"\n\n"), "a chunk that is no JSON object"),
    "endless line": (endless(b"x" * 65536, start=b"data: "), "a line of over 1 MiB"),
    "endless comments": (endless(b": ping\n\n" * 100), "40 lines without data"),
    "slow comments": (endless(b": ping\n\n", pause=0.01), "40 lines without data"),
    "slow line": (endless(b"x", start=b"data: ", pause=0.05), "did not answer in time"),
    "bomb": (send(gzip.compress(b"data: {}\n" * 100_000), Content_Encoding="gzip"), "answers compressed"),
    "refused": (send(b'{"error": {"message": {"a": [1]}}}', 500), "answers 500"),
}


@pytest.mark.parametrize("how", STREAMS)
def test_streams(how: str, serve: Callable[..., Client]) -> None:
    answer, said = STREAMS[how]
    with pytest.raises(EngineError, match=said) as raised:
        list(serve(answer).stream_chat(HELLO, model="m"))
    assert "\n" not in str(raised.value)


COUNTED = "vllm:spec_decode_num_drafts_total 1\nvllm:spec_decode_num_draft_tokens_total 1\nvllm:spec_decode_num_accepted_tokens_total 1\n"
POSITION = 'vllm:spec_decode_num_accepted_tokens_per_pos_total{{position="{}"}} 1\n'


@pytest.mark.parametrize(
    "page",
    [
        "vllm:prompt_tokens_total NaN\n",
        "vllm:prompt_tokens_total +Inf\n",
        "vllm:prompt_tokens_total -1\n",
        "vllm:prompt_tokens_total 1e300\n",
        *(COUNTED + POSITION.format(position) for position in ("20000000000", "-5", "x", "9" * 5000)),
        'a{b="\\',
        "vllm:prompt_tokens_total{" + "x" * 100_000,
    ],
)
def test_pages_that_are_none(page: str) -> None:
    with pytest.raises(EngineError, match="no page of Prometheus metrics"):
        Metrics.parse(page)


def test_labels_that_are_no_numbers() -> None:
    found = Metrics.parse('vllm:cache_config_info{kv_cache_size_tokens="inf",block_size="nan",num_gpu_blocks="-3",cache_dtype="auto"} 1\n')
    assert found.kv_cache is not None
    assert (found.kv_cache.num_tokens, found.kv_cache.block_size, found.kv_cache.num_blocks) == (None, None, None)


def test_a_login_is_used_and_not_shown(serve: Callable[..., Client]) -> None:
    def echo(to: Hostile) -> None:
        send(json.dumps({"error": {"message": f"{to.headers['Authorization']} is wrong"}}).encode(), 403)(to)

    client = serve(send(MODELS), login="me:a%2Fb@")
    assert client.model == "m"
    assert "me" not in repr(client) and "a/b" not in client.url
    wanted = "Basic " + base64.b64encode(b"me:a/b").decode()
    assert client.authorization == wanted
    for hostile, secret in (
        (serve(echo, login="me:SECRET@"), base64.b64encode(b"me:SECRET").decode()),
        (serve(echo, key="SECRET"), "SECRET"),
    ):
        with pytest.raises(InputError) as raised:
            hostile.models()
        assert secret not in str(raised.value) and "is wrong" in str(raised.value)
    with pytest.raises(MtpressError, match="not with both"):
        Client("http://me:SECRET@127.0.0.1:1", "key")
