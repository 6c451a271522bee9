"""What an engine generates by where a request says nothing: generation_config.json.

In: that file of a checkpoint and of its source, and the sampling that the checkpoint's record says was set on purpose. Out: a
`Difference` for what is not the source's; sampling within what people use is a topic of its own. Leaves out: end tokens that a rule of
rules/tokenizer.py asks for.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from mtpress.comparison.difference import Difference, Topic, differing
from mtpress.json_files import shown
from mtpress.quant_config.tokenizer_files import GENERATION, GENERATION_IDS, SAMPLING

FREE = {
    "transformers_version", "_from_model_config", "use_cache", "output_attentions", "output_hidden_states", "return_dict_in_generate",
    "output_scores", "output_logits", "cache_implementation", "disable_compile", "generation_config", *GENERATION_IDS,
}  # fmt: skip
DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "repetition_penalty": 1.0}  # transformers' GenerationConfig
# Sampling that somebody may choose: what Qwen and the makers of fine-tunes publish lies well inside.
USUAL = {
    "temperature": (0.0, 1.5), "top_p": (0.5, 1.0), "top_k": (0, 200), "min_p": (0.0, 0.3), "repetition_penalty": (0.9, 1.3),
    "presence_penalty": (-2.0, 2.0), "frequency_penalty": (-2.0, 2.0), "max_new_tokens": (1024, 1 << 24),
}  # fmt: skip


def _ends(content: Mapping[str, Any]) -> set[Any]:
    said = content.get("eos_token_id")
    return {number for number in (said if isinstance(said, list) else [said]) if type(number) is int}


def differences(
    content: Mapping[str, Any] | None, base: Mapping[str, Any] | None, chosen: Mapping[str, Any], marks: Collection[int]
) -> Iterator[Difference]:
    """chosen: key → value of the sampling that a recipe set. marks: the ids that may end a turn: <|im_end|> and <|endoftext|>."""
    if content is None or base is None:
        return
    for key, here, there in differing(content, base, DEFAULTS, FREE):
        if key in chosen and chosen[key] == content.get(key):
            continue
        low, high = USUAL.get(key, (1.0, 0.0))
        usual = key == "do_sample" or here is None or (isinstance(here, int | float) and low <= here <= high)
        topic: Topic = "sampling" if key in (*SAMPLING, "max_new_tokens") and usual else "generation"
        yield Difference(topic, GENERATION, f"{GENERATION}: {key}", None if here is None else shown(here), shown(there))
    ours, theirs = _ends(content), _ends(base)
    added, gone = ours - theirs - set(marks), theirs - ours - set(marks)
    if added or gone:
        yield Difference(
            "generation", GENERATION, f"{GENERATION}: eos_token_id", shown(sorted(ours)), shown(sorted(theirs))
        )  # fmt: skip
    for key in ("bos_token_id", "pad_token_id"):
        here, there = content.get(key), base.get(key)
        if here is not None and there is not None and here != there and here not in marks:
            yield Difference("generation", GENERATION, f"{GENERATION}: {key}", shown(here), shown(there))
