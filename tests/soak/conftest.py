"""The soak tests: full counts with MTPRESS_SOAK=1 (`make soak`), a short sample otherwise."""

import os
from collections.abc import Iterator

import pytest
from fork_server import ForkServer


@pytest.fixture(scope="session")
def soak() -> bool:
    return os.environ.get("MTPRESS_SOAK") == "1"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    with ForkServer(tmp_path_factory.mktemp("logs")) as running:
        yield running
