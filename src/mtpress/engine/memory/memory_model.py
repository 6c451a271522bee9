"""What a launch takes of memory, how many tokens and sequences fit, and which setting frees how much where it does not fit.

In: a `ServedModel`, the settings of a launch, a `Hardware`. Out: a `MemoryEstimate`. Leaves out: choosing the settings (launch.py).

    budget     = gpu_memory_utilization · memory of the GPU      (unified memory: of the host)
    KV room    = budget − weights − reserved                     (CPU: VLLM_CPU_KVCACHE_SPACE; weights lie beside it)
    blocks     = KV room / bytes a block                         (kv_blocks.py)
    concurrency = blocks / blocks of a sequence of max_model_len
    tokens     = concurrency · max_model_len                     vLLM's "KV cache size"

Source: vLLM 0.32, v1/worker/gpu_worker.py and cpu_worker.py (determine_available_memory), v1/core/kv_cache_utils.py
(get_kv_cache_configs, _check_enough_kv_cache_memory), v1/worker/gpu_model_runner.py (_init_minimal_kv_cache_for_profiling).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from mtpress.engine.memory.hardware import Hardware
from mtpress.engine.memory.kv_blocks import CPU_BLOCK_SIZE, CUDA_BLOCK_SIZE, KV_BITS, KvBlocks, kv_blocks
from mtpress.engine.memory.reserved import CUDA_CONTEXT_BYTES, MAX_CAPTURE_SIZE, reserved_bytes
from mtpress.engine.memory.served_model import ServedModel
from mtpress.errors import InputError
from mtpress.models.qwen3_5 import names as qwen3_5
from mtpress.models.qwen3_5.names import COMPONENT_TITLES
from mtpress.progress import human_bytes

GIB = 1 << 30
MAX_UTILIZATION = 0.95
# The CPU platform, beside weights and KV cache: the worker, which counts towards its budget (vLLM 0.32 reports 0.66 GiB with
# mtpress-tiny), and the server in front of it, which does not.
CPU_WORKER_BYTES, CPU_SERVER_BYTES = 700_000_000, 1_000_000_000


@dataclass(frozen=True)
class ServeSettings:
    """What of a launch decides over memory, by vLLM's own names.

    cpu_kv_bytes: VLLM_CPU_KVCACHE_SPACE. Not None means the CPU platform, 0 that it is not set: the worker then takes
    gpu_memory_utilization of the host's memory.
    """

    max_model_len: int
    max_num_seqs: int
    kv_cache_dtype: str = "auto"
    num_speculative_tokens: int = 0
    language_model_only: bool = False
    gpu_memory_utilization: float = 0.92
    tensor_parallel_size: int = 1
    max_num_batched_tokens: int = 2048
    enforce_eager: bool = False
    prefix_caching: bool = True
    block_size: int | None = None
    cpu_kv_bytes: int | None = None


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes are those of one GPU.

    kv_bytes_per_token: in all attention layers, the draft head's too. state_bytes_per_sequence: the blocks that a sequence of any
    length takes for its Gated-DeltaNet states. kv_room_bytes: what the KV cache gets. num_tokens, max_concurrency: vLLM's "KV cache
    size" and "Maximum concurrency". num_sequences: short ones that can run at once. mtp_bytes: what the room would hold more of with
    speculation off. problem: why the launch cannot be, or None; remedies: which setting frees how much.
    """

    weight_bytes: int
    weight_bytes_by_component: Mapping[str, int]
    kv_bytes_per_token: int
    state_bytes_per_sequence: int
    reserved_bytes: int
    kv_room_bytes: int
    num_tokens: int
    max_concurrency: float
    num_sequences: int
    problem: str | None
    remedies: tuple[str, ...]
    mtp_bytes: int = 0
    num_blocks: int = 0
    block_size: int = 0
    longest_sequence: int = 0
    settings: ServeSettings | None = field(default=None, repr=False)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> tuple[str, ...]:
        """For people, one fact a line; the problem and its remedies last."""
        parts = ", ".join(f"{COMPONENT_TITLES[part]} {human_bytes(size)}" for part, size in self.weight_bytes_by_component.items())
        found = [f"weights {human_bytes(self.weight_bytes)}: {parts}"]
        if self.mtp_bytes:
            found.append(f"MTP takes {human_bytes(self.mtp_bytes)} of it all: the draft head, its KV cache, a state a draft token")
        found += [
            f"activations, CUDA graphs and libraries {human_bytes(self.reserved_bytes)}",
            f"KV cache {human_bytes(max(0, self.kv_room_bytes))}: {human_bytes(self.kv_bytes_per_token)} a token, "
            f"{human_bytes(self.state_bytes_per_sequence)} of Gated DeltaNet state a sequence",
        ]
        if self.settings is not None and self.num_blocks:
            found.append(
                f"room for {self.num_tokens:,} tokens: {self.max_concurrency:.2f} sequences of {self.settings.max_model_len:,}, "
                f"or {self.num_sequences:,} of up to {self.block_size:,}"
            )
        return (*found, *((f"does not fit: {self.problem}", *self.remedies) if self.problem else ()))


