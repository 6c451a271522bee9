"""SHA-256 of everything that mtpress writes, so that a change of its structure can be seen to change no byte.

    python tests/outputs.py OUT.json            builds and hashes all of it in this checkout, some minutes
    python tests/outputs.py --compare A.json B.json
    python tests/outputs.py --pin

Out: "kind/name/file" → SHA-256 (of a refusal: of its line), for every shipped recipe on mtpress-tiny with a few samples, the small
checkpoint in every format, and graft, convert and repair on every broken checkpoint of breaks.py and format_breaks.py, with a base and
without one. Of mtpress.json what the run measured and the versions are left out. Two checkouts are compared on one machine. The bytes
of `pinned` are the same on every machine: no sample and no random number decides one. outputs.json has them, tests/test_outputs.py
compares; where a change of them is meant, `python tests/outputs.py --pin` writes that file anew.
"""

import hashlib
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import breaks
import format_breaks
from checkpoints import SMALL_FORMATS, Edit, weight_only, write_small
from mtpress.builtin import BUILTIN_MODEL
from mtpress.checkpoint.record import RECORD_NAME
from mtpress.errors import InputError
from mtpress.plan.recipe import Recipe, load_recipe, shipped
from mtpress.stages.convert import convert
from mtpress.stages.graft import graft
from mtpress.stages.quantize import quantize
from mtpress.stages.repair import repair

PINNED = Path(__file__).with_name("outputs.json")
MEASURED = re.compile(
    r"seconds|memory|disk|preflight|versions|command|device|kernel|workers|^(path|source|base|checkpoint|out|calibration)$"
)
SAMPLES = [{"text": f"{number} and {number + 7} are {2 * number + 7}. The sum of two numbers has no other value."} for number in range(6)]


def hashes(directory: Path) -> dict[str, str]:
    """File → SHA-256, of the record without what differs from run to run."""
    return {str(file.relative_to(directory)): _sha256(file) for file in sorted(directory.rglob("*")) if file.is_file()}


def _sha256(file: Path) -> str:
    content = file.read_bytes()
    if file.name == RECORD_NAME:
        lasting = json.dumps(_lasting(json.loads(content)), sort_keys=True)
        content = re.sub(re.escape(tempfile.gettempdir()) + r"/\w+", "", lasting).encode()
    return hashlib.sha256(content).hexdigest()


def _lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lasting(inner) for key, inner in value.items() if not MEASURED.search(key)}
    return [_lasting(inner) for inner in value] if isinstance(value, list) else value


def with_samples(name: str) -> Recipe:
    """A shipped recipe with fewer iterations, otherwise as it is."""
    recipe = load_recipe(name)
    if recipe.rounding != "signround":
        return recipe
    return recipe.model_copy(update={"signround": recipe.signround.model_copy(update={"iterations": 4})})


def outcome(out: Path, make: Callable[[Path], object]) -> dict[str, str]:
    """The hashes of what `make` writes to `out`, which is removed, or of the line with which it refuses."""
    try:
        make(out)
        return hashes(out) if out.exists() else {"nothing": ""}
    except InputError as error:
        return {"refused": hashlib.sha256(str(error).replace(str(out.parent), "").encode()).hexdigest()}
    finally:
        shutil.rmtree(out, ignore_errors=True)


