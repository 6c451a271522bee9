"""A stand-in for `vllm serve` that dies in every way: `fake_engine.py PORT WORD…`, standard library only.

print=FILE  writes that file to stderr, as a log          exit=N      ends with code N before it answers anything
late=S      answers /health only after S seconds          kill        kills itself with SIGKILL before it answers anything
falls=S     killed S seconds after its first answer          child       starts a child that leaves the session and ignores SIGTERM
stubborn    ignores SIGTERM                               orphan      starts a child that outlives it, then ends with code 3
sibling     starts a child of its own group that says when it is asked to end, and ends half a second after it is asked itself
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

CHILD = "import os, signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('child up', flush=True); time.sleep(600)"

SIBLING = """
import os, signal, sys, time

def end(number, frame):
    print("asked to end", file=sys.stderr, flush=True)
    sys.exit()

signal.signal(signal.SIGTERM, end)
print("child up", flush=True)
time.sleep(600)
"""


class Handler(BaseHTTPRequestHandler):
    falls: float | None = None

    def do_GET(self) -> None:
        if Handler.falls is not None:
            threading.Timer(Handler.falls, os.kill, (os.getpid(), signal.SIGKILL)).start()
            Handler.falls = None
        self.answer(200, {"data": [{"id": "tiny"}]})

    def do_POST(self) -> None:
        time.sleep(600)  # it is asked, and dies meanwhile

    def answer(self, status: int, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class Listener(ThreadingHTTPServer):
    daemon_threads = True


def main(port: int, words: list[str]) -> int:
    values = dict(word.split("=", 1) for word in words if "=" in word)
    print("(APIServer pid=1) INFO 11-21 09:50:48 [model.py:733] Resolved architecture: Qwen3_5ForConditionalGeneration", file=sys.stderr)
    if "stubborn" in words:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if "child" in words or "orphan" in words:
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(port)], start_new_session=True, stdout=subprocess.PIPE)
        assert child.stdout and child.stdout.readline()
    if "orphan" in words:
        return 3
    if "sibling" in words:
        sibling = subprocess.Popen([sys.executable, "-c", SIBLING, str(port)], stdout=subprocess.PIPE)
        assert sibling.stdout and sibling.stdout.readline()

        def end(number: int, frame: object) -> None:
            time.sleep(0.5)
            sibling.kill()
            os._exit(0)

        signal.signal(signal.SIGTERM, end)
    if "print" in values:
        sys.stderr.write(Path(values["print"]).read_text(encoding="utf-8"))
        sys.stderr.flush()
    if "kill" in words:
        os.kill(os.getpid(), signal.SIGKILL)
    if "exit" in values:
        return int(values["exit"])
    print("(Worker pid=2) INFO 11-21 09:51:07 [cpu_model_runner.py:68] Starting to load model tiny...", file=sys.stderr, flush=True)
    time.sleep(float(values.get("late", 0)))
    if "falls" in values:
        Handler.falls = float(values["falls"])
    Listener(("127.0.0.1", port), Handler).serve_forever(poll_interval=0.05)
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