def estimate(model: ServedModel, settings: ServeSettings, hardware: Hardware) -> MemoryEstimate:
    """What the launch takes and what fits; InputError for a config without sizes or a --kv-cache-dtype that is not known."""
    settings = _resolved(model, settings)
    found = _Launch(model, settings, hardware)
    without_mtp = _Launch(model, replace(settings, num_speculative_tokens=0), hardware)
    problem = found.problem()
    return MemoryEstimate(
        weight_bytes=sum(found.weights.values()),
        weight_bytes_by_component=found.weights,
        kv_bytes_per_token=found.blocks.attention_groups * found.blocks.bytes_per_block // found.blocks.block_size,
        state_bytes_per_sequence=found.blocks.state_blocks * found.blocks.bytes_per_block,
        reserved_bytes=found.reserved,
        kv_room_bytes=found.room,
        num_tokens=found.blocks.num_tokens(found.num_blocks, settings.max_model_len),
        max_concurrency=found.blocks.concurrency(found.num_blocks, settings.max_model_len),
        num_sequences=found.blocks.num_sequences(found.num_blocks),
        problem=problem,
        remedies=tuple(_remedies(model, settings, hardware)) if problem else (),
        mtp_bytes=max(0, without_mtp.slack - found.slack),
        num_blocks=found.num_blocks,
        block_size=found.blocks.block_size,
        longest_sequence=found.blocks.longest_sequence(found.num_blocks),
        settings=settings,
    )


