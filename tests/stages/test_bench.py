import json
import resource
import shutil
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest

from bench_results import FAILURE, result
from mtpress.bench.benchmark import RUNS, Benchmark
from mtpress.bench.configurations import baseline_of, configurations_of
from mtpress.builtin import BUILTIN_MODEL
from mtpress.cli import main
from mtpress.engine.launch.installed import Engine
from mtpress.engine.launch.launch import ServeOptions
from mtpress.errors import EngineError, InputError
from mtpress.stages import bench as stage
from mtpress.stages.bench import bench

TINY = str(BUILTIN_MODEL)


class Model:
    """As much of a ServedModel as a configuration needs."""

    def __init__(self, path: str, num_mtp_layers: int = 1) -> None:
        self.path, self.name, self.num_mtp_layers = Path(path), Path(path).name, num_mtp_layers


def labels(models: list[Any], mtp: tuple[int, ...] = (0, 2)) -> list[str]:
    return [configuration.label for configuration in configurations_of(models, mtp)]


def test_configurations_are_every_checkpoint_with_every_number_of_drafts() -> None:
    assert labels([Model("/a/one")]) == ["MTP off", "MTP n=2"]
    assert labels([Model("/a/one"), Model("/b/two")]) == ["one, MTP off", "one, MTP n=2", "two, MTP off", "two, MTP n=2"]
    assert labels([Model("/a/one"), Model("/b/one")], (0,)) == ["a/one, MTP off", "b/one, MTP off"]
    assert labels([Model("/a/one"), Model("/b/plain", 0)]) == ["one, MTP off", "one, MTP n=2", "plain, MTP off"]


def test_a_checkpoint_without_a_draft_head_needs_mtp_off() -> None:
    with pytest.raises(InputError, match="only be measured with MTP off; add off"):
        labels([Model("/a/plain", 0)], (1, 2))


def test_the_same_checkpoint_twice_is_a_mistake() -> None:
    with pytest.raises(InputError, match="a/one is named twice"):
        labels([Model("/a/one"), Model("/a/one")])


