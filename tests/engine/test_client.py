"""The client against a small server in this process that answers as vLLM does, well and badly."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from mtpress.engine.server.client import Client
from mtpress.errors import EngineError, InputError
from serving import HELLO, free_port

KEY = "a-key-that-must-not-show"
ANSWER = {"choices": [{"message": {"content": "hello"}}], "usage": {"completion_tokens": 1}}


class Handler(BaseHTTPRequestHandler):
    """What it does depends on the model's name in the request, or on the path."""

    asked: list[dict[str, Any]]
    keys: list[str | None]
    gone: threading.Event
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.keys.append(self.headers["Authorization"])
        pages: dict[str, tuple[int, bytes]] = {
            "/health": (200, b""),
            "/v1/models": (200, json.dumps({"data": [{"id": "tiny"}, {"id": "alias"}]}).encode()),
            "/metrics": (200, b"# TYPE vllm:prompt_tokens_total counter\nvllm:prompt_tokens_total 7.0\n"),
        }
        self.reply(*pages.get(self.path, (404, b'{"detail":"Not Found"}')))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.keys.append(self.headers["Authorization"])
        self.asked.append({"path": self.path, **body})
        how = body["model"]
        if how == "refused":
            message = "The model `x`\ndoes not exist."
            self.reply(404, json.dumps({"error": {"message": message, "type": "NotFoundError", "code": 404}}).encode())
        elif how == "unauthorized":
            self.reply(401, b'{"error":"Unauthorized"}')
        elif how == "broken":
            self.reply(500, b"Internal Server Error")
        elif how == "no-json":
            self.reply(200, b"<html>")
        elif how == "hangs-up":
            self.close_connection = True
        elif how == "slow":
            time.sleep(1)
        elif body.get("stream"):
            self.stream(how)
        else:
            self.reply(200, json.dumps(ANSWER).encode())

    def stream(self, how: str) -> None:
        self.send_response(200)
        self.end_headers()
        chunks = [json.dumps({"choices": [{"delta": {"content": word}}]}) for word in ("one ", "two ", "three ö")]
        if how == "endless":
            chunks *= 1000
        lines = [": a comment", *(f"data: {chunk}" for chunk in chunks)]
        if how == "fails":
            lines.append('data: {"error": {"message": "the engine is dead", "code": 500}}')
        if how == "garbled":
            lines.append("data: {not json")
        if how != "cut":
            lines.append("data: [DONE]")
        try:
            for line in lines:
                self.wfile.write(f"{line}\n\n".encode())
                self.wfile.flush()
                if how == "endless":
                    time.sleep(0.01)
        except OSError:
            self.gone.set()
        self.close_connection = True

    def reply(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def handler() -> type[Handler]:
    return type("Fresh", (Handler,), {"asked": [], "keys": [], "gone": threading.Event()})


@pytest.fixture
def client(handler: type[Handler]) -> Iterator[Client]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        with Client(f"http://127.0.0.1:{server.server_port}/v1/", KEY, timeout_seconds=0.5) as client:
            yield client
        server.shutdown()


def test_questions_and_answers(client: Client, handler: type[Handler]) -> None:
    assert client.health()
    assert client.models() == ["tiny", "alias"]
    assert client.metrics().prompt_tokens == 7
    assert client.chat(HELLO, max_tokens=5) == ANSWER
    assert client.complete([1, 2], model="alias") == ANSWER
    assert handler.asked == [
        {"path": "/v1/chat/completions", "model": "tiny", "messages": HELLO, "max_tokens": 5},
        {"path": "/v1/completions", "model": "alias", "prompt": [1, 2]},
    ]
    assert set(handler.keys) == {f"Bearer {KEY}"}


def test_streams(client: Client, handler: type[Handler]) -> None:
    words = [chunk["choices"][0]["delta"]["content"] for chunk in client.stream_chat(HELLO, max_tokens=3)]
    assert words == ["one ", "two ", "three ö"]
    assert handler.asked[-1] == {
        "path": "/v1/chat/completions",
        "model": "tiny",
        "messages": HELLO,
        "max_tokens": 3,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert len(list(client.stream_complete("The"))) == 3
    assert handler.asked[-1]["path"] == "/v1/completions"


def test_a_closed_stream_is_a_cancelled_request(client: Client, handler: type[Handler]) -> None:
    stream = client.stream_chat(HELLO, model="endless")
    assert next(stream)
    stream.close()
    assert handler.gone.wait(10)


@pytest.mark.parametrize(
    ("model", "kind", "message"),
    [
        ("refused", InputError, r"/v1/chat/completions answers 404: The model `x` does not exist\.$"),
        ("unauthorized", InputError, r"wants an API key, or another one than it was given \(--api-key\)"),
        ("broken", EngineError, r"answers 500: Internal Server Error"),
        ("no-json", EngineError, r"is no JSON object: '<html>'"),
        ("hangs-up", EngineError, r"broke off \(RemoteProtocolError\); the engine's log says why"),
        ("slow", EngineError, r"/v1/chat/completions did not answer in time"),
    ],
)
def test_errors_are_one_line_without_the_key(model: str, kind: type[Exception], message: str, client: Client) -> None:
    with pytest.raises(kind, match=message) as raised:
        client.chat(HELLO, model=model)
    assert "\n" not in str(raised.value)
    assert KEY not in f"{raised.value!r} {client!r}"
    assert raised.value.__cause__ is None
    if model in ("refused", "unauthorized", "broken", "hangs-up"):
        with pytest.raises(kind, match=message):
            list(client.stream_chat(HELLO, model=model))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("cut", "broke off before the answer was whole; the engine's log says why"),
        ("fails", "broke off: the engine is dead"),
        ("garbled", "sends a chunk that is no JSON"),
    ],
)
def test_streams_that_end_badly(model: str, message: str, client: Client) -> None:
    chunks = []
    with pytest.raises(EngineError, match=message):
        for chunk in client.stream_chat(HELLO, model=model):
            chunks.append(chunk)
    assert len(chunks) == 3


def test_nobody_there() -> None:
    with Client(f"http://127.0.0.1:{free_port()}") as client:
        assert not client.health()
        with pytest.raises(EngineError, match=r"nothing answers at http://127\.0\.0\.1:\d+; is the server running there\?"):
            client.models()


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "", "http://", "http://host:port"])
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(InputError, match="is not the address of a server"):
        Client(url)


def test_a_key_that_no_header_carries() -> None:
    with pytest.raises(InputError, match="the API key holds characters") as raised:
        Client("http://127.0.0.1:1", "schlüssel")
    assert "schlüssel" not in str(raised.value)
