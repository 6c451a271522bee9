"""What ships with mtpress: the trained model mtpress-tiny, and calibration and evaluation sets made by its corpus."""

from pathlib import Path

BUILTIN_DIR = Path(__file__).parent
BUILTIN_MODEL = BUILTIN_DIR / "mtpress-tiny"
CALIBRATION_FILE = BUILTIN_DIR / "calibration.jsonl"
EVALUATION_FILE = BUILTIN_DIR / "evaluation.jsonl"
