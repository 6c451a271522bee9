"""The peers' own pythons and what they make of mtpress-tiny, each made when a test first asks for it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from real_exports import EXPORTS, peer_python, real_export


@pytest.fixture(scope="session")
def modelopt_python() -> Path:
    """The python of .envs/modelopt."""
    return peer_python("modelopt")


@pytest.fixture(scope="session")
def autoround_python() -> Path:
    """The python of .envs/autoround."""
    return peer_python("autoround")


@pytest.fixture(scope="session")
def llmcompressor_python() -> Path:
    """The python of .envs/llmcompressor."""
    return peer_python("llmcompressor")


@pytest.fixture(scope="session")
def export() -> Callable[[str], Path]:
    """export(name): that checkpoint of real_exports.EXPORTS, kept under build/."""
    return real_export


@pytest.fixture(scope="session", params=list(EXPORTS))
def each_export(request: pytest.FixtureRequest) -> tuple[str, Path]:
    """Name and directory, export by export."""
    return request.param, real_export(request.param)
