"""vLLM's own benchmark client (`vllm bench serve`), imported once and asked many times.

    python -m mtpress.bench.driver

In: JSON lines on stdin, each {"arguments": [the arguments of `vllm bench serve`]}. Out: JSON lines on stdout: one
{"ready": version of vLLM} or {"unusable": reason} first, then for each request {"result": …} or {"error": reason}.
Everything else that vLLM prints goes to stderr. Leaves out: what the figures mean (measurement.py), and starting servers.

It runs under the engine's own python and imports nothing but vLLM. A new process a cell would pay that import (8 s) each
time. Called as a function, vLLM's hand-over to its Rust client (VLLM_USE_RUST_BENCH), which looks at the command line,
does not happen: what measures is the same with every setting of that variable.

The result, per request in the order in which they were sent:

    seconds        from the first request sent to the last answer
    ttft_seconds, latency_seconds, prompt_tokens, output_tokens    lists; tokens by the server's `usage`
    errors         one string a request, empty where it was answered
    acceptance     the growth of the server's counters: num_drafts, num_draft_tokens, num_accepted_tokens, per_position
                   (shares); null where it does not speculate
"""

import argparse
import asyncio
import json
import os
import sys
from typing import Any, TextIO


def load_client() -> tuple[str, Any, Any]:
    """vLLM's version, the parser of `vllm bench serve`, and the function that runs it."""
    import vllm
    from vllm.benchmarks import serve

    try:
        from vllm.utils.argparse_utils import FlexibleArgumentParser as Parser
    except ImportError:  # older versions keep it elsewhere
        from vllm.utils import FlexibleArgumentParser as Parser

    from importlib.util import find_spec

    if find_spec("pandas") is None:
        raise ImportError("its benchmark client needs pandas, which is not in its environment; pip install 'vllm[bench]' there")
    parser = Parser(prog="vllm bench serve")
    serve.add_cli_args(parser)
    return vllm.__version__, parser, serve.main_async


def plain(result: dict[str, Any]) -> dict[str, Any]:
    """What is wanted of vLLM's result, as plain lists and numbers."""
    gaps = result["itls"]
    summed = [ttft + sum(between) for ttft, between in zip(result["ttfts"], gaps, strict=True)]
    acceptance = None
    if result.get("spec_decode_num_drafts"):
        acceptance = {
            "num_drafts": result["spec_decode_num_drafts"],
            "num_draft_tokens": result["spec_decode_draft_tokens"],
            "num_accepted_tokens": result["spec_decode_accepted_tokens"],
            "per_position": list(result["spec_decode_per_position_acceptance_rates"]),
        }
    return {
        "seconds": result["duration"],
        "ttft_seconds": list(result["ttfts"]),
        "latency_seconds": list(result.get("latencies") or summed),
        "prompt_tokens": list(result["input_lens"]),
        "output_tokens": list(result["output_lens"]),
        "errors": [error or "" for error in result["errors"]],
        "acceptance": acceptance,
    }


def answer(line: str, parser: argparse.ArgumentParser, run: Any) -> dict[str, Any]:
    try:
        options = parser.parse_args(json.loads(line)["arguments"])
        return {"result": plain(asyncio.run(run(options)))}
    except SystemExit:  # argparse's; what it says is on stderr
        return {"error": "this vLLM's bench serve does not take the arguments it was given; see the log"}
    except Exception as error:  # one cell's failure is the caller's to judge
        return {"error": " ".join(f"{type(error).__name__}: {error}".split())[-600:]}


def main() -> None:
    out = own_stdout()

    def say(document: dict[str, Any]) -> None:
        out.write(json.dumps(document) + "\n")
        out.flush()

    try:
        version, parser, run = load_client()
    except ImportError as error:
        say({"unusable": " ".join(str(error).split())[:600]})
        return
    say({"ready": version})
    for line in sys.stdin:
        say(answer(line, parser, run))


def own_stdout() -> TextIO:
    """The real stdout for answers alone; what vLLM prints, in this process or a child, goes to stderr from here on."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


if __name__ == "__main__":
    main()
