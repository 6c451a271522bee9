"""One process of another environment's library: news before answers, what fails, what dies."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from mtpress.engine.drivers.process import DriverProcess, client_environment
from mtpress.errors import EngineError, InputError

DRIVER = """
import os, sys
def answer(request, say):
    print("noise")
    if "die" in request: os._exit(3)
    if "fail" in request: raise RuntimeError("not\\n  today")
    for number in range(request["count"]): say({"done": number})
    return [request["count"]]
def load(): return "1.0", answer
"""


def process(folder: Path, source: str = DRIVER) -> DriverProcess:
    (folder / "driver.py").write_text(source)
    return DriverProcess(Path(sys.executable), folder / "driver.py", folder / "log", dict(os.environ), "the library")


def test_news_come_before_the_answer(tmp_path: Path) -> None:
    news: list[Any] = []
    with process(tmp_path) as driver:
        assert driver.ready == "1.0"
        assert driver.ask({"count": 3}, news.append) == [3]
        assert news == [{"done": 0}, {"done": 1}, {"done": 2}]
        assert driver.ask({"count": 2}) == [2]
    assert (tmp_path / "log").read_text() == "noise\nnoise\n"


def test_a_failure_is_one_line_and_the_next_request_is_answered(tmp_path: Path) -> None:
    with process(tmp_path) as driver:
        with pytest.raises(EngineError, match=r"^the library: RuntimeError: not today; .*log has the rest$"):
            driver.ask({"fail": 1})
        assert driver.ask({"count": 0}) == [0]
    assert "Traceback" in (tmp_path / "log").read_text()


def test_one_that_dies_names_its_log(tmp_path: Path) -> None:
    with process(tmp_path) as driver, pytest.raises(EngineError, match=r"the library ended by itself; .*log says why"):
        driver.ask({"die": 1})


def test_a_library_that_is_not_there_is_the_callers_to_install(tmp_path: Path) -> None:
    source = "def load():\n    import no_such_library\n"
    with pytest.raises(InputError, match="the library cannot be used there: No module named 'no_such_library'"), process(tmp_path, source):
        pass


def test_a_harness_may_fetch_what_a_benchmark_may_not() -> None:
    outside = {"HTTPS_PROXY": "http://proxy", "OPENAI_API_KEY": "another service's"}
    kept = client_environment(outside, None, offline=False)
    assert kept["HTTPS_PROXY"] == "http://proxy"
    assert "HF_HUB_OFFLINE" not in kept and "OPENAI_API_KEY" not in kept
    assert client_environment(outside, None)["HF_HUB_OFFLINE"] == "1"