def loaded_weights(
    weight_bytes: Mapping[str, int], *, mtp: bool = True, vision: bool = True, tensor_parallel_size: int = 1
) -> dict[str, int]:
    """Bytes by component that one GPU loads.

    Linears split by heads or columns, embeddings and lm_head by vocabulary, the tower as the body (--mm-encoder-tp-mode weights);
    every GPU has all norms. The draft head brings neither embeddings nor lm_head: the target's are shared.
    """
    dropped = {*(() if mtp else ("mtp",)), *(() if vision else ("vision",))}
    return {
        part: size if part == "norms" else -(-size // tensor_parallel_size) for part, size in weight_bytes.items() if part not in dropped
    }


def _resolved(model: ServedModel, settings: ServeSettings) -> ServeSettings:
    dtype = settings.kv_cache_dtype
    if dtype not in KV_BITS:
        raise InputError(f"--kv-cache-dtype {dtype[:40]}: not one whose size is known; try {', '.join(KV_BITS)}")
    if dtype == "auto" and model.kv_cache_declared in KV_BITS:  # vLLM takes what the checkpoint declares
        return replace(settings, kv_cache_dtype=str(model.kv_cache_declared))
    return settings


class _Launch:
    """The sizes of one launch. slack: bytes left beside one sequence of max_model_len, or max_num_seqs short ones, whichever is
    more; negative where they do not fit."""

    def __init__(self, model: ServedModel, settings: ServeSettings, hardware: Hardware) -> None:
        self.model, self.settings, self.hardware = model, settings, hardware
        self.on_cpu = settings.cpu_kv_bytes is not None or not hardware.gpus
        vision = model.has_vision and not settings.language_model_only
        parallel = max(1, settings.tensor_parallel_size)
        self.weights = loaded_weights(
            model.weight_bytes, mtp=settings.num_speculative_tokens > 0, vision=vision, tensor_parallel_size=parallel
        )
        self.reserved = CPU_WORKER_BYTES if self.on_cpu else reserved_bytes(
            model.config,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            max_num_seqs=settings.max_num_seqs,
            num_speculative_tokens=settings.num_speculative_tokens,
            vision=vision,
            tensor_parallel_size=parallel,
            enforce_eager=settings.enforce_eager,
        )  # fmt: skip
        self.blocks: KvBlocks = kv_blocks(
            model.config,
            kv_cache_dtype=settings.kv_cache_dtype,
            num_speculative_tokens=settings.num_speculative_tokens,
            tensor_parallel_size=parallel,
            prefix_caching=settings.prefix_caching,
            block_size=settings.block_size or (CPU_BLOCK_SIZE if self.on_cpu else CUDA_BLOCK_SIZE),
        )
        self.room = self._room()
        self.num_blocks = max(0, self.room) // self.blocks.bytes_per_block
        one = 1 + self.blocks.blocks_per_sequence(settings.max_model_len)  # vLLM keeps a block for itself
        self.needed = one * self.blocks.bytes_per_block
        many = 1 + settings.max_num_seqs * self.blocks.blocks_per_sequence(1)
        self.slack = self.room - max(one, many) * self.blocks.bytes_per_block

    @property
    def taken(self) -> int:
        return sum(self.weights.values()) + self.reserved

    @property
    def _gpus(self) -> tuple[int, int]:
        """(memory, free) of the smallest GPU that is used, free as vLLM finds it: after its own CUDA context."""
        used = self.hardware.gpus[: max(1, self.settings.tensor_parallel_size)]
        return min(gpu.memory_bytes for gpu in used), min(gpu.free_bytes for gpu in used) - CUDA_CONTEXT_BYTES

    @property
    def budget(self) -> int:
        memory = self.hardware.memory_bytes if self.on_cpu else self._gpus[0]
        return int(self.settings.gpu_memory_utilization * memory)

    def _room(self) -> int:
        if self.settings.cpu_kv_bytes:
            return self.settings.cpu_kv_bytes
        return self.budget - self.taken

    def problem(self) -> str | None:
        """Why vLLM would not start, or would not run max_num_seqs at once; None where it does."""
        settings, blocks = self.settings, self.blocks
        found = self._split_problem() or (self._host_problem() if self.on_cpu else self._gpu_problem())
        if found:
            return found
        if self.room <= 0:
            return f"weights and what runs beside them take {human_bytes(self.taken)} of {human_bytes(self.budget)}"
        if self.needed > self.room:
            return (
                f"one sequence of {settings.max_model_len:,} tokens needs {human_bytes(self.needed)} of KV cache, "
                f"there is room for {human_bytes(self.room)}"
            )
        if blocks.num_sequences(self.num_blocks) < settings.max_num_seqs:
            return f"{settings.max_num_seqs:,} sequences at once; their states leave room for {blocks.num_sequences(self.num_blocks):,}"
        return None

    def _split_problem(self) -> str | None:
        parallel, d = self.settings.tensor_parallel_size, qwen3_5.sizes(self.model.config)
        if self.hardware.gpus and not self.on_cpu and parallel > len(self.hardware.gpus):
            return f"--tensor-parallel-size {parallel}, and there are {len(self.hardware.gpus)} GPUs"
        for heads in ("num_attention_heads", "linear_num_key_heads", "linear_num_value_heads"):
            if d[heads] % parallel:
                return f"--tensor-parallel-size {parallel} does not divide {heads} {d[heads]}"
        key_value = d["num_key_value_heads"]
        if key_value % parallel and parallel % key_value:
            return f"--tensor-parallel-size {parallel} neither divides nor is a multiple of num_key_value_heads {key_value}"
        return None

    def _host_problem(self) -> str | None:
        """The CPU platform: weights, KV cache and processes lie in the host's memory."""
        wanted, available = self.taken + CPU_SERVER_BYTES + max(0, self.room), self.hardware.available_bytes
        return f"{human_bytes(wanted)} of memory are needed, {human_bytes(available)} are available" if wanted > available else None

    def _gpu_problem(self) -> str | None:
        memory, free = self._gpus
        if self.budget > free:
            return (
                f"--gpu-memory-utilization {self.settings.gpu_memory_utilization:g} asks for {human_bytes(self.budget)} of "
                f"{human_bytes(memory)}, {human_bytes(max(0, free))} are free"
            )
        if self.settings.enforce_eager or self.room <= 0:
            return None
        # Before it knows its room, vLLM takes a block for every sequence to try CUDA graphs on.
        settings = self.settings
        tried = min(settings.max_num_seqs, settings.max_num_seqs * (1 + settings.num_speculative_tokens) * 2, MAX_CAPTURE_SIZE)
        if sum(self.weights.values()) + tried * self.blocks.bytes_per_block > free:
            return (
                f"trying CUDA graphs takes a block of {human_bytes(self.blocks.bytes_per_block)} for each of {tried} sequences beside the "
                f"weights, {human_bytes(free)} are free"
            )
        return None


def _remedies(model: ServedModel, settings: ServeSettings, hardware: Hardware) -> list[str]:
    """What each setting alone would free, those that are enough first."""
    now = _Launch(model, settings, hardware)
    enough, helps = [], []
    for flag, changed in _changes(now):
        then = _Launch(model, changed, hardware)
        gain = then.slack - now.slack
        if then.problem() is None:
            enough.append(f"{flag} would fit" + (f" (frees {human_bytes(gain)})" if gain > 0 else ""))
        elif gain > 0:
            helps.append(f"{flag} frees {human_bytes(gain)}")
    return enough + helps


def _changes(now: _Launch) -> list[tuple[str, ServeSettings]]:
    """(as a user would write it, the settings with it), the least painful first."""
    settings, model = now.settings, now.model
    found: list[tuple[str, ServeSettings]] = []

    def change(flag: str, **changed: Any) -> None:
        found.append((flag, replace(settings, **changed)))

    for count in (64, 32, 16, 8, 4, 2, 1):
        if count < settings.max_num_seqs and _Launch(model, replace(settings, max_num_seqs=count), now.hardware).problem() is None:
            change(f"--max-num-seqs {count}", max_num_seqs=count)
            break
    if KV_BITS[settings.kv_cache_dtype][0] > 8:
        change("--kv-cache-dtype fp8", kv_cache_dtype="fp8")
    longest = now.blocks.longest_sequence(now.num_blocks) // 1024 * 1024
    if 0 < longest < settings.max_model_len:
        change(f"--max-model-len {longest}", max_model_len=longest)
    if model.has_vision and not settings.language_model_only:
        change("--language-model-only", language_model_only=True)
    if settings.num_speculative_tokens:
        change("MTP off", num_speculative_tokens=0)
    if settings.prefix_caching:
        change("--no-enable-prefix-caching", prefix_caching=False)
    if settings.cpu_kv_bytes is not None:
        spare = now.hardware.available_bytes - now.taken - CPU_SERVER_BYTES
        if spare >= GIB and spare // GIB * GIB != settings.cpu_kv_bytes:
            change(f"VLLM_CPU_KVCACHE_SPACE={spare // GIB}", cpu_kv_bytes=spare // GIB * GIB)
        return found
    if not now.on_cpu:
        memory, free = now._gpus
        utilization = int(min(MAX_UTILIZATION, free / memory) * 100) / 100
        if utilization > 0 and utilization != settings.gpu_memory_utilization:
            change(f"--gpu-memory-utilization {utilization:g}", gpu_memory_utilization=utilization)
        if settings.max_num_batched_tokens > 2048:
            change("--max-num-batched-tokens 2048", max_num_batched_tokens=2048)
        if not settings.enforce_eager:
            change("--enforce-eager", enforce_eager=True)
        if len(now.hardware.gpus) >= 2 * settings.tensor_parallel_size:
            change(f"--tensor-parallel-size {2 * settings.tensor_parallel_size}", tensor_parallel_size=2 * settings.tensor_parallel_size)
    return found
