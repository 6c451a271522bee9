"""Sign-gradient rounding against the real auto-round: error of every block of mtpress-tiny, time and memory of full-width blocks.

    python benchmarks/bench_signround.py [--iters 200] [--tokens 32 128] [--wide-iters 3] [--rounds 1] [--skip-error] [--json FILE]

Out: tables and JSON.
error   Both tune the four blocks of mtpress-tiny on the same 64 samples of 128 tokens; then the error of each block's output on 32 other
        samples, as a share of the output's mean square: on the BF16 input ("alone") and on what the rounded blocks before made ("in a
        row", which is what both tune for), with plain rounding and searched scales beside it; --iters 0 takes those two alone.
time    One Gated DeltaNet and one full-attention block of hidden size 5120, random weights, batches of 8 samples of each of `--tokens`
        lengths, in turn, each in a process of its own. Seconds of an iteration are the median of all but the first; CPU seconds stand
        still while other work has the cores. Memory is the process's peak.
auto-round runs in .envs/autoround, once as it is when called from Python and, with --compile, as its command runs it.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import qwen3_6_files
from measuring import measured, options, table, write_json
from mtpress.builtin import BUILTIN_MODEL, CALIBRATION_FILE, EVALUATION_FILE
from mtpress.calibration.samples import encode_row, read_jsonl
from mtpress.chat.encoder import ChatEncoder
from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.models.qwen3_5.layers import StreamedBody
from mtpress.models.qwen3_5.names import QUANTIZABLE, layer_shapes
from mtpress.progress import human_bytes
from mtpress.rounding import rtn, search
from qwen3_6_files import Width
from signround_timed import dequantized

HERE = Path(__file__).resolve().parent
LENGTH = 128  # of the error's samples
KINDS = ("linear_attention", "full_attention")
OURS, THEIRS, PLAIN, SEARCHED = "mtpress", "auto-round", "plain rounding", "searched scales"
UNTUNED = {PLAIN: rtn.round_matrix, SEARCHED: search.round_matrix}


def main() -> None:
    parser = options(__doc__ or "", "bench_signround")
    parser.add_argument("--iters", type=int, default=200)
    parser.add_argument("--tokens", type=int, nargs="*", default=[32, 128])
    parser.add_argument("--wide-iters", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--skip-error", action="store_true")
    chosen = parser.parse_args()
    python = subprocess.run(
        [sys.executable, HERE.parent / "locks/make_env.py", "autoround"], check=True, stdout=subprocess.PIPE, text=True
    ).stdout.splitlines()[-1]  # fmt: skip
    Path("build").mkdir(exist_ok=True)
    found: dict[str, Any] = {"threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory(dir="build") as scratch:
        if not chosen.skip_error:
            found["error"] = compare_errors(Path(scratch), python, chosen.iters)
        if chosen.tokens:
            found["wide"] = compare_costs(Path(scratch), python, chosen)
    write_json(chosen.json, found)


def compare_errors(here: Path, python: str, iterations: int) -> dict[str, Any]:
    source, tokens = write_tiny(here / "tiny"), here / "tokens.json"
    tokens.write_text(json.dumps(chunks(CALIBRATION_FILE, 64)), encoding="utf-8")
    tuners = ((THEIRS, python, "autoround_timed.py"), (OURS, sys.executable, "signround_timed.py")) if iterations else ()
    for who, interpreter, script in tuners:
        measured([interpreter, str(HERE / script), str(source), str(here / who), str(tokens), "--iters", str(iterations)])
    rounded = {who: read_weights(here / who) for who, *_ in tuners}
    errors = block_errors(Checkpoint.open(source), rounded, chunks(EVALUATION_FILE, 32))
    show_errors(errors)
    return errors


def show_errors(errors: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    for way, of in errors.items():
        columns = {who: [*errors, statistics.mean(errors)] for who, errors in of.items()}
        if OURS in of:
            columns[f"{OURS} / {THEIRS}"] = [ours / theirs for ours, theirs in zip(columns[OURS], columns[THEIRS], strict=True)]
        names = [*range(len(of[PLAIN])), "mean"]
        print(f"\nerror {way}")
        table(["block", *columns], [[name, *row] for name, *row in zip(names, *columns.values(), strict=True)])


def compare_costs(here: Path, python: str, chosen: argparse.Namespace) -> dict[str, Any]:
    source, found, rows = write_wide(here / "wide"), {}, []
    contenders = [(THEIRS, [python, str(HERE / "autoround_timed.py")], [])]
    if chosen.compile:
        contenders.append((f"{THEIRS}, compiled", [python, str(HERE / "autoround_timed.py")], ["--compile"]))
    contenders.append((OURS, [sys.executable, str(HERE / "signround_timed.py")], []))
    for length in chosen.tokens:
        tokens = here / f"tokens-{length}.json"
        tokens.write_text(json.dumps(torch.randint(0, 256, (8, length)).tolist()), encoding="utf-8")
        runs: dict[str, list[Any]] = {who: [] for who, *_ in contenders}
        for _ in range(chosen.rounds):
            for who, command, more in contenders:
                out = here / "out"
                run = measured([*command, str(source), str(out), str(tokens), "--iters", str(chosen.wide_iters), *more])
                shutil.rmtree(out)
                runs[who].append((run.peak_bytes, [block["clock"] for block in json.loads(run.stdout.splitlines()[-1])["blocks"]]))
        found[str(length)] = runs
        costs = {who: [*iteration_seconds(made), max(peak for peak, _ in made)] for who, made in runs.items()}
        for who, (wall, cpu, peak) in costs.items():
            more_than = [costs[OURS][0][i] / wall[i] for i in range(2)] + [costs[OURS][1][i] / cpu[i] for i in range(2)]
            ratios = "1" if who == OURS else " / ".join(f"{ratio:.2f}" for ratio in more_than)
            memory = "1" if who == OURS else f"{costs[OURS][2] / peak:.2f}"
            rows.append([8 * length, who, *wall, *cpu, ratios, human_bytes(peak), memory])
    print("\ntime and memory")
    heads = [f"{kind} {unit}" for unit in ("s", "CPU s") for kind in ("GDN", "attention")]
    table(["tokens an iteration", "", *heads, f"{OURS} / it", "peak memory", f"{OURS} / it"], rows)
    return found


def iteration_seconds(made: Sequence[tuple[int, list[list[list[float]]]]]) -> tuple[list[float], list[float]]:
    """Median wall and CPU seconds of an iteration, the first of each run left out; one figure a block."""
    return tuple(  # type: ignore[return-value]
        [
            statistics.median(b[unit] - a[unit] for _, clocks in made for a, b in zip(clocks[block][1:], clocks[block][2:], strict=False))
            for block in range(2)
        ]
        for unit in range(2)
    )


def block_errors(source: Checkpoint, rounded: Mapping[str, Mapping[str, Tensor]], tokens: Sequence[Sequence[int]]) -> dict[str, Any]:
    """ "alone" and "in a row" → who → mean squared error of each block's output, over the output's mean square."""
    body, ids = StreamedBody(source.config, torch.device("cpu")), torch.tensor(tokens)
    positions = torch.arange(ids.shape[1]).expand(3, len(ids), -1)
    exact = source.read("model.embed_tokens.weight")[ids]
    rows = dict.fromkeys((*UNTUNED, *rounded), exact)
    found: dict[str, dict[str, list[float]]] = {way: {who: [] for who in rows} for way in ("alone", "in a row")}
    for layer in range(body.text_config.num_hidden_layers):
        start = f"model.layers.{layer}."
        weights = {name.removeprefix(start): source.read(name) for name in source.tensors if name.startswith(start)}
        linears = {f"{name}.weight" for part in QUANTIZABLE.values() for name in part} & weights.keys()

        def through(states: Tensor, changed: Mapping[str, Tensor], weights: dict[str, Tensor] = weights, layer: int = layer) -> Tensor:
            module = body.decoder_layer(layer, weights | changed)
            with torch.no_grad(), body.delta_rule(module):
                return body.through(module, states, positions)

        expected = through(exact, {})
        for who in rows:
            if who in UNTUNED:
                changed = {name: dequantized(*UNTUNED[who](weights[name])) for name in linears}
            else:
                changed = {name: rounded[who][start + name] for name in linears}
            for way, states in (("alone", exact), ("in a row", rows[who])):
                made = through(states, changed)
                error = (made.float() - expected.float()).square().mean() / expected.float().square().mean()
                found[way][who].append(float(error))
            rows[who] = made
        exact = expected
    return found


def chunks(file: Path, count: int) -> list[list[int]]:
    """The first `count` pieces of LENGTH tokens of a set that ships with mtpress."""
    encoder = ChatEncoder(BUILTIN_MODEL)

    def ids() -> Iterator[int]:
        for where, row in read_jsonl(file):
            yield from encode_row(encoder, row, where).input_ids.tolist()

    tokens = list(ids())
    return [tokens[i : i + LENGTH] for i in range(0, len(tokens) - LENGTH + 1, LENGTH)][:count]


def read_weights(directory: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def write_tiny(out: Path) -> Path:
    """mtpress-tiny's language model, which auto-round takes as text only."""
    source = Checkpoint.open(BUILTIN_MODEL)
    out.mkdir()
    body = {
        name.replace("model.language_model.", "model."): name for name in source.tensors if not name.startswith(("mtp.", "model.visual"))
    }
    save_file({name: source.read(stored) for name, stored in body.items()}, out / "model.safetensors", {"format": "pt"})
    write_config(out, source.text_config)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUILTIN_MODEL / name, out / name)
    return out


