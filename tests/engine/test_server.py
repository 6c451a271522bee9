"""The server around an engine: it comes up, it goes, and whatever dies, nothing is left. With a fake engine that dies in every
way in a second, and with the real one on the built-in model, of which this file starts two (five with MTPRESS_SOAK=1).
"""

import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from mtpress.engine.launch.launch import Launch
from mtpress.engine.server.server import Server, drain_seconds
from mtpress.engine.server.watchdog import INTERVAL_SECONDS, default_threshold
from mtpress.engine.trial.first_words import first_words
from mtpress.errors import EngineError, InputError
from serving import HELLO, Family, about_picture, fake_launch, free_port, launch, real_launch, red_circle, said, storm

UNDER_MTPRESS = Path(__file__).with_name("under_mtpress.py")
PROMPTLY_SECONDS = 120.0  # nothing here takes this long; a test that waits fails instead of hanging
SECRET = "a-key-that-must-not-show"


def fake(*words: str, **environment: str) -> Launch:
    return fake_launch(*words, python=sys.executable, **environment)


def silent(line: str) -> None:
    pass


def serve(tmp_path: Path, *words: str, **options: Any) -> Server:
    return Server(fake(*words), tmp_path / "engine.log", say=silent, **options)


def assert_nothing_left(family: Family) -> None:
    assert family.left() == []
    assert family.port_is_free


def test_it_comes_up_and_goes(tmp_path: Path) -> None:
    told: list[str] = []
    with Server(fake("late=0.6"), tmp_path / "logs/engine.log", say=told.append) as server:
        family = Family(server.launch.port).meet(server)
        assert server.alive
        assert server.client.models() == ["tiny"]
        assert server.start_seconds is not None and server.start_seconds > 0.5
        assert server.memory_bytes() > 1_000_000
    assert len(family.members) == 1
    assert any("reading the configuration" in line or "loading weights" in line for line in told)
    assert "ready in" in told[-1]
    assert_nothing_left(family)


