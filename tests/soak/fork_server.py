"""A process that has imported everything once and forks a child for every command line, so that a run costs milliseconds to start.

In: command lines, one at a time, with limits of time, a moment to kill at, a limit of file size. Out: for each a `Run`: exit
code or signal, seconds, peak memory, stdout and stderr. Leaves out: what the command lines mean.

The server never computes, so no thread pool of torch exists where it forks. The test process talks to it in JSON lines.
"""

import gc
import importlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

PRELOADED = (
    "torch", "transformers", "transformers.models.qwen2.tokenization_qwen2", "PIL.Image", "rich.console", "rich.table", "mtpress.cli",
    "mtpress.calibration.samples", "mtpress.chat.encoder", "mtpress.models.qwen3_5.layers", "mtpress.quantization.rounders",
    "mtpress.stages.check", "mtpress.stages.inspect", "mtpress.stages.quantize",
)  # fmt: skip
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
MAX_SECONDS = 120.0


@dataclass(frozen=True)
class Run:
    """How a command line ended. code: None if a signal ended it. peak_bytes: VmHWM, counted from the fork on.

    processor_seconds: of it and its children; other work on the machine does not lengthen them.
    """

    code: int | None
    signal: int | None
    seconds: float
    processor_seconds: float
    peak_bytes: int
    timed_out: bool
    stdout: str
    stderr: str

    @property
    def error_lines(self) -> list[str]:
        """What stands on stderr, without empty lines and without progress."""
        return [line for line in self.stderr.splitlines() if line.strip() and not line.startswith(("quantize  ", "measure  "))]


class ForkServer:
    """Context manager. start() and wait(), or both as run(); `logs` is a directory for what the children print."""

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **ENVIRONMENT}
        )
        self._answer()  # it is ready

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def start(
        self,
        argv: list[str],
        *,
        limit_s: float = MAX_SECONDS,
        kill_after_s: float | None = None,
        max_file_bytes: int | None = None,
        max_shard_bytes: int | None = None,
    ) -> int:
        """Starts `mtpress ARGV` and says its process id.

        limit_s: it is killed then, and `timed_out`. kill_after_s: it is killed then, as wished. max_file_bytes: the system
        refuses to make a file larger. max_shard_bytes: in place of the 5 GB of an output shard.
        """
        assert self._process.stdin is not None
        request = {
            "argv": argv,
            "limit_s": limit_s,
            "kill_after_s": kill_after_s,
            "max_file_bytes": max_file_bytes,
            "max_shard_bytes": max_shard_bytes,
            "logs": str(self.logs),
        }
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._answer()["pid"])

    def wait(self) -> Run:
        found = self._answer()
        texts = {name: (self.logs / name).read_bytes().decode(errors="replace") for name in ("stdout", "stderr")}
        return Run(**found, **texts)

    def run(self, argv: list[str], **limits: Any) -> Run:
        self.start(argv, **limits)
        return self.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the fork server died"
        answer: dict[str, Any] = json.loads(line)
        return answer


def serve() -> None:
    """The server: imports, then a child for every line of stdin; ends with stdin."""
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1):
        os.dup2(nothing, number)
    for name in PRELOADED:
        importlib.import_module(name)
    importlib.import_module("PIL.Image").init()
    gc.collect()
    gc.freeze()
    threads = [task.name for task in Path("/proc/self/task").iterdir()]
    assert len(threads) == 1, f"{len(threads)} threads where the server forks"
    print("{}", file=answers, flush=True)
    for line in requests:
        request = json.loads(line)
        started = time.monotonic()
        child = os.fork()
        if child == 0:
            requests.close()
            answers.close()
            _be_the_command(request)
        print(json.dumps({"pid": child}), file=answers, flush=True)
        print(json.dumps(_watch(child, started, request["limit_s"], request["kill_after_s"])), file=answers, flush=True)


def _watch(child: int, started: float, limit_s: float, kill_after_s: float | None) -> dict[str, Any]:
    """Waits for the child, or kills it at its moment."""
    handle = os.pidfd_open(child)
    waits = select.poll()
    waits.register(handle, select.POLLIN)
    end = started + min(limit_s, limit_s if kill_after_s is None else kill_after_s)
    ended = waits.poll(max(0.0, end - time.monotonic()) * 1000)
    if not ended:
        os.kill(child, signal.SIGKILL)
    os.close(handle)
    _, status, usage = os.wait4(child, 0)
    return {
        "code": os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
        "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else None,
        "seconds": time.monotonic() - started,
        "processor_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * 1024,  # the counter that /proc calls VmHWM, readable after the end too
        "timed_out": not ended and kill_after_s is None,
    }


def _be_the_command(request: dict[str, Any]) -> None:
    """In the child: what the `mtpress` script does."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    logs = Path(request["logs"])
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(logs / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    importlib.import_module("torch").set_num_threads(1)
    if request["max_file_bytes"] is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["max_file_bytes"], request["max_file_bytes"]))
    if request["max_shard_bytes"] is not None:
        importlib.import_module("mtpress.checkpoint.writer").split_into_shards.__defaults__ = (request["max_shard_bytes"],)
    sys.argv = ["mtpress", *request["argv"]]
    code: Any = 1
    try:
        code = importlib.import_module("mtpress.cli").main(request["argv"])
    except SystemExit as leaving:
        code = leaving.code
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    serve()
