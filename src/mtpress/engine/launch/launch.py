"""A checkpoint, an engine and a machine → the `vllm serve` command, with a reason for each of its arguments.

In: ServedModel, Engine, Hardware, and what the user asked for. Out: a `Launch`. Leaves out: running it (server.py), the
arithmetic of memory (memory_model.py), and what is known of hardware and of vLLM's faults, which is data
(profiles.yaml, known_issues.yaml). What the user wrote for the engine stands last in the command and wins.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mtpress.api_key import (
    API_KEY,
    SECRET_VARIABLES,
    STORED_TOKEN,
    refuse_secrets_in,
    secret_flag,
    without_login,
    without_secrets,
)
from mtpress.engine.launch.arguments import ON, Argument, read, split_command
from mtpress.engine.launch.meaning import Meaning, listening_port, speculative, url
from mtpress.engine.launch.ports import free_port
from mtpress.engine.launch.settings import (
    OURS,
    TEXT_ONLY,
    YOU,
    Setting,
    as_that_version_knows,
    environment_settings,
    is_local,
    path_argument,
    profile_settings,
    served_name,
)
from mtpress.errors import InputError, MtpressError, ResourceError
from mtpress.terminal import quoted

if TYPE_CHECKING:
    from mtpress.engine.launch.installed import Engine
    from mtpress.engine.memory.hardware import Hardware
    from mtpress.engine.memory.memory_model import MemoryEstimate
    from mtpress.engine.memory.served_model import ServedModel


@dataclass(frozen=True)
class Launch:
    """What is to be started. environment: what is added to os.environ, the API key among it; it is never shown.

    left_out: flags that other launches pass and this one does not, with the reason. profile: its name; chosen_by: why it is that one.
    min_available_bytes: the profile's threshold of the watchdog, where it has one. refused: what `force` let through.
    """

    command: tuple[str, ...]
    environment: Mapping[str, str] = field(repr=False)
    settings: tuple[Setting, ...]
    warnings: tuple[str, ...]
    host: str
    port: int
    url: str
    served_model_name: str
    num_speculative_tokens: int
    language_model_only: bool
    estimate: "MemoryEstimate"
    notes: tuple[str, ...] = ()
    left_out: tuple[Setting, ...] = ()
    profile: str = ""
    chosen_by: str = ""
    min_available_bytes: int | None = None
    refused: tuple[MtpressError, ...] = ()

    def shown(self) -> str:
        """The command for a shell: environment first, one flag a line; the API key stands there as the variable it is read from."""
        named = [f"{name}={quoted(value)}" for name, value in self._shown_environment().items()]
        named += [f'{name}="${name}"' for name in SECRET_VARIABLES.values() if name in self.environment]
        start, arguments = split_command(without_secrets(self.command))
        lines = [" ".join(named)] if named else []
        lines.append(" ".join(map(quoted, start)))
        lines += [f"  {' '.join(map(quoted, argument.tokens))}" for argument in arguments]
        return " \\\n".join(lines)

    def _shown_environment(self) -> dict[str, str]:
        return {name: value for name, value in self.environment.items() if name not in SECRET_VARIABLES.values()}

    def as_json(self) -> dict[str, Any]:
        """Everything but secrets."""
        return {
            "command": without_secrets(self.command),
            "environment": self._shown_environment(),
            "api_key": API_KEY in self.environment,
            "profile": self.profile,
            "chosen_by": self.chosen_by,
            "settings": [setting.as_json() for setting in self.settings],
            "left_out": [setting.as_json() for setting in self.left_out],
            "estimate": self.estimate.as_json(),
            "warnings": list(self.warnings),
            "notes": list(self.notes),
            "url": self.url,
            "served_model_name": self.served_model_name,
            "num_speculative_tokens": self.num_speculative_tokens,
            "language_model_only": self.language_model_only,
            "min_available_bytes": self.min_available_bytes,
        }


def compose(
    model: "ServedModel",
    engine: "Engine",
    hardware: "Hardware",
    *,
    profile: str | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    num_speculative_tokens: int | None = None,
    max_model_len: int | None = None,
    max_num_seqs: int | None = None,
    kv_cache_dtype: str | None = None,
    api_key: str | None = None,
    enable_weights_track: bool = False,
    force: bool = False,
    extra: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
) -> Launch:
    """The launch. port: None for a free one; profile: None for the machine's; extra: engine arguments, which win over everything.

    environ: the environment that the engine inherits, os.environ by default; what stands there is not set again.
    InputError for settings that are refused and for a wrong argument, ResourceError where the machine is not the profile's or
    it cannot fit; with `force` these are warnings.
    """
    from mtpress.engine.launch import profiles
    from mtpress.engine.launch.thinking import read_template

    environ = os.environ if environ is None else environ
    theirs, secrets = _without_secrets(read(extra))
    key = secrets.get(API_KEY) or api_key or environ.get(API_KEY)
    refused: list[MtpressError] = []
    chosen = profiles.named(profile) if profile is not None else profiles.choose(hardware, engine.platform, model)
    here = profiles.described(hardware)
    if reason := profiles.mismatch(chosen, hardware, engine.platform, None):
        hint = f"`mtpress serve --dry-run --profile {chosen.name}` shows its command without the hardware"
        refused.append(ResourceError(f"profile {chosen.name} is not for this machine: {reason}; {hint}"))
        if engine.platform == "cuda" and not hardware.gpus:
            raise refused[0]
    if num_speculative_tokens and not model.num_mtp_layers:
        why = f"no draft head is stored, --mtp {num_speculative_tokens} would draft with random weights"
        refused.append(InputError(f"{model.path}: {why}; --mtp 0"))
    asked = {"--max-model-len": max_model_len, "--max-num-seqs": max_num_seqs, "--kv-cache-dtype": kv_cache_dtype}
    template = read_template(model.path)
    settings, left_out = profile_settings(model, engine, chosen, template, num_speculative_tokens, asked, enable_weights_track)
    settings[:0] = [
        Setting("--served-model-name", served_name(model), "what requests call it", OURS),
        Setting("--host", host, *(("only this machine can reach it", OURS) if is_local(host) else ("others can reach it", "--host"))),
        Setting("--port", str(port or free_port(host)), "where it listens" if port else "a free one", "--port" if port else OURS),
    ]
    given = {argument.flag for argument in theirs}
    settings = [setting for setting in settings if plain(setting.flag) not in given]
    settings += environment_settings(chosen, engine, environ)
    meaning = Meaning(model, engine, hardware, template, environ, theirs)
    settings, warnings, notes, dangers = _heed(meaning, settings)
    refused += [InputError(danger) for danger in dangers]
    if refused and not force:
        raise type(refused[0])(f"{refused[0]}; --force serves it all the same")
    settings, fits, problem = _fit(meaning, settings, force)
    if problem is not None and not force:
        raise type(problem)(f"{problem}; --force serves it all the same")
    refused += [problem] if problem is not None else []
    warnings = [*map(str, refused), *warnings]
    values = meaning.values(settings)
    if not is_local(values["--host"]) and key is None:
        warnings.append(f"everyone who reaches {values['--host']} can use this server; --api-key closes it")
    settings = [as_that_version_knows(setting, engine.release) for setting in settings]
    environment = {s.flag: s.value or "" for s in settings if s.is_environment and environ.get(s.flag) != s.value}
    return Launch(
        command=(
            *engine.command, "serve", path_argument(model.path),
            *(token for setting in settings if not setting.is_environment for token in setting.tokens),
            *(token for argument in theirs for token in argument.tokens),
        ),
        environment=environment | secrets | ({API_KEY: key} if key else {}),
        settings=(*settings, *_written(theirs)),
        warnings=tuple(warnings),
        host=values["--host"],
        port=listening_port(values["--port"]),
        url=url(values),
        served_model_name=values["--served-model-name"].split()[0],
        num_speculative_tokens=speculative(values)[1],
        language_model_only=values.get(TEXT_ONLY) == ON,
        estimate=fits,
        notes=tuple(notes),
        left_out=tuple(setting for setting in left_out if setting.flag not in given),
        profile=chosen.name,
        chosen_by=f"--profile, on {here}" if profile is not None else f"{here}: {chosen.summary}",
        min_available_bytes=chosen.min_available_bytes,
        refused=tuple(refused),
    )  # fmt: skip


@dataclass(frozen=True)
class ServeOptions:
    """What several launches have in common, beside their checkpoints; None: as the profile has it."""

    profile: str | None = None
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    kv_cache_dtype: str | None = None
    force: bool = False
    extra: tuple[str, ...] = ()

    def launch(
        self,
        model: "ServedModel",
        engine: "Engine",
        hardware: "Hardware",
        *,
        num_speculative_tokens: int | None = None,
        max_num_seqs: int | None = None,
    ) -> Launch:
        """compose() with these, on a port that is free now. max_num_seqs: where these do not say."""
        return compose(
            model,
            engine,
            hardware,
            profile=self.profile,
            num_speculative_tokens=num_speculative_tokens,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs or max_num_seqs,
            kv_cache_dtype=self.kv_cache_dtype,
            force=self.force,
            extra=self.extra,
        )


def plain(flag: str) -> str:
    """The flag without its --no- form."""
    return "--" + flag.removeprefix("--no-") if flag.startswith("--no-") else flag


def _without_secrets(arguments: Iterable[Argument]) -> tuple[list[Argument], dict[str, str]]:
    """The user's arguments without those that are secret, and these by variable: they travel in the environment."""
    kept: list[Argument] = []
    secrets: dict[str, str] = {}
    for argument in arguments:
        flag = secret_flag(argument.tokens[0])
        if argument.flag == "--uds":
            raise InputError("--uds: mtpress watches the server by host and port; leave it out, or start vllm itself")
        if argument.flag == "--config":
            refuse_secrets_in(argument.text or "")
        if flag is None or (flag == STORED_TOKEN and argument.tokens == (flag,)):
            kept.append(argument)
        elif len(argument.values) == 1 and not argument.key and not argument.negated:
            secrets[SECRET_VARIABLES[flag]] = argument.values[0]
        else:
            raise InputError(f"{flag}: one value; others would stand in the command, where every user of the machine reads them")
    return kept, secrets


