"""Reads an engine's log while it grows: which stage of loading it is in, and why it died.

In: the log file of `vllm serve`, several processes of which write to it at once. Out: lines as they come, a stage in words, and the
first error: the one that brought the engine down, not the ones that it set off in the other processes. Phrases are those of vLLM
0.32; an unknown one costs a name or a hint, never an exception. Leaves out: what to do about a process that hangs.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

READY = "Application startup complete"
MAX_READ = 8 << 20  # of a log that has grown for days, its end is read
MAX_ERROR = 300

# "(EngineCore pid=20370) ERROR 11-21 09:50:56 [core.py:1512] text", each part of it optional
PREFIX = re.compile(
    r"^(?:\((?P<process>[\w .:-]+?) pid=\d+\) ?)?"
    r"(?:(?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL) \d\d-\d\d \d\d:\d\d:\d\d (?:\[[^\]]*\] ?)?)?"
)
SHARDS = re.compile(r"Loading \S+ checkpoint shards:\s+(?P<percent>\d+)% Completed \| (?P<done>\d+)/(?P<total>\d+)")
CAPTURING = re.compile(r"Capturing CUDA graphs.*?:\s+(?P<percent>\d+)%")
KV_CACHE = r".*?KV cache size: (?P<tokens>[\d,]+) tokens"
STAGES = (  # first match wins; the groups of the pattern fill the words
    (SHARDS, "loading weights: {done} of {total} files"),
    (CAPTURING, "capturing CUDA graphs: {percent} %"),
    (re.compile(r"Resolved architecture: (?P<name>\w+)"), "reading the configuration"),
    (re.compile(r"Initializing an? .*LLM engine"), "starting the engine's processes"),
    (re.compile(r"Starting to load model"), "loading weights"),
    (re.compile(r"Loading drafter model"), "loading the draft head"),
    (re.compile(r"Model loading took (?P<gib>[\d.]+) GiB.* (?P<seconds>\d+)[\d.]* seconds"), "loading weights: {gib} GiB in {seconds} s"),
    (re.compile(r"Loading weights took (?P<seconds>[\d.]+) seconds"), "loading weights: read in {seconds} s"),
    (re.compile(r"torch\.compile t|Using cache directory: .* for vLLM's torch|Dynamo bytecode|Compiling a graph"), "compiling"),
    (re.compile(r"Available KV cache memory: (?P<gib>[\d.]+) GiB"), "profiling memory: {gib} GiB are left for the KV cache"),
    (
        re.compile(KV_CACHE + r", Maximum concurrency for (?P<n>[\d,]+) .*: (?P<x>[\d.]+)"),
        "making the KV cache: {tokens} tokens, {x} × {n}",
    ),
    (re.compile(KV_CACHE), "making the KV cache: {tokens} tokens"),
    (re.compile(r"Graph capturing finished in (?P<seconds>[\d.]+) secs"), "capturing CUDA graphs: done in {seconds} s"),
    (re.compile(r"init engine \(profile.*?\) took (?P<seconds>[\d.]+) s"), "warming up: done in {seconds} s"),
    (re.compile(r"Warming up (?!chat template|multi-modal)"), "warming up"),
    (re.compile(r"Starting vLLM (API )?server"), "opening the port"),
)


def stage(line: str) -> str | None:
    """What the engine is doing by this line of its log: "loading weights: 3 of 11 files"; None where the line does not say."""
    said = _Line.of(line)
    for pattern, words in STAGES if said.level in ("", "INFO") else ():
        if found := pattern.match(said.text.strip()):
            return words.format(**found.groupdict())
    return None


class LogFollower:
    """The lines that were added to a file since the last look. A progress bar's carriage returns end lines too."""

    def __init__(self, path: Path, start: int = 0) -> None:
        self._path, self._offset, self._rest = path, start, ""

    def lines(self) -> list[str]:
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                new = file.read(MAX_READ)
        except OSError:
            return []
        self._offset += len(new)
        *whole, self._rest = re.split(r"[\r\n]+", self._rest + new.decode("utf-8", "replace"))
        return [line for line in whole if line]


