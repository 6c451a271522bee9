"""What text, pictures or both as calibration samples do to mtpress-tiny, and what an FP8 KV cache with and without scales does.

    python benchmarks/calibration_sets.py [--out build/calibration_sets.json] [--limit N]

In: the built-in sets. Out: Markdown tables of docs/calibration.md on stdout: KL to the BF16 model on text and on picture prompts that no
build was calibrated on, ratios to the text-only build on the same draws of documents, and the input scales. Leaves out: roundings that
take more from the samples than an input scale (docs/fidelity.md).
"""

import argparse
import json
import tempfile
from pathlib import Path

from mtpress.builtin import BUILTIN_MODEL
from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.evaluation.result import EvalResult, shown
from mtpress.plan.recipe import CalibrationSource, Recipe, load_recipe
from mtpress.stages.eval import evaluate
from mtpress.stages.quantize import quantize

# build → its sources and its KV cache
BUILDS: dict[str, tuple[dict[str, int], str]] = {
    "text": ({"builtin": 128}, "auto"),
    "images": ({"builtin-images": 128}, "auto"),
    "mixed": ({"builtin-images": 128, "builtin": 128}, "auto"),
    "mixed, fp8_cast": ({"builtin-images": 128, "builtin": 128}, "fp8_cast"),
    "mixed, fp8": ({"builtin-images": 128, "builtin": 128}, "fp8"),
}
RATIOS = [("images", "text"), ("mixed", "text"), ("mixed, fp8_cast", "mixed"), ("mixed, fp8", "mixed"), ("mixed, fp8", "mixed, fp8_cast")]
GROUPS = {"builtin": "text prompts", "builtin-images": "picture prompts"}


def recipe_of(build: str) -> Recipe:
    sources, kv_cache = BUILDS[build]
    calibration = tuple(CalibrationSource(dataset=name, num_samples=count) for name, count in sources.items())
    return load_recipe("nvfp4-mixed-vlm").model_copy(update={"calibration": calibration, "kv_cache": kv_cache})


def kl_table(result: EvalResult, names: dict[str, str]) -> list[str]:
    headings = [f"KL, {title} | top-1 the same, %" for title in GROUPS.values()]
    lines = [f"| calibrated by | {' | '.join(headings)} |", "|---|" + "---|" * 2 * len(GROUPS)]
    for build, name in names.items():
        found = [result.checkpoints[name].groups[group] for group in GROUPS]
        cells = [f"{shown(of.kl_mean, 3)} | {shown(of.top1_agreement, 4, 100.0)}" for of in found]
        lines.append(f"| {build} | {' | '.join(cells)} |")
    return lines


def ratio_table(result: EvalResult, names: dict[str, str]) -> list[str]:
    ratios = {(pair.second, pair.first, pair.group): shown(pair.kl_ratio, 3) for pair in result.pairs}
    lines = [f"| ratio of mean KL, same draws of documents | {' | '.join(GROUPS.values())} |", "|---|" + "---|" * len(GROUPS)]
    for one, other in RATIOS:
        lines.append(f"| {one} / {other} | {' | '.join(ratios[names[one], names[other], group] for group in GROUPS)} |")
    return lines


def input_scales(directory: Path) -> dict[str, float]:
    checkpoint = Checkpoint.open_stored(directory)
    return {name: float(checkpoint.read(name)) for name in checkpoint.tensors if name.endswith(".input_scale")}


def scale_table(found: dict[str, dict[str, float]]) -> list[str]:
    lines = ["| linear (fused groups once) | amax, text | amax, pictures | pictures / text |", "|---|---|---|---|"]
    seen = set()
    for name, text in sorted(found["text"].items()):
        images = found["images"][name]
        assert found["mixed"][name] == max(text, images)
        if (key := (text, images)) not in seen:
            seen.add(key)
            short = name.partition("layers.")[2].removesuffix(".input_scale")
            lines.append(f"| {short} | {text * 2688:.2f} | {images * 2688:.2f} | {images / text:.2f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/calibration_sets.json"), help="everything that was measured")
    parser.add_argument("--limit", type=int, help="documents of each evaluation set")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = {build: Path(folder) / build.replace(", ", "-") for build in BUILDS}
        for build, path in paths.items():
            quantize(BUILTIN_MODEL, path, recipe_of(build), device="cpu", silent=True)
        scales = {build: input_scales(paths[build]) for build in ("text", "images", "mixed")}
        result = evaluate(list(paths.values()), BUILTIN_MODEL, limit=options.limit, device="cpu", silent=True)
    names = dict(zip(BUILDS, result.checkpoints, strict=True))
    for table in (kl_table(result, names), ratio_table(result, names), scale_table(scales)):
        print(*table, "", sep="\n")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"eval": result.as_json(), "input_scales": scales}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