def _written(arguments: Iterable[Argument]) -> tuple[Setting, ...]:
    written = ((a.tokens[0].partition("=")[0], without_login(a.text) if a.text is not None else None) for a in arguments)
    return tuple(Setting(flag, text, "written after --", YOU) for flag, text in written)


def _fit(meaning: Meaning, settings: list[Setting], force: bool) -> tuple[list[Setting], "MemoryEstimate", MtpressError | None]:
    """(settings with fewer of the profile's sequences where they do not fit, what they take, why they cannot be served)."""
    from mtpress.engine.memory.memory_model import estimate

    wanted = meaning.serve_settings(settings)
    try:
        fits = estimate(meaning.model, wanted, meaning.hardware)
    except InputError as error:  # a fork's own KV cache: its size is not known, the rest is
        if not force or wanted.kv_cache_dtype == "auto":
            raise
        return settings, estimate(meaning.model, replace(wanted, kv_cache_dtype="auto"), meaning.hardware), error
    if fits.problem is not None and (fewer := _fewer_sequences(settings, fits.num_sequences)):
        settings, fits = fewer, estimate(meaning.model, meaning.serve_settings(fewer), meaning.hardware)
    problem = ResourceError("; ".join((fits.problem, *fits.remedies))) if fits.problem is not None else None
    return settings, fits, problem