def write_wide(out: Path) -> Path:
    """A text model of two layers, one of each kind, as wide as Qwen3.6-27B; random weights."""
    width, random = Width(vocab_size=1024), torch.Generator().manual_seed(0)

    def drawn(shape: Sequence[int], size: float) -> Tensor:
        return torch.randn(*shape, generator=random).mul_(size).bfloat16()

    tensors = {"model.embed_tokens.weight": drawn((1024, width.hidden_size), 1), "model.norm.weight": drawn((width.hidden_size,), 0.1)}
    tensors["lm_head.weight"] = drawn((1024, width.hidden_size), 0.02)
    for layer, kind in enumerate(KINDS):
        for name, shape in layer_shapes(qwen3_6_files.config(width, 2), kind).items():
            tensors[f"model.layers.{layer}.{name}"] = drawn(shape, 0.02 if len(shape) > 1 else 0.1)
    out.mkdir()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    write_config(out, qwen3_6_files.text_config(width, 2) | {"layer_types": list(KINDS)})
    for name, content in qwen3_6_files.files(width, 2).items():
        if name.startswith("tokenizer"):
            (out / name).write_bytes(content)
    return out


def write_config(out: Path, text_config: Mapping[str, Any]) -> None:
    config = dict(text_config) | {"architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text", "mtp_num_hidden_layers": 0}
    config.pop("full_attention_interval", None)
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")


if __name__ == "__main__":
    main()
