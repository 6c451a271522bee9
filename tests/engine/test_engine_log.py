"""Why an engine died and how far it had come, from its log.

Logs marked "real" were written by vLLM 0.32 on a CPU (paths and tracebacks shortened); the others follow what its sources print on a
GPU, in the same frame.
"""

from pathlib import Path

import pytest

from mtpress.engine.server.engine_log import LogFollower, first_error, read_end, stage

CORE = "(EngineCore pid=20370) ERROR 11-21 09:54:23 [core.py:1510] "
WORKER = "(Worker pid=20444) ERROR 11-21 09:54:23 [multiproc_executor.py:1063] "
SERVER = "(APIServer pid=20086) "
TRACE = "Traceback (most recent call last):"
FRAME = '  File "/env/site-packages/vllm/v1/engine/core.py", line 1482, in run_engine_core\n    engine_core = EngineCoreProc(*args)\n'


def prefixed(prefix: str, text: str) -> str:
    return "".join(f"{prefix}{line}\n" for line in text.splitlines())


def start_failure(error: str) -> str:
    """How the engine core's error comes out: logged, printed again by multiprocessing, and followed by the API server's own."""
    failed = prefixed(CORE, f"EngineCore failed to start.\n{TRACE}\n{FRAME}{error}")
    again = prefixed("(EngineCore pid=20370) ", f"Process EngineCore:\n{TRACE}\n{FRAME}{error}")
    after = (
        f"{TRACE}\n{FRAME}RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {{'EngineCore': 1}}"
    )
    return failed + again + prefixed(SERVER, after)


UNKNOWN_FLAG = """\
Triton is installed, but doesn't include CPU backend. Disabling Triton.
usage: vllm [-h] [-v]
            {chat,complete,serve,launch,bench,collect-env,download-kernels,preload,run-batch,snapshot}
            ...
vllm: error: unrecognized arguments: --no-such-flag 3
"""
BAD_VALUE = """\
usage: vllm serve [model_tag] [options]
vllm serve: error: argument --max-num-seqs: invalid int value: 'banana'
"""
PORT = f"""\
(APIServer pid=30131) INFO 11-21 10:17:56 [api_utils.py:286] non-default args: {{'port': 8125}}
{TRACE}
  File "/env/bin/vllm", line 8, in <module>
    sys.exit(main())
             ^^^^^^
OSError: [Errno 98] Address already in use
"""
NO_KERNEL = (
    prefixed(
        "(Worker pid=30683) ERROR 11-21 10:19:53 [multiproc_executor.py:953] ",
        f"WorkerProc failed to start.\n{TRACE}\n{FRAME}"
        "ValueError: Failed to find a kernel that can implement the NVFP4 linear layer. Reasons: \n",
    )
    + "(EngineCore pid=30664) INFO 11-21 10:19:56 [multiproc_executor.py:486] [shutdown] Executor: all workers exited gracefully\n"
    + start_failure(
        "Exception: WorkerProc initialization failed due to an exception in a background process. See stack trace for root cause."
    )
)
FATAL = (
    "INFO:     Application startup complete.\n"
    + prefixed(
        SERVER + "ERROR 11-21 09:53:02 [serving.py:274] ", f"Error in a request\n{TRACE}\n{FRAME}KeyError: 'of one request, survived'"
    )
    + prefixed(WORKER, f"WorkerProc hit an exception.\n{TRACE}\n{FRAME}RuntimeError: index -1438083101 is out of bounds for dimension 1")
    + prefixed(
        CORE,
        f"EngineCore encountered a fatal error.\n{TRACE}\n{FRAME}RuntimeError: Worker failed with error 'index -1438083101 is out', "
        "please check the stack trace above for the root cause",
    )
    + prefixed(
        SERVER + "ERROR 11-21 09:54:23 [async_llm.py:906] ",
        f"AsyncLLM output_handler failed.\n{TRACE}\n{FRAME}vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue. "
        "See stack trace (above) for the root cause.",
    )
)
KILLED_WORKER = (
    "INFO:     Application startup complete.\n"
    + prefixed(CORE, "Worker proc VllmWorker-0 died unexpectedly (exit code: -9), shutting down executor.")
    + prefixed(CORE, f"EngineCore encountered a fatal error.\n{TRACE}\n{FRAME}RuntimeError: Executor failed.")
)
KILLED_CORE = prefixed(
    "(Worker pid=32058) ERROR 11-21 10:23:30 [multiproc_executor.py:953] ",
    f"WorkerProc failed to start.\n{TRACE}\n{FRAME}BrokenPipeError: [Errno 32] Broken pipe",
) + prefixed(
    SERVER,
    f"{TRACE}\n{FRAME}RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {{'EngineCore': -9}}",
)
LOST_CORE = "INFO:     Application startup complete.\n" + prefixed(
    SERVER + "ERROR 11-21 10:23:30 [core_client.py:1] ", "Engine core proc EngineCore died unexpectedly, shutting down client."
)
OUT_OF_MEMORY = start_failure(
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.37 GiB. GPU 0 has a total capacity of 31.36 GiB"
)
NO_ROOM = start_failure(
    "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when initializing the engine"
)
TOO_LONG = start_failure(
    "ValueError: To serve at least one request with the model's max seq len (262144), (16.0 GiB KV cache is needed, which is larger than "
    "the available KV cache memory (9.1 GiB). Based on the available memory, the estimated maximum model length is 149504."
)
TAKEN_GPU = start_failure(
    "ValueError: Free memory on device cuda:0 (10.1/31.4 GiB) on startup is less than desired GPU memory utilization (0.92, 28.9 GiB)."
)
MAMBA = start_failure("ValueError: max_num_seqs (256) exceeds available Mamba cache blocks (40). Each decode sequence requires one")
MISSING = start_failure(
    "ValueError: Following weights were not initialized from checkpoint: {'language_model.model.layers.1.mlp.down_proj.weight'}"
)
HALF_FUSED = start_failure(
    "ValueError: Detected some but not all shards of model.layers.0.qkv_proj are quantized. All shards of fused layers"
)
PYDANTIC = prefixed(
    SERVER,
    f"{TRACE}\n{FRAME}pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
    "  Value error, User-specified max_model_len (100000) is greater than the derived max_model_len (max_position_embeddings=4096.0)",
)
CHAINED = start_failure(
    f"KeyError: 'the first'\n\nThe above exception was the direct cause of the following exception:\n\n{TRACE}\n{FRAME}TypeError: 2nd"
)


