import json
from dataclasses import replace

from bench_results import CELLS, FAILURE, result
from mtpress.bench.markdown import markdown, summary_table


def rows_of(text: str, heading: str) -> list[list[str]]:
    """The cells of the table below a heading, its head and rule left out."""
    section = text.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in section.splitlines() if line.startswith("|")][2:]


def test_the_summary_reads_as_model_cards_do() -> None:
    head, rows = summary_table(result())
    assert head == ["build", "MTP", "single tok/s, 50/350", "× baseline", "2 streams tok/s, 50/350", "× baseline"]
    assert rows == [
        ["tiny", "off", "95 / 95", "1.00 / 1.00", "190 / 190", "1.00 / 1.00"],
        ["tiny", "n=2", "190 / 190", "2.00 / 2.00", "380 / 380", "2.00 / 2.00"],
    ]


def test_every_cell_has_its_spread_and_its_latencies() -> None:
    rows = rows_of(markdown(result()), "Every cell")
    assert len(rows) == 2 * len(CELLS)
    assert rows[1][:3] == ["tiny, MTP n=2", "50 × 1", "190 (180–200)"]
    assert rows[1][5] == "2.00"
    assert rows[0][8] == "–"
    assert rows[1][8] == "2.20"


def test_acceptance_by_position_is_of_all_cells() -> None:
    rows = rows_of(markdown(result(mtp=(0, 1, 3))), "Draft acceptance")
    assert rows == [["tiny, MTP n=1", "60.0%", "1.60", "80.0%", "–", "–"], ["tiny, MTP n=3", "60.0%", "2.80", "80.0%", "60.0%", "40.0%"]]


def test_random_prompts_have_no_acceptance_but_a_reason() -> None:
    text = markdown(result(mtp=(0,), prompts={"source": "random tokens", "short": "random tokens", "no_acceptance": "it says nothing"}))
    assert "Draft acceptance: not measured; it says nothing." in text
    assert "## Draft acceptance" not in text


def test_command_machine_engine_and_capacity_are_named() -> None:
    text = markdown(result())
    for said in ("mtpress bench /home/me/tiny", "Some CPU, 2 cores, 24 GiB", "no GPU", "vLLM 0.32.0", "2026-01-02", "45 prompts"):
        assert said in text
    assert rows_of(text, "KV capacity")[0] == ["tiny, MTP off", "123,456", "4,096", "30.14", "fp8"]


def test_a_failure_is_told_and_breaks_no_table() -> None:
    whole = result()
    broken = replace(whole, failures=(FAILURE,), runs=tuple(run for run in whole.runs if run.configuration == 0))
    assert not broken.complete
    text = markdown(broken)
    assert "- tiny, MTP n=2, round 1: the engine died: out of memory | really" in text
    assert rows_of(text, "Summary")[1] == ["tiny", "n=2", "– / –", "– / –", "– / –", "– / –"]


def test_a_noisy_machine_is_called_one() -> None:
    assert "up to 11% between rounds; the machine was not quiet" in markdown(result())
    assert "nothing is known of the spread" in markdown(result(rounds=1))


def test_paths_of_this_machine_stay_out_of_what_is_published() -> None:
    short = result(failures=(FAILURE,)).without_paths({"/home/me/tiny": "tiny", "/home/me": "me"})
    assert short.command == "mtpress bench tiny"
    assert short.servers[0].command == "vllm serve tiny"
    assert "/home" not in markdown(short)
    assert "/home" not in json.dumps(short.as_json())


def test_json_holds_every_request() -> None:
    document = json.loads(json.dumps(result().as_json(), allow_nan=False))
    assert len(document["runs"]) == 16
    assert document["configurations"][1]["cells"][0]["ratios"]["tokens_per_second"]["median"] == 2.0
    assert document["configurations"][1]["spec_decode"]["per_position"] == [0.8, 0.6]
    assert document["runs"][0]["latency_seconds"] == [0.5]
