"""Progress of long work on stderr: rate, time left and memory; live on a terminal, a line now and then elsewhere."""

import io

import pytest

from mtpress import progress
from mtpress.progress import Progress


class Clock:
    """Stands for time.monotonic."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        patch.setattr(progress.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_has_share_rate_time_left_and_memory(clock: Clock) -> None:
    stream = io.StringIO()
    with Progress("quantize", 8e9, stream=stream) as shown:
        clock.now += 20
        shown.advance(2e9, "layer 7")
    line = stream.getvalue()
    assert line.startswith("quantize   25%  layer 7 ")
    assert "100 MB/s  1m00s left  RAM " in line
    assert line.count("\n") == 1


def test_the_last_line_stands_once(clock: Clock) -> None:
    stream = io.StringIO()
    with Progress("eval", 2, unit="answers", stream=stream) as shown:
        clock.now += 60
        shown.advance(1)
        clock.now += 0.01
        shown.advance(1)  # too soon for a line of its own
    first, last = stream.getvalue().splitlines()
    assert " 50%" in first and "100%" in last and "in 60.0 s" in last
    with Progress("eval", 1, stream=(again := io.StringIO())) as shown:
        clock.now += 60
        shown.advance(1)
    assert again.getvalue().count("100%") == 1


def test_a_terminal_has_one_line_that_changes(clock: Clock) -> None:
    stream = Terminal()
    with Progress("quantize", 4, stream=stream) as shown:
        for _ in range(4):
            clock.now += 1
            shown.advance(1)
    assert stream.getvalue().count("\n") == 1
    assert stream.getvalue().count("\r") == 5


def test_what_was_done_before_counts_for_nothing(clock: Clock) -> None:
    stream = io.StringIO()
    with Progress("quantize", 10, unit="layers", stream=stream) as shown:
        shown.skip(5)
        clock.now += 50
        shown.advance(1)
    assert " 20%" in stream.getvalue() and "0.02 layers/s  3m20s left" in stream.getvalue()


def test_silence_and_failure(clock: Clock) -> None:
    stream = io.StringIO()
    with Progress("quantize", 4, silent=True, stream=stream) as shown:
        shown.say("needs a second")
        clock.now += 60
        shown.advance(4)
    with pytest.raises(RuntimeError), Progress("quantize", 4, stream=stream) as shown:
        shown.advance(1)
        raise RuntimeError
    assert stream.getvalue() == ""


def test_a_terminal_that_is_gone_stops_nothing(clock: Clock) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError

    with Progress("quantize", 2, stream=Gone()) as shown:
        clock.now += 60
        shown.advance(1)
        assert shown.silent