@pytest.mark.parametrize(
    ("log", "text", "remedy"),
    [
        pytest.param(UNKNOWN_FLAG, "this vLLM does not know --no-such-flag 3", "use another version (--engine)", id="unknown flag, real"),
        pytest.param(BAD_VALUE, "argument --max-num-seqs: invalid int value: 'banana'", "vllm serve --help=all", id="bad value, real"),
        pytest.param(PORT, "the port is taken", "choose another --port", id="port, real"),
        pytest.param(
            NO_KERNEL, "ValueError: Failed to find a kernel that can implement the NVFP4", "install mtpress into", id="no kernel, real"
        ),
        pytest.param(FATAL, "RuntimeError: index -1438083101 is out of bounds for dimension 1", "", id="death in a request, real"),
        pytest.param(
            PYDANTIC, "ValidationError: 1 validation error for ModelConfig Value error, User-specified", "--max-model-len", id="value, real"
        ),
        pytest.param(OUT_OF_MEMORY, "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.37 GiB.", "--max-num-seqs", id="GPU memory"),
        pytest.param(NO_ROOM, "ValueError: No available memory for the cache blocks.", "raise --gpu-memory-utilization", id="no blocks"),
        pytest.param(TOO_LONG, "ValueError: To serve at least one request", "lower --max-model-len", id="too long"),
        pytest.param(TAKEN_GPU, "ValueError: Free memory on device cuda:0", "lower --gpu-memory-utilization", id="taken GPU"),
        pytest.param(
            MAMBA, "ValueError: max_num_seqs (256) exceeds available Mamba cache blocks (40).", "lower --max-num-seqs", id="Mamba blocks"
        ),
        pytest.param(MISSING, "ValueError: Following weights were not initialized from checkpoint", "mtpress check", id="missing tensor"),
        pytest.param(HALF_FUSED, "ValueError: Detected some but not all shards of", "ignore list", id="half a fused group"),
        pytest.param(CHAINED, "KeyError: 'the first'", "", id="chained"),
        pytest.param(KILLED_WORKER, "Worker proc VllmWorker-0 was killed by SIGKILL", "dmesg", id="killed worker"),
        pytest.param(KILLED_CORE, "EngineCore was killed by SIGKILL", "dmesg", id="killed core, real"),
        pytest.param(
            KILLED_CORE.replace("'EngineCore': -9", ""), "one of the engine's processes ended without", "dmesg", id="killed, real"
        ),
        pytest.param(LOST_CORE, "Engine core proc EngineCore died unexpectedly", "dmesg", id="lost core"),
    ],
)
def test_the_first_error_is_the_one_that_counts(log: str, text: str, remedy: str) -> None:
    error = first_error(log)
    assert error is not None
    assert error.text.startswith(text)
    assert remedy in error.remedy
    assert "Engine core initialization failed" not in error.text
    assert "\n" not in error.text


