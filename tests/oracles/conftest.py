"""The peers' own pythons, each environment made when a test first asks for it; their exports are real_exports.py's."""

from pathlib import Path

import pytest

from real_exports import peer_python


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
def templates_python() -> Path:
    """The python of .envs/templates."""
    return peer_python("templates")
