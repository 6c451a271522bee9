"""One process of another environment's library, asked for one thing after another.

In: that environment's python, a driver file for it (driver_loop.py has the protocol), an environment. Out: answers as plain JSON. Leaves
out: what is asked. What the process prints goes to its log.
"""

import json
import subprocess
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

from mtpress.errors import EngineError, InputError

LOOP = Path(__file__).with_name("loop.py")
PROXIES = ("http_proxy", "https_proxy", "all_proxy")
STOP_SECONDS = 5.0


class DriverProcess:
    """A context manager; entering it waits until the library is imported. title: what the process is, in errors: "vLLM's client".

    InputError where that library is not there; EngineError where it fails or dies.
    """

    def __init__(self, python: Path, driver: Path, log: Path, environment: Mapping[str, str], title: str) -> None:
        self.python, self.driver, self.log, self.environment, self.title = python, driver, log, dict(environment), title

    def __enter__(self) -> Self:
        # By path, not by name: that environment need not have mtpress, and no folder of it must come first in its imports.
        code = f"import runpy; runpy.run_path({str(LOOP)!r}, {{'DRIVER': {str(self.driver)!r}}}, '__main__')"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [str(self.python), "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                encoding="utf-8",
                env=self.environment,
                cwd=self.log.parent,
                start_new_session=True,  # Ctrl-C is ours to pass on
            )
        try:
            first = self._read()
            if reason := first.get("unusable"):
                raise InputError(f"{self.python}: {self.title} cannot be used there: {reason}")
            self.ready = first["ready"]
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop()

    def ask(self, request: Mapping[str, Any], on_news: Callable[[Any], None] | None = None, about: str = "") -> Any:
        """The answer to one request; what is said before it goes to on_news. about: what the request is, before an error of it."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except OSError:
            self._died()
        while "news" in (answer := self._read()):
            if on_news is not None:
                on_news(answer["news"])
        if "error" in answer:
            raise EngineError(f"{about}{': ' if about else ''}{self.title}: {answer['error']}; {self.log} has the rest")
        return answer["result"]

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self._died()
        answer = json.loads(line)
        assert isinstance(answer, dict)
        return answer

    def _died(self) -> NoReturn:
        raise EngineError(f"{self.title} ended by itself; {self.log} says why")

    def _stop(self) -> None:
        for stream in (self.process.stdin, self.process.stdout):
            with suppress(OSError):
                if stream is not None:
                    stream.close()
        self.process.terminate()  # it owns nothing that would want to be put away
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def client_environment(environment: Mapping[str, str], api_key: str | None, *, offline: bool = True) -> dict[str, str]:
    """Without proxies where nothing is fetched, and without a key for another service: what is asked is the server named."""
    left_out = {"OPENAI_API_KEY"} | ({name for name in environment if name.lower() in PROXIES} if offline else set())
    kept = {name: value for name, value in environment.items() if name not in left_out}
    kept |= {"VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false"} | ({"HF_HUB_OFFLINE": "1"} if offline else {})
    kept.setdefault("OMP_NUM_THREADS", "1")
    if api_key:
        kept["OPENAI_API_KEY"] = api_key  # in no argument, where ps would show it
    return kept
