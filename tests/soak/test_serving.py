"""A served model under 5,000 requests, and the real engine killed in every place at every time. `make soak` only.

The ordinary suite sends 500 requests and kills in four places (tests/engine/test_server.py). A start takes 30 s of one core.
"""

import contextlib
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from mtpress.engine.server.server import Server
from mtpress.errors import EngineError
from serving import HELLO, Family, real_launch, storm

ENGINE = Path(__file__).resolve().parents[2] / ".envs/engine/bin/python"
NUM_REQUESTS, ROUNDS = 500, 10
FLAT_BYTES = 100_000_000  # of 3.2 GB; seen: 63 MB in steps over the first 3,500, as batches of new shapes come, then 1 MB
MOMENTS = {
    "reading the configuration": "Resolved architecture",
    "starting processes": "Initializing a V1 LLM engine",
    "loading weights": "Starting to load model",
    "opening the port": "Starting vLLM",
    "serving": "Application startup complete",
}
VICTIMS = ("API server", "EngineCore", "Worker")


@pytest.fixture(autouse=True)
def only_in_soak(soak: bool) -> None:
    if not soak:
        pytest.skip("make soak; tests/engine/test_server.py has the sample")


@pytest.mark.engine
def test_memory_is_flat_over_thousands_of_requests(tmp_path: Path) -> None:
    with Server(real_launch(ENGINE), tmp_path / "engine.log") as server:
        family = Family(server.launch.port).meet(server)
        storm(server, NUM_REQUESTS, seed="warm-up")
        before = server.memory_bytes()
        for number in range(ROUNDS):
            outcomes = storm(server, NUM_REQUESTS, seed=f"mtpress soak {number}")
            assert sum(count for outcome, count in outcomes.items() if outcome.endswith("200") and outcome[0] != "c") > 0
            assert server.client.health(), outcomes
            rss = [round(process.memory_info().rss / 1e6) for process in server.processes()]
            print(f"\n{(number + 1) * NUM_REQUESTS} requests: {server.memory_bytes() / 1e6:.0f} MB, was {before / 1e6:.0f}; {rss}")
        assert server.memory_bytes() < before + FLAT_BYTES
        print(dict(outcomes))
    assert family.left() == []
    assert family.port_is_free


@pytest.mark.engine
@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("moment", list(MOMENTS))
def test_any_process_killed_at_any_time(moment: str, victim: str, tmp_path: Path) -> None:
    server = Server(real_launch(ENGINE), tmp_path / "engine.log", say=lambda line: None)
    family = Family(server.launch.port)
    killed: list[float] = []

    def kill() -> None:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, psutil.Error):
                if MOMENTS[moment] in (tmp_path / "engine.log").read_text(errors="replace"):
                    processes = list(family.meet(server).members.values())
                    named = processes[:1] if victim == "API server" else [p for p in processes if victim in p.name()]
                    if named:
                        if moment == "serving":
                            time.sleep(1)
                        named[0].kill()
                        killed.append(time.monotonic())
                        return
            time.sleep(0.02)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(EngineError) as died, server:
        with contextlib.suppress(EngineError):
            server.client.chat(HELLO, max_tokens=1900, temperature=0, ignore_eos=True)
        server.wait()
    killer.join()
    print(f"\n{victim}, {moment}: told {time.monotonic() - killed[0]:.1f} s later: {died.value}")
    assert str(died.value).startswith("the engine died while ")
    assert family.left() == []
    assert family.port_is_free


@pytest.mark.engine
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_the_engine_itself(number: signal.Signals, tmp_path: Path) -> None:
    """Somebody else ends the server that mtpress runs."""
    with Server(real_launch(ENGINE), tmp_path / "engine.log", say=lambda line: None) as server:
        family = Family(server.launch.port).meet(server)
        server.processes()[0].send_signal(number)
        with pytest.raises(EngineError) as died:
            server.wait()
    print(f"\n{number.name}: {died.value}")
    assert family.left() == []
    assert family.port_is_free


@pytest.mark.engine
def test_the_watchdog_stops_the_engine_when_its_own_loading_takes_too_much(tmp_path: Path) -> None:
    """The KV cache alone takes 6 GiB; the threshold is 4 GB under what is available before. Needs a machine left to itself."""
    threshold = psutil.virtual_memory().available - 4_000_000_000
    server = Server(
        real_launch(ENGINE, VLLM_CPU_KVCACHE_SPACE="6"), tmp_path / "engine.log", min_available_bytes=threshold, say=lambda line: None
    )
    family = Family(server.launch.port)
    with pytest.raises(EngineError) as stopped, server:
        pass
    print(f"\n{stopped.value}")
    assert str(stopped.value).startswith("stopped the engine while ")
    assert server.start_seconds is None
    assert family.left() == []
    assert family.port_is_free
