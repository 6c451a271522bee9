"""Runs an engine for as long as a `with` block lasts, or until something ends it.

In: a `Launch` (its command, environment, address) and where its log is to go. Out: a `Client` for the running server. While it
loads, its progress is told; when it dies, the first error of its log is; when memory runs short, the watchdog ends it. Leaving the
block, by whatever way, leaves no process behind and the port free: the engine's parent is a keeper (keeper.py) that ends it even
when mtpress itself is killed. Leaves out: how the command comes to be (launch.py), restarting what died.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import psutil

from mtpress.api_key import API_KEY
from mtpress.engine.launch import ports
from mtpress.engine.launch.arguments import command_values
from mtpress.engine.server import keeper
from mtpress.engine.server.client import Client
from mtpress.engine.server.engine_log import LogFollower, first_error, read_end
from mtpress.engine.server.load_progress import LoadProgress
from mtpress.engine.server.watchdog import Watchdog, default_threshold
from mtpress.errors import EngineError, InputError
from mtpress.progress import human_bytes, human_seconds

if TYPE_CHECKING:
    from mtpress.engine.launch.launch import Launch

START_SECONDS = 1800.0
GRACE_SECONDS = 20.0  # for a polite end; the CPU engine needs 1 to 2
KILLED_SECONDS = 10.0  # for the kernel to take back what was killed
PORT_SECONDS = 5.0
POLL_SECONDS = 0.2
HEALTH_SECONDS = 0.5
LESS_MEMORY = "lower --gpu-memory-utilization, --max-model-len or --max-num-seqs, or the threshold with --min-available-gb"


class Server:
    """A context manager: inside it, the engine answers /health. Use it from one thread.

    min_available_bytes: the watchdog's threshold; None for max(2 GiB, 4 % of memory), 0 for no watchdog. say: gets lines of
    progress; None writes them to stderr, live on a terminal. EngineError: it did not come up, died, or was stopped for want of
    memory. InputError: the port is taken, the log cannot be written, the command is not there.
    """

    def __init__(
        self,
        launch: "Launch",
        log: Path,
        *,
        start_timeout_seconds: float = START_SECONDS,
        min_available_bytes: int | None = None,
        grace_seconds: float = GRACE_SECONDS,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.launch, self.log = launch, log
        self.client = Client(launch.url, launch.environment.get(API_KEY) or os.environ.get(API_KEY))
        self.start_seconds: float | None = None  # how long the start took, once it is done
        self._start_timeout, self._say = start_timeout_seconds, say
        self._drain_seconds = drain_seconds(launch.command)
        self._grace = grace_seconds + self._drain_seconds
        self._threshold = default_threshold(psutil.virtual_memory().total) if min_available_bytes is None else min_available_bytes
        self._keeper: subprocess.Popen[bytes] | None = None
        self._engine_pid: int | None = None
        self._watchdog: Watchdog | None = None
        self._stage = "starting"

    def __enter__(self) -> Self:
        try:
            self._start()
            self._wait_until_ready()
        except BaseException as error:
            self.stop()
            _say_what_is_left(error)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """A request that broke off because the engine died is told as that death."""
        problem = self._death_behind(error) if isinstance(error, EngineError) else None
        self.stop()
        _say_what_is_left(error)
        if problem and problem != str(error):
            raise EngineError(problem) from None

    @property
    def alive(self) -> bool:
        return self._keeper is not None and self._keeper.poll() is None

    def processes(self) -> list[psutil.Process]:
        """The engine's processes, its first one first; the keeper is not among them."""
        if self._keeper is None or not self.alive:
            return []
        try:
            return psutil.Process(self._keeper.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def memory_bytes(self) -> int:
        """Resident memory of the engine's processes, pages that they share counted once for each."""
        total = 0
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                total += int(process.memory_info().rss)
        return total

    def wait(self) -> None:
        """Blocks until the engine ends, which is always an EngineError here; Ctrl-C passes through, the engine stopped."""
        try:
            while self.alive:
                time.sleep(POLL_SECONDS)
        except BaseException as error:
            self.stop()
            _say_what_is_left(error)
            raise
        problem = self._how_it_ended()
        self.stop()
        raise EngineError(problem)

    def stop(self) -> None:
        """Ends the engine: politely, then by force. Returns when none of its processes is left and the port is free."""
        if self._watchdog is not None:
            self._watchdog.end()
        if self._keeper is None:
            self.client.close()
            return
        try:
            self._order(b"t")
            self._keeper.wait(self._grace + KILLED_SECONDS)
        except BaseException as error:  # also a second Ctrl-C: the user will not wait
            self._kill()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
        finally:
            self._kill()
            self.client.close()
            for pipe in (self._keeper.stdin, self._keeper.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
            self._keeper = None
            self._wait_for_port()

    def _start(self) -> None:
        ports.refuse_taken(self.launch.host, self.launch.port)
        log = _create_log(self.log)
        try:
            self._keeper = subprocess.Popen(
                [sys.executable, "-I", "-S", keeper.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=_environment(self.launch),
                start_new_session=True,
            )
        finally:
            os.close(log)
        if self._threshold:
            from mtpress.engine.memory.hardware import available_memory_bytes

            self._watchdog = Watchdog(self._threshold, available_memory_bytes, self._kill_now)
            self._watchdog.start()
        asked = {"command": list(self.launch.command), "grace_seconds": self._grace, "drain": self._drain_seconds > 0}
        assert self._keeper.stdin and self._keeper.stdout
        self._keeper.stdin.write(json.dumps(asked).encode() + b"\n")
        self._keeper.stdin.flush()
        answer = self._keeper.stdout.readline().decode().strip()
        if answer.isdigit():
            self._engine_pid = int(answer)
            return
        command = self.launch.command[0]
        raise InputError(
            f"{command}: the engine cannot be started ({answer.removeprefix('!') or 'no reason given'}); --engine PATH names another"
        )

    def _wait_until_ready(self) -> None:
        started = time.monotonic()
        follower = LogFollower(self.log)
        asked = 0.0
        with LoadProgress(self.memory_bytes, say=self._say) as progress:
            while True:
                for line in follower.lines():
                    progress.see(line)
                self._stage = progress.stage.partition(":")[0]
                if not self.alive:
                    raise EngineError(self._how_it_ended())
                now = time.monotonic()
                if now - asked >= HEALTH_SECONDS:
                    asked = now
                    if self.client.health():
                        break
                if now - started > self._start_timeout:
                    raise EngineError(
                        f"the engine did not come up in {human_seconds(self._start_timeout)}, still {self._stage}; raise --start-timeout, "
                        f"or see {self.log}"
                    )
                progress.show()
                time.sleep(POLL_SECONDS)
            self.start_seconds = time.monotonic() - started
            self._stage = "serving"
            progress.ready(self.start_seconds)

    def _how_it_ended(self) -> str:
        """One line for an engine that is no longer there."""
        if self._watchdog is not None and self._watchdog.seen_bytes is not None:
            return (
                f"stopped the engine while {self._stage}: {human_bytes(self._watchdog.seen_bytes)} of memory were available, under the "
                f"threshold of {human_bytes(self._watchdog.threshold_bytes)}; {LESS_MEMORY}"
            )
        code = 0 if self._keeper is None else self._keeper.wait()
        text = read_end(self.log)
        error = first_error(text)
        ended = f"the engine died while {self._stage}"
        if code > 128 or code < 0:
            number = code - 128 if code > 0 else -code
            with contextlib.suppress(ValueError):
                ended += f", killed by {signal.Signals(number).name}"
        elif error is None:
            ended += f" with exit code {code}"
        if error is None:
            memory = ", as the kernel does when memory runs out (dmesg says so)" if code in (-9, 128 + 9) else ""
            return f"{ended}{memory}; its log says no more: {self.log}"
        remedy = f"; {error.remedy}" if error.remedy else ""
        return f"{ended}: {error.text}{remedy} (log: {self.log})"

    def _death_behind(self, error: EngineError) -> str | None:
        """Why the engine died, if it did when this error came up: it may take a moment to fall."""
        deadline = time.monotonic() + KILLED_SECONDS
        while self.alive:
            if self.client.health() or time.monotonic() > deadline:
                return None
            time.sleep(POLL_SECONDS)
        return None if self._keeper is None else self._how_it_ended()

    def _order(self, order: bytes) -> None:
        assert self._keeper is not None
        assert self._keeper.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # it has ended already
            self._keeper.stdin.write(order)
            self._keeper.stdin.flush()

    def _kill_now(self) -> None:
        """At once, from any thread: the group first, then whatever has left it, by the keeper."""
        if self._engine_pid is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._engine_pid, signal.SIGKILL)
        self._order(b"k")

    def _kill(self) -> None:
        """What is left: nothing, as a rule. Also where somebody has killed the keeper."""
        assert self._keeper is not None
        left = self.processes()
        if self.alive:
            self._kill_now()
            try:
                self._keeper.wait(KILLED_SECONDS)
            except subprocess.TimeoutExpired:
                self._keeper.kill()
                self._keeper.wait()
        elif self._engine_pid is not None and self._keeper.returncode < 0:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._engine_pid, signal.SIGKILL)
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, KILLED_SECONDS)

    def _wait_for_port(self) -> None:
        freed = ports.wait_until_free(self.launch.host, self.launch.port, PORT_SECONDS)
        assert freed or ports.owner_of(self.launch.port) is not None, "the port is ours and not free"


