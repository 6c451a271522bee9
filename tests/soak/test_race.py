"""Three processes write to one OUT at the same moment: one makes it, the others are refused, and it is whole.

`make soak` runs 2,000 rounds, the ordinary suite a few dozen. Some of the runs give up once they are in, so that one cleans up
while the others come.
"""

import os
import subprocess
import sys
from pathlib import Path

FULL, SAMPLE = 2000, 40
NUM_PROCESSES = 3
ROUNDS = """
import os, random, shutil, signal, sys, time
from pathlib import Path
from mtpress.checkpoint.checkpoint import Checkpoint, read_shard
from mtpress.checkpoint.writer import CheckpointWriter
from mtpress.errors import MtpressError

place, shard, rounds, count = Path(sys.argv[1]), read_shard(Path(sys.argv[2])), int(sys.argv[3]), int(sys.argv[4])

def run(out, at, gives_up):
    while time.time() < at:
        pass
    try:
        with CheckpointWriter(out, {}, {}, linked=[shard]) as writer:
            if gives_up:
                raise KeyError
            writer.wait()
            writer.write_file("config.json", b"{}")
            writer.finish()
    except MtpressError as error:
        return 2 if "\\n" not in str(error) else 3
    except KeyError:
        return 4
    return 0

for number in range(rounds):
    rng = random.Random(f"race {number}")
    out, at = place / str(number), time.time() + 0.01
    giving_up = [rng.random() < 0.3 for _ in range(count)]
    children = []
    for gives_up in giving_up:
        child = os.fork()
        if not child:
            code = 9
            try:
                code = run(out, at + rng.random() * 0.002, gives_up)
            finally:
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(*sorted(codes), sorted(path.name for path in place.iterdir()), sorted(p.name for p in out.iterdir()) if out.exists() else "")
    shutil.rmtree(out, ignore_errors=True)
"""


def test_one_of_three_makes_it(tmp_path: Path, soak: bool) -> None:
    from checkpoints import write_small

    shard = next(iter(sorted(write_small(tmp_path / "source").glob("*.safetensors"))))
    (tmp_path / "place").mkdir()
    rounds = FULL if soak else SAMPLE
    command = [sys.executable, "-c", ROUNDS, str(tmp_path / "place"), str(shard), str(rounds), str(NUM_PROCESSES)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and not done.stderr, done.stderr
    lines = done.stdout.splitlines()
    made = 0
    for number, line in enumerate(lines):
        codes = [int(code) for code in line.split(" [")[0].split()]
        assert set(codes) <= {0, 2, 4}, line
        assert codes.count(0) <= 1, line
        if 0 in codes:
            made += 1
            files = ["config.json", shard.name, "model.safetensors.index.json"]
            assert line.endswith(f"['{number}'] {sorted(files)}"), line
        else:
            assert 4 in codes and line.endswith(" [] "), line
    assert len(lines) == rounds and made > rounds // 3
    print(f"\n{rounds} rounds of {NUM_PROCESSES}: {made} outputs, all whole")