class Error(NamedTuple):
    """What brought the engine down, and what to try."""

    text: str
    remedy: str


@dataclass(frozen=True)
class Known:
    """An error that users meet. says: words for people, filled from the pattern's groups; None: the engine's own words."""

    pattern: re.Pattern[str]
    remedy: str
    says: str | None = None


LESS_MEMORY = "lower --max-num-seqs or --max-model-len, or pass --enforce-eager after --"
KILLED = "a SIGKILL is what the kernel sends when memory runs out (dmesg says so); use a smaller launch"
CHECK = "`mtpress check` says which"
KNOWN = tuple(
    Known(re.compile(pattern), remedy, says)
    for pattern, remedy, says in (
        (
            r"error: unrecognized arguments: (?P<what>.+)",
            "leave it out, or use another version (--engine)",
            "this vLLM does not know {what}",
        ),
        (r"^[\w ./-]+: error: (?P<what>.+)", "`vllm serve --help=all` lists what this version takes", "{what}"),
        (r"\[Errno 98\]|[Aa]ddress already in use", "choose another --port, or end what uses it", "the port is taken"),
        (r"out of memory|OutOfMemoryError|cudaErrorMemoryAllocation", LESS_MEMORY, None),
        (r"No available memory for the cache blocks", f"raise --gpu-memory-utilization if there is room, otherwise {LESS_MEMORY}", None),
        (r"To serve at least one request with the model's max", "lower --max-model-len, or raise --gpu-memory-utilization", None),
        (r"Free memory on device .*less than", "lower --gpu-memory-utilization, or end what else uses the GPU", None),
        (r"User-specified max_model_len .* is greater than the derived", "lower --max-model-len", None),
        (r"exceeds available Mamba cache", "lower --max-num-seqs", None),
        (r"Error in memory profiling", "end what else uses the GPU while the engine starts", None),
        (
            r"find a kernel that can implement the NVFP4",
            "on a CPU, install mtpress into the engine's environment; on a GPU, update vLLM",
            None,
        ),
        (
            r"no kernel image is available|[Ii]llegal instruction",
            "this vLLM has no kernels for this GPU; use a recent one (vllm#38423)",
            None,
        ),
        (
            r"Ninja build failed|nvcc|CUDA_HOME",
            "FlashInfer compiles its kernels: install the CUDA toolkit, or choose another backend",
            None,
        ),
        (r"torchvision::nms does not exist", "torchvision is built for CUDA, torch for a CPU; `make engine` makes both fit", None),
        (r"weights were not initialized from", f"tensors are missing from the checkpoint: {CHECK}", None),
        (r"There is no module or parameter named", f"the checkpoint holds tensors that nothing takes: {CHECK}", None),
        (r"some but not all shards of \S+ are quantized", f"the ignore list names only part of a fused group: {CHECK}", None),
        (r"NVIDIA driver|CUDA driver|libcuda\.so", "the CUDA driver is missing, or too old for this build", None),
        (r"No space left on device", "free space on that disk", None),
    )
)

# Set off by the real error in another process, or by the end itself.
CONSEQUENCES = re.compile(
    r"Engine core initialization failed|WorkerProc initialization failed|EngineDeadError|Engine core proc|Engine core process"
    r"|EngineCore encountered an issue|Executor failed|Worker failed with error|CancelledError|KeyboardInterrupt|SystemExit"
    r"|BrokenPipeError|ConnectionResetError|Frontend process failed|cancelled|EngineGenerateError"
)
# vLLM logs one of these, then the traceback, in the process that fails first.
ANCHORS = re.compile(r"failed to start\.|encountered a fatal error|WorkerProc hit an exception|Traceback \(most recent call last\)")
EXCEPTION = re.compile(r"^(?P<type>[A-Za-z_][\w.]*(?:Error|Exception|Exit|Interrupt|Warning|Timeout|Unavailable))(?:: (?P<text>.*))?$")
DIED = (
    re.compile(r"Failed core proc\(s\): \{'(?P<who>[^']+)': (?P<code>-\d+)"),
    re.compile(r"(?P<who>Worker proc \S+|Engine core proc(?:ess)? \S+) died unexpectedly(?: \(exit code: (?P<code>-?\d+)\))?"),
)


