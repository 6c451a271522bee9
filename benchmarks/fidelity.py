"""What each choice of scales and codes costs in quality, on mtpress-tiny: the tables of docs/fidelity.md.

    python benchmarks/fidelity.py [--only NAME…] [--samples 128] [--keep DIR] [--write] [--json FILE]

In: mtpress-tiny, the calibration set and both evaluation sets that ship with mtpress. Every checkpoint is calibrated on the same
documents: mtpress's by `quantize`, modelopt's and auto-round's by the real libraries in their own environments (auto-round takes the first
64 documents that have 64 tokens, and no more of them; modelopt's lack the draft head, which is grafted). Out: one pass of
`mtpress eval` over all of them; KL with its interval, its ratio to modelopt's max (INT4: to plain rounding) on the same documents,
drafts accepted, bytes. --write puts the tables into the document between their markers. Some 20 minutes of one core.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from measuring import machine, write_json
from mtpress.builtin import BUILTIN_MODEL, CALIBRATION_FILE
from mtpress.calibration.samples import load_calibration
from mtpress.evaluation.documents import ALL, IMAGES, TEXT
from mtpress.evaluation.result import EvalResult, number, shown
from mtpress.plan.recipe import CalibrationSource, Recipe, load_recipe, parse_recipe
from mtpress.progress import human_bytes
from mtpress.stages.eval import evaluate
from mtpress.stages.graft import graft
from mtpress.stages.quantize import quantize
from real_exports import COPIED, peer_python

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs/fidelity.md"


@dataclass(frozen=True)
class Build:
    """A row; the first of a table is what the others are held against. recipe: changes to the recipe of its format; or export: a script
    of tests/oracles by its environment, and arguments."""

    title: str
    recipe: dict[str, Any] = field(default_factory=dict)
    export: tuple[str, ...] = ()
    calibration: str = "builtin"


def _gptq(scales: str) -> dict[str, Any]:
    return {"rounding": "gptq", "gptq": {"scales": scales}}


NVFP4 = {
    "modelopt-max": Build("modelopt 0.47, max", export=("modelopt",)),
    "modelopt-mse": Build("modelopt 0.47, MSE sweep", export=("modelopt", "--algorithm", "mse")),
    "modelopt-local-hessian": Build("modelopt 0.47, local Hessian", export=("modelopt", "--algorithm", "local_hessian")),
    "max": Build("`max`", {"rounding": "max"}),
    "four-over-six": Build("`four-over-six`", {"rounding": "four-over-six"}),
    "sweep": Build("`sweep`", {"rounding": "sweep"}),
    "hessian": Build("`hessian`", {"rounding": "hessian"}),
    "gptq-max": Build("`gptq`, scales `max`", _gptq("max")),
    "gptq-sweep": Build("`gptq`, scales `sweep`", _gptq("sweep")),
    "gptq-hessian": Build("`gptq`, scales `hessian`", _gptq("hessian")),
    "gptq-mixed": Build("the same, half of the documents with pictures", _gptq("hessian"), calibration="builtin-mixed"),
}
INT4 = {
    "int4-rtn": Build("`rtn`", {"rounding": "rtn"}),
    "int4-search": Build("`search`", {"rounding": "search"}),
    "int4-hessian": Build("`hessian`", {"rounding": "hessian"}),
    "int4-gptq": Build("`gptq`, scales `hessian`", _gptq("hessian")),
    "int4-gptq-mixed": Build("the same, half of the documents with pictures", _gptq("hessian"), calibration="builtin-mixed"),
    "int4-signround": Build("`signround`, 200 iterations", {"rounding": "signround"}),
    "autoround": Build("auto-round 0.16.1, 200 iterations", export=("autoround", "--iters", "200", "--seqlen", "64", "--nsamples", "64")),
}
TABLES = {"nvfp4": ("nvfp4-mtp-vlm", NVFP4, "modelopt-max"), "int4": ("int4-mtp-vlm", INT4, "int4-rtn")}


def recipe_of(build: Build, name: str, samples: int) -> Recipe:
    content = load_recipe(name).model_dump(exclude_defaults=True) | {"rounding": None} | build.recipe
    content["calibration"] = CalibrationSource(num_samples=samples)
    return parse_recipe(content, name)


def make(name: str, build: Build, base: str, samples: int, folder: Path) -> Path:
    """The checkpoint, made unless it is there."""
    out = folder / name
    if out.exists():
        return out
    print(f"making {name}", file=sys.stderr, flush=True)
    if not build.export:
        quantize(BUILTIN_MODEL, out, recipe_of(build, base, samples), calibration=[build.calibration], silent=True)
        return out
    environment, *arguments = build.export
    tokens = folder / "tokens.json"
    loaded = load_calibration(BUILTIN_MODEL, CalibrationSource(num_samples=samples), [str(CALIBRATION_FILE)])
    tokens.write_text(json.dumps([sample.input_ids.tolist() for sample in loaded.samples]), encoding="utf-8")
    made = folder / f"{name}.export"
    script = ROOT / f"tests/oracles/{environment}_export.py"
    command = [str(peer_python(environment)), str(script), str(BUILTIN_MODEL), str(made), str(tokens), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-3000:]}")
    if environment == "modelopt":
        for file in COPIED:
            (made / file).write_bytes((BUILTIN_MODEL / file).read_bytes())
        graft(made, out, BUILTIN_MODEL, silent=True)
    else:
        made.rename(out)
    return out


def ratio(result: EvalResult, reference: str, name: str, group: str) -> str:
    """Mean KL of a checkpoint over the reference's, on the same draws of documents."""
    if name == reference:
        return "1"
    pair = next(pair for pair in result.pairs if (pair.group, pair.first, pair.second) == (group, reference, name))
    return shown(pair.kl_ratio, 3)