def _fewer_sequences(settings: list[Setting], num_sequences: int) -> list[Setting] | None:
    """The settings with as many sequences as have room, where the profile's are more; what the user asked for is not touched."""
    old = next((s for s in settings if s.flag == "--max-num-seqs" and s.source != YOU), None)
    if old is None or old.value is None or not 1 <= num_sequences < int(old.value):
        return None
    fits = str(1 << (num_sequences.bit_length() - 1))
    new = replace(old, value=fits, reason=f"the profile's {old.value} do not fit, {num_sequences} do by the memory model", source=OURS)
    return [new if setting is old else setting for setting in settings]


def _heed(meaning: Meaning, settings: list[Setting]) -> tuple[list[Setting], list[str], list[str], list[str]]:
    """(settings with what known issues set, warnings, notes, refusals)."""
    from mtpress.engine.launch.known_issues import known_issues

    warnings: list[str] = []
    notes: list[str] = []
    refused: list[str] = []
    given = {argument.flag for argument in meaning.theirs}
    facts = meaning.facts(settings)
    for issue in known_issues():
        if not issue.applies(meaning.engine.release, facts):
            continue
        if issue.action == "set" and not given & set(issue.set_):
            changed = [Setting(flag, value, f"{issue.effect}; {issue.remedy}", issue.source) for flag, value in issue.set_.items()]
            settings = [*(s for s in settings if s.flag not in issue.set_), *changed]
            facts = meaning.facts(settings)
        else:
            {"refuse": refused, "warn": warnings, "set": warnings, "note": notes}[issue.action].append(issue.line())
    return settings, warnings, notes, refused
