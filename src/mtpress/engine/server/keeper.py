"""The parent of an engine: ends it, with every process it has started, when it is told to or when mtpress is gone.

A program of its own, run by server.py as a file (`python -I -S keeper.py`): it imports nothing but the standard library, so that
it is there in 20 ms and cannot be taken down by what takes mtpress down. In, on stdin: one line of JSON (command; grace_seconds;
drain: whether the first process alone is asked to end, as it then waits for requests), then `t` to end the engine politely or `k`
to kill it; the end of stdin is mtpress's own end and counts as `t`. Out, on stdout: the engine's process id, or `!` and why it could
not be started. The engine writes to what is stderr here. Exits with the engine's exit code, 128 + n for signal n, and only when no
descendant of the engine is left: as "subreaper" it inherits those whose parent dies.
"""

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
LEFT_BEHIND_SECONDS = 3.0  # what outlives the engine's first process gets these to end by itself
AGAIN_SECONDS = 0.1
OOM_SCORE_ADJ = "500"  # when memory runs out anyway, the kernel takes the engine before the shell and mtpress


def prctl(option: int, value: int) -> None:
    with contextlib.suppress(OSError, AttributeError):  # Linux only; elsewhere the process group has to do
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def start(command: list[str]) -> int:
    """The engine in a session of its own, so that the terminal's Ctrl-C reaches mtpress alone. Returns its process id."""

    def prepare() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text(OOM_SCORE_ADJ)

    engine = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=2, stderr=2, start_new_session=True, preexec_fn=prepare)
    engine.returncode = 0  # it is waited for below, with everything else
    return engine.pid


def descendants() -> list[int]:
    """Every process below this one, from /proc; [] where there is none."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry.name))
    found = [os.getpid()]
    for pid in found:
        found += children.get(pid, [])
    return found[1:]


def send(number: int, engine: int) -> None:
    """To the engine's group, and to whatever has left it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(engine, number)
    if number == signal.SIGKILL:
        for pid in descendants():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)


def keep(engine: int, grace_seconds: float, drain: bool, woken: int) -> int:
    """Until no process is left. Returns the exit code of the first one."""
    code, listening, kill_at = 0, True, None
    while True:
        ready, _, _ = select.select([0, woken] if listening else [woken], [], [], None if kill_at is None else AGAIN_SECONDS)
        if woken in ready:
            os.read(woken, 512)
        if 0 in ready:
            order = os.read(0, 1)
            listening = bool(order)
            if order == b"k":
                kill_at = 0.0
            elif kill_at is None:
                if drain:
                    os.kill(engine, signal.SIGTERM)
                else:
                    send(signal.SIGTERM, engine)
                kill_at = time.monotonic() + grace_seconds
        if kill_at is not None and time.monotonic() >= kill_at:
            send(signal.SIGKILL, engine)
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return code
            if not pid:
                break
            if pid == engine:
                ended = os.waitstatus_to_exitcode(status)
                code = ended if ended >= 0 else 128 - ended
                if kill_at is None:
                    send(signal.SIGTERM, engine)
                    kill_at = time.monotonic() + LEFT_BEHIND_SECONDS


def main() -> int:
    read_end, write_end = os.pipe()
    for end in (read_end, write_end):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: None)  # orders come on stdin; SIG_IGN would be handed down to the engine
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    line = b""
    while not line.endswith(b"\n"):  # unbuffered: what follows belongs to select()
        byte = os.read(0, 1)
        if not byte:
            return 0  # mtpress ended before it had said anything
        line += byte
    asked = json.loads(line)
    try:
        engine = start(asked["command"])
    except OSError as error:
        print(f"!{error.strerror or error}", flush=True)
        return 127
    print(engine, flush=True)
    return keep(engine, asked["grace_seconds"], asked["drain"], read_end)


if __name__ == "__main__":
    sys.exit(main())