def rows(result: EvalResult, builds: dict[str, Build], reference: str) -> Iterator[str]:
    groups = [ALL, TEXT, IMAGES]
    heads = [f"KL, {group} | ÷" for group in groups]
    yield "| choice | bytes | " + " | ".join(heads) + " | top-1 the same | drafts accepted ÷ BF16's, positions 1 2 3 |"
    yield "|---|---|" + "---|---|" * len(groups) + "---|---|"
    for name, build in builds.items():
        found = result.checkpoints.get(name)
        if found is None:
            continue
        cells = [f"{shown(found.groups[g].kl_mean, 3)} | {ratio(result, reference, name, g)}" for g in groups]
        drafts = " ".join(number(at.ratio.value, 3) for at in found.acceptance or () if at.ratio is not None)
        agreed = f"{found.groups[ALL].top1_agreement.value:.2%}"
        yield (
            f"| {build.title} | {human_bytes(found.num_bytes)} | " + " | ".join(cells) + f" | {agreed} | {drafts or found.no_acceptance} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these rows; the reference of a table is always there")
    parser.add_argument("--samples", type=int, default=128, help="documents to calibrate on")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="make the checkpoints here and leave them")
    parser.add_argument("--write", action="store_true", help=f"into {DOCUMENT.relative_to(ROOT)}")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    results: dict[str, EvalResult] = {}
    with tempfile.TemporaryDirectory() if options.keep is None else nullcontext(str(options.keep)) as place:
        folder = Path(place)
        folder.mkdir(exist_ok=True)
        for table, (base, builds, reference) in TABLES.items():
            chosen = {n: b for n, b in builds.items() if not options.only or n in (*options.only, reference)}
            if options.only and not set(options.only) & set(builds):
                continue
            made = [make(name, build, base, options.samples, folder) for name, build in chosen.items()]
            result = evaluate(made, BUILTIN_MODEL)
            results[table] = result
            text = "\n".join(rows(result, builds, reference))
            print(f"\n{text}\n\n{machine()}", flush=True)
            if options.write:
                write(table, text)
    if options.json:
        write_json(options.json, {table: result.as_json() for table, result in results.items()})


def write(table: str, text: str) -> None:
    """Between the markers of the document."""
    document = DOCUMENT.read_text(encoding="utf-8")
    begin, end = f"<!-- {table}: benchmarks/fidelity.py -->\n", f"<!-- end of {table} -->"
    before, _, rest = document.partition(begin)
    _, found, after = rest.partition(end)
    assert found, f"{DOCUMENT} has no place for {table}"
    DOCUMENT.write_text(f"{before}{begin}{text}\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
