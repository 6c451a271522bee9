"""Runs under the engine's python, which has torchvision: what transformers' own processor makes of videos.

    python video_processor.py CHECKPOINT REQUEST.json ANSWERS.safetensors

REQUEST.json: a list of {"text": rendered, "frames": [picture files], "fps": number, "sampled": bool}; sampled frames are all taken.
ANSWERS.safetensors: by number, "0.input_ids", "0.pixel_values_videos", "0.video_grid_thw", "0.mm_token_type_ids". Imports nothing of
mtpress.
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoProcessor
from transformers.video_utils import VideoMetadata


def main() -> None:
    checkpoint, request, answers = map(Path, sys.argv[1:])
    processor = AutoProcessor.from_pretrained(checkpoint, local_files_only=True)
    found = {}
    for number, entry in enumerate(json.loads(request.read_text(encoding="utf-8"))):
        frames = np.stack([np.array(Image.open(file).convert("RGB")) for file in entry["frames"]])
        metadata = VideoMetadata(total_num_frames=len(frames), fps=entry["fps"])
        if entry["sampled"]:
            metadata.frames_indices = list(range(len(frames)))
        made = processor(
            text=[entry["text"]], videos=[frames], video_metadata=[metadata], do_sample_frames=not entry["sampled"], return_tensors="pt"
        )
        found |= {f"{number}.{name}": tensor.contiguous() for name, tensor in made.items() if name != "attention_mask"}
    save_file(found, answers)


if __name__ == "__main__":
    main()
