"""The far side of a DriverProcess: another environment's library, imported once and asked many times.

It runs under that environment's python, by path, with DRIVER set to the path of a file that has `load()`; nothing but the standard
library and what that file imports. `load()` gives what is ready and the function that answers: request, say → result. `say` sends news
before the result.

In: JSON lines on stdin, a request each. Out: JSON lines on stdout: one {"ready": …} or {"unusable": reason} first, then for each
request any number of {"news": …} and one {"result": …} or {"error": reason}. Everything else that the library prints, in this process or
a child, goes to stderr.
"""

import json
import os
import runpy
import sys
import traceback
from typing import Any, TextIO

MAX_CHARS = 600


def main(driver: str) -> None:
    out = own_stdout()

    def say(document: dict[str, Any]) -> None:
        out.write(json.dumps(document) + "\n")
        out.flush()

    try:
        ready, answer = runpy.run_path(driver)["load"]()
    except ImportError as error:
        say({"unusable": " ".join(str(error).split())[:MAX_CHARS]})
        return
    say({"ready": ready})
    for line in sys.stdin:
        try:
            say({"result": answer(json.loads(line), lambda news: say({"news": news}))})
        except SystemExit:  # an argument parser's; what it says is on stderr
            say({"error": "it does not take the arguments it was given"})
        except Exception as error:  # one request's failure is the caller's to judge
            traceback.print_exc()
            say({"error": " ".join(f"{type(error).__name__}: {error}".split())[-MAX_CHARS:]})


def own_stdout() -> TextIO:
    """The real stdout for answers alone."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


if __name__ == "__main__":
    main(DRIVER)  # type: ignore[name-defined]  # noqa: F821  # set by whoever runs this file
