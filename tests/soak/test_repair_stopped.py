"""repair killed at any moment, on disks that fill up, from inputs torn anywhere or of odd JSON: no output or a whole one.

`make soak` kills 60 runs, limits 12 disks, tears 60 inputs and tries 2,000 odd values, the ordinary suite a few of each. There is
nothing to resume: the same command starts over. The record is left out of what is compared, for its timings differ.
"""

import copy
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fork_server import ForkServer, Run
from safetensors.torch import load_file, save_file
from whole_runs import MAX_SHARD_BYTES, hashes, make_source

from mtpress.checkpoint.checkpoint import INDEX_NAME
from mtpress.errors import InputError
from mtpress.stages.repair import repair

KILLS, LIMITS, TEARS, ODD = (60, 3), (12, 2), (60, 4), (2000, 60)
SEED = "mtpress repair 1"
FILES = ("config.json", "hf_quant_config.json", "tokenizer_config.json", "generation_config.json", INDEX_NAME)
VALUES: tuple[Any, ...] = (None, -1, 10**30, "x", [], [["a"], None], {"a": 1})


@pytest.fixture(scope="module")
def source(server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve layers in NVFP4 in several shards, its body under another prefix, without a draft head: every shard is written anew."""
    folder = tmp_path_factory.mktemp("repair")
    made = folder / "nvfp4"
    run = server.run(make_source(folder / "case").arguments("weight-only", made), max_shard_bytes=MAX_SHARD_BYTES)
    assert run.code == 0, run.stderr
    for path in made.glob("*.safetensors"):
        tensors = {n.replace("model.language_model.", "model."): t for n, t in load_file(path).items() if not n.startswith("mtp.")}
        save_file(tensors, path) if tensors else path.unlink()
    (made / INDEX_NAME).write_text("{")
    return made


@pytest.fixture(scope="module")
def base(source: Path) -> Path:
    return source.with_name("case") / "source"


@pytest.fixture(scope="module")
def whole(server: ForkServer, source: Path, base: Path) -> tuple[dict[str, str], float]:
    """Hashes of an undisturbed output, and its seconds."""
    out = source.with_name("whole")
    run = server.run(arguments(source, out, base))
    assert run.code == 0, run.stdout + run.stderr
    return hashes(out), run.seconds


def arguments(source: Path, out: Path, base: Path) -> list[str]:
    return ["repair", str(source), str(out), "--base", str(base), "--no-compare"]


def one_line(run: Run) -> str:
    """The only line of an error; progress does not count."""
    lines = [line for line in run.stderr.splitlines() if line.strip() and not line.startswith("repair  ")]
    assert run.code == 2 and len(lines) == 1, f"exit code {run.code}, signal {run.signal}\n{run.stderr}"
    return lines[0]


def test_killed_runs_leave_nothing_or_all(
    source: Path, base: Path, whole: tuple[dict[str, str], float], server: ForkServer, tmp_path: Path, soak: bool
) -> None:
    before, num, killed = hashes(source), KILLS[0 if soak else 1], 0
    for number in range(num):
        out = tmp_path / "out"
        moment = whole[1] * (number + random.Random(f"{SEED}/{number}").random()) / num
        run = server.run(arguments(source, out, base), kill_after_s=moment)
        killed += run.signal == 9
        assert hashes(source) == before
        if not out.exists():
            run = server.run(arguments(source, out, base))
            assert run.code == 0, run.stderr
        assert hashes(out) == whole[0] and not out.with_name("out.partial").exists(), f"killed after {moment:.3f} s"
        shutil.rmtree(out)
    assert killed >= num // 2


def test_full_disks(source: Path, base: Path, whole: tuple[dict[str, str], float], server: ForkServer, tmp_path: Path, soak: bool) -> None:
    """The system refuses to make a file larger than its share of the largest shard."""
    before, num = hashes(source), LIMITS[0 if soak else 1]
    largest = max(path.stat().st_size for path in source.with_name("whole").glob("*.safetensors"))
    for number in range(num):
        out = tmp_path / "out"
        line = one_line(server.run(arguments(source, out, base), max_file_bytes=int(largest * (number + 0.5) / num)))
        assert line.startswith("mtpress repair: ") and "free space or choose another disk" in line
        assert not list(tmp_path.iterdir()) and hashes(source) == before


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
        line = one_line(server.run(["repair", str(torn), str(tmp_path / "out")]))
        assert file.name in line and not list(tmp_path.glob("out*")), line
        shutil.rmtree(torn)


def places(content: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON document but the whole."""
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in inner:
        yield (*at, key)
        yield from places(value, (*at, key))


def test_no_value_is_too_odd(
    small_nvfp4: dict[str, Path], small_formats: dict[str, Path], small_bf16: Path, tmp_path: Path, soak: bool
) -> None:
    """Whatever stands in the JSON files, repair says something: what it mends or leaves, or one line."""
    kinds = {"nvfp4": small_nvfp4["nvfp4-mtp-vlm"], **small_formats}
    done = 0
    for number in range(ODD[0 if soak else 1]):
        rng = random.Random(f"{SEED}/odd/{number}")
        odd = Path(shutil.copytree(kinds[rng.choice(list(kinds))], tmp_path / "odd"))
        file = odd / rng.choice([name for name in FILES if (odd / name).exists()])
        content = json.loads(file.read_text())
        at = rng.choice(list(places(content)))
        inner = changed = copy.deepcopy(content)
        for key in at[:-1]:
            inner = inner[key]
        if rng.random() < 0.2:
            del inner[at[-1]]
        else:
            inner[at[-1]] = rng.choice(VALUES)
        file.write_text(json.dumps(changed))
        try:
            result = repair(odd, tmp_path / "out", small_bf16 if rng.random() < 0.5 else None, silent=True, comparing=rng.random() < 0.5)
            done += len(result.fixed)
        except InputError as error:
            assert "\n" not in str(error)
        except Exception as error:
            raise AssertionError(f"{number}: {file.name} {at}: {error!r}") from error
        shutil.rmtree(odd)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert done > 0