def recipes(folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    samples = folder / "samples.jsonl"
    samples.write_text("".join(json.dumps(sample) + "\n" for sample in SAMPLES), encoding="utf-8")
    for name in shipped():
        recipe = with_samples(name)
        made = outcome(folder / "out", lambda out, r=recipe: quantize(BUILTIN_MODEL, out, r, calibration=[str(samples)], silent=True))
        yield f"recipes/{name}", made


def weight_only_recipes(folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """The recipes of NVFP4 without samples: no product of matrices decides a bit of them."""
    for name in shipped():
        if load_recipe(name).format == "nvfp4" and load_recipe(name).budget is None:
            made = outcome(folder / "out", lambda out, name=name: quantize(BUILTIN_MODEL, out, weight_only(name), silent=True))
            yield f"weight-only/{name}", made


def mends(folder: Path, pick: slice = slice(None)) -> Iterator[tuple[str, dict[str, str]]]:
    """repair, graft and convert on sound and on broken checkpoints."""
    base, nvfp4 = write_small(folder / "bf16"), folder / "nvfp4"
    quantize(base, nvfp4, weight_only("nvfp4-mtp-vlm"), silent=True)
    sound = {"": nvfp4} | {kind: write(base, nvfp4, folder / kind) for kind, write in SMALL_FORMATS.items()}
    for kind, path in sound.items():
        yield f"small/{kind or 'modelopt'}", hashes(path)
        yield from _mended(f"sound-{kind or 'modelopt'}", path, base, folder / "out")
    cases = [(name, "", break_it) for name, _, break_it in breaks.CASES] + [(name, kind, b) for name, kind, _, b in format_breaks.CASES]
    for name, kind, break_it in cases[pick]:
        broken = Path(shutil.copytree(sound[kind], folder / "broken"))
        edit = Edit(broken)
        break_it(edit)
        edit.save()
        yield from _mended(f"{kind}-{name}".lstrip("-"), broken, base, folder / "out")
        shutil.rmtree(broken)


def _mended(name: str, path: Path, base: Path, out: Path) -> Iterator[tuple[str, dict[str, str]]]:
    yield f"repair/{name}", outcome(out, lambda out: repair(path, out, silent=True))
    yield f"repair-from-base/{name}", outcome(out, lambda out: repair(path, out, base, silent=True))
    yield f"graft/{name}", outcome(out, lambda out: graft(path, out, base, replace_head=True, silent=True))
    for layout in ("modelopt", "compressed-tensors"):
        yield f"convert/{name}/{layout}", outcome(out, lambda out, to=layout: convert(path, out, to, silent=True))


def pinned(folder: Path) -> dict[str, str]:
    """File → SHA-256 of outputs that no machine and no run changes: weight-only builds, and what is made of one; without records."""
    found, nvfp4 = dict(weight_only_recipes(folder)), folder / "nvfp4"
    quantize(BUILTIN_MODEL, nvfp4, weight_only("nvfp4-mtp-vlm"), silent=True)
    found["convert"] = outcome(folder / "out", lambda out: convert(nvfp4, out, "compressed-tensors", silent=True))
    broken = {"graft": breaks.no_draft_head, "repair": breaks.all_of_it_wrapped}
    for name, break_it in broken.items():
        edit = Edit(Path(shutil.copytree(nvfp4, folder / name)))
        break_it(edit)
        edit.save()
    found["graft"] = outcome(folder / "out", lambda out: graft(folder / "graft", out, BUILTIN_MODEL, silent=True))
    found["repair"] = outcome(folder / "out", lambda out: repair(folder / "repair", out, silent=True))
    return {name: digest for name, digest in flat(iter(found.items())).items() if not name.endswith(RECORD_NAME)}


def flat(found: Iterator[tuple[str, dict[str, str]]]) -> dict[str, str]:
    return {f"{name}/{file}": digest for name, files in found for file, digest in files.items()}


def main() -> int:
    if sys.argv[1] == "--compare":
        before, after = (json.loads(Path(name).read_text()) for name in sys.argv[2:])
        differing = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        print(*differing, f"{len(differing)} of {len(before.keys() | after.keys())} differ", sep="\n")
        return 1 if differing else 0
    found: dict[str, str] = {}
    if sys.argv[1] == "--pin":
        with tempfile.TemporaryDirectory() as folder:
            PINNED.write_text(json.dumps(pinned(Path(folder)), indent=1, sort_keys=True) + "\n", encoding="utf-8")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        for part in (recipes, weight_only_recipes, mends):
            place = Path(folder) / part.__name__
            place.mkdir()
            for name, files in part(place):
                found |= flat(iter([(name, files)]))
                print(f"{len(found):6d}  {name}", file=sys.stderr)
    Path(sys.argv[1]).write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