def first_error(log: str) -> Error | None:
    """Why the engine ended, from its log's text; None where the log has no error."""
    lines = [_Line.of(line) for line in log.splitlines()]
    ready = max((i for i, line in enumerate(lines) if READY in line.text), default=-1)
    lines = lines[ready + 1 :]
    found = _exceptions(lines)
    text = next((error for error in found if not CONSEQUENCES.search(error)), None) or _usage_error(lines)
    if text is None and (died := _died(lines)):
        return died
    if text is None and found:  # consequences alone: what caused them was killed before it could say anything
        return Error("one of the engine's processes ended without a word", KILLED)
    text = text or _last_error_line(lines)
    if text is None:
        return None
    for known in KNOWN:
        if match := known.pattern.search(text):
            said = known.says.format(**match.groupdict()) if known.says else text
            return Error(_short(said), known.remedy)
    return Error(_short(text), "")


class _Line(NamedTuple):
    process: str
    level: str
    text: str

    @classmethod
    def of(cls, line: str) -> "_Line":
        found = PREFIX.match(line)
        assert found is not None  # every part is optional
        return cls(found["process"] or "", found["level"] or "", line[found.end() :].rstrip())


def _exceptions(lines: list[_Line]) -> list[str]:
    """The last line (and what continues it) of every traceback, in the order in which they ended.

    The lines of one process follow one another, but those of another may stand between them. A request that failed leaves a
    traceback too; one that follows `fatal` words is put first.
    """
    fatal: list[str] = []
    others: list[str] = []
    open_in: dict[str, bool] = {}  # process → whether its traceback was announced as fatal
    announced: set[str] = set()
    for i, line in enumerate(lines):
        if "Traceback (most recent call last)" in line.text:
            open_in[line.process] = line.process in announced
        elif ANCHORS.search(line.text):
            announced.add(line.process)
        elif line.process in open_in and (match := EXCEPTION.match(line.text)):
            text = " ".join([line.text, *_continued(lines, i)])
            name = match["type"].rpartition(".")[2]
            said = " ".join([text.removeprefix(match["type"]).removeprefix(":").strip()])
            (fatal if open_in.pop(line.process) else others).append(f"{name}: {said}" if said else name)
    return fatal + others


def _continued(lines: list[_Line], at: int) -> list[str]:
    """The further lines of a message of several, as pydantic's and vLLM's lists of reasons are."""
    more = []
    for line in lines[at + 1 : at + 12]:
        if line.process != lines[at].process:
            continue
        if (
            line.level != lines[at].level
            or not line.text
            or line.text.startswith(("Traceback", "During handling", "The above exception", "[rank"))
        ):
            break
        if EXCEPTION.match(line.text):
            break
        more.append(line.text.strip())
    return more


def _usage_error(lines: list[_Line]) -> str | None:
    return next((line.text for line in lines if re.search(r"^[\w ./-]+: error: ", line.text)), None)


def _died(lines: list[_Line]) -> Error | None:
    """A process that went without a word of its own; what the others say of it."""
    for line in lines:
        for pattern in DIED:
            if match := pattern.search(line.text):
                killed = match["code"] in ("-9", None)
                remedy = KILLED if killed else ""
                how = {None: "died unexpectedly", "-9": "was killed by SIGKILL"}.get(match["code"], f"died with exit code {match['code']}")
                return Error(f"{match['who']} {how}", remedy)
    return None


def _last_error_line(lines: list[_Line]) -> str | None:
    said = [line.text for line in lines if line.level in ("ERROR", "CRITICAL") and line.text[:1].strip() and not ANCHORS.search(line.text)]
    return said[0] if said else None


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= MAX_ERROR else text[:MAX_ERROR] + "…"


def read_end(path: Path) -> str:
    """The log's text, or its last MAX_READ bytes; "" where it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - MAX_READ))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""
