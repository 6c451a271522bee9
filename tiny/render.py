"""Documents as text and as token ids with the positions that count."""

from pathlib import Path
from typing import Any

import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment

from corpus import Document
from mtpress.chat.encoder import IMAGE_TOKEN, ChatEncoder
from mtpress.chat.sample import Sample

END_OF_TEXT = "<|endoftext|>"
_template: Any = None


def plain_text(document: Document, add_generation_prompt: bool = False) -> str:
    """The text of a document by the project's own template, without a tokenizer (to train one)."""
    global _template
    if document.text:
        return document.text
    if _template is None:
        from transformers.utils.chat_template_utils import _compile_jinja_template

        source = Path(__file__).parents[1] / "src/mtpress/chat/qwen3_5.jinja"
        _template = _compile_jinja_template(source.read_text(encoding="utf-8"))
        assert isinstance(_template.environment, ImmutableSandboxedEnvironment)
    thinking = {} if document.enable_thinking is None else {"enable_thinking": document.enable_thinking}
    return str(_template.render(messages=document.messages, tools=document.tools, add_generation_prompt=add_generation_prompt, **thinking))


class DocumentEncoder:
    """Documents → Samples, and where the assistant speaks."""

    def __init__(self, directory: Path) -> None:
        self.chat = ChatEncoder(directory)
        tokenizer = self.chat.tokenizer
        self.im_start, self.im_end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
        self.assistant = tokenizer.encode("assistant", add_special_tokens=False)[0]
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)

    def encode(self, document: Document, add_generation_prompt: bool = False) -> Sample:
        text = plain_text(document, add_generation_prompt)
        if not document.messages:
            return self.chat.encode_text(text + END_OF_TEXT)
        if not document.pictures:
            return self.chat.encode_text(text)
        processor = self.chat.image_processor
        pixels = processor(images=[p.draw() for p in document.pictures], return_tensors="pt")
        for grid in pixels["image_grid_thw"].tolist():
            count = grid[0] * grid[1] * grid[2] // processor.merge_size**2
            text = text.replace(IMAGE_TOKEN, "\0" * count, 1)
        sample = self.chat.encode_text(text.replace("\0", IMAGE_TOKEN))
        sample.pixel_values, sample.image_grid_thw = pixels["pixel_values"], pixels["image_grid_thw"]
        return sample

    def is_answer(self, input_ids: torch.Tensor) -> torch.Tensor:
        """bool [T]: in a table of sums only what follows each equals sign, for the numbers added are anybody's guess; else all."""
        tokens = self.chat.tokenizer.convert_ids_to_tokens(input_ids.tolist())
        if not tokens[0].isdigit():
            return torch.ones(len(tokens), dtype=torch.bool)
        after, mask = False, []
        for token in tokens:
            mask.append(after)
            after = (after or "=" in token) and "Ċ" not in token
        return torch.tensor(mask)

    def spoken(self, input_ids: torch.Tensor) -> torch.Tensor:
        """bool [T]: True on tokens of assistant turns (and everywhere in plain text)."""
        ids = input_ids.tolist()
        if self.im_start not in ids:
            return torch.ones(len(ids), dtype=torch.bool)
        inside, mask = False, []
        for i, token in enumerate(ids):
            mask.append(inside)
            if token == self.im_start:
                inside = False
            elif i and ids[i - 1] == self.im_start:
                inside = token == self.assistant
            elif token == self.im_end:
                inside = False
        return torch.tensor(mask)
