"""The settings of a launch before anything known speaks against them: what is passed, what is left out, each with its reason.

In: a checkpoint, an engine, a profile, what the user asked for. Out: `Setting`s. Leaves out: the user's own engine
arguments and known issues (launch.py).
"""

import ipaddress
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.version import Version

from mtpress.engine.launch.arguments import SPECULATIVE

if TYPE_CHECKING:
    from mtpress.engine.launch.installed import Engine
    from mtpress.engine.launch.profiles import Profile
    from mtpress.engine.launch.thinking import Template
    from mtpress.engine.memory.served_model import ServedModel

YOU, OURS, CONFIG = "you", "mtpress", "config.json"
TEXT_ONLY = "--language-model-only"
MTP_SINCE = Version("0.19")  # seed 004 drafts by "mtp" on 0.19.1; before it the family's own word is the safe one
# vLLM imports it by its path: nothing of mtpress has to be installed beside it. Written against the parsers of 0.32.
REASONING_PARSER, REASONING_PARSER_SINCE = Path(__file__).parents[1] / "plugins/reasoning_parser.py", Version("0.32")
# Flags that older versions know as an environment variable only: the flag's first version, the variable.
BEFORE_FLAGS = {
    "--attention-backend": (Version("0.13"), "VLLM_ATTENTION_BACKEND"),
    "--moe-backend": (Version("0.17"), "VLLM_USE_FLASHINFER_MOE_FP4"),  # vllm#33807
    "--linear-backend": (Version("0.20"), "VLLM_NVFP4_GEMM_BACKEND"),  # vllm#39538
}
OLD_VARIABLES = tuple(variable for _, variable in BEFORE_FLAGS.values())


@dataclass(frozen=True)
class Setting:
    """One argument of the command. flag: `--name`, or the NAME of an environment variable; value: None for a switch.

    source: where the reason comes from: "seed 002", "vllm#55673", "config.json", "you", …
    """

    flag: str
    value: str | None
    reason: str
    source: str

    @property
    def is_environment(self) -> bool:
        return not self.flag.startswith("-")

    @property
    def tokens(self) -> tuple[str, ...]:
        return (self.flag,) if self.value is None else (self.flag, self.value)

    def as_json(self) -> dict[str, Any]:
        return {"flag": self.flag, "value": self.value, "reason": self.reason, "source": self.source}


def profile_settings(
    model: "ServedModel",
    engine: "Engine",
    profile: "Profile",
    template: "Template",
    num_speculative_tokens: int | None,
    asked: Mapping[str, int | str | None],
    enable_weights_track: bool,
) -> tuple[list[Setting], list[Setting]]:
    """(what is passed, what is left out and why), before the user's own engine arguments and known issues."""
    said = f"profile {profile.name}"
    passed: list[Setting] = []
    left_out: list[Setting] = []
    quantized = f"vLLM reads {model.quant_method} from the checkpoint" if model.quant_method else "nothing is quantized"
    left_out.append(Setting("--quantization", None, quantized, CONFIG))
    if model.needs_language_model_only:
        passed.append(Setting(TEXT_ONLY, None, "the vision tower was taken out; without this vLLM serves a random one", CONFIG))
    elif model.has_vision:
        left_out.append(Setting(TEXT_ONLY, None, "the vision tower is stored and served", CONFIG))
    passed += _drafts(model, engine, profile, num_speculative_tokens, left_out)
    for flag, value in profile.flags.items():
        own = asked.get(flag)
        if own is not None:
            passed.append(Setting(flag, str(own), "asked for", YOU))
        elif flag == "--max-model-len" and 0 < model.max_position_embeddings < int(value.value):
            passed.append(Setting(flag, str(model.max_position_embeddings), "the checkpoint has no more positions", CONFIG))
        elif flag == "--kv-cache-dtype" and (model.kv_cache_declared or value.value == "auto"):
            reason = f"the checkpoint declares {model.kv_cache_declared}, vLLM follows" if model.kv_cache_declared else value.reason
            left_out.append(Setting(flag, None, reason, CONFIG if model.kv_cache_declared else value.source))
        elif isinstance(value.value, bool):
            passed.append(Setting(flag if value.value else f"--no-{flag[2:]}", None, value.reason, value.source))
        else:
            passed.append(Setting(flag, value.text, value.reason, value.source if value.source != OURS else said))
    passed += [Setting(flag, str(own), "asked for", YOU) for flag, own in asked.items() if own is not None and flag not in profile.flags]
    if model.kv_cache_declared and "--kv-cache-dtype" not in profile.flags and asked["--kv-cache-dtype"] is None:
        left_out.append(Setting("--kv-cache-dtype", None, f"the checkpoint declares {model.kv_cache_declared}, vLLM follows", CONFIG))
    if template.file is not None:
        passed += [
            *_reasoning(template, engine),
            Setting("--enable-auto-tool-choice", None, "the model may call the tools of a request", "seed 002"),
            Setting("--tool-call-parser", "qwen3_xml", "the XML form in which this family calls tools", "seed 002"),
        ]
        left_out.append(Setting("--chat-template", None, f"vLLM finds the checkpoint's own in {template.file}", CONFIG))
    if enable_weights_track:
        reason = "a checkpoint that lacks tensors is refused; a quantized one is not, without this"
        passed.append(Setting("--model-loader-extra-config", '{"enable_weights_track": true}', reason, "vLLM 0.32"))
    left_out.append(Setting("--trust-remote-code", None, "vLLM has this family built in; code from a checkpoint is not run", OURS))
    return passed, left_out