def _environment(launch: "Launch") -> dict[str, str]:
    """Ours and the launch's. The engine's own programs come first, as if its environment were activated: FlashInfer calls ninja."""
    given = {**os.environ, "PYTHONUNBUFFERED": "1", **launch.environment}
    folder = Path(launch.command[0]).parent
    if folder.is_absolute():
        given["PATH"] = os.pathsep.join(part for part in (str(folder), given.get("PATH", os.defpath)) if part)
    return given


def _say_what_is_left(error: BaseException | None) -> None:
    """What cli.py tells after "ended by SIGINT"."""
    if isinstance(error, KeyboardInterrupt) and not error.args:
        error.args = ("the engine is stopped, and nothing of it is left",)


def drain_seconds(command: Sequence[str]) -> float:
    """What --shutdown-timeout gives to requests that are under way. 0: they are cut off, vLLM's default.

    A SIGTERM to the whole group would then end the workers under these requests, and one to the first process alone may wait
    for a client that reads no more: each is right only in its own case (tried with 0.32 on a CPU).
    """
    given = command_values(command).get("--shutdown-timeout", "")
    return float(given) if given.isdigit() else 0.0  # anything else is for vLLM's own parser to refuse


def _create_log(path: Path) -> int:
    """A file that only its owner reads: prompts may end up in it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        os.fchmod(log, 0o600)
    except OSError as error:
        raise InputError(f"{path}: the engine's log cannot be written ({error.strerror or error}); name another place") from None
    return log
