"""mtpress as a process of its own around a server, for tests that kill it: `under_mtpress.py LOG LAUNCH.json GRACE_SECONDS`.

Says "up" when the engine answers. What main() of cli.py does with signals and errors is done here by its own code.
"""

import json
import signal
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from mtpress import cli
from mtpress.engine.launch.launch import Launch
from mtpress.engine.server.server import Server


def run_stage(arguments: list[str]) -> tuple[int, dict[str, Any]]:
    launch = Launch(**json.loads(Path(arguments[1]).read_text(encoding="utf-8")))
    with Server(launch, Path(arguments[0]), grace_seconds=float(arguments[2])) as server:
        print("up", flush=True)
        server.wait()
    return 0, {}


# a shell that runs the tests in the background has the one ignored, nohup the other
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
with mock.patch.object(cli, "run_stage", run_stage):
    sys.exit(cli.main(sys.argv[1:]))
