"""A benchmark as Markdown that a model card can take: the summary, every cell, acceptance, KV capacity, and how it was measured.

In: a `BenchResult`. Out: text. Leaves out: the picture (chart.py).
"""

from collections.abc import Iterable, Sequence

from mtpress.bench.measurement import Cell, CellSummary, Spread
from mtpress.bench.result import BenchResult

Row = Sequence[str]
MISSING = "–"
NOISY = 0.1  # a spread over rounds from which small ratios mean nothing


def markdown(result: BenchResult, picture: str | None = None) -> str:
    """The whole document; picture: the file that it shows, beside it."""
    parts = [
        "# Benchmark",
        f"![Decode speed and draft acceptance]({picture})" if picture else "",
        "## Summary",
        table(*summary_table(result)),
        summary_note(result),
        "## Every cell",
        table(*cell_table(result)),
        "Medians over rounds, (lowest–highest) behind them. TTFT: time to the first token. TPOT: time per output token after the first.",
        *acceptance_part(result),
        *capacity_part(result),
        *failure_part(result),
        "## How it was measured",
        how(result),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(head: Row, rows: Iterable[Row]) -> str:
    cells = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells)


def lengths_and_streams(result: BenchResult) -> tuple[list[int], list[int]]:
    return sorted({cell.length for cell in result.cells}), sorted({cell.streams for cell in result.cells})


def summary_table(result: BenchResult) -> tuple[Row, list[Row]]:
    """As model cards have it: one line a configuration, the lengths side by side, single stream and then each aggregate."""
    lengths, streams = lengths_and_streams(result)
    tokens = "/".join(map(str, lengths))
    heads = [f"single tok/s, {tokens}" if s == 1 else f"{s} streams tok/s, {tokens}" for s in streams]
    rows: list[Row] = []
    for number, configuration in enumerate(result.configurations):
        summaries = result.summaries[number]
        shown = [" / ".join(_median(summaries.get(Cell(length, s)), "tokens_per_second") for length in lengths) for s in streams]
        ratios = [" / ".join(_ratio(summaries.get(Cell(length, s))) for length in lengths) for s in streams]
        rows.append([configuration.build, configuration.mtp, *(v for pair in zip(shown, ratios, strict=True) for v in pair)])
    return ["build", "MTP", *(v for head in heads for v in (head, "× baseline"))], rows


def summary_note(result: BenchResult) -> str:
    rounds = result.settings["rounds"]
    spread_note = f" Speeds of a cell differ by up to {result.largest_spread:.0%} between rounds" if rounds > 1 else ""
    if spread_note:
        noisy = "; the machine was not quiet, and smaller differences between configurations mean nothing."
        spread_note += noisy if result.largest_spread > NOISY else "."
    return (
        f"Decodes of {', '.join(map(str, lengths_and_streams(result)[0]))} tokens. × baseline: against "
        f"“{result.configurations[result.baseline].label}”, compared within each round; "
        + (f"median of {rounds} rounds." if rounds > 1 else "one round, so nothing is known of the spread.")
        + spread_note
    )


def cell_table(result: BenchResult) -> tuple[Row, list[Row]]:
    head = ["configuration", "tokens × streams", "total tok/s", "tok/s a stream", "decode tok/s", "× baseline", "TTFT ms, median / p99",
            "TPOT ms, median / p99", "accepted length"]  # fmt: skip
    rows: list[Row] = []
    for cell in result.cells:
        for number, configuration in enumerate(result.configurations):
            if (summary := result.summaries[number].get(cell)) is None:
                continue
            m = summary.metrics
            rows.append(
                [
                    configuration.label,
                    f"{cell.length} × {cell.streams}",
                    spread(m["tokens_per_second"]),
                    spread(m["stream_tokens_per_second"]),
                    spread(m["decode_tokens_per_second"]),
                    spread(summary.ratios["tokens_per_second"], places=2),
                    f"{_milliseconds(m['ttft_median_seconds'])} / {_milliseconds(m['ttft_p99_seconds'])}",
                    f"{_milliseconds(m['tpot_median_seconds'])} / {_milliseconds(m['tpot_p99_seconds'])}",
                    plain(m["mean_accepted_length"], 2),
                ]
            )
    return head, rows


def acceptance_part(result: BenchResult) -> list[str]:
    rows = acceptance_rows(result)
    if not rows:
        reason = result.prompts.get("no_acceptance")
        return [f"Draft acceptance: not measured; {reason}."] if reason else []
    positions = max(len(row) - 3 for row in rows)
    head = ["configuration", "acceptance rate", "mean accepted length", *(f"position {at + 1}" for at in range(positions))]
    padded = [[*row, *[MISSING] * (len(head) - len(row))] for row in rows]
    note = (
        f"Prompts: {result.prompts['source']}. Acceptance rate: accepted / drafted tokens. Mean accepted length: tokens a step of the "
        "model yields, its own one included. Position: the share of drafts whose token there was accepted."
    )
    return ["## Draft acceptance", table(head, padded), note]