def test_the_log_is_for_its_owner_alone_and_holds_no_key(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    log.write_text("old")
    log.chmod(0o644)
    with Server(fake(VLLM_API_KEY=SECRET), log, say=silent) as server:
        assert log.stat().st_mode & 0o777 == 0o600
        argv = [word for process in [*server.processes(), psutil.Process()] for word in process.cmdline()]
        assert SECRET not in f"{argv} {server.launch!r} {server.client!r} {vars(server)!r}"
    assert "Resolved architecture" in log.read_text()
    assert SECRET not in log.read_text()


def test_the_engines_own_programs_are_found_first(tmp_path: Path) -> None:
    with Server(fake(EXTRA="given"), tmp_path / "engine.log", say=silent) as server:
        environment = server.processes()[0].environ()
    assert environment["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert environment["PATH"].endswith(os.environ["PATH"])
    assert environment["EXTRA"] == "given"


def test_a_taken_port_is_refused_beforehand(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = Server(fake_launch(python=sys.executable, port=port), tmp_path / "engine.log", say=silent)
        with pytest.raises(InputError, match=rf"port {port} is taken by .*\(process {os.getpid()}\); choose another --port"), server:
            pass
    assert not (tmp_path / "engine.log").exists()


def test_what_cannot_be_started_is_told(tmp_path: Path) -> None:
    server = Server(launch([str(tmp_path / "no-vllm"), "serve"], free_port()), tmp_path / "engine.log", say=silent)
    with pytest.raises(InputError, match=r"no-vllm: the engine cannot be started \(No such file or directory\); --engine PATH"), server:
        pass
    server = Server(fake(), tmp_path / "file/engine.log", say=silent)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="the engine's log cannot be written"), server:
        pass


CUDA_OOM = """\
(EngineCore pid=7) ERROR 11-21 10:00:00 [core.py:1510] EngineCore failed to start.
(EngineCore pid=7) ERROR 11-21 10:00:00 [core.py:1510] Traceback (most recent call last):
(EngineCore pid=7) ERROR 11-21 10:00:00 [core.py:1510] torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.
(APIServer pid=1) Traceback (most recent call last):
(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""


def test_an_early_death_is_told_at_once_with_its_cause(tmp_path: Path) -> None:
    (tmp_path / "said.txt").write_text(CUDA_OOM)
    server = serve(tmp_path, f"print={tmp_path / 'said.txt'}", "exit=1")
    with pytest.raises(EngineError) as died, server:
        pass
    message = str(died.value)
    assert message.startswith(
        "the engine died while reading the configuration: OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."
    )
    assert "lower --max-num-seqs" in message
    assert str(tmp_path / "engine.log") in message
    assert "Engine core initialization" not in message
    assert_nothing_left(Family(server.launch.port))


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("kill", "killed by SIGKILL, as the kernel does when memory runs out"),
        ("exit=0", "the engine died while reading the configuration with exit code 0; its log says no more"),
        ("exit=7", "with exit code 7; its log says no more"),
        ("orphan", "with exit code 3"),
    ],
)
def test_a_death_without_a_word(word: str, message: str, tmp_path: Path) -> None:
    server = serve(tmp_path, word)
    with pytest.raises(EngineError) as died, server:
        pass
    assert message in str(died.value)
    assert_nothing_left(Family(server.launch.port))


def test_an_engine_that_never_answers_is_given_up(tmp_path: Path) -> None:
    server = serve(tmp_path, "late=600", start_timeout_seconds=1.0)
    with pytest.raises(EngineError, match=r"did not come up in 1s, still loading weights; raise --start-timeout"), server:
        pass
    assert_nothing_left(Family(server.launch.port))


@pytest.mark.parametrize("words", [("stubborn",), ("child",), ("stubborn", "child")])
def test_what_will_not_end_is_killed(words: tuple[str, ...], tmp_path: Path) -> None:
    with serve(tmp_path, *words, grace_seconds=0.5) as server:
        family = Family(server.launch.port).meet(server)
    assert len(family.members) == (2 if "child" in words else 1)
    assert_nothing_left(family)


@pytest.mark.parametrize(
    ("words", "seconds"),
    [((), 0.0), (("--shutdown-timeout", "20"), 20.0), (("--shutdown-timeout=7",), 7.0), (("--shutdown-timeout",), 0.0), (("20",), 0.0)],
)
def test_a_shutdown_timeout_is_waited_for(words: tuple[str, ...], seconds: float) -> None:
    assert drain_seconds(["vllm", "serve", *words]) == seconds


def test_with_a_shutdown_timeout_only_the_first_process_is_asked(tmp_path: Path) -> None:
    """A child that would die of SIGTERM is still there when the first process ends by itself."""
    with serve(tmp_path, "sibling", "--shutdown-timeout", "1") as server:
        family = Family(server.launch.port).meet(server)
        assert len(family.members) == 2
    assert "asked to end" not in server.log.read_text()
    with serve(tmp_path, "sibling") as server:
        family.port = server.launch.port
        family.meet(server)
    assert "asked to end" in server.log.read_text()
    assert_nothing_left(family)


def test_a_death_while_serving_ends_the_wait(tmp_path: Path) -> None:
    with serve(tmp_path, "falls=0.5", "child") as server:
        family = Family(server.launch.port).meet(server)
        with pytest.raises(EngineError, match="the engine died while serving, killed by SIGKILL"):
            server.wait()
        assert_nothing_left(family)


def test_a_request_that_breaks_off_is_told_as_the_engines_death(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="the engine died while serving, killed by SIGKILL"), serve(tmp_path, "falls=0.5") as server:
        server.client.chat(HELLO)


def test_other_errors_in_the_block_pass_through(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"^mine$"), serve(tmp_path):
        raise EngineError("mine")
    with pytest.raises(ZeroDivisionError), serve(tmp_path):
        raise ZeroDivisionError


@pytest.mark.parametrize("words", [("late=600",), ()])
def test_the_watchdog_stops_it_before_memory_runs_out(words: tuple[str, ...], tmp_path: Path) -> None:
    threshold = 2 * psutil.virtual_memory().total  # more than there can be
    server = serve(tmp_path, *words, min_available_bytes=threshold)
    with pytest.raises(EngineError) as stopped, server:
        server.wait()
    assert "stopped the engine while" in str(stopped.value)
    assert "of memory were available, under the threshold of" in str(stopped.value)
    assert "lower --gpu-memory-utilization, --max-model-len or --max-num-seqs" in str(stopped.value)
    assert_nothing_left(Family(server.launch.port))


def test_the_watchdog_sees_memory_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's real memory belongs to others too; the soak has the real engine take it."""
    available = 10_000_000_000
    monkeypatch.setattr("mtpress.engine.memory.hardware.available_memory_bytes", lambda: available)
    with pytest.raises(EngineError) as stopped, serve(tmp_path, min_available_bytes=2_000_000_000) as server:
        family = Family(server.launch.port).meet(server)
        time.sleep(3 * INTERVAL_SECONDS)
        assert server.alive
        available = 1_900_000_000
        server.wait()
    assert str(stopped.value).startswith(
        "stopped the engine while serving: 1.9 GB of memory were available, under the threshold of 2 GB; lower"
    )
    assert_nothing_left(family)


def test_the_threshold_follows_the_machine() -> None:
    assert default_threshold(16 << 30) == 2 << 30
    assert default_threshold(128 << 30) == int(0.04 * (128 << 30))


def test_without_a_threshold_there_is_no_watchdog(tmp_path: Path) -> None:
    with serve(tmp_path, min_available_bytes=0) as server:
        assert server._watchdog is None


def test_a_killed_keeper_takes_the_engine_with_it(tmp_path: Path) -> None:
    with serve(tmp_path) as server:
        family = Family(server.launch.port).meet(server)
        assert server._keeper is not None
        server._keeper.kill()
        with pytest.raises(EngineError, match="the engine died while serving, killed by SIGKILL"):
            server.wait()
        assert_nothing_left(family)


# mtpress itself: a process that is stopped or killed


@contextlib.contextmanager
def mtpress(launch: Launch, folder: Path, grace_seconds: float = 20.0) -> Iterator[subprocess.Popen[str]]:
    asked = folder / "launch.json"
    asked.write_text(json.dumps(dataclasses.asdict(launch)), encoding="utf-8")
    command = [sys.executable, str(UNDER_MTPRESS), str(folder / "engine.log"), str(asked), str(grace_seconds)]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield running
    finally:
        running.kill()
        running.communicate(timeout=PROMPTLY_SECONDS)


def wait_for(condition: Callable[[], object], running: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PROMPTLY_SECONDS
    while not condition():
        assert running.poll() is None, running.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def log_says(folder: Path, words: str) -> Callable[[], bool]:
    log = folder / "engine.log"
    return lambda: log.exists() and words in log.read_text(errors="replace")


def meet(family: Family, running: subprocess.Popen[str]) -> None:
    family.members.update({process.pid: process for process in psutil.Process(running.pid).children(recursive=True)})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("words", [("late=600", "child"), ("child",)], ids=["loading", "serving"])
def test_a_signal_stops_the_engine_first(words: tuple[str, ...], number: signal.Signals, tmp_path: Path) -> None:
    launch = fake(*words)
    family = Family(launch.port)
    with mtpress(launch, tmp_path, grace_seconds=0.5) as running:
        assert running.stdout is not None
        if "late=600" in words:
            wait_for(log_says(tmp_path, "Starting to load model"), running)
        else:
            assert running.stdout.readline() == "up\n"
        meet(family, running)
        running.send_signal(number)
        _, stderr = running.communicate(timeout=PROMPTLY_SECONDS)
    assert running.returncode == 128 + number
    assert f"ended by {number.name}; the engine is stopped, and nothing of it is left\n" in stderr
    assert "Traceback" not in stderr
    assert len(family.members) == 3  # keeper, engine, child
    assert_nothing_left(family)


@pytest.mark.parametrize("words", [("late=600", "child"), ("child", "stubborn")], ids=["loading", "serving"])
def test_nothing_outlives_a_killed_mtpress(words: tuple[str, ...], tmp_path: Path) -> None:
    launch = fake(*words)
    family = Family(launch.port)
    with mtpress(launch, tmp_path, grace_seconds=0.5) as running:
        wait_for(log_says(tmp_path, "Starting to load model"), running)
        meet(family, running)
        running.kill()
        running.wait()
        assert len(family.members) == 3
        gone = psutil.wait_procs(list(family.members.values()), timeout=PROMPTLY_SECONDS)[0]
        assert len(gone) == 3
    assert_nothing_left(family)


# the real engine


@pytest.fixture(scope="module")
def server(engine_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One for all tests that do not kill it; the last one does."""
    with Server(real_launch(engine_python, VLLM_API_KEY=""), tmp_path_factory.mktemp("real") / "engine.log", say=silent) as running:
        yield running


@pytest.mark.engine
def test_the_real_engine_answers(server: Server) -> None:
    answer = server.client.chat(HELLO, max_tokens=24, temperature=0)
    assert answer["usage"]["completion_tokens"] == 24
    text = said(answer["choices"][0])
    assert len(text.split()) > 8
    chunks = list(server.client.stream_chat(HELLO, max_tokens=24, temperature=0))
    parts = [choice["delta"].get("reasoning") or choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"]]
    assert "".join(parts).strip() == text.strip()
    assert chunks[-1]["usage"]["completion_tokens"] == 24
    assert "red" in said(server.client.chat(about_picture(red_circle()), max_tokens=24, temperature=0)["choices"][0])
    assert server.client.complete("The", max_tokens=3, temperature=0)["usage"]["completion_tokens"] <= 3
    assert len(server.processes()) >= 3  # API server, engine core, worker


@pytest.mark.engine
def test_first_words_of_the_real_engine(server: Server) -> None:
    words = first_words(server.client, 3)
    assert words.num_tokens == 64
    assert words.tokens_per_second is not None and words.tokens_per_second > 1
    assert words.spec_decode is not None and words.spec_decode.num_drafts > 10
    assert 0.3 < words.spec_decode.acceptance_rate <= 1
    assert len(words.spec_decode.accepted_per_position) == 3
    assert words.warnings == ()
    assert "drafted tokens accepted" in str(words)


@pytest.mark.engine
def test_a_storm_of_requests_leaves_it_alive_and_its_memory_flat(server: Server) -> None:
    """500 requests, 16 at a time, a quarter malformed or cancelled; make soak sends ten times as many."""
    storm(server, 100, seed="warm-up")
    before = server.memory_bytes()
    outcomes = storm(server, 500)
    assert_weathered(server, outcomes.items(), 500)
    assert server.memory_bytes() < before + 100_000_000


def assert_weathered(server: Server, outcomes: Any, num: int) -> None:
    counts = dict(outcomes)
    assert sum(counts.values()) == num
    good = sum(count for outcome, count in counts.items() if outcome.split(":")[0] in ("chat", "picture", "streamed") and "200" in outcome)
    assert good == num * 3 // 4, counts
    refused = {outcome for outcome in counts if outcome.split(":")[0] not in ("chat", "picture", "streamed", "cancelled")}
    assert all(outcome.rpartition(": ")[2][0] in "45" for outcome in refused), counts
    assert server.client.health()
    assert said(server.client.chat(HELLO, max_tokens=8, temperature=0)["choices"][0])


@pytest.mark.engine
def test_the_engine_core_killed_in_a_request(server: Server) -> None:
    """The last test of the shared server."""
    family = Family(server.launch.port).meet(server)
    core = next(process for process in server.processes() if "EngineCore" in process.name())
    stream = server.client.stream_chat(HELLO, max_tokens=1500, temperature=0, ignore_eos=True)
    next(stream)
    core.kill()
    with pytest.raises(EngineError):
        list(stream)
    with pytest.raises(EngineError, match=r"the engine died while serving.*\(log: .*engine.log\)"):
        server.wait()
    assert_nothing_left(family)


IN_SOAK = pytest.mark.skipif(os.environ.get("MTPRESS_SOAK") != "1", reason="one more start of the engine; MTPRESS_SOAK=1")
LOADING = {"API server": "Initializing a V1 LLM engine", "EngineCore": "world_size=1 rank=0"}  # a line of the log by which it is there


@pytest.mark.engine
@IN_SOAK
@pytest.mark.parametrize("victim", ["API server", "EngineCore"])
def test_a_process_of_the_real_engine_killed_while_it_loads(victim: str, engine_python: Path, tmp_path: Path) -> None:
    server = Server(real_launch(engine_python), tmp_path / "engine.log", say=silent)
    family = Family(server.launch.port)

    def kill() -> None:
        deadline = time.monotonic() + PROMPTLY_SECONDS
        while not log_says(tmp_path, LOADING[victim])() and time.monotonic() < deadline:
            time.sleep(0.05)
        first, *others = family.meet(server).members.values()
        chosen = first if victim == "API server" else next(process for process in others if "EngineCore" in process.name())
        chosen.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(EngineError) as died, server:
        pass
    killer.join()
    message = str(died.value)
    assert re.match(r"the engine died while [a-z' ]+[,:]", message), message
    assert str(tmp_path / "engine.log") in message
    assert re.search("killed by SIGKILL" if victim == "API server" else "EngineCore was killed|ended without a word", message), message
    assert len(family.members) >= 3
    assert_nothing_left(family)


@pytest.mark.engine
@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=IN_SOAK), signal.SIGKILL])
def test_mtpress_stopped_or_killed_while_the_real_engine_loads(number: signal.Signals, engine_python: Path, tmp_path: Path) -> None:
    launch = real_launch(engine_python)
    family = Family(launch.port)
    with mtpress(launch, tmp_path) as running:
        wait_for(log_says(tmp_path, LOADING["API server"]), running)
        meet(family, running)
        running.send_signal(number)
        running.wait(PROMPTLY_SECONDS)
        gone, alive = psutil.wait_procs(list(family.members.values()), timeout=PROMPTLY_SECONDS)
        assert not alive
        assert len(gone) >= 4  # keeper, API server, resource tracker, engine core
    assert running.returncode == (-number if number == signal.SIGKILL else 128 + number)
    assert_nothing_left(family)
