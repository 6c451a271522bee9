import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mtpress.cli import main
from mtpress.engine.launch import profiles
from mtpress.engine.launch.installed import Engine
from mtpress.engine.memory.hardware import Hardware
from mtpress.engine.server import server
from mtpress.engine.server.metrics import SpecDecode
from mtpress.engine.trial import first_words
from mtpress.engine.trial.first_words import FirstWords
from mtpress.errors import EngineError
from mtpress.stages.serve import NEWEST_READ

ROOT = Path(__file__).parents[2]
TINY = ROOT / "src/mtpress/builtin/mtpress-tiny"
KEY = "do-not-show-me"
CPU = Engine(Path("python"), ("/env/bin/vllm",), "0.32.0+cpu", "cpu")
HERE = Hardware((), 24 << 30, 20 << 30, 2)


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine with a CPU build of vLLM, no GPU, and nothing set."""
    monkeypatch.setattr("mtpress.engine.launch.installed.find_engine", lambda where=None: CPU)
    monkeypatch.setattr("mtpress.engine.memory.hardware.read_hardware", lambda: HERE)
    for name in ("MTPRESS_API_KEY", "VLLM_API_KEY", "VLLM_CPU_KVCACHE_SPACE", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "VLLM_NO_USAGE_STATS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def dry_run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["serve", str(TINY), "--dry-run", *arguments])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def document(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    code, out, _ = dry_run(capsys, "--json", *arguments)
    assert code == 0
    return dict(json.loads(out))


def test_a_dry_run_prints_the_command_and_a_reason_for_each_setting(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = dry_run(capsys)
    assert (code, err) == (0, "")
    command, _, rest = out.partition("\n\n")
    assert command.splitlines()[1] == f"/env/bin/vllm serve {TINY} \\"
    passed = [line.split()[0] for line in command.splitlines()[2:]]
    why = rest.partition("\nwhy\n")[2].partition("\n\n")[0].splitlines()
    assert len(passed) > 8
    for flag in passed:
        assert sum(line.startswith((f"  {flag}:", f"  {flag} ")) for line in why) == 1
    assert all(line.endswith(")") for line in why)
    for title in ("\nleft out\n", "\nmemory\n", "profile cpu: no GPU, 2 cores", "engine: vLLM 0.32.0+cpu for the CPU", "room for"):
        assert title in rest


def test_the_command_can_be_run_by_a_shell(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    _, out, _ = dry_run(capsys, "--", "--max-model-len=128")
    found = document(capsys, "--", "--max-model-len=128")
    recorder = tmp_path / "vllm"
    recorder.write_text(f"#!{sys.executable}\nimport json, os, sys\nprint(json.dumps([sys.argv[1:], os.environ['HF_HUB_OFFLINE']]))\n")
    recorder.chmod(0o755)
    script = out.partition("\n\n")[0].replace("/env/bin/vllm", str(recorder))
    ran = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout) == [found["command"][1:], "1"]


def test_json_holds_the_whole_launch(capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "--port", "8001", "--mtp", "2")
    assert found["command"][:3] == ["/env/bin/vllm", "serve", str(TINY)]
    assert found["environment"]["VLLM_CPU_KVCACHE_SPACE"] == "4"
    assert found["engine"] == {"command": ["/env/bin/vllm"], "version": "0.32.0+cpu", "platform": "cpu"}
    assert (found["url"], found["num_speculative_tokens"], found["profile"], found["served"]) == ("http://127.0.0.1:8001", 2, "cpu", False)
    assert {"flag": "--max-num-seqs", "value": "8", "reason": "more share the same cores", "source": "profile cpu"} in found["settings"]
    assert found["estimate"]["problem"] is None
    assert found["estimate"]["num_tokens"] > 0


@pytest.mark.parametrize("before", [[], ["--port", "8001"], ["--mtp", "1", "--force"]])
def test_everything_behind_the_dashes_goes_to_the_engine(before: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    extra = ["--port", "9001", "--enable-log-requests", "--max_num_seqs=3", "--seed", "-1"]
    found = document(capsys, *before, "--", *extra)
    assert found["command"][-len(extra) :] == extra
    assert found["url"].endswith(":9001")
    assert "--max-num-seqs" not in found["command"]


def test_the_dashes_may_stand_before_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert document(capsys, "--")["command"] == document(capsys)["command"]


@pytest.mark.parametrize("asked", [["--api-key", KEY], ["--", "--api-key", KEY], "MTPRESS_API_KEY", "VLLM_API_KEY"])
def test_the_key_is_never_printed(asked: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if isinstance(asked, str):
        monkeypatch.setenv(asked, KEY)
        asked = []
    found = document(capsys, *asked)
    assert found["api_key"] is True
    assert KEY not in json.dumps(found)
    _, out, err = dry_run(capsys, *asked)
    assert KEY not in out + err


def test_a_profile_for_other_hardware_is_shown_on_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "--profile", "gb10")
    assert found["engine"]["platform"] == "cuda"
    assert found["chosen_by"] == "--profile, on NVIDIA GB10 (12.1, 119.7 GiB, shared with the host)"
    assert "built for CUDA, this one is built for the CPU" in found["assumed"][0]
    assert "--linear-backend" in found["command"]
    assert found["min_available_bytes"] == 6 << 30
    assert document(capsys, "--profile", "gb10", "--min-available-gb", "2.5")["min_available_bytes"] == 2_500_000_000
    assert "assumed: NVIDIA GB10" in dry_run(capsys, "--profile", "gb10")[1]
    assert main(["serve", str(TINY), "--profile", "gb10"]) == 2
    assert "not for this machine" in capsys.readouterr().err
    assert document(capsys)["assumed"] == []


@pytest.fixture
def nothing_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without an engine and without a GPU."""
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("mtpress.engine.memory.hardware.read_hardware", lambda: HERE)


