"""vLLM's command line, read as vLLM reads it.

In: tokens after `vllm serve MODEL`. Out: `Argument`s by the flag's own name, and the value that each flag ends up with.
Leaves out: whether vLLM knows the flag, which its own parser says. Source: vLLM 0.32, utils/argparse_utils.py:
underscores are dashes, `--flag=value` is two tokens, `--no-flag` turns a switch off, `--flag.key value` is one key of a
JSON value, of a flag that stands twice the last counts.
"""

import argparse
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mtpress.errors import InputError

ALIASES = {
    "-tp": "--tensor-parallel-size", "-pp": "--pipeline-parallel-size", "-dp": "--data-parallel-size", "-q": "--quantization",
    "-sc": "--speculative-config", "-cc": "--compilation-config", "-asc": "--api-server-count", "-O": "--optimization-level",
    "--device-memory-utilization": "--gpu-memory-utilization",
}  # fmt: skip
SPECULATIVE = "--speculative-config"
SPECULATIVE_PARTS = {"--spec-method": "method", "--spec-model": "model", "--spec-tokens": "num_speculative_tokens"}
MULTIPLES = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
ON, OFF = "true", "false"  # what a switch and its --no- twin stand for
NEGATIVE = re.compile(r"^-\d")


def take_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Makes what stands after -- the option engine_arguments; argparse would take it for positionals."""
    parse = parser.parse_known_args

    def parse_known_args(args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        given = list(args or ())
        at = given.index("--") if "--" in given else len(given)
        found, unknown = parse(given[:at], namespace)
        found.engine_arguments = tuple(given[at + 1 :])
        return found, unknown

    parser.parse_known_args = parse_known_args  # type: ignore[method-assign, assignment]


@dataclass(frozen=True)
class Argument:
    """One flag with what follows it. flag: its plain name; key: of a JSON value ("--flag.key"), ""; tokens: as they were written."""

    flag: str
    key: str
    values: tuple[str, ...]
    negated: bool
    tokens: tuple[str, ...]

    @property
    def text(self) -> str | None:
        """What stands behind the flag, None for a switch."""
        return " ".join(self.values) if self.values else None


def read(tokens: Sequence[str]) -> tuple[Argument, ...]:
    """The arguments in order; InputError for a word that belongs to no flag."""
    groups: list[list[str]] = []
    for token in tokens:
        if token.startswith("-") and token != "-" and not NEGATIVE.match(token):
            groups.append([token])
        elif groups:
            groups[-1].append(token)
        else:
            raise InputError(f"{token[:80]!r} belongs to no flag; behind -- stand flags of `vllm serve`, and the checkpoint before it")
    return tuple(_argument(group) for group in groups)


def split_command(command: Sequence[str]) -> tuple[Sequence[str], tuple[Argument, ...]]:
    """A whole `vllm serve MODEL …` as what stands before its first flag, and its arguments."""
    start = next((i for i, token in enumerate(command) if token.startswith("--")), len(command))
    return command[:start], read(command[start:])


def command_values(command: Sequence[str]) -> dict[str, str]:
    """Flag → the text that it ends up with, of a whole `vllm serve MODEL …`."""
    return final_values(split_command(command)[1])


def _argument(tokens: Sequence[str]) -> Argument:
    name, equals, value = tokens[0].partition("=")
    if re.match(r"^-O.", name):  # -O3
        name, value, equals = "-O", name[2:] or value, "="
    flag, _, key = name.partition(".")
    flag = flag.replace("_", "-") if flag.startswith("--") else flag
    negated = flag.startswith("--no-")
    flag = ALIASES.get("--" + flag.removeprefix("--no-") if negated else flag, "--" + flag.removeprefix("--no-") if negated else flag)
    if flag in SPECULATIVE_PARTS:
        flag, key = SPECULATIVE, SPECULATIVE_PARTS[flag]
    return Argument(flag, key, (*([value] if equals else []), *tokens[1:]), negated, tuple(tokens))


def final_values(arguments: Iterable[Argument]) -> dict[str, str]:
    """Flag → the text that it ends up with: ON or OFF for a switch, JSON for what was given by keys."""
    found: dict[str, str] = {}
    for argument in arguments:
        if argument.key:
            content: Any = json_value(argument.text if argument.text is not None else ON)
            for part in reversed(argument.key.split(".")):
                content = {part: content}
            found[argument.flag] = json.dumps(_merged(json_object(found.get(argument.flag)), content))
        elif argument.negated:
            found[argument.flag] = OFF
        else:
            found[argument.flag] = argument.text if argument.text is not None else ON
    return found


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(old)
    for key, value in new.items():
        inner = merged.get(key)
        merged[key] = _merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged


def json_value(text: str) -> Any:
    """The text as JSON, or itself where it is none."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def json_object(text: str | None) -> dict[str, Any]:
    """The text as a JSON object; empty where it is none, which vLLM says better than we."""
    value = json_value(text) if text is not None else None
    return value if isinstance(value, dict) else {}


def whole_number(flag: str, text: str) -> int | None:
    """32768, "32k" (1000s) and "32K" (1024s) as vLLM reads them; None for "auto" and -1; InputError for anything else."""
    if text in ("-1", "auto"):
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMgGtT]?)", text.strip())
    if found is None or ("." in text and found[2] not in ("k", "m", "g", "t")):
        raise InputError(f"{flag} {text[:40]}: not a whole number; 32768, 32k or 32K is")
    return int(float(found[1]) * MULTIPLES.get(found[2], 1))


def decimal(flag: str, text: str) -> float:
    """A number; InputError for anything else."""
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{flag} {text[:40]}: not a number") from None
