"""Text, pictures and videos in one calibrated run: the largest of what each shows, whatever their order and whoever moves them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mtpress.builtin import BUILTIN_MODEL, CALIBRATION_FILE, CALIBRATION_IMAGES_FILE
from mtpress.formats.kv_cache import K_SCALE, V_SCALE
from mtpress.plan.recipe import CalibrationSource, Recipe, load_recipe, parse_recipe
from mtpress.stages.quantize import quantize

RECIPE = load_recipe("nvfp4-mixed-vlm").model_copy(update={"kv_cache": "fp8"})
KV = {f"model.language_model.layers.3.{name}" for name in (K_SCALE, V_SCALE)}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Kind of sample → its lines; what a video shows moves."""
    from PIL import Image, ImageDraw

    folder, frames = tmp_path_factory.mktemp("videos"), []
    for number in range(4):
        frames.append(Image.new("RGB", (64, 64), (90, 90, 90)))
        ImageDraw.Draw(frames[-1]).ellipse((8 * number, 10, 8 * number + 30, 40), fill="red")
    frames[0].save(folder / "a.gif", save_all=True, append_images=frames[1:], duration=500)
    video = {
        "messages": [{"role": "user", "content": [{"type": "video", "video": str(folder / "a.gif")}, {"type": "text", "text": "What?"}]}]
    }
    return {
        "text": CALIBRATION_FILE.read_text().splitlines()[:4],
        "images": CALIBRATION_IMAGES_FILE.read_text().splitlines()[2:5],
        "videos": [json.dumps(video)],
    }


def build(folder: Path, name: str, lines: list[list[str]], workers: int = 1, recipe: Recipe = RECIPE) -> dict[str, torch.Tensor]:
    """The weights of a build calibrated by files of these lines."""
    named = []
    for number, rows in enumerate(lines):
        named.append(str(folder / f"{name}-{number}.jsonl"))
        Path(named[-1]).write_text("\n".join(rows))
    quantize(BUILTIN_MODEL, folder / name, recipe, calibration=named, workers=workers, silent=True)
    return load_file(folder / name / "model.safetensors")


@pytest.fixture(scope="module")
def mixed(files: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return build(tmp_path_factory.mktemp("mixed"), "mixed", list(files.values()))


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[n].view(-1).view(torch.uint8), other[n].view(-1).view(torch.uint8)) for n in one
    )


def test_order_and_files_change_nothing(mixed: dict[str, torch.Tensor], files: dict[str, list[str]], tmp_path: Path) -> None:
    rows = [line for lines in files.values() for line in lines]
    assert equal(build(tmp_path, "reversed", [rows[::-1]]), mixed)


def test_the_number_of_workers_changes_nothing(mixed: dict[str, torch.Tensor], files: dict[str, list[str]], tmp_path: Path) -> None:
    assert equal(build(tmp_path, "spread", list(files.values()), workers=2), mixed)


def test_each_scale_is_the_largest_of_the_kinds(mixed: dict[str, torch.Tensor], files: dict[str, list[str]], tmp_path: Path) -> None:
    alone = {kind: build(tmp_path, kind, [lines]) for kind, lines in files.items()}
    from_samples = {name for name in mixed if name.endswith(".input_scale")} | KV
    assert len(from_samples) == 25 + 2
    decided = set()
    for name, tensor in mixed.items():
        values = {kind: found[name] for kind, found in alone.items()}
        if name in from_samples:
            assert tensor == max(values.values())
            decided |= {kind for kind, value in values.items() if value == tensor and len(set(map(float, values.values()))) > 1}
        else:  # with `max` nothing else follows from the samples
            assert all(torch.equal(found.view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8)) for found in values.values())
    assert len(decided) > 1


@pytest.mark.parametrize("quantized", [("attention", "gdn", "mlp"), ("mlp",)], ids=["all", "mlp"])
def test_gptq_finds_the_scales_that_calibration_finds(
    quantized: tuple[str, ...], mixed: dict[str, torch.Tensor], files: dict[str, list[str]], tmp_path: Path
) -> None:
    """Its BF16 stream is calibration's; whether k_proj is rounded or stays changes nothing of what it shows."""
    recipe = parse_recipe(RECIPE.canonical() | {"rounding": "gptq", "quantize": quantized}, "test")
    made = build(tmp_path, "gptq", list(files.values()), recipe=recipe)
    from_samples = {name for name in made if name.endswith(".input_scale")} | KV
    assert len(from_samples) == (27 if len(quantized) == 3 else 4 * 3 + 2)
    assert all(torch.equal(made[name], mixed[name]) for name in from_samples)
    up = "model.language_model.layers.0.mlp.up_proj.weight"
    assert made[up].shape == mixed[up].shape and not torch.equal(made[up], mixed[up])


def test_sources_of_a_recipe_are_files_one_after_another(tmp_path: Path) -> None:
    sources = tuple(CalibrationSource(dataset=name, num_samples=2) for name in ("builtin", "builtin-images"))
    recipe = RECIPE.model_copy(update={"calibration": sources})
    quantize(BUILTIN_MODEL, tmp_path / "named", recipe, silent=True)
    text, images = (file.read_text().splitlines()[:2] for file in (CALIBRATION_FILE, CALIBRATION_IMAGES_FILE))
    assert equal(load_file(tmp_path / "named/model.safetensors"), build(tmp_path, "filed", [text, images]))
    record = json.loads((tmp_path / "named/mtpress.json").read_text())
    assert [part["source"] for part in record["calibration"]["sources"]] == ["builtin", "builtin-images"]
    config = json.loads((tmp_path / "named/config.json").read_text())["quantization_config"]
    assert config["kv_cache_scheme"] == {"dynamic": False, "num_bits": 8, "type": "float"}
