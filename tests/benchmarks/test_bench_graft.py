import json
from pathlib import Path

from bench_graft import bench


def test_a_small_run_says_what_a_large_one_does(tmp_path: Path) -> None:
    found = json.loads(json.dumps(bench(tmp_path, layers=4, width="tiny", rounds=1)))
    lost, wrong, alone = (found[case] for case in ("head lost", "wrong head among the body's tensors", "config.json alone"))
    assert (lost["new"], lost["rewritten"]) == (["model-mtp.safetensors"], []) and lost["bytes_linked"] > 0
    assert wrong["new"] == [] and len(wrong["rewritten"]) == 1 and wrong["bytes_written"] > lost["bytes_written"]
    assert alone["seconds"] and alone["peak_bytes"] > 0 and len(alone["bytes_read"]) == 1
    assert not (tmp_path / "out" / "model-mtp.safetensors").exists()