def test_lines_of_other_processes_stand_between() -> None:
    lines = OUT_OF_MEMORY.splitlines(keepends=True)
    mixed = "".join(line + "(Worker pid=3) INFO 11-21 09:54:23 [x.py:1] ValueError: none of ours\n" for line in lines)
    assert first_error(mixed) == first_error(OUT_OF_MEMORY)


def test_what_came_before_the_engine_was_up_is_not_why_it_died() -> None:
    assert first_error(OUT_OF_MEMORY + "INFO:     Application startup complete.\n") is None
    assert first_error("") is None
    assert first_error(CORE + "EngineCore failed to start.\n") is None  # and was killed before it could say why
    assert first_error("INFO 11-21 09:54:23 [x.py:1] all is well\n") is None


def test_a_long_message_is_cut() -> None:
    error = first_error(start_failure("ValueError: " + "x" * 5000))
    assert error is not None
    assert len(error.text) < 700


@pytest.mark.parametrize(
    "junk", ["\x00\xff\n" * 50, TRACE + "\n", "(EngineCore pid=1) " * 100, CORE + "\n" + WORKER, "ValueError: alone\n"]
)
def test_junk_is_no_exception(junk: str) -> None:
    first_error(junk)
    stage(junk)


INFO = "(Worker pid=1) INFO 11-21 09:51:07 [x.py:68] "


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (INFO + "Starting to load model src/tiny...", "loading weights"),
        ("Loading safetensors checkpoint shards:  27% Completed | 3/11 [00:04<00:12,  1.50s/it]", "loading weights: 3 of 11 files"),
        (INFO + "Loading drafter model...", "loading the draft head"),
        (INFO + "Model loading took 15.42 GiB memory and 12.341234 seconds", "loading weights: 15.42 GiB in 12 s"),
        (INFO + "Available KV cache memory: 9.1 GiB", "profiling memory: 9.1 GiB are left for the KV cache"),
        (
            INFO + "GPU KV cache size: 524,288 tokens, Maximum concurrency for 2,048 tokens per request: 256.00x",
            "making the KV cache: 524,288 tokens, 256.00 × 2,048",
        ),
        (INFO + "GPU KV cache size: 524,288 tokens", "making the KV cache: 524,288 tokens"),
        ("Capturing CUDA graphs (mixed prefill-decode, PIECEWISE):  40%|####      | 4/10", "capturing CUDA graphs: 40 %"),
        (INFO + "Graph capturing finished in 5 secs, took 0.61 GiB", "capturing CUDA graphs: done in 5 s"),
        (INFO + "init engine (profile, create kv cache, warmup model) took 0.48 s", "warming up: done in 0.48 s"),
        (INFO + "init engine (profile, create kv cache, warmup model) took 60.48 s (compilation: 41.20 s)", "warming up: done in 60.48 s"),
        (INFO + "Starting vLLM server on http://127.0.0.1:8120", "opening the port"),
        (INFO.replace("INFO", "WARNING") + "Starting to load model", None),
        ('INFO:     127.0.0.1:54204 - "GET /health HTTP/1.1" 200 OK', None),
        ("", None),
    ],
)
def test_stages(line: str, words: str | None) -> None:
    assert stage(line) == words


def test_following_a_log_as_it_grows(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    follower = LogFollower(log)
    assert follower.lines() == []
    with log.open("wb", buffering=0) as file:
        file.write(b"one\ntw")
        assert follower.lines() == ["one"]
        file.write(b"o\r  0%\r 50%\r")
        assert follower.lines() == ["two", "  0%", " 50%"]
        assert follower.lines() == []


def test_of_a_large_log_the_end_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "engine.log"
    assert read_end(log) == ""
    log.write_text("first\n" + "x" * 100 + "\nlast\n")
    assert read_end(log).startswith("first")
    monkeypatch.setattr("mtpress.engine.server.engine_log.MAX_READ", 10)
    assert read_end(log) == "xxxx\nlast\n"
