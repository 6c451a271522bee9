"""convert killed at any moment, on disks that fill up, from inputs torn anywhere: no output or a whole one, the source as it was.

`make soak` kills 60 runs, limits 12 disks and tears 60 inputs, the ordinary suite a few of each. There is nothing to resume: the same
command starts over. The record is left out of what is compared, for its timings differ.
"""

import random
import shutil
from pathlib import Path

import pytest
from fork_server import ForkServer, Run
from whole_runs import MAX_SHARD_BYTES, hashes, make_source

KILLS, LIMITS, TEARS = (60, 3), (12, 2), (60, 4)
SEED = "mtpress convert 1"
TO = ("--to", "compressed-tensors")


@pytest.fixture(scope="module")
def source(server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve layers in NVFP4, in several shards."""
    folder = tmp_path_factory.mktemp("convert")
    run = server.run(make_source(folder / "case").arguments("weight-only", folder / "nvfp4"), max_shard_bytes=MAX_SHARD_BYTES)
    assert run.code == 0, run.stderr
    return folder / "nvfp4"


@pytest.fixture(scope="module")
def whole(server: ForkServer, source: Path) -> tuple[dict[str, str], float]:
    """Hashes of an undisturbed output, and its seconds."""
    out = source.with_name("whole")
    run = server.run(arguments(source, out))
    assert run.code == 0, run.stderr
    return hashes(out), run.seconds


def arguments(source: Path, out: Path) -> list[str]:
    return ["convert", str(source), str(out), *TO]


def one_line(run: Run) -> str:
    """The only line of an error; progress does not count."""
    lines = [line for line in run.stderr.splitlines() if line.strip() and not line.startswith("convert  ")]
    assert run.code == 2 and len(lines) == 1, f"exit code {run.code}, signal {run.signal}\n{run.stderr}"
    return lines[0]


def test_killed_runs_leave_nothing_or_all(
    source: Path, whole: tuple[dict[str, str], float], server: ForkServer, tmp_path: Path, soak: bool
) -> None:
    before, num, killed = hashes(source), KILLS[0 if soak else 1], 0
    for number in range(num):
        out = tmp_path / "out"
        moment = whole[1] * (number + random.Random(f"{SEED}/{number}").random()) / num
        run = server.run(arguments(source, out), kill_after_s=moment)
        killed += run.signal == 9
        assert hashes(source) == before
        if not out.exists():
            run = server.run(arguments(source, out))
            assert run.code == 0, run.stderr
        assert hashes(out) == whole[0] and not out.with_name("out.partial").exists(), f"killed after {moment:.3f} s"
        shutil.rmtree(out)
    assert killed >= num // 2


def test_full_disks(source: Path, whole: tuple[dict[str, str], float], server: ForkServer, tmp_path: Path, soak: bool) -> None:
    """The system refuses to make a file larger than its share of the largest shard that is written."""
    before, num = hashes(source), LIMITS[0 if soak else 1]
    shards = source.with_name("whole").glob("*.safetensors")
    largest = max(path.stat().st_size for path in shards if path.stat().st_nlink == 1)  # the others are links to the source's
    for number in range(num):
        out = tmp_path / "out"
        line = one_line(server.run(arguments(source, out), max_file_bytes=int(largest * (number + 0.5) / num)))
        assert line.startswith("mtpress convert: ") and "free space or choose another disk" in line
        assert not list(tmp_path.iterdir()) and hashes(source) == before
    assert server.run(arguments(source, tmp_path / "out")).code == 0
    assert hashes(tmp_path / "out") == whole[0]


def test_torn_inputs_are_one_line(source: Path, server: ForkServer, tmp_path: Path, soak: bool) -> None:
    for number in range(TEARS[0 if soak else 1]):
        rng = random.Random(f"{SEED}/tear/{number}")
        torn = Path(shutil.copytree(source, tmp_path / "torn"))
        file = rng.choice(sorted(path for path in torn.iterdir() if path.suffix == ".safetensors" or path.name == "config.json"))
        content = bytearray(file.read_bytes())
        if rng.random() < 0.5 or file.suffix == ".json":
            del content[rng.randrange(len(content) - 1) :]
        else:
            content[rng.randrange(8)] ^= 1 << rng.randrange(8)  # the length of the header
        file.write_bytes(content)
        line = one_line(server.run(arguments(torn, tmp_path / "out")))
        assert file.name in line and not list(tmp_path.glob("out*")), line
        shutil.rmtree(torn)
