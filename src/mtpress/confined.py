"""A process for what strangers wrote: a template, a tokenizer. Its limits of time and memory hold whatever runs there, in C too.

In: the name of a module of ours with `answer(request)`, and `prepare()` for what is imported late; requests as JSON. Out: its answers, or
`TooLongError`, `TooLargeError`.
Leaves out: what is asked. One process answers many requests, so that it costs a start once a run; one that is ended is started again.
"""

import atexit
import importlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

MAX_ANSWER_BYTES = 64 << 20
START_SECONDS = 30.0  # of a slow machine, for Python and the module
# Not `-m`, and -P: the current directory may be a stranger's checkpoint, and no file of it is a module of ours.
CHILD = "import sys; from mtpress.confined import serve; serve(sys.argv[1], int(sys.argv[2]))"


class TooLongError(Exception):
    """It did not end in time."""


class TooLargeError(Exception):
    """It wanted more memory than it may have, or ended its process."""


class Confined:
    """module: its `answer` is called there. max_bytes: of memory, over what the process has when it starts. For several threads."""

    def __init__(self, module: str, max_bytes: int) -> None:
        self.module, self.max_bytes = module, max_bytes
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._lock = threading.Lock()
        atexit.register(self._end)

    def ask(self, request: Any, seconds: float) -> Any:
        """The answer to a request. seconds: of processor time; on a machine that others use it may take twice as many.

        ValueError: `answer` raised something; it has the reason.
        """
        with self._lock:
            return self._ask(request, seconds)

    def _ask(self, request: Any, seconds: float) -> Any:
        process = self._started()
        assert process.stdin is not None
        deadline = time.monotonic() + 2 * seconds
        try:
            process.stdin.write(json.dumps([seconds, request]).encode() + b"\n")
            process.stdin.flush()
            line = self._line(process, deadline)
        except OSError:
            line = b""
        except BaseException:
            self._end()
            raise
        if not line:
            ended = process.wait()
            self._end()
            raise TooLongError if ended == -signal.SIGXCPU else TooLargeError
        answer = json.loads(line)
        if "raised" in answer:
            raise ValueError(answer["raised"])
        return answer["answer"]

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
            self._end()
            self._owner = os.getpid()
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", CHILD, self.module, str(self.max_bytes)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
            )
            try:
                if not self._line(self._process, time.monotonic() + START_SECONDS):
                    raise TooLargeError  # the machine, or a limit of the shell, has no room for it
            except BaseException:
                self._end()
                raise
        return self._process

    def _line(self, process: subprocess.Popen[bytes], deadline: float) -> bytes:
        """The next line without its end; empty where the process ended. TooLongError, TooLargeError."""
        assert process.stdout is not None
        found = bytearray()
        while not found.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
                raise TooLongError
            piece = os.read(process.stdout.fileno(), 1 << 20)
            if not piece:
                return b""
            found += piece
            if len(found) > MAX_ANSWER_BYTES:
                raise TooLargeError
        return bytes(found[:-1])

    def _end(self) -> None:
        if self._process is None:
            return
        if self._owner == os.getpid():  # a fork's copy is not its own
            self._process.kill()
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process = None


def serve(module: str, max_bytes: int) -> None:
    """The far side: answers one line after another, under limits, until the other side is gone."""
    answering = importlib.import_module(module)
    if hasattr(answering, "prepare"):
        answering.prepare()
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what anything prints is no answer
    out.write(b"{}\n")
    _limit(resource.RLIMIT_AS, int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + max_bytes)
    for line in sys.stdin.buffer:
        seconds, request = json.loads(line)
        used = time.process_time()
        _limit(resource.RLIMIT_CPU, int(used + seconds) + 1)  # the other side may be gone, and nobody else ends it
        try:
            said = json.dumps({"answer": answering.answer(request)}).encode()
        except MemoryError:
            os._exit(1)
        except BaseException as error:  # a Rust library's panic is no Exception
            said = json.dumps({"raised": f"{(str(error).strip().splitlines() or [type(error).__name__])[0][:300]}"}).encode()
        out.write(said + b"\n")
        if len(said) > MAX_ANSWER_BYTES:
            return


def _limit(kind: int, value: int) -> None:
    """Lowers or raises the soft limit, as far as the hard one lets it."""
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))
