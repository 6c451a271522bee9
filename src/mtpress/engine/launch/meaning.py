"""What a command comes to: the values that its flags end up with, as known issues and the memory model ask for them.

In: settings, the user's engine arguments, the machine. Out: `Meaning`: facts by name, `ServeSettings`, where the server
listens. Leaves out: deciding anything (launch.py).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mtpress.engine.launch.arguments import OFF, ON, SPECULATIVE, Argument, decimal, final_values, json_object, read, whole_number
from mtpress.engine.launch.settings import OLD_VARIABLES, TEXT_ONLY, Setting
from mtpress.errors import InputError

if TYPE_CHECKING:
    from mtpress.engine.launch.installed import Engine
    from mtpress.engine.launch.thinking import Template
    from mtpress.engine.memory.hardware import Hardware
    from mtpress.engine.memory.memory_model import ServeSettings
    from mtpress.engine.memory.served_model import ServedModel

MTP_METHODS = ("mtp", "qwen3_5_mtp", "qwen3_next_mtp")
GIB = 1 << 30


@dataclass(frozen=True)
class Meaning:
    """What known issues and the memory model ask of a launch, beside its settings."""

    model: "ServedModel"
    engine: "Engine"
    hardware: "Hardware"
    template: "Template"
    environ: Mapping[str, str]
    theirs: Sequence[Argument]

    @cached_property
    def tokenizer_backend(self) -> bool:
        """Whether tokenizer_config.json names what transformers 4 cannot load. The file may hold every added token: it is read once."""
        from mtpress.engine.launch.thinking import tokenizer_config

        tokenizer = tokenizer_config(self.model.path)
        return tokenizer.get("tokenizer_class") == "TokenizersBackend" or "backend" in tokenizer

    def values(self, settings: Iterable[Setting]) -> dict[str, str]:
        """Flag → its text at the end of the command."""
        ours = read([token for setting in settings if not setting.is_environment for token in setting.tokens])
        return final_values([*ours, *self.theirs])

    def serve_settings(self, settings: Sequence[Setting]) -> "ServeSettings":
        """The launch as the memory model sees it, with vLLM's own defaults where it passes nothing."""
        from mtpress.engine.memory.memory_model import ServeSettings

        values = self.values(settings)
        positions = self.model.max_position_embeddings or 4096
        space = next((s.value for s in settings if s.flag == "VLLM_CPU_KVCACHE_SPACE"), None)
        block_size = count(values, "--block-size")
        return ServeSettings(
            max_model_len=count(values, "--max-model-len") or positions,
            max_num_seqs=count(values, "--max-num-seqs") or 256,
            kv_cache_dtype=self.kv_cache_dtype(values),
            num_speculative_tokens=speculative(values)[1],
            language_model_only=values.get(TEXT_ONLY) == ON,
            gpu_memory_utilization=decimal("--gpu-memory-utilization", values.get("--gpu-memory-utilization", "0.92")),
            tensor_parallel_size=count(values, "--tensor-parallel-size") or 1,
            max_num_batched_tokens=count(values, "--max-num-batched-tokens") or self.default_batched_tokens(),
            enforce_eager=values.get("--enforce-eager") == ON,
            prefix_caching=values.get("--enable-prefix-caching", ON) == ON,
            block_size=block_size,
            cpu_kv_bytes=int(decimal("VLLM_CPU_KVCACHE_SPACE", space or "0") * GIB) if self.engine.platform == "cpu" else None,
        )

    def kv_cache_dtype(self, values: Mapping[str, str]) -> str:
        said = values.get("--kv-cache-dtype", "auto")
        return self.model.kv_cache_declared or said if said == "auto" else said

    def default_batched_tokens(self) -> int:
        """Tokens a step where nothing is passed. Source: vLLM 0.32, engine/arg_utils.py, get_batch_defaults."""
        memory = self.hardware.gpus[0].memory_bytes if self.hardware.gpus and self.engine.platform == "cuda" else 0
        if memory >= 160 * GIB:
            return 16384
        return 8192 if memory >= 70 * GIB and "a100" not in self.hardware.gpus[0].name.lower() else 2048

    def _cpu(self) -> dict[str, bool | None]:
        """What the CPU build's paths depend on; None where the platform is another, or it is not known."""
        flags = self.hardware.cpu_flags if self.engine.platform == "cpu" else None
        names = {"avx512": "avx512bw", "avx512_bf16": "avx512_bf16", "amx": "amx_tile"}
        return {fact: flag in flags if flags is not None else None for fact, flag in names.items()}

    def facts(self, settings: Sequence[Setting]) -> dict[str, Any]:
        """By the names of known_issues.FACTS, and every flag of the command."""
        from mtpress.engine.launch.profiles import capability_text

        values = self.values(settings)
        gpu = self.hardware.gpus[0] if self.hardware.gpus and self.engine.platform == "cuda" else None
        method, number = speculative(values)
        drafting = json_object(values.get(SPECULATIVE))
        return {flag: text for flag, text in values.items() if text != OFF} | {
            "platform": self.engine.platform,
            "gpu": gpu.name if gpu else None,
            "compute_capability": capability_text(gpu) if gpu else None,
            "unified": gpu.unified if gpu else None,
            "memory_gib": gpu.memory_bytes / GIB if gpu else None,
            **self._cpu(),
            "format": self.model.format,
            "quant_method": self.model.quant_method,
            "num_mtp_layers": self.model.num_mtp_layers,
            "needs_language_model_only": self.model.needs_language_model_only,
            "kv_cache_dtype": self.kv_cache_dtype(values),
            "num_speculative_tokens": number,
            "mtp": number if method in MTP_METHODS else 0,
            "max_model_len": count(values, "--max-model-len") or self.model.max_position_embeddings,
            "max_num_seqs": count(values, "--max-num-seqs"),
            "gpu_memory_utilization": decimal("--gpu-memory-utilization", values.get("--gpu-memory-utilization", "0.92")),
            "tensor_parallel_size": count(values, "--tensor-parallel-size") or 1,
            "prefix_caching": values.get("--enable-prefix-caching", ON) == ON,
            "thinking_off_by_default": self.template.default == "off",
            "think_tags": self.template.tags,
            "tokenizer_backend": self.tokenizer_backend,
            "old_backend_variables": any(name in self.environ for name in OLD_VARIABLES),
            "plugins": " ".join(self.engine.plugins),
            "architecture": self.model.architecture,
            "draft_lm_head_quantization": drafting.get("draft_lm_head_quantization"),
            "rejection_sample_method": drafting.get("rejection_sample_method"),
            "v1_runner": self.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "0",
        }


def speculative(values: Mapping[str, str]) -> tuple[str, int]:
    """(method, number of drafted tokens); ("", 0) where nothing drafts."""
    content = json_object(values.get(SPECULATIVE))
    number = content.get("num_speculative_tokens")
    return str(content.get("method") or ""), number if type(number) is int else 0


def count(values: Mapping[str, str], flag: str) -> int | None:
    return whole_number(flag, values[flag]) if flag in values else None


def listening_port(text: str) -> int:
    if not re.fullmatch(r"\d{1,5}", text) or not 0 < int(text) < 65536:
        raise InputError(f"--port {text[:40]}: not a port; 1 to 65535 is")
    return int(text)


def url(values: Mapping[str, str]) -> str:
    host = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(values["--host"], values["--host"])
    scheme = "https" if "--ssl-certfile" in values else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{listening_port(values['--port'])}"
