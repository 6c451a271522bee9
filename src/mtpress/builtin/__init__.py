"""What ships with mtpress: the trained model mtpress-tiny, and sets of text and of pictures made by its corpus."""

from pathlib import Path

BUILTIN_DIR = Path(__file__).parent
BUILTIN_MODEL = BUILTIN_DIR / "mtpress-tiny"
CALIBRATION_FILE = BUILTIN_DIR / "calibration.jsonl"
EVALUATION_FILE = BUILTIN_DIR / "evaluation.jsonl"
CALIBRATION_IMAGES_FILE = BUILTIN_DIR / "calibration_images.jsonl"
EVALUATION_IMAGES_FILE = BUILTIN_DIR / "evaluation_images.jsonl"