def test_a_dry_run_needs_no_engine(nothing_here: None, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = document(capsys, "--profile", "rtx-5090")
    assert found["engine"] == {"command": ["vllm"], "version": NEWEST_READ["cuda"], "platform": "cuda"}
    assert any("no vLLM" in line for line in found["assumed"])
    assert main(["serve", str(TINY)]) == 2
    assert "make engine" in capsys.readouterr().err
    assert dry_run(capsys, "--engine", str(tmp_path / "gone"))[0] == 2
    assert document(capsys, "--profile", "cpu")["engine"] == {"command": ["vllm"], "version": NEWEST_READ["cpu"], "platform": "cpu"}


def test_where_nothing_chooses_a_profile_a_dry_run_asks_for_one(
    nothing_here: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def asks(version: str) -> None:
        code, out, err = dry_run(capsys)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert "CUDA build" not in err
        assert f"--profile NAME shows the command of one for vLLM {version}: {', '.join(profiles.profiles())}" in err

    asks(NEWEST_READ["cuda"])
    installed = Engine(Path("python"), ("/env/bin/vllm",), "0.31.0", "cuda")
    monkeypatch.setattr("mtpress.engine.launch.installed.find_engine", lambda where=None: installed)
    asks("0.31.0")
    assert main(["serve", str(TINY)]) == 2  # to be served, it needs a GPU
    assert "no NVIDIA GPU is visible" in capsys.readouterr().err


def test_a_refused_launch_is_printed_and_then_refused(capsys: pytest.CaptureFixture[str]) -> None:
    refused = ["--profile", "rtx-5090", "--kv-cache-dtype", "turboquant_k8v4"]
    code, out, err = dry_run(capsys, *refused)
    assert code == 2
    assert "turboquant_k8v4" in out
    assert err.startswith("mtpress serve: a TurboQuant KV cache")
    assert err.count("\n") == 1
    code, out, err = dry_run(capsys, *refused, "--force")
    assert (code, err) == (0, "")
    assert "\nwarnings\n  a TurboQuant KV cache" in out
    code, out, _ = dry_run(capsys, *refused, "--json")
    assert (code, set(json.loads(out))) == (2, {"error", "exit_code"})


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--port", "70000"], "70000"),
        (["--mtp", "-1"], "-1"),
        (["--mtp", "many"], "many"),
        (["--max-model-len", "0"], "0"),
        (["--min-available-gb", "nan"], "nan"),
        (["--start-timeout", "soon"], "soon"),
        (["--trust-remote-code"], "--trust-remote-code"),
    ],
)
def test_a_wrong_call_is_one_line(arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["serve", str(TINY), *arguments])
    assert left.value.code == 2
    shown = capsys.readouterr().err
    assert word in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--profile", "gb1"], ["--", "word"], ["--", "--uds", "x"], ["--", "--port", "x"]])
def test_what_cannot_be_is_one_line_too(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(TINY), *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_no_checkpoint_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["serve", str(tmp_path), "--dry-run"]) == 2
    assert "config.json" in capsys.readouterr().err


class FakeServer:
    """Stands for server.Server: remembers what it was given, and ends as it is told to."""

    ends_by: BaseException = EngineError("it died")
    given: dict[str, Any]

    def __init__(self, launch: Any, log: Path, **limits: Any) -> None:
        type(self).given = {"launch": launch, "log": log, **limits}
        self.client = self

    def __enter__(self) -> "FakeServer":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def wait(self) -> None:
        raise self.ends_by


@pytest.mark.parametrize(
    ("ends_by", "code", "said"),
    [
        (EngineError("the engine died: no room"), 2, "the engine died: no room"),
        (KeyboardInterrupt("the engine is stopped"), 130, "the engine is stopped"),
    ],
)
def test_it_serves_until_it_ends(
    ends_by: BaseException, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(server, "Server", FakeServer)
    monkeypatch.setattr(FakeServer, "ends_by", ends_by)
    said_first = FirstWords("Once\nupon.", 3, 0.5, 20.0, SpecDecode(1, 1, 0, (0,)), ("none of 1 drafted tokens was accepted",))
    monkeypatch.setattr(first_words, "first_words", lambda client, drafts: said_first)
    assert main(["serve", str(TINY), "--port", "8123", "--start-timeout", "5", "--api-key", KEY]) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert said in shown.err.splitlines()[-1]
    assert "serving mtpress-tiny at http://127.0.0.1:8123/v1" in shown.err
    assert 'it says "Once upon.", 3 tokens, 20.0 tokens/s' in shown.err
    assert "warning: none of 1 drafted tokens was accepted" in shown.err
    assert "profile cpu" in shown.err
    assert KEY not in shown.err
    given = FakeServer.given
    assert given["log"] == Path("mtpress-serve-8123.log")
    assert (given["start_timeout_seconds"], given["min_available_bytes"]) == (5, 1 << 30)
    assert given["launch"].environment["VLLM_API_KEY"] == KEY


def test_serving_imports_no_torch() -> None:
    call = f"main(['serve', {str(TINY)!r}, '--dry-run', '--json'])"
    seen = "print({'torch', 'transformers', 'vllm'} & set(sys.modules), file=sys.stderr)"
    code = f"import sys\nfrom mtpress.cli import main\n{call}\n{seen}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={**os.environ, "MTPRESS_API_KEY": KEY}
    )
    assert done.stderr.strip().splitlines()[-1] == "set()"
    assert KEY not in done.stdout
