"""A checkpoint, an engine and a machine → the `vllm serve` command, with a reason for each of its arguments.

In: ServedModel, Engine, Hardware, and what the user asked for. Out: a `Launch`. Leaves out: running it (server.py), the
arithmetic of memory (memory_model.py), and what is known of hardware and of vLLM's faults, which is data
(profiles.yaml, known_issues.yaml).
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtpress.engine.hardware import Hardware
    from mtpress.engine.installed import Engine
    from mtpress.engine.memory_model import MemoryEstimate
    from mtpress.engine.served_model import ServedModel

API_KEY = "VLLM_API_KEY"  # vLLM reads it; an argument would stand in the process list


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

    def as_json(self) -> dict[str, Any]:
        return {"flag": self.flag, "value": self.value, "reason": self.reason, "source": self.source}


@dataclass(frozen=True)
class Launch:
    """What is to be started. environment: what is added to os.environ, the API key among it; it is never shown."""

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

    def shown(self) -> str:
        """The command for a shell: environment first, one flag a line; the API key is left out."""
        raise NotImplementedError


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
) -> Launch:
    """The launch; InputError for a pair of settings that is refused, ResourceError where it cannot fit."""
    raise NotImplementedError(shlex)