def _reasoning(template: "Template", engine: "Engine") -> list[Setting]:
    """The parser that knows the template's modes, and the defaults for what a request does not say."""
    if not template.switches or engine.release < REASONING_PARSER_SINCE:
        return [Setting("--reasoning-parser", "qwen3", "thoughts go to `reasoning`, answers to `content`", "seed 001")]
    imported = "vLLM imports the parser from this file"
    sees = "sees by the prompt whether the template thinks, where qwen3 takes for granted that it does and leaves content null"
    keeps = "earlier thoughts stay, so a prompt goes on as it was cached; enable_thinking is not set, for false would beat <|think_on|>"
    return [
        Setting("--reasoning-parser-plugin", str(REASONING_PARSER), imported, OURS),
        Setting("--reasoning-parser", "mtpress", sees, "vllm#53284"),
        Setting("--default-chat-template-kwargs", json.dumps({"preserve_thinking": True}), keeps, OURS),
    ]


def _drafts(
    model: "ServedModel", engine: "Engine", profile: "Profile", asked: int | None, left_out: list[Setting]
) -> list[Setting]:  # fmt: skip
    number = asked if asked is not None else int(profile.num_speculative_tokens.value)
    if asked is None and not model.num_mtp_layers:
        left_out.append(Setting(SPECULATIVE, None, "no draft head is stored", CONFIG))
        return []
    if not number:
        left_out.append(Setting(SPECULATIVE, None, "--mtp 0", YOU))
        return []
    method = "mtp" if engine.release >= MTP_SINCE else "qwen3_5_mtp"
    value = json.dumps({"method": method, "num_speculative_tokens": number})
    stated = profile.num_speculative_tokens
    reason, source = (f"{stated.reason}", stated.source) if asked is None else ("asked for", YOU)
    return [Setting(SPECULATIVE, value, reason, source)]


def environment_settings(profile: "Profile", engine: "Engine", environ: Mapping[str, str]) -> list[Setting]:
    """Variables of the launch; one that stands in the environment already keeps its value."""
    wanted = [
        Setting("HF_HUB_OFFLINE", "1", "the checkpoint is a local directory, nothing is to be fetched", OURS),
        Setting("VLLM_NO_USAGE_STATS", "1", "nothing about what you serve leaves the machine", OURS),
        *(Setting(name, value.text, value.reason, value.source) for name, value in profile.environment.items()),
    ]
    return [_kept(setting, environ) for setting in wanted]


def _kept(setting: Setting, environ: Mapping[str, str]) -> Setting:
    if setting.flag not in environ:
        return setting
    return replace(setting, value=environ[setting.flag], reason="set already", source="your environment")


def as_that_version_knows(setting: Setting, release: Version) -> Setting:
    """The setting as that version knows it: a flag, or the environment variable that came before it."""
    if setting.flag not in BEFORE_FLAGS or release >= BEFORE_FLAGS[setting.flag][0]:
        return setting
    since, variable = BEFORE_FLAGS[setting.flag]
    return replace(setting, flag=variable, reason=f"{setting.reason} (before {since} a variable, later {setting.flag})")


def is_local(host: str) -> bool:
    """Whether only this machine reaches it: localhost, or a loopback address. 127.0.0.1.example.org is a name like any other."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def served_name(model: "ServedModel") -> str:
    """The directory's name; of a snapshot in the Hub's cache the name of its repository. What is no name for a request becomes a dash."""
    if model.path.parent.name == "snapshots" and model.path.parents[1].name.startswith("models--"):
        return model.path.parents[1].name.removeprefix("models--").replace("--", "/")
    return re.sub(r"[^\w.+@:=-]+", "-", model.name).strip("-") or "model"


def path_argument(path: Path) -> str:
    """A checkpoint's path as vLLM takes it for one, also where it begins with a dash."""
    return str(path.absolute() if str(path).startswith("-") else path)