def test_baseline_by_label_or_number() -> None:
    configurations = result().configurations
    assert [baseline_of(named, configurations) for named in (None, "TINY, mtp n=2", "1", "2")] == [0, 1, 0, 1]
    with pytest.raises(InputError, match="--baseline 3: is none of 1 tiny, MTP off; 2 tiny, MTP n=2"):
        baseline_of("3", configurations)


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that is found but must not be started."""
    monkeypatch.setattr(
        "mtpress.engine.launch.installed.find_engine", lambda where=None: Engine(Path("python"), ("vllm",), "0.32.0", "cpu")
    )

    def refuse(self: Benchmark) -> None:
        raise AssertionError("something was started")

    monkeypatch.setattr(Benchmark, "run", refuse)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name checkpoints to start, or servers"),
        ([TINY, "--url", "http://127.0.0.1:1"], "and not both"),
        ([TINY, "--baseline", "best"], "--baseline best: is none of 1 MTP off"),
        ([TINY, "--prompts", "random"], "--prompts random with MTP on: random tokens have no next token"),
        ([TINY, "--lengths", "3900"], "3900 more do not fit a context of 4096"),
        (["/nowhere"], "/nowhere"),
        (["--url", "http://127.0.0.1:1", "--max-model-len", "9"], "leave out the options of serving"),
        (["--url", "http://127.0.0.1:1"], "nothing answers at http://127.0.0.1:1"),
        ([TINY, "--out", "{here}"], "exists; name a new directory"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(
    no_engine: None, capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], said: str
) -> None:
    assert main(["bench", *(argument.format(here=tmp_path) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--mtp", "off,many"], "'off,many' is no list like off,1,2,3"),
        (["--mtp", "99"], "'99' is no list like off,1,2,3"),
        (["--lengths", "50,0"], "'50,0' is no list of positive numbers"),
        (["--streams", ""], "is no list of positive numbers"),
        (["--rounds", "0"], "'0' is no positive number"),
        (["--temperature", "hot"], "'hot' is no temperature"),
    ],
)
def test_mistyped_options_are_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["bench", TINY, *arguments])
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1


def test_without_matplotlib_nothing_starts(
    no_engine: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["bench", TINY, "--out", str(tmp_path / "out")]) == 2
    assert "--no-plot" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def pretended(monkeypatch: pytest.MonkeyPatch, outcome: Any) -> dict[str, Any]:
    """bench() that hands back a result, or raises; gives what it was called with."""
    called: dict[str, Any] = {}

    def instead(checkpoints: Any, *, logs: Path | None = None, **options: Any) -> Any:
        called.update(options, checkpoints=checkpoints)
        if logs is not None:
            (logs / "1-1.engine.log").write_text("…")
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    monkeypatch.setattr(stage, "bench", instead)
    return called


def test_the_directory_holds_data_tables_pictures_and_logs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    called = pretended(monkeypatch, result())
    out = tmp_path / "out"
    assert main(["bench", TINY, "--out", str(out), "--mtp", "off,2", "--", "--max-num-batched-tokens", "512"]) == 0
    assert {path.name for path in out.iterdir()} == {"bench.json", "bench.md", "bench.svg", "bench.png", "logs"}
    assert list(tmp_path.iterdir()) == [out]
    assert capsys.readouterr().out.splitlines()[-4:] == [str(out / f"bench.{kind}") for kind in ("json", "md", "svg", "png")]
    assert called["checkpoints"] == [TINY]
    assert called["mtp"] == (0, 2)
    assert called["serve"].extra == ("--max-num-batched-tokens", "512")
    assert json.loads((out / "bench.json").read_text())["baseline"] == 0


def test_json_is_all_that_json_prints(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pretended(monkeypatch, result())
    assert main(["bench", TINY, "--json", "--no-plot", "--out", str(tmp_path / "out")]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["written"] == [str(tmp_path / "out/bench.json"), str(tmp_path / "out/bench.md")]
    assert "bench.png" not in (tmp_path / "out/bench.md").read_text()


def test_a_failed_configuration_is_exit_code_1_and_the_rest_is_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pretended(monkeypatch, result(failures=(FAILURE,)))
    assert main(["bench", TINY, "--no-plot", "--out", str(tmp_path / "out")]) == 1
    assert "tiny, MTP n=2, round 1: the engine died" in capsys.readouterr().out
    assert (tmp_path / "out/bench.json").is_file()


def test_ctrl_c_leaves_no_directory(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pretended(monkeypatch, KeyboardInterrupt())
    assert main(["bench", TINY, "--no-plot", "--out", str(tmp_path / "out")]) == 130
    assert list(tmp_path.iterdir()) == []


def test_where_nothing_came_up_the_logs_stay_until_the_next_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretended(monkeypatch, EngineError("nothing was measured"))
    out = tmp_path / "out"
    assert main(["bench", TINY, "--no-plot", "--out", str(out)]) == 2
    assert (tmp_path / "out.partial/logs/1-1.engine.log").is_file()
    assert not out.exists()
    pretended(monkeypatch, result())
    assert main(["bench", TINY, "--no-plot", "--out", str(out)]) == 0
    assert list(tmp_path.iterdir()) == [out]


def test_a_partial_directory_of_another_kind_is_not_touched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretended(monkeypatch, result())
    (tmp_path / "out.partial/logs").mkdir(parents=True)
    (tmp_path / "out.partial/thesis.md").write_text("mine")
    assert main(["bench", TINY, "--no-plot", "--out", str(tmp_path / "out")]) == 2
    assert (tmp_path / "out.partial/thesis.md").read_text() == "mine"


def test_called_from_python_it_gives_what_the_rounds_found(no_engine: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = result()

    def run(self: Benchmark) -> None:
        self.runs.extend(made.runs)
        assert self.folder == tmp_path

    monkeypatch.setattr(Benchmark, "run", run)
    found = bench([TINY], mtp=(0, 2), lengths=(50, 350), streams=(1, 2), baseline="2", logs=tmp_path, engine="anything")
    assert found.summaries[0][found.cells[0]].ratios["tokens_per_second"].median == 0.5
    assert found.checkpoints[0]["name"] == "mtpress-tiny"
    assert found.checkpoints[0]["weight_bytes"] > 1e6
    assert found.prompts["num_prompts"] == 45
    assert found.complete


def test_a_key_among_the_engine_arguments_reaches_the_client(no_engine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = []
    monkeypatch.setattr(Benchmark, "run", lambda self: keys.append(self.plan.api_key))
    bench([TINY], mtp=(0,), lengths=(50,), streams=(1,), serve=ServeOptions(extra=("--api-key", "secret")))
    assert keys == ["secret"]


class Running(BaseHTTPRequestHandler):
    """As much of a server as is asked before a benchmark of it. A prompt and answer of more than `context` characters do not fit."""

    context = 2000
    metrics = (
        "vllm:spec_decode_num_drafts_total 0\nvllm:spec_decode_num_draft_tokens_total 0\nvllm:spec_decode_num_accepted_tokens_total 0\n"
    )
    positions = 'vllm:spec_decode_num_accepted_tokens_per_pos_total{{position="{}"}} 0\n'

    def do_GET(self) -> None:
        if self.path == "/metrics":
            self._answer(200, self.metrics + "".join(self.positions.format(at) for at in range(3)))
        else:
            self._answer(200, json.dumps({"data": [{"id": "first"}, {"id": "second"}]}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if len(body["messages"][0]["content"]) + body["max_completion_tokens"] > self.context:
            self._answer(400, json.dumps({"error": {"message": "it is too long"}}))
        else:
            self._answer(200, 'data: {"choices": []}\n\ndata: [DONE]\n\n')

    def _answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Running) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_running_server_is_asked_what_it_serves(no_engine: None, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setattr(Benchmark, "run", lambda self: None)
    found = bench(urls=[url], lengths=(50,), streams=(1,))
    (configuration,) = found.configurations
    assert (configuration.label, configuration.mtp, configuration.url) == ("first", "n=3", url)
    assert bench(urls=[url], model="second", lengths=(50,)).configurations[0].build == "second"
    with pytest.raises(InputError, match="does not serve third; it has first, second"):
        bench(urls=[url], model="third")


def test_a_running_server_is_asked_the_longest_prompt_first(no_engine: None, url: str) -> None:
    with pytest.raises(InputError, match=r"the longest prompt with 1990 tokens to follow: .*it is too long"):
        bench(urls=[url], lengths=(50, 1990))


def test_random_tokens_are_not_for_a_running_server(no_engine: None, url: str) -> None:
    with pytest.raises(InputError, match="not for --url"):
        bench(urls=[url], prompts="random")


def test_a_stray_file_in_the_checkpoint_costs_no_measurement(no_engine: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stray = tmp_path / "stray"
    shutil.copytree(TINY, stray)
    (stray / "a.safetensors").mkdir()
    (stray / "b.safetensors").symlink_to("nowhere")
    (stray / "c.safetensors").write_bytes(b"\xff" * 100)
    monkeypatch.setattr(Benchmark, "run", lambda self: self.runs.extend(result().runs))
    assert bench([stray], mtp=(0, 2), lengths=(50, 350), streams=(1, 2)).runs == result().runs


def test_a_full_disk_costs_no_measurement(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """No file may grow beyond 1000 bytes, as on a disk with so much room."""
    pretended(monkeypatch, result())
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, old[1]))
    try:
        assert main(["bench", TINY, "--no-plot", "--out", str(tmp_path / "out")]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    said = capsys.readouterr()
    assert json.loads(said.out) == json.loads(json.dumps(result().without_paths({}).as_json()))
    assert "what was measured is printed above" in said.err and len(said.err.splitlines()) == 1


def test_an_output_that_appears_meanwhile_costs_no_measurement(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    write = stage.write_report
    pretended(monkeypatch, result())
    monkeypatch.setattr(stage, "write_report", lambda *given, **how: ((out / "mine").mkdir(parents=True), write(*given, **how))[1])
    assert main(["bench", TINY, "--no-plot", "--out", str(out)]) == 2
    kept = tmp_path / "out.partial/bench.json"
    assert f"what was measured is in {kept}" in capsys.readouterr().err
    assert len(json.loads(kept.read_text())["runs"]) == len(result().runs)
    shutil.rmtree(out)
    assert main(["bench", TINY, "--no-plot", "--out", str(out)]) == 2
    assert "holds what an earlier run measured" in capsys.readouterr().err
    assert kept.exists()


@pytest.mark.parametrize("end", [KeyboardInterrupt, EngineError])
def test_what_was_measured_before_the_end_is_kept(
    end: type[BaseException], no_engine: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def measured(self: Benchmark) -> None:
        self.dataset = self.folder / "prompts.jsonl"
        client = SimpleNamespace(measure=lambda *_, **__: result().runs[0])
        self._measure(client, "http://h", "m", 0, 0, self.plan.cells[0])  # type: ignore[arg-type]
        raise end("the client died" if end is EngineError else "")

    monkeypatch.setattr(Benchmark, "run", measured)
    assert main(["bench", TINY, "--no-plot", "--mtp", "off", "--out", str(tmp_path / "out")]) in (2, 130)
    kept = tmp_path / "out.partial/logs" / RUNS
    assert f"what was measured is in {kept}" in capsys.readouterr().err
    assert json.loads(kept.read_text())["label"] == "MTP off"
    assert main(["bench", TINY, "--no-plot", "--mtp", "off"]) in (2, 130)
    elsewhere = Path(capsys.readouterr().err.split("what was measured is in ")[1].strip())
    assert json.loads(elsewhere.read_text())["label"] == "MTP off"
    shutil.rmtree(elsewhere.parent)


def test_a_name_that_is_no_formula_is_drawn(tmp_path: Path) -> None:
    odd = result(builds=("$\\frac{$ [/x]",))
    assert "bench.png" in stage.write_report(odd, tmp_path)
