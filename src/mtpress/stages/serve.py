"""serve: a checkpoint → a running vLLM server, with every setting and its reason.

In: a checkpoint; the engine and the machine are found. Out: a `ServeResult`; with --dry-run that is all, else the server
runs until Ctrl-C. Leaves out: composing the command (engine/launch/launch.py), watching over the process (engine/server/server.py). No
torch is imported here: the engine is another process.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtpress.api_key import KEY_VARIABLES, given_key
from mtpress.engine.launch.arguments import take_engine_arguments
from mtpress.errors import InputError
from mtpress.progress import human_bytes
from mtpress.terminal import say

if TYPE_CHECKING:
    from mtpress.engine.launch.installed import Engine
    from mtpress.engine.launch.launch import Launch
    from mtpress.engine.launch.profiles import Platform
    from mtpress.engine.launch.settings import Setting
    from mtpress.engine.memory.hardware import Hardware

DEFAULT_PORT = 8000  # vLLM's own
NEWEST_READ: dict["Platform", str] = {"cuda": "0.33.0", "cpu": "0.32.0"}  # whose sources profiles and known issues were read in
PLUGINS = (
    "mtpress_gdn_cpu",
    "mtpress_int4_cpu",
    "mtpress_nvfp4_cpu",
    "mtpress_sampling_cpu",
)  # what `make engine` installs beside the CPU build


@dataclass(frozen=True)
class ServeResult:
    """The launch, and what of this machine it was composed for. assumed: what is not here and a dry run took for granted."""

    launch: "Launch"
    engine: "Engine"
    assumed: tuple[str, ...] = ()
    served: bool = False

    def as_json(self) -> dict[str, Any]:
        engine = {"command": list(self.engine.command), "version": self.engine.version, "platform": self.engine.platform}
        return {"engine": engine, **self.launch.as_json(), "assumed": list(self.assumed), "served": self.served}


def plan(options: argparse.Namespace) -> ServeResult:
    """The launch that the options ask for; errors as engine/launch.compose, and where there is no engine."""
    from mtpress.engine.launch.launch import compose
    from mtpress.engine.memory.hardware import read_hardware
    from mtpress.engine.memory.served_model import ServedModel

    model = ServedModel.read(options.checkpoint)
    hardware = read_hardware()
    assumed: list[str] = []
    engine = _engine(options, assumed)
    if options.dry_run:
        engine, hardware = _assume_profile(options.profile, engine, hardware, assumed)
    launch = compose(
        model, engine, hardware,
        profile=options.profile, host=options.host, port=options.port or None, num_speculative_tokens=options.mtp,
        max_model_len=options.max_model_len, max_num_seqs=options.max_num_seqs, kv_cache_dtype=options.kv_cache_dtype,
        api_key=given_key(options.api_key), force=options.force or options.dry_run, extra=options.engine_arguments,
    )  # fmt: skip
    if options.min_available_gb is not None:
        launch = replace(launch, min_available_bytes=int(options.min_available_gb * 1e9))
    return ServeResult(launch, engine, tuple(assumed))


def _engine(options: argparse.Namespace, assumed: list[str]) -> "Engine":
    from mtpress.engine.launch.installed import Engine, find_engine

    try:
        return find_engine(options.engine)
    except InputError as error:
        if not options.dry_run or options.engine is not None:
            raise
        assumed.append(f"vLLM {NEWEST_READ['cuda']}, built for CUDA: {error}")
        return Engine(Path("python"), ("vllm",), NEWEST_READ["cuda"], "cuda", PLUGINS)


def _assume_profile(name: str | None, engine: "Engine", hardware: "Hardware", assumed: list[str]) -> tuple["Engine", "Hardware"]:
    """The engine and the machine of the profile, where those here are not; InputError where nothing here says which profile."""
    from mtpress.engine.launch import profiles

    if name is None:
        if engine.platform == "cuda" and not hardware.gpus:
            there = ", ".join(profiles.profiles())
            raise InputError(
                f"no GPU here to choose a profile by; --profile NAME shows the command of one for vLLM {engine.version}: {there}"
            )
        return engine, hardware
    profile = profiles.named(name)
    reason = profiles.mismatch(profile, hardware, engine.platform, None)
    if reason is None:
        return engine, hardware
    nominal = profile.hardware.as_hardware()
    if engine.platform != profile.match.platform:
        version = NEWEST_READ[profile.match.platform] if assumed else str(engine.release)
        engine = replace(engine, version=version, platform=profile.match.platform, plugins=PLUGINS)
    built = "CUDA" if profile.match.platform == "cuda" else "the CPU"
    assumed.append(f"{profiles.described(nominal)} and a vLLM built for {built}; the profile is not for this machine: {reason}")
    return engine, nominal


def serve(result: ServeResult, log: Path, start_timeout_seconds: float, say: Callable[[str], None]) -> ServeResult:
    """Starts it, asks one question, waits until it ends: EngineError where it dies, KeyboardInterrupt on Ctrl-C."""
    from mtpress.engine.server.server import Server
    from mtpress.engine.trial.first_words import first_words

    launch = result.launch
    with Server(launch, log, start_timeout_seconds=start_timeout_seconds, min_available_bytes=launch.min_available_bytes) as server:
        said = first_words(server.client, launch.num_speculative_tokens)
        say(f"asked for a story, it says {said}")
        for warning in said.warnings:
            say(f"warning: {warning}")
        say(f"serving {launch.served_model_name} at {launch.url}/v1 (Ctrl-C stops it; log: {log})")
        server.wait()
    return replace(result, served=True)


# ---- the command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CKPT", help="the checkpoint to serve: a directory or a Hub id")
    parser.add_argument("--profile", metavar="NAME", help="a launch by its name (docs/serving.md); without it the machine decides")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on (default 127.0.0.1: this machine only)")
    parser.add_argument("--port", type=_port, default=DEFAULT_PORT, help=f"the port to listen on (default {DEFAULT_PORT}; 0: a free one)")
    parser.add_argument(
        "--mtp", type=_count, metavar="N", help="tokens the draft head drafts a step; 0 turns it off (default: the profile's)"
    )
    parser.add_argument("--max-model-len", type=_positive, metavar="N", help="tokens of context a request may have")
    parser.add_argument("--max-num-seqs", type=_positive, metavar="N", help="requests that run at once")
    parser.add_argument("--kv-cache-dtype", metavar="DTYPE", help="fp8, auto, … (default: the checkpoint's, else the profile's)")
    parser.add_argument("--api-key", metavar="KEY", help=f"what clients must send; better in {KEY_VARIABLES[0]}: ps shows this")
    parser.add_argument("--engine", metavar="PATH", help="vLLM's environment, its python or its vllm command")
    parser.add_argument("--log", metavar="FILE", type=Path, help="where the engine's own output goes (default mtpress-serve-PORT.log here)")
    parser.add_argument(
        "--min-available-gb", type=_amount, metavar="X", help="stop the engine when the host has less memory than this available; 0: never"
    )
    parser.add_argument("--start-timeout", type=_amount, metavar="S", default=1800.0, help="seconds to wait for it (default 1800)")
    parser.add_argument("--force", action="store_true", help="serve what is refused: a dangerous pair, what does not fit")
    parser.add_argument("--dry-run", action="store_true", help="print the command, each setting's reason and what fits; start nothing")
    parser.usage = f"{parser.prog} [options] CKPT [-- ENGINE ARGUMENTS]"
    parser.epilog = "Everything after -- goes to `vllm serve` as it stands and wins over what mtpress chooses."
    take_engine_arguments(parser)


def run(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """The stage as the command line calls it: (exit code, result for --json)."""

    def tell(line: str) -> None:
        say(line, to=sys.stderr)

    result = plan(options)
    if options.dry_run:
        refused = () if options.force else result.launch.refused
        if not options.json:
            show(result)
        if refused:
            raise type(refused[0])(f"{refused[0]}; --force serves it all the same")
        return 0, result.as_json()
    launch = result.launch
    for line in (f"profile {launch.profile}: {launch.chosen_by}", *(f"warning: {text}" for text in launch.warnings)):
        tell(line)
    log = options.log or Path(f"mtpress-serve-{launch.port}.log")
    result = serve(result, log, options.start_timeout, tell)
    return 0, result.as_json()


def show(result: ServeResult) -> None:
    """The command, then why it is so, on stdout."""
    launch = result.launch
    print(launch.shown())  # a command of several lines, whose words are quoted
    print()
    say(f"profile {launch.profile}: {launch.chosen_by}")
    say(f"engine: vLLM {result.engine.version} for {'CUDA' if result.engine.platform == 'cuda' else 'the CPU'}")
    for line in result.assumed:
        say(f"assumed: {line}")
    _print_settings("why", launch.settings)
    _print_settings("left out", launch.left_out)
    print("\nmemory")
    for line in launch.estimate.lines():
        say(f"  {line}")
    if launch.min_available_bytes:
        say(f"  the watchdog stops the engine when less than {human_bytes(launch.min_available_bytes)} is available")
    for title, lines in (("warnings", launch.warnings), ("to know", launch.notes)):
        if lines:
            print(f"\n{title}")
        for line in lines:
            say(f"  {line}")


def _print_settings(title: str, settings: Sequence["Setting"]) -> None:
    if settings:
        print(f"\n{title}")
    for setting in settings:
        say(f"  {setting.flag}{'' if setting.value is None else f' {setting.value}'}: {setting.reason} ({setting.source})")


def _port(text: str) -> int:
    return int(_within(text, 0, 65535, whole=True))


def _count(text: str) -> int:
    return int(_within(text, 0, 64, whole=True))


def _positive(text: str) -> int:
    return int(_within(text, 1, 1 << 40, whole=True))


def _amount(text: str) -> float:
    return _within(text, 0, 1e6)


def _within(text: str, least: float, most: float, *, whole: bool = False) -> float:
    with contextlib.suppress(ValueError):
        value = int(text) if whole else float(text)
        if least <= value <= most:
            return value
    raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a {'whole ' if whole else ''}number from {least:g} to {most:g}")
