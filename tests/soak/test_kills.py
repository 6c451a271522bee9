"""Runs killed at any moment: nothing has the output's name before it is whole, and --resume writes the bytes of an undisturbed run.

`make soak` kills 200 runs, the ordinary suite a few. The moments are spread evenly over the duration of an undisturbed run,
measured first; every third run is killed once or twice more while it is resumed.
"""

import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
from fork_server import ForkServer
from whole_runs import KINDS, MAX_SHARD_BYTES, ORDER, QUICK, Whole, arguments, hashes, make_source, record, recorded_hashes, run_whole

FULL, SAMPLE = 200, 4
SEED = "mtpress kills 1"


def test_killed_runs_go_on(tmp_path: Path, server: ForkServer, soak: bool) -> None:
    case = make_source(tmp_path / "case")
    before = hashes(case.source)
    num = FULL if soak else SAMPLE
    kinds = dict.fromkeys(ORDER[:num])
    whole = {kind: run_whole(server, case, kind, tmp_path / kind, max_shard_bytes=MAX_SHARD_BYTES) for kind in kinds}
    assert all(sum(name.endswith(".safetensors") for name in made.hashes) > 3 for made in whole.values())
    killed, resumed_behind = Counter[str](), []
    for number in range(num):
        kind = ORDER[number % len(ORDER)]
        rng = random.Random(f"{SEED}/{number}")
        moments = [whole[kind].seconds * (number + rng.random()) / num]
        moments += [rng.uniform(0, whole[kind].seconds) for _ in range(rng.choice((0, 0, 1, 2)))]
        out = tmp_path / "out"
        said = f"run {number}, {kind}, killed after {', '.join(f'{moment:.3f}' for moment in moments)} of {whole[kind].seconds:.3f} s"
        command, first = arguments(case, kind, out), moments.pop(0)
        while (run := server.run(command, kill_after_s=first, max_shard_bytes=MAX_SHARD_BYTES)).code == 0:
            shutil.rmtree(out)  # it was quicker than the runs that were measured
            first *= 0.9
        for moment in [None, *moments]:
            if moment is not None:
                run = server.run([*command, "--resume"], kill_after_s=moment, max_shard_bytes=MAX_SHARD_BYTES)
            assert run.signal == 9 or (moment and run.code == 0), f"{said}\n{run.stderr}"
            killed[f"{kind}, {'killed' if moment is None else 'killed again' if run.signal else 'resumed before the second kill'}"] += 1
            assert hashes(case.source) == before, said
            if out.exists():  # the name is given last
                assert hashes(out).items() >= whole[kind].hashes.items(), said
                break
        command.append("--resume")
        run = server.run(command, max_shard_bytes=MAX_SHARD_BYTES)
        assert run.code == 0, f"{said}\n{run.stderr}"
        same(out, whole[kind], said)
        assert not out.with_name("out.partial").exists(), said
        resumed_behind.append(record(out).get("resumed", {}).get("steps_before", 0))
        shutil.rmtree(out)
    assert hashes(case.source) == before
    share = sum(steps > 0 for steps in resumed_behind) / num
    print(f"\n{num} runs, {dict(killed)}; {share:.0%} went on behind finished steps, the furthest behind {max(resumed_behind)}")
    for kind in kinds:
        print(f"undisturbed, {kind}: {whole[kind].seconds:.2f} s, {whole[kind].num_bytes / 1e6:.1f} MB")
    assert share >= (0.5 if soak else 0.25), "too few kills fell behind a finished step"
    assert sum(n for key, n in killed.items() if key.endswith("killed")) == num


def same(out: Path, whole: Whole, said: str) -> None:
    assert hashes(out) == whole.hashes, said
    assert recorded_hashes(out) == whole.sha256, said


@pytest.mark.parametrize("kind", KINDS)
def test_resume_without_anything_to_resume(kind: str, tmp_path: Path, server: ForkServer, soak: bool) -> None:
    """--resume simply starts where nothing was written, and is content where all is."""
    if kind not in QUICK and not soak:
        pytest.skip("make soak has the kinds that take long")
    case = make_source(tmp_path / "case")
    for _ in range(2):
        run = server.run([*arguments(case, kind, tmp_path / "out"), "--resume"])
        assert run.code == 0, run.stderr
    same(tmp_path / "out", run_whole(server, case, kind, tmp_path / "whole", times=1), kind)
