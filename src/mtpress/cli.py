"""The command line: a table of stages, each imported only when it is called.

In: arguments. Out: the stage's result as text or, with --json, as JSON on stdout; progress and errors on stderr.
Exit codes: 0 done and sound, 1 it ran and found something wrong, 2 the input or the call is bad, 128 + n ended by
signal n (130: Ctrl-C).
"""

import argparse
import contextlib
import importlib
import io
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from mtpress import __version__
from mtpress.api_key import without_login, without_secrets_in
from mtpress.errors import MtpressError, ResourceError, of_the_machine
from mtpress.terminal import json_text, say, visible


@dataclass(frozen=True)
class Stage:
    """One subcommand: its module under mtpress.stages, and what --help says of it."""

    name: str
    summary: str


STAGES = (
    Stage("inspect", "what a checkpoint holds: components, quantization, draft head, fit of each recipe"),
    Stage("quantize", "a BF16 checkpoint → a 4-bit checkpoint with a working draft head"),
    Stage("check", "whether a finished checkpoint is sound: names, scales, ignore lists, draft head"),
    Stage("graft", "the draft head of the BF16 release, bit for bit, into a finished checkpoint that lost it or has it quantized"),
    Stage("repair", "a checkpoint with faults → one without those that can be mended without loss, and what it takes for the others"),
    Stage("convert", "NVFP4 in modelopt's layout ↔ in compressed-tensors', without quantizing again; or without its vision tower"),
    Stage("eval", "how far checkpoints are from their BF16 base on the same tokens: KL, perplexity, drafts, error by layer"),
    Stage("serve", "a checkpoint → a running vLLM server: the right flags for this machine, with reasons, and a watch over it"),
    Stage("bench", "how fast checkpoints are served, and how well their draft heads guess, compared in one run"),
    Stage("recipes", "the shipped recipes, or one of them in full"),
    Stage("demo", "the whole line on the model that ships with mtpress"),
)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, without the secrets of the arguments given."""

    given: Sequence[str] = ()

    def error(self, message: str) -> NoReturn:
        said = visible(" ".join(without_secrets_in(message, self.given).split()))
        self.exit(2, f"{self.prog}: {said} (see {self.prog} --help)\n")


def build_parser(stage: str | None) -> Parser:
    """The parser of one stage; without a stage, the one that lists them all."""
    parser = Parser(prog="mtpress", description="A BF16 Qwen3.5-class checkpoint in, a 4-bit checkpoint with a working draft head out.")
    parser.add_argument("--version", action="version", version=f"mtpress {__version__}")
    subparsers = parser.add_subparsers(dest="stage", metavar="STAGE", required=True, parser_class=Parser)
    for entry in STAGES:
        sub = subparsers.add_parser(entry.name, help=entry.summary, description=entry.summary, allow_abbrev=False)
        sub.add_argument("--json", action="store_true", help="print the result as JSON on stdout, and nothing else there")
        if entry.name == stage:
            importlib.import_module(f"mtpress.stages.{entry.name}").add_arguments(sub)
    return parser


def run_stage(arguments: Sequence[str]) -> tuple[int, dict[str, Any]]:
    """Runs one command line as main() does, but hands back (exit code, result) and lets errors through."""
    stage = next((a for a in arguments if not a.startswith("-")), None)
    Parser.given = arguments
    options = build_parser(stage).parse_args(arguments)
    code, result = importlib.import_module(f"mtpress.stages.{options.stage}").run(options)
    return int(code), result


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its notes on missing GPU kernels are not news to the user
    stage = next((a for a in arguments if not a.startswith("-")), None)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names need not be text
    try:
        _Signals.take_over()
        try:
            code, result = run_stage(arguments)
        except SystemExit:
            sys.stdout.flush()  # --help and --version, which may go nowhere
            raise
        if "--json" in arguments:
            print(json_text(result, indent=2))
        sys.stdout.flush()
        return code
    except MtpressError as error:
        return _fail(stage, str(error), error.exit_code, "--json" in arguments)
    except KeyboardInterrupt as stopped:
        left = str(stopped) or "the source is untouched and no unfinished output was left"
        return _fail(stage, f"ended by {_Signals.received.name}; {left}", 128 + _Signals.received, "--json" in arguments)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        said = of_the_machine(error)
        if said is None:
            raise
        return _fail(stage, said, MtpressError.exit_code, "--json" in arguments)


def entry() -> NoReturn:
    """main() as a command: leaves at once, for there is nothing to put away and tearing torch down takes a second."""
    _open_streams()
    code = main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is over
    with contextlib.suppress(OSError, MtpressError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


class _Stdout(io.FileIO):
    """stdout that says in its own words that it takes no more."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise ResourceError(
                f"stdout cannot be written ({error.strerror or error}), so the result is not told; what was made is there"
            ) from None


def _open_streams() -> None:
    """Puts /dev/null in the place of a closed stdin or stderr, so that no file of ours gets its number, and what others write there.

    A closed stdout ends the command here, with a line: what it is to find could be told to nobody.
    """
    closed = [number for number in (0, 1, 2) if not _is_open(number)]
    for number in closed:
        os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
        if number == 2:
            sys.stderr = os.fdopen(2, "w", closefd=False)
    if 1 in closed:
        sys.stderr.write("mtpress: stdout is closed, and the result goes there; send it to a file, or to /dev/null\n")
        sys.stderr.flush()
        os._exit(2)
    if isinstance(sys.stdout, io.TextIOWrapper):
        out = io.BufferedWriter(_Stdout(1, "w", closefd=False))
        sys.stdout = io.TextIOWrapper(out, sys.stdout.encoding, "backslashreplace", line_buffering=sys.stdout.line_buffering)


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


class _Signals:
    """Ctrl-C, a polite kill and a closed terminal all end the work the same way: KeyboardInterrupt in the main thread."""

    received: signal.Signals = signal.SIGINT

    @classmethod
    def take_over(cls) -> None:
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # in place of what start.py leaves with
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) == signal.SIG_DFL:  # nohup's choice stands
                signal.signal(number, cls._stop)

    @classmethod
    def _stop(cls, number: int, frame: object) -> None:
        cls.received = signal.Signals(number)
        raise KeyboardInterrupt


def _fail(stage: str | None, message: str, code: int, as_json: bool) -> int:
    message = without_login(message)  # an address may stand where a path is to
    if as_json:
        with contextlib.suppress(OSError, MtpressError):  # who reads may be gone
            document: dict[str, Any] = {"error": message, "exit_code": code}
            print(json_text(document), flush=True)
    with contextlib.suppress(OSError):
        say(f"mtpress{f' {stage}' if stage else ''}: {message}", to=sys.stderr)
    return code
