"""Runs over a Ray cluster of this machine: the bytes of one process, and what Ray says as one line."""

import json
import socket
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from test_worker_pool import CALIBRATED, COMMAND, WEIGHT_ONLY, build, hashes, record, write_other_model

from mtpress.builtin import BUILTIN_MODEL
from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.checkpoint.writer import CheckpointWriter
from mtpress.cli import main, run_stage
from mtpress.errors import InputError, ResourceError
from mtpress.plan.plan import make_plan
from mtpress.quantization import worker_pool as workers
from mtpress.quantization.worker_pool import RayWorker, WorkerPool, connect, ray_resources

ray = pytest.importorskip("ray")
CPU = torch.device("cpu")


def test_actors_write_the_bytes_of_one_process(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out, before = tmp_path / "out", psutil.Process().children()
    code = main([*COMMAND, str(out), "--calibration", "builtin", "--workers", "2", "--ray", "local", "--json"])
    printed = capfd.readouterr()
    assert code == 0, printed.err
    assert json.loads(printed.out)["out"] == str(out)  # and nothing of Ray's
    assert printed.err == ""
    assert not ray.is_initialized()
    assert psutil.Process().children() == before
    assert hashes(out) == hashes(build(tmp_path / "one", CALIBRATED, 1))
    assert record(out)["workers"]["count"] == 2 and record(out)["workers"]["ray"]
    assert record(out)["source"] == record(tmp_path / "one")["source"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    assert connect("local")
    yield
    ray.shutdown()


def test_a_cluster_that_this_process_has_joined_is_left_running(cluster: None, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main([*COMMAND, str(out), "--weight-only", "0.01", "--workers", "1", "--ray", "local", "--json"]) == 0
    assert ray.is_initialized()
    assert hashes(out) == hashes(build(tmp_path / "one", WEIGHT_ONLY, 1))
    assert record(out)["workers"]["ray"]


def test_what_an_actor_refuses_is_one_line(cluster: None, tmp_path: Path) -> None:
    other = write_other_model(tmp_path / "other")
    plan = make_plan(Checkpoint.open(BUILTIN_MODEL), WEIGHT_ONLY)
    with (
        CheckpointWriter(tmp_path / "out", plan.shards, {}) as writer,
        pytest.raises(InputError) as caught,
        closing(WorkerPool(plan, writer, other, CPU, 1, "local")),
    ):
        pytest.fail("an actor of another checkpoint")
    assert type(caught.value) is InputError
    assert str(caught.value) == f"{other}: is not the same checkpoint on every worker; put it where all of them see it"


def test_an_actor_that_dies_is_one_line(cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = RayWorker.call

    def call(self: RayWorker, method: str, *arguments: Any) -> None:
        if method == "write_shard":
            ray.kill(self.actor)
        original(self, method, *arguments)

    monkeypatch.setattr(RayWorker, "call", call)
    with pytest.raises(ResourceError, match=r"a Ray worker died \(.*\); is there memory for as many\?") as caught:
        run_stage([*COMMAND, str(tmp_path / "out"), "--weight-only", "0.01", "--ray", "local", "--json"])
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("machines", "count", "device", "share"),
    [
        ([{"CPU": 8.0}], 2, "cpu", {"num_cpus": 4.0}),
        ([{"CPU": 8.0}, {"CPU": 3.0}], 2, "cpu", {"num_cpus": 1.0}),
        ([{"CPU": 2.0}], 3, "cpu", {"num_cpus": 0.6666}),  # thrice 0.6667, as Ray would round it, is more than there is
        ([{"memory": 1.0}, {"CPU": 4.0}], 4, "cpu", {"num_cpus": 1.0}),  # a head that takes no work
        ([{"CPU": 16.0, "GPU": 1.0}, {"CPU": 16.0, "GPU": 1.0}], 2, "cuda", {"num_cpus": 8.0, "num_gpus": 1.0}),
        ([{"CPU": 16.0, "GPU": 1.0}, {"CPU": 16.0, "GPU": 1.0}], 3, "cuda", {"num_cpus": 5.0, "num_gpus": 0.5}),
        ([{"CPU": 16.0, "GPU": 8.0}], 1, "cuda", {"num_cpus": 16.0, "num_gpus": 1.0}),
    ],
)
def test_all_actors_have_room_at_once(
    machines: list[dict[str, float]], count: int, device: str, share: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [{"Alive": True, "Resources": machine} for machine in machines] + [{"Alive": False, "Resources": {"CPU": 0.1}}]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    assert ray_resources(count, torch.device(device)) == share


def test_a_cluster_without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 8.0}}])
    with pytest.raises(ResourceError, match="--ray: no machine of the cluster has a GPU that Ray knows of; use --device cpu"):
        ray_resources(2, torch.device("cuda"))


def test_without_ray_the_command_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main([*COMMAND, str(tmp_path / "out"), "--weight-only", "0.01", "--ray", "local"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "mtpress quantize: --ray: Ray is not installed; `pip install mtpress[ray]`, or use --workers alone on this machine"
    assert list(tmp_path.iterdir()) == []


def test_no_cluster_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(**options: Any) -> None:
        raise ConnectionError(f"Could not find any running Ray instance ({options['address']}).\nMore lines.")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", nobody)
    with pytest.raises(ResourceError) as caught:
        connect("auto")
    assert str(caught.value) == (
        "--ray auto: no cluster there (Could not find any running Ray instance (auto).); "
        "start one with `ray start --head`, or use --ray local"
    )


def test_an_address_where_nobody_answers_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(workers, "RAY_SECONDS", 3.0)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        dead = f"127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(ResourceError, match=r"no cluster there \(Connection refused\); start one"):
            connect(dead)
        closed.listen()  # takes the call, and never says a word
        for address in (dead, f"ray://{dead}"):
            with pytest.raises(ResourceError, match=r"no cluster there \((no answer in 3 s|what answers is no Ray .*)\); start one"):
                connect(address)
