"""One HTTP request and its answer, within limits of time and of bytes: what is behind an address may be anything.

In: a client's connections, a request. Out: the status and the body, whole or line by line. Leaves out: what they mean (client.py).
Nothing is decompressed: vLLM never compresses, and a small body would become a large one. A watch cuts the connection at the deadline,
since a timeout between two bytes never comes when one byte comes now and then.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    import httpx2

MAX_LINE_BYTES = 4 << 20
MAX_STREAM_BYTES = 256 << 20
MAX_IDLE_LINES = 40  # comments and empty lines between two pieces of data; proxies keep connections alive with some
LINE_SECONDS = 15.0  # from the first byte of a line to its last
BODY_SECONDS = 60.0  # from the head of an answer to its end
WATCH_SECONDS = 0.5


class TooMuchError(Exception):
    """An answer beyond a limit; it says which."""


class Exchange:
    """A context manager: inside it the head of the answer is there. seconds: for the head and, of a stream, until its end.

    Raises httpx2's errors and TooMuchError; `expired` says afterwards whether the deadline was the reason.
    """

    def __init__(self, http: "httpx2.Client", method: str, url: str, body: Mapping[str, Any] | None, seconds: float) -> None:
        self._opening = http.stream(
            method, url, json=body, headers={"Accept-Encoding": "identity"}, extensions={"trace": self._see_connection}
        )
        self.expired = False
        self._until = time.monotonic() + seconds
        self._over = threading.Event()
        self._socket: socket.socket | None = None

    def __enter__(self) -> Self:
        threading.Thread(target=self._watch, daemon=True).start()
        try:
            self.response = self._opening.__enter__()
        except BaseException:
            self._over.set()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        self._opening.__exit__(kind, error, trace)

    def _see_connection(self, event: str, info: Mapping[str, Any]) -> None:
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            self._socket = info["return_value"].get_extra_info("socket")

    def _watch(self) -> None:
        while not self._over.wait(WATCH_SECONDS):
            if time.monotonic() > self._until and self._socket is not None:
                self.expired = True
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)

    def _pieces(self, max_bytes: int) -> Iterator[bytes]:
        if self.response.headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity"):
            raise TooMuchError("answers compressed, which it was not asked to")
        size = 0
        for piece in self.response.iter_raw():
            size += len(piece)
            if size > max_bytes:
                raise TooMuchError(f"answers with over {max_bytes >> 20} MiB")
            yield piece
        if self.expired:  # a cut connection ends a body whose length was not said
            raise TooMuchError("did not answer in time")

    def text(self, max_bytes: int) -> str:
        """The whole body as UTF-8, whatever charset it claims."""
        self._until = min(self._until, time.monotonic() + BODY_SECONDS)
        return b"".join(self._pieces(max_bytes)).decode("utf-8", "replace")

    def beginning(self, num_bytes: int) -> str:
        """At least the first num_bytes of the body, where it has as many."""
        self._until = min(self._until, time.monotonic() + BODY_SECONDS)
        found = b""
        for piece in self._pieces(1 << 62):
            found += piece
            if len(found) >= num_bytes:
                break
        return found.decode("utf-8", "replace")

    def data_lines(self) -> Iterator[str]:
        """What stands behind `data:` on the lines of an event stream."""
        end = self._until
        rest = b""
        idle = 0
        for piece in self._pieces(MAX_STREAM_BYTES):
            began = not rest
            *lines, rest = (rest + piece).split(b"\n")
            if len(rest) > MAX_LINE_BYTES:
                raise TooMuchError(f"sends a line of over {MAX_LINE_BYTES >> 20} MiB")
            if lines or began:
                self._until = min(end, time.monotonic() + LINE_SECONDS) if rest else end
            for line in lines:
                idle += 1
                if idle > MAX_IDLE_LINES:
                    raise TooMuchError(f"sends {MAX_IDLE_LINES} lines without data, and no answer")
                if line.startswith(b"data:"):
                    idle = 0
                    yield line.removeprefix(b"data:").strip().decode("utf-8", "replace")