def acceptance_rows(result: BenchResult) -> list[list[str]]:
    """Label, rate, mean accepted length, and one share a position, of each configuration that drafted anything."""
    rows = []
    for number, configuration in enumerate(result.configurations):
        if (counted := result.spec_decode(number)) is not None:
            shares = [f"{share:.1%}" for share in counted.per_position]
            rows.append([configuration.label, f"{counted.acceptance_rate:.1%}", f"{counted.mean_accepted_length:.2f}", *shares])
    return rows


def capacity_part(result: BenchResult) -> list[str]:
    rows: list[Row] = []
    for number, configuration in enumerate(result.configurations):
        facts = result.server(number)
        if facts is not None and facts.kv_cache_tokens is not None:
            concurrency = f"{facts.max_concurrency:.2f}" if facts.max_concurrency is not None else MISSING
            context = f"{facts.max_model_len:,}" if facts.max_model_len is not None else MISSING
            rows.append([configuration.label, f"{facts.kv_cache_tokens:,}", context, concurrency, facts.kv_cache_dtype or MISSING])
    head = ["configuration", "KV cache, tokens", "context", "requests of that length at once", "KV dtype"]
    return ["## KV capacity", table(head, rows), "As the engine reports it after its start."] if rows else []


def failure_part(result: BenchResult) -> list[str]:
    lines = [f"- {result.configurations[f.configuration].label}, round {f.round + 1}: {f.message}" for f in result.failures]
    failed = [run for run in result.runs if run.num_failed]
    lines += [
        f"- {result.configurations[r.configuration].label}, {r.cell}: {r.num_failed} requests failed: {r.first_error}" for r in failed
    ]
    return ["## What failed", "\n".join(lines)] if lines else []


def how(result: BenchResult) -> str:
    machine, settings = result.machine, result.settings
    gpus = ", ".join(f"{gpu['name']} ({gpu['memory_bytes'] / 2**30:.0f} GiB)" for gpu in machine["gpus"]) or "no GPU"
    short = sum(run.num_short for run in result.runs)
    each = "each measuring every server" if settings["running"] else "each starting every configuration once, to and fro"
    cores = f"{machine['num_cores']} core{'s' * (machine['num_cores'] != 1)}"
    lines = [
        f"- {result.date}, {gpus}; {machine['cpu']}, {cores}, {machine['memory_bytes'] / 2**30:.0f} GiB",
        f"- vLLM {result.engine}, measured with its own `vllm bench serve`; greedy" + _temperature(settings["temperature"]),
        f"- rounds: {settings['rounds']}, {each}; warm-up before each; at least {settings['requests']} requests a cell, and twice as many "
        "as streams",
        f"- prompts: {result.prompts['source']}",
        "- answers end where the model ends them" if settings["natural_end"] else "- every answer is decoded to the full length",
        f"- {short} of {sum(len(run.output_tokens) for run in result.runs)} answers were shorter than the cell" if short else "",
    ]
    commands = [f"```sh\n{result.command}\n```"]
    for number, configuration in enumerate(result.configurations):
        facts = result.server(number)
        if facts is not None and facts.command:
            commands.append(f"{configuration.label}:\n\n```sh\n{facts.command}\n```")
    return "\n\n".join(["\n".join(line for line in lines if line), *commands])


def _temperature(value: float) -> str:
    return "" if value == 0 else f" was off: temperature {value}"


def spread(value: Spread | None, places: int = 0) -> str:
    """Median, and (lowest–highest) where rounds differ in what is shown."""
    if value is None:
        return MISSING
    low, middle, high = (f"{x:,.{_places(x, places)}f}" for x in (value.low, value.median, value.high))
    return middle if low == high else f"{middle} ({low}–{high})"


def plain(value: Spread | None, places: int = 0) -> str:
    return MISSING if value is None else f"{value.median:,.{_places(value.median, places)}f}"


def _places(value: float, places: int) -> int:
    return max(places, 1) if abs(value) < 10 else places


def _median(summary: CellSummary | None, metric: str) -> str:
    return MISSING if summary is None else plain(summary.metrics[metric])


def _ratio(summary: CellSummary | None) -> str:
    return MISSING if summary is None else plain(summary.ratios["tokens_per_second"], 2)


def _milliseconds(value: Spread | None) -> str:
    return MISSING if value is None else f"{value.median * 1000:,.{_places(value.median * 1000, 0)}f}"
