"""vLLM's own benchmark client (`vllm bench serve`), imported once and asked many times; engine/drivers/loop.py runs it.

A request: {"arguments": [the arguments of `vllm bench serve`]}. Leaves out: what the figures mean (measurement.py), and starting
servers. It imports nothing but vLLM. A new process a cell would pay that import (8 s) each time. Called as a function, vLLM's hand-over
to its Rust client (VLLM_USE_RUST_BENCH), which looks at the command line, does not happen: what measures is the same with every setting
of that variable.

The result, per request in the order in which they were sent:

    seconds        from the first request sent to the last answer
    ttft_seconds, latency_seconds, prompt_tokens, output_tokens    lists; tokens by the server's `usage`
    errors         one string a request, empty where it was answered
    acceptance     the growth of the server's counters: num_drafts, num_draft_tokens, num_accepted_tokens, per_position
                   (shares); null where it does not speculate
"""

import asyncio
from collections.abc import Callable
from typing import Any


def load() -> tuple[str, Callable[[dict[str, Any], Any], dict[str, Any]]]:
    """vLLM's version, and what answers a request."""
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

    def answer(request: dict[str, Any], say: Any) -> dict[str, Any]:
        return plain(asyncio.run(serve.main_async(parser.parse_args(request["arguments"]))))

    return vllm.__version__, answer


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
