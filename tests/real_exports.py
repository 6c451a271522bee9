"""Second-hand checkpoints of mtpress-tiny, made by the real libraries in their own environments and kept under build/.

    python tests/real_exports.py [NAME…]        makes them all, or those named, and prints their paths

In: a name of EXPORTS. Out: a directory as a user of that library has it, never to be changed. An export is made once: it is
kept under a key of the library's lock file, its script, the calibration set and the model, and two processes that want the
same one wait for one another. Leaves out: what is wrong with them; that is for the tests.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from mtpress.builtin import BUILTIN_MODEL, CALIBRATION_FILE

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "tests/oracles"
KEPT = ROOT / "build/real-exports"
NUM_SAMPLES = 16
TIMEOUT_SECONDS = 900  # each takes some 20 s of one core; this leaves room for a busy machine
# modelopt writes no files beside the weights, so its users copy these; the other libraries write their own
COPIED = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json", "video_preprocessor_config.json")


@dataclass(frozen=True)
class Export:
    """How one is made: the environment of locks/, the script of tests/oracles, its further arguments, the files copied beside."""

    environment: str
    script: str
    arguments: tuple[str, ...] = ()
    copied: tuple[str, ...] = ()


W4A16_FP8 = "huggingface/qwen3_5/ptq/w4a16_nvfp4-fp8_attn-kv_fp8_cast"  # NVIDIA's own for this family
EXPORTS = {
    "autoround": Export("autoround", "autoround_export.py"),
    "llmcompressor": Export("llmcompressor", "llmcompressor_export.py"),
    "llmcompressor-gdn": Export("llmcompressor", "llmcompressor_export.py", ("--gdn",)),
    "modelopt": Export("modelopt", "modelopt_export.py", copied=COPIED),
    "modelopt-fp8": Export("modelopt", "modelopt_export.py", ("--fp8",), COPIED),
    "modelopt-w4a16-fp8": Export("modelopt", "modelopt_export.py", ("--recipe", W4A16_FP8), COPIED),
}


def peer_python(environment: str) -> Path:
    """The python of .envs/ENVIRONMENT, made by locks/make_env.py where it is not there yet; RuntimeError with its words if it fails."""
    made = subprocess.run([sys.executable, str(ROOT / "locks/make_env.py"), environment], capture_output=True, text=True)
    if made.returncode:
        raise RuntimeError(f"locks/make_env.py {environment} failed:\n{made.stderr[-3000:]}")
    return Path(made.stdout.splitlines()[-1])


def real_export(name: str) -> Path:
    """The directory of that export, made if it is not there; RuntimeError if the library fails."""
    out = KEPT / f"{name}-{key(EXPORTS[name])}"
    KEPT.mkdir(parents=True, exist_ok=True)
    with (KEPT / f"{name}.flock").open("w") as flock:
        fcntl.flock(flock, fcntl.LOCK_EX)
        if not out.is_dir():
            for older in KEPT.iterdir():
                if re.fullmatch(rf"{name}-[0-9a-f]{{16}}(\.partial)?", older.name):
                    shutil.rmtree(older)
            began = time.monotonic()
            print(f"making {out.relative_to(ROOT)} with {EXPORTS[name].environment}", file=sys.stderr, flush=True)
            partial = out.with_name(out.name + ".partial")
            make(EXPORTS[name], partial)
            partial.rename(out)
            print(f"made {out.relative_to(ROOT)} in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return out


def key(export: Export) -> str:
    """Sixteen hex digits that change with anything the export is made of."""
    digest = hashlib.sha256(f"{export.arguments} {export.copied} {NUM_SAMPLES}".encode())
    files = [ROOT / "locks" / f"{export.environment}.txt", SCRIPTS / export.script, CALIBRATION_FILE, *sorted(BUILTIN_MODEL.iterdir())]
    for file in files:
        digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


def make(export: Export, out: Path) -> None:
    """Runs the library; leaves a whole directory in `out`."""
    python = peer_python(export.environment)
    calibration = out.with_name(out.name + ".json")
    calibration.write_text(json.dumps(samples()), encoding="utf-8")
    command = [str(python), str(SCRIPTS / export.script), str(BUILTIN_MODEL), str(out), str(calibration), *export.arguments]
    settings = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    settings.pop("PYTHONDONTWRITEBYTECODE", None)  # half of a first run is compiling what it imports
    done = subprocess.run(command, capture_output=True, text=True, env=settings, timeout=TIMEOUT_SECONDS)
    calibration.unlink()
    if done.returncode:
        shutil.rmtree(out, ignore_errors=True)
        raise RuntimeError(f"{export.script} failed:\n{done.stderr[-4000:]}")
    for file in export.copied:
        shutil.copyfile(BUILTIN_MODEL / file, out / file)


def samples() -> list[list[int]]:
    """Token ids [NUM_SAMPLES][T] of the first samples of the built-in calibration set that hold no picture."""
    from mtpress.calibration.samples import load_calibration
    from mtpress.plan.recipe import load_recipe

    limits = load_recipe("nvfp4-mtp-vlm").calibration.model_copy(update={"num_samples": 2 * NUM_SAMPLES})
    loaded = load_calibration(BUILTIN_MODEL, limits, [str(CALIBRATION_FILE)]).samples
    return [sample.input_ids.tolist() for sample in loaded if sample.pixel_values is None][:NUM_SAMPLES]


if __name__ == "__main__":
    for chosen in sys.argv[1:] or EXPORTS:
        print(real_export(chosen))
