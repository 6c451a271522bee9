"""Rules on what stands beside the weights, against the source: an engine that goes by it computes what the source computes.

Against an ancestor nothing is an error: what was trained may have other tokens, templates and settings. Added tokens, a template and
generation_config.json are its own; what else computes otherwise is told with both values.
"""

from collections.abc import Callable, Iterator

from mtpress.comparison.difference import Difference, Topic
from mtpress.comparison.weights import Comparison
from mtpress.quant_config.tokenizer_files import TOKENIZER
from mtpress.rules.rule import Problem, Rule
from mtpress.terminal import count

ITS_OWN = ("vocab_size", "dtype", "tie_word_embeddings", "eos_token_id")  # keys of config.json that follow what a fine-tune stores
MOST_TOLD = 5  # differences in one line; --json has all
FROM_SOURCE = "if it was not meant so: mtpress repair CKPT OUT --base SRC --base-is source"


def of_topic(topic: Topic, noun: str) -> Callable[[Comparison], Iterator[Problem]]:
    """The differences of one topic as one problem, each in a line of its own."""

    def find(found: Comparison) -> Iterator[Problem]:
        of = [difference for difference in found.differences if difference.topic == topic and found.kind == "source"]
        if of:
            files = " and ".join(dict.fromkeys(difference.file for difference in of))
            yield Problem(f"{files}: {count(len(of), noun)} not as in the source", tuple(map(str, of)))

    return find


def ancestor_settings(found: Comparison) -> Iterator[Problem]:
    """Sizes are those of what is stored, and the dtype too; which tokens end an answer is the fine-tune's."""
    if found.kind == "ancestor":
        of = [d for d in found.differences if d.topic in ("config", "processor") and d.place.rpartition(".")[2] not in ITS_OWN]
        yield from _told(of, "setting")


def ancestor_tokenizer(found: Comparison) -> Iterator[Problem]:
    """tokenizer.json alone: tokenizer_config.json names the marks of a template."""
    if found.kind == "ancestor":
        yield from _told([d for d in found.differences if d.topic == "tokenizer" and d.file == TOKENIZER and not d.added], "part")


def _told(differences: list[Difference], noun: str) -> Iterator[Problem]:
    """In one problem, with the values of the first few."""
    if differences:
        lines = [f"{d.place}: {d.here or 'nothing'}, the ancestor has {d.there or 'nothing'}" for d in differences]
        more = f"; and {len(lines) - MOST_TOLD} more" if len(lines) > MOST_TOLD else ""
        yield Problem(f"{count(len(lines), noun)} not the ancestor's: {'; '.join(lines[:MOST_TOLD])}{more}", tuple(lines))


def tokenizer_respelled(found: Comparison) -> Iterator[Problem]:
    files = tuple(
        difference.file for difference in found.differences if difference.topic == "tokenizer-spelling" and found.kind == "source"
    )
    if files:
        yield Problem(f"{' and '.join(files)} not byte for byte the source's, with the same tokens", files)


def template_differs(found: Comparison) -> Iterator[Problem]:
    for difference in found.differences:
        if difference.topic == "template" and found.kind == "source":
            yield Problem(f"{difference.file}: neither the source's chat template nor mtpress's", (difference.file,))


RULES = (
    Rule(
        "config-differs",
        "error",
        "Keys of config.json that decide what is computed do not say what the source's say, or are not in the source: the engine computes "
        "something else, or dies. What transformers 4 and 5 spell differently is equal.",
        FROM_SOURCE,
        of_topic("config", "key"),
    ),
    Rule(
        "config-unknown",
        "warning",
        "Keys of config.json that the source lacks and that no engine is known to read.",
        "take them out if nobody put them there on purpose",
        of_topic("config-unknown", "key"),
    ),
    Rule(
        "ancestor-settings",
        "warning",
        "The base is an ancestor, and a setting that decides what is computed is not its: rope_theta, rope_scaling, rms_norm_eps, a "
        "processor's pixels. Right where the model was trained with it.",
        "if it was not trained so, set the key to the ancestor's value",
        ancestor_settings,
    ),
    Rule(
        "ancestor-tokenizer",
        "warning",
        "The base is an ancestor, and the tokenizer makes other tokens of the same text: ids, merges, or a step before or after them. "
        "Tokens that were added are none of it.",
        "if it was not trained so, take the tokenizer that it was trained with",
        ancestor_tokenizer,
    ),
    Rule(
        "processor-differs",
        "error",
        "A setting of the picture or video processor is not the source's: the model sees other patches than it was trained on.",
        FROM_SOURCE,
        of_topic("processor", "setting"),
    ),
    Rule(
        "tokenizer-differs",
        "error",
        "The tokenizer makes other tokens than the source's: vocabulary, merges, added tokens, or a step before or after them.",
        FROM_SOURCE,
        of_topic("tokenizer", "part"),
    ),
    Rule(
        "tokenizer-respelled",
        "note",
        "tokenizer.json was written anew, by another version of the library: other bytes, the same tokens.",
        "nothing needs to be done",
        tokenizer_respelled,
    ),
    Rule(
        "generation-differs",
        "error",
        "generation_config.json is not the source's in what ends or bounds an answer, or sets sampling that no model is served with.",
        FROM_SOURCE,
        of_topic("generation", "key"),
    ),
    Rule(
        "sampling-differs",
        "warning",
        "generation_config.json sets another sampling than the source's, and no recipe in mtpress.json says so.",
        "set it by the recipe's generation_config, or: mtpress repair CKPT OUT --base SRC",
        of_topic("sampling", "key"),
    ),
    Rule(
        "template-differs",
        "warning",
        "The chat template is neither the source's nor mtpress's: what it does beyond the cases that check tries is not known.",
        "read it; copy the source's, or let quantize install mtpress's with chat_template: mtpress in the recipe",
        template_differs,
    ),
)
