"""Asks a running OpenAI-compatible server: chat, streamed chat, completions, models, health, metrics.

In: the server's address, with user and password where a proxy wants them, and its API key where it has one. Out: the server's JSON as
it is, within the limits of exchange.py. Errors are one line: InputError where the server refuses the request, EngineError where it is
not there, breaks off or fails. Key and password travel in a header and are in no message, log or repr. Leaves out: retries, and what
the answers are worth.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self

from mtpress.api_key import split_login, without_login
from mtpress.engine.server.exchange import Exchange, TooMuchError
from mtpress.engine.server.metrics import Metrics
from mtpress.errors import EngineError, InputError

if TYPE_CHECKING:
    import httpx2

CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 600.0  # between two bytes; a long prompt on a slow machine says nothing for minutes
HEALTH_SECONDS = 5.0
FACTS_SECONDS = 10.0  # /v1/models and /metrics are computed from nothing
STREAM_SECONDS = 7200.0
MAX_ANSWER_BYTES, MAX_FACTS_BYTES, MAX_MESSAGE_BYTES = 256 << 20, 4 << 20, 1 << 16
MAX_MESSAGE, MAX_NAME = 500, 256
MAX_CONTEXT = 1 << 31
NUM_CONNECTIONS = 1024  # the pool must not be what limits a benchmark's streams


def is_address(text: str) -> bool:
    """Whether it names a server, and no directory or Hub id."""
    return text.startswith(("http://", "https://"))


class Client:
    """One server. May be used from several threads. A context manager, for its connections."""

    def __init__(self, url: str, api_key: str | None = None, *, timeout_seconds: float = ANSWER_SECONDS) -> None:
        import httpx2

        address, login = split_login(url)
        if login and api_key:
            raise InputError(f"{address}: a server is asked with an API key or with a user and password, not with both")
        self.url = address.rstrip("/").removesuffix("/v1")
        self.authorization = login or (f"Bearer {api_key}" if api_key else None)
        headers = {"Authorization": self.authorization} if self.authorization else {}
        try:
            parsed = httpx2.URL(self.url)
            if parsed.scheme not in ("http", "https") or not parsed.host or parsed.query or parsed.fragment:
                raise httpx2.InvalidURL("")
            self._http = httpx2.Client(
                headers=headers,
                timeout=httpx2.Timeout(timeout_seconds, connect=CONNECT_SECONDS),
                limits=httpx2.Limits(max_connections=NUM_CONNECTIONS, max_keepalive_connections=0),  # exchange.py cuts what it opened
                trust_env=False,  # a proxy of the environment has no business between here and the engine
            )
        except httpx2.InvalidURL:
            raise InputError(f"{address.partition('?')[0]!r} is not the address of a server; write it as http://127.0.0.1:8000") from None
        except UnicodeEncodeError:
            raise InputError("the API key holds characters that no HTTP header can carry; use plain ASCII") from None
        self._model: str | None = None

    def __repr__(self) -> str:
        return f"Client({self.url!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def health(self) -> bool:
        """Whether the server says that it can answer. Never raises for a server that is not there."""
        import httpx2

        try:
            with Exchange(self._http, "GET", f"{self.url}/health", None, HEALTH_SECONDS) as answer:
                return answer.response.status_code == 200
        except httpx2.HTTPError:
            return False

    def models(self) -> list[str]:
        """The names under which the server answers."""
        names = [entry["id"] for entry in self._listed() if isinstance(entry.get("id"), str) and entry["id"]]
        if any(len(name) > MAX_NAME for name in names):
            raise EngineError(f"{self.url} serves a model whose name has over {MAX_NAME} characters; it is no vLLM server")
        return names

    def _listed(self) -> list[dict[str, Any]]:
        listed = self._json("GET", "/v1/models").get("data")
        return [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []

    @property
    def model(self) -> str:
        """The first of models(), asked once."""
        if self._model is None:
            names = self.models()
            if not names:
                raise EngineError(f"{self.url} serves no model")
            self._model = names[0]
        return self._model

    @property
    def max_model_len(self) -> int:
        """Tokens of context of the first of models()."""
        said = next((entry.get("max_model_len") for entry in self._listed()), None)
        if type(said) is not int or not 0 < said < MAX_CONTEXT:
            raise EngineError(f"{self.url} does not say how long its context is; it is no vLLM server")
        return said

    def chat(self, messages: Sequence[Any], **body: Any) -> dict[str, Any]:
        """POST /v1/chat/completions; body: max_tokens, temperature, tools, chat_template_kwargs, … as the API names them.

        model is the server's own where it is not given.
        """
        return self._json("POST", "/v1/chat/completions", self._with_model({"messages": messages, **body}))

    def complete(self, prompt: str | Sequence[int], **body: Any) -> dict[str, Any]:
        """POST /v1/completions: no chat template. prompt: text or token ids."""
        return self._json("POST", "/v1/completions", self._with_model({"prompt": prompt, **body}))

    def stream_chat(self, messages: Sequence[Any], **body: Any) -> Iterator[dict[str, Any]]:
        """The chunks of a streamed chat, the last one with its usage. Closing the iterator cancels the request.

        EngineError where the stream ends without its [DONE], or carries an error.
        """
        asked = self._with_model({"messages": messages, "stream_options": {"include_usage": True}, **body, "stream": True})
        return self._stream("/v1/chat/completions", asked)

    def stream_complete(self, prompt: str | Sequence[int], **body: Any) -> Iterator[dict[str, Any]]:
        """stream_chat() without a chat template."""
        asked = self._with_model({"prompt": prompt, "stream_options": {"include_usage": True}, **body, "stream": True})
        return self._stream("/v1/completions", asked)

    def metrics(self) -> Metrics:
        status, text = self._send("GET", "/metrics")
        if status != 200:
            raise EngineError(f"{self.url}/metrics answers {status}; is this a vLLM server?")
        return Metrics.parse(text)

    def _with_model(self, body: dict[str, Any]) -> dict[str, Any]:
        return body if "model" in body else {"model": self.model, **body}

    @contextmanager
    def _exchange(self, method: str, path: str, body: dict[str, Any] | None, seconds: float) -> Iterator[Exchange]:
        """The head of an answer; whatever breaks it off becomes an EngineError."""
        import httpx2

        exchange = Exchange(self._http, method, self.url + path, body, seconds)
        try:
            with exchange:
                yield exchange
        except TooMuchError as error:
            raise EngineError(f"{self.url}{path} {error}; is this a vLLM server?") from None
        except httpx2.HTTPError as error:
            self._lost(path, error, exchange.expired)

    def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, str]:
        """(status, text)."""
        seconds, most = (FACTS_SECONDS, MAX_FACTS_BYTES) if body is None else (STREAM_SECONDS, MAX_ANSWER_BYTES)
        with self._exchange(method, path, body, seconds) as exchange:
            status = exchange.response.status_code
            return status, exchange.text(most) if status == 200 else exchange.beginning(MAX_MESSAGE_BYTES)

    def _json(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        status, text = self._send(method, path, body)
        if status != 200:
            self._refused(path, status, text)
        answer = _parsed(text)
        if not isinstance(answer, dict):
            raise EngineError(f"{self.url}{path} answers with something that is no JSON object: {text[:80]!r}")
        return answer

    def _stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        with self._exchange("POST", path, body, STREAM_SECONDS) as exchange:
            if (status := exchange.response.status_code) != 200:
                self._refused(path, status, exchange.beginning(MAX_MESSAGE_BYTES))
            for data in exchange.data_lines():
                if data == "[DONE]":
                    return
                chunk = _parsed(data)
                if not isinstance(chunk, dict):
                    raise EngineError(f"{self.url}{path} sends a chunk that is no JSON object: {data[:80]!r}")
                if "error" in chunk:
                    raise EngineError(f"{self.url}{path} broke off: {self._message(chunk)}")
                yield chunk
        raise EngineError(f"{self.url}{path} broke off before the answer was whole; the engine's log says why")

    def _refused(self, path: str, status: int, text: str) -> NoReturn:
        if status == 401:
            raise InputError(f"{self.url} wants an API key, or another one than it was given (--api-key)")
        answer = _parsed(text)
        said = self._message(text if answer is None else answer)
        kind = InputError if 400 <= status < 500 else EngineError
        raise kind(f"{self.url}{path} answers {status}: {said or 'nothing'}")

    def _lost(self, path: str, error: "httpx2.HTTPError", expired: bool) -> NoReturn:
        import httpx2

        if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout):
            raise EngineError(f"nothing answers at {self.url}; is the server running there?") from None
        if expired or isinstance(error, httpx2.TimeoutException):
            raise EngineError(f"{self.url}{path} did not answer in time") from None
        raise EngineError(f"{self.url}{path} broke off ({type(error).__name__}); the engine's log says why") from None

    def _message(self, answer: Any) -> str:
        """What an error object says: vLLM's {"error": {"message": …}} or FastAPI's {"detail": …}; without the key, if it says that back."""
        said = answer
        for key in ("error", "message", "detail"):
            if isinstance(said, dict) and key in said:
                said = said[key]
        text = said if isinstance(said, str) else json.dumps(said, ensure_ascii=False)
        for secret in (self.authorization or "").split():
            text = text.replace(secret, "…")
        return without_login(text if len(text) <= MAX_MESSAGE else text[:MAX_MESSAGE] + "…")


def _parsed(text: str) -> Any:
    """JSON; None for what is none, is nested too deep, or holds a number of thousands of digits."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
