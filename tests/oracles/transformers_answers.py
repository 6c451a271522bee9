"""The oracle: what transformers, with auto-round installed, makes of a checkpoint, the way its model card's reader loads it.

    .envs/autoround/bin/python tests/oracles/transformers_answers.py REQUEST.json RESULT.json LOGITS.safetensors

In: {"class": name of an Auto class, "checkpoint": path, "questions": [messages, …]}, or a list of such. A content part may be
{"type": "image", "path": file}. Out: per entry the greedy answers, the class that was loaded, the classes of its quantized linears,
and which parameters were missing; as "0.0", "0.1", … the float32 logits [T, vocabulary] at each token of each answer. No
trust_remote_code. Runs on the packages of locks/autoround.txt and imports nothing of mtpress.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from PIL import Image
from safetensors.torch import save_file

MAX_TOKENS = 24


def encoded(checkpoint: str, messages: list[dict]) -> dict[str, torch.Tensor]:
    """The question as the model takes it: by the tokenizer or, if it has pictures, by the processor."""
    parts = [part for m in messages if isinstance(m["content"], list) for part in m["content"]]
    images = [Image.open(part["path"]).convert("RGB") for part in parts if part["type"] == "image"]
    kind = transformers.AutoProcessor if images else transformers.AutoTokenizer
    coder = kind.from_pretrained(checkpoint, local_files_only=True)
    text = coder.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return coder(text=[text], **({"images": images} if images else {}), return_tensors="pt")


def answer(entry: dict, logits: dict[str, torch.Tensor], number: int) -> dict:
    """One entry of the request; its logits go into `logits`."""
    model, info = getattr(transformers, entry["class"]).from_pretrained(
        entry["checkpoint"], device_map="cpu", output_loading_info=True, local_files_only=True
    )
    model.eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(entry["checkpoint"], local_files_only=True)
    answers = []
    with torch.inference_mode():
        for index, messages in enumerate(entry["questions"]):
            inputs = encoded(entry["checkpoint"], messages)
            if "pixel_values" in inputs:
                inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
            out = model.generate(
                **inputs, max_new_tokens=MAX_TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True
            )  # fmt: skip
            tokens = out.sequences[0, inputs["input_ids"].shape[1] :]
            answers.append(tokenizer.decode(tokens, skip_special_tokens=True).strip())
            logits[f"{number}.{index}"] = torch.stack([step[0].float() for step in out.logits])
    linears = {name: type(module).__name__ for name, module in model.named_modules() if hasattr(module, "qweight")}
    return {
        "class": type(model).__name__,
        "answers": answers,
        "dtype": str(model.dtype),
        "linears": linears,
        "missing": sorted(map(str, info["missing_keys"])),
        "unexpected": sorted(map(str, info["unexpected_keys"])),
    }


def main() -> None:
    request, result, logits_file = map(Path, sys.argv[1:])
    entries = json.loads(request.read_text(encoding="utf-8"))
    logits: dict[str, torch.Tensor] = {}
    found = [answer(entry, logits, number) for number, entry in enumerate(entries)]
    save_file(logits, logits_file)
    result.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
