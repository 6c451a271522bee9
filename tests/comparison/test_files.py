"""What stands beside the weights, against the source: everything that computes is found, and no mere spelling is."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mtpress.builtin import BUILTIN_MODEL
from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.comparison.config import restored
from mtpress.comparison.files import differences
from mtpress.comparison.relation import Kind, Relation
from mtpress.comparison.weights import Comparison
from mtpress.quant_config.view import Subject
from mtpress.rules.meanings import RULES
from mtpress.rules.rule import Finding, apply

Change = Callable[[Path], object]


def edit(name: str, change: Callable[[dict[str, Any]], object]) -> Change:
    """A change of one JSON file."""

    def apply_to(path: Path) -> None:
        content = json.loads((path / name).read_text(encoding="utf-8"))
        change(content)
        (path / name).write_text(json.dumps(content), encoding="utf-8")

    return apply_to


def text(**keys: Any) -> Change:
    return edit("config.json", lambda c: c["text_config"].update(keys))


def top(**keys: Any) -> Change:
    return edit("config.json", lambda c: c.update(keys))


def vision(**keys: Any) -> Change:
    return edit("config.json", lambda c: c["vision_config"].update(keys))


def rope(**keys: Any) -> Change:
    return edit("config.json", lambda c: c["text_config"]["rope_parameters"].update(keys))


def image(**keys: Any) -> Change:
    return edit("preprocessor_config.json", lambda c: c.update(keys))


def video(**keys: Any) -> Change:
    return edit("video_preprocessor_config.json", lambda c: c.update(keys))


def generation(**keys: Any) -> Change:
    return edit("generation_config.json", lambda c: c.update(keys))


def tokenizer(change: Callable[[dict[str, Any]], object]) -> Change:
    return edit("tokenizer.json", change)


def tokenizer_config(**keys: Any) -> Change:
    return edit("tokenizer_config.json", lambda c: c.update(keys))


def shuffle(content: dict[str, Any]) -> None:
    vocab = content["model"]["vocab"]
    some = [token for token in vocab if vocab[token] < 256]
    ids = [vocab[token] for token in some]
    random.Random(0).shuffle(ids)
    vocab.update(zip(some, ids, strict=True))


def move(content: dict[str, Any], one: str, other: str) -> None:
    vocab = content["model"]["vocab"]
    vocab[one], vocab[other] = vocab[other], vocab[one]


def nest_processors(path: Path) -> None:
    """As transformers 5 saves them: one file, with the classes that it has."""
    image, video = (json.loads((path / name).read_text()) for name in ("preprocessor_config.json", "video_preprocessor_config.json"))
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        (path / name).unlink()
    image |= {"image_processor_type": "Qwen2VLImageProcessor", "do_resize": True, "rescale_factor": 0.00392156862745098, "resample": 3}
    content = {"image_processor": image, "video_processor": video, "processor_class": "Qwen3VLProcessor"}
    (path / "processor_config.json").write_text(json.dumps(content))


def in_words_of_transformers_4(path: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        inner = config["text_config"]
        said = inner.pop("rope_parameters")
        inner["rope_theta"], inner["partial_rotary_factor"] = said.pop("rope_theta"), said.pop("partial_rotary_factor")
        said["type"] = said["rope_type"]
        inner["rope_scaling"] = said
        inner["torch_dtype"] = inner.pop("dtype")
        del inner["layer_types"], inner["rms_norm_eps"], inner["attn_output_gate"]
        config["vision_config"]["num_attention_heads"] = config["vision_config"].pop("num_heads")

    edit("config.json", change)(path)


def saved_by_transformers(path: Path) -> None:
    from transformers import AutoConfig

    AutoConfig.from_pretrained(path).save_pretrained(path)


def saved_tokenizer(path: Path) -> None:
    """Merges as strings, keys in another order, nulls left out, the added tokens in the vocabulary too."""

    def change(content: dict[str, Any]) -> None:
        content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
        content["model"] = {key: value for key, value in reversed(content["model"].items()) if value is not None}
        content["model"]["vocab"] |= {token["content"]: token["id"] for token in content["added_tokens"]}
        del content["truncation"], content["padding"]

    tokenizer(change)(path)
    edit(
        "tokenizer_config.json",
        lambda c: c.update(tokenizer_class="TokenizersBackend", backend="tokenizers", eos_token={"content": c["eos_token"]}),
    )(path)


def text_only(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    flat = config["text_config"] | {"architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text"}
    (path / "config.json").write_text(json.dumps(flat))


BREAKS: dict[str, tuple[str, Change]] = {
    "eps": ("config-differs", text(rms_norm_eps=0.9)),
    "eps, near": ("config-differs", text(rms_norm_eps=1e-5)),
    "theta": ("config-differs", rope(rope_theta=10.0)),
    "whole heads": ("config-differs", rope(partial_rotary_factor=1.0, mrope_section=[32, 0, 0])),
    "sections": ("config-differs", rope(mrope_section=[5, 5, 6])),
    "not interleaved": ("config-differs", rope(mrope_interleaved=False)),
    "linear": ("config-differs", rope(rope_type="linear", factor=100.0)),
    "a factor": ("config-differs", rope(factor=2.0)),
    "rope_scaling beside": ("config-differs", text(rope_scaling={"type": "linear", "rope_type": "linear", "factor": 100.0})),
    "rope_scaling, yarn": ("config-differs", text(rope_scaling={"rope_type": "yarn", "factor": 4.0})),
    "rope_scaling above": ("config-differs", top(rope_scaling={"rope_type": "linear", "factor": 100.0})),
    "theta beside": ("config-differs", text(rope_theta=3.0)),
    "a factor beside": ("config-differs", text(partial_rotary_factor=1.0)),
    "a window": ("config-differs", text(sliding_window=2, use_sliding_window=True)),
    "a soft cap": ("config-differs", text(attn_logit_softcapping=1.0)),
    "both directions": ("config-differs", text(is_causal=False)),
    "tied": ("config-differs", text(tie_word_embeddings=True)),
    "positions": ("config-differs", text(max_position_embeddings=4)),
    "half precision": ("config-differs", text(dtype="float16")),
    "gate": ("config-differs", text(attn_output_gate=False)),
    "activation": ("config-differs", text(hidden_act="gelu")),
    "layer types": ("config-differs", text(layer_types=["full_attention"] + 3 * ["linear_attention"])),
    "key heads": ("config-differs", text(linear_num_key_heads=1, linear_key_head_dim=128)),
    "deep stack": ("config-differs", vision(deepstack_visual_indexes=[0])),
    "heads of the tower": ("config-differs", vision(num_heads=1)),
    "activation of the tower": ("config-differs", vision(hidden_act="gelu")),
    "code": ("config-differs", top(auto_map={"AutoModel": "other.T"})),
    "an image token": ("config-differs", top(image_token_id=7)),
    "an end token": ("config-differs", text(eos_token_id=7)),
    "nobody's key": ("config-unknown", text(a_key_of_nobody="x")),
    "mean": ("processor-differs", image(image_mean=[50, 50, 50])),
    "std of zero": ("processor-differs", image(image_std=[0, 0, 0])),
    "rescale": ("processor-differs", image(rescale_factor=1.0)),
    "no rescale": ("processor-differs", image(do_rescale=False)),
    "not normalized": ("processor-differs", image(do_normalize=False)),
    "patches": ("processor-differs", image(patch_size=8)),
    "small pictures": ("processor-differs", image(size={"shortest_edge": 16, "longest_edge": 16})),
    "few pixels": ("processor-differs", image(max_pixels=16)),
    "merged": ("processor-differs", video(merge_size=7)),
    "frames": ("processor-differs", video(fps=30)),
    "another class": ("processor-differs", image(image_processor_type="CLIPImageProcessor")),
    "code of a processor": ("processor-differs", image(auto_map={"AutoImageProcessor": "other.P"})),
    "one file before the other": (
        "processor-differs", lambda path: (path / "processor_config.json").write_text('{"image_processor": {"image_mean": [9, 9, 9]}}')
    ),
    "shuffled": ("tokenizer-differs", tokenizer(shuffle)),
    "two tokens": ("tokenizer-differs", tokenizer(lambda t: move(t, "a", "b"))),
    "merges": ("tokenizer-differs", tokenizer(lambda t: t["model"]["merges"].reverse())),
    "fewer merges": ("tokenizer-differs", tokenizer(lambda t: t["model"]["merges"].pop())),
    "normalizer": ("tokenizer-differs", tokenizer(lambda t: t.update(normalizer={"type": "Lowercase"}))),
    "pre-tokenizer": ("tokenizer-differs", tokenizer(lambda t: t["pre_tokenizer"]["pretokenizers"].pop(0))),
    "decoder": ("tokenizer-differs", tokenizer(lambda t: t.update(decoder=None))),
    "truncation": ("tokenizer-differs", tokenizer(lambda t: t.update(truncation={"max_length": 4, "strategy": "LongestFirst"}))),
    "dropout": ("tokenizer-differs", tokenizer(lambda t: t["model"].update(dropout=0.5))),
    "an added token": ("tokenizer-differs", tokenizer(lambda t: t["added_tokens"][0].update(content="<|end|>"))),
    "a special token that is none": ("tokenizer-differs", tokenizer(lambda t: t["added_tokens"][2].update(special=False))),
    "code of a tokenizer": ("tokenizer-differs", tokenizer_config(auto_map={"AutoTokenizer": ["x.T", None]})),
    "a first token": ("tokenizer-differs", tokenizer_config(add_bos_token=True)),
    "another end of turn": ("tokenizer-differs", tokenizer_config(eos_token="<|endoftext|>")),
    "penalty": ("generation-differs", generation(repetition_penalty=50.0)),
    "hot": ("generation-differs", generation(temperature=2.0)),
    "short": ("generation-differs", generation(max_new_tokens=1)),
    "letters end": ("generation-differs", generation(eos_token_id=[1219, 1217, *range(60, 120)])),
    "words": ("generation-differs", generation(suppress_tokens=[1, 2, 3])),
    "another temperature": ("sampling-differs", generation(temperature=0.6)),
    "a template": (
        "template-differs", lambda path: (path / "chat_template.jinja").write_text("{% if 'x' in messages[-1].content %}y{% endif %}")
    ),
}  # fmt: skip

SPELLINGS: dict[str, tuple[set[str], Change]] = {
    "nothing": (set(), lambda path: None),
    "tied, with an lm_head of its own": (set(), top(tie_word_embeddings=True)),  # which the engines take all the same
    "transformers 4": (set(), in_words_of_transformers_4),
    "transformers 5": (set(), saved_by_transformers),
    "one processor file": (set(), nest_processors),
    "pixels by their old names": (
        set(), lambda path: image(size={}, min_pixels=4096, max_pixels=262144, image_processor_type="Qwen2VLImageProcessor")(path)
    ),
    "a tokenizer saved anew": ({"tokenizer-respelled"}, saved_tokenizer),
    "a tokenizer in another layout": ({"tokenizer-respelled"}, tokenizer(lambda t: None)),
    "text only": (set(), text_only),
    "of no effect": (
        set(), lambda path: [text(use_cache=False, attention_dropout=0.1, sliding_window=None, router_aux_loss_coef=0.1)(path),
                             top(transformers_version="4.57.1", _name_or_path="somewhere", language_model_only=True)(path)]
    ),
    "more ends": (set(), generation(eos_token_id=[1217, 1219], transformers_version="4.57.1", top_k=20)),
    "sampling of the recipe": (
        set(),
        lambda path: [generation(temperature=1.0, top_k=40)(path), (path / "mtpress.json").write_text(
            '{"recipe": {"generation_config": {"temperature": 1.0, "top_k": 40, "do_sample": true}}}')]
    ),
}  # fmt: skip


def findings_of(path: Path, kind: Kind = "source") -> list[Finding]:
    compared = Comparison(differences=differences(Subject(Checkpoint.open(path)), Checkpoint.open(BUILTIN_MODEL)))
    compared.relation = Relation(kind, "")
    return list(apply(RULES, compared))


def found_of(path: Path) -> set[str]:
    return {finding.id for finding in findings_of(path)}


def add_token(content: dict[str, Any]) -> None:
    content["added_tokens"].append({**content["added_tokens"][-1], "id": 1279, "content": "<|mine|>"})


def add_words(content: dict[str, Any]) -> None:
    """Two tokens that training a tokenizer on added."""
    content["model"]["vocab"] |= {"zq": 1270, "zqz": 1271}
    content["model"]["merges"] += [["z", "q"], ["zq", "z"]]


# What is told of a fine-tune whose ancestor is the base, with the words of it; a fine-tune's own, of which nothing is told.
ANCESTOR: dict[str, tuple[str, str, Change]] = {
    "theta": (
        "ancestor-settings", "text_config.rope_parameters.rope_theta: 5000.0, the ancestor has 10000", rope(rope_theta=5000.0)
    ),
    "theta in the words of transformers 4": ("ancestor-settings", "rope_theta: [10000", text(rope_theta=3.0)),
    "yarn": ("ancestor-settings", 'rope_type: "yarn", the ancestor has "default"', rope(rope_type="yarn", factor=4.0)),
    "yarn, its factor": ("ancestor-settings", "factor: 4.0, the ancestor has nothing", rope(rope_type="yarn", factor=4.0)),
    "eps": ("ancestor-settings", "text_config.rms_norm_eps: 1e-05, the ancestor has 1e-06", text(rms_norm_eps=1e-5)),
    "partial heads": ("ancestor-settings", "partial_rotary_factor: 1.0, the ancestor has 0.5", rope(partial_rotary_factor=1.0)),
    "mean": ("ancestor-settings", "image_mean", image(image_mean=[50, 50, 50])),
    "shuffled": ("ancestor-tokenizer", "tokens moved or gone and 0 new", tokenizer(shuffle)),
    "merges": ("ancestor-tokenizer", "merges, number 0", tokenizer(lambda t: t["model"]["merges"].reverse())),
    "normalizer": ("ancestor-tokenizer", "normalizer", tokenizer(lambda t: t.update(normalizer={"type": "Lowercase"}))),
    "an added token gone": ("ancestor-tokenizer", "nothing, the ancestor has", tokenizer(lambda t: t["added_tokens"].pop())),
}  # fmt: skip
OWN: dict[str, Change] = {
    "added tokens": tokenizer(add_token),
    "words added by training": tokenizer(add_words),
    "resized embeddings": text(vocab_size=1300),
    "another template": lambda path: (path / "chat_template.jinja").write_text("{{ messages }}"),
    "another generation_config": generation(temperature=0.6, eos_token_id=[1217, 1279], max_new_tokens=64),
    "another end of turn": lambda path: [tokenizer_config(eos_token="<|endoftext|>", pad_token="<|mine|>")(path),
                                         text(eos_token_id=1217)(path)],
    "trained in float32": text(dtype="float32"),
    "tied": text(tie_word_embeddings=True),
    "saved by transformers 4": in_words_of_transformers_4,
}  # fmt: skip


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(BUILTIN_MODEL, tmp_path / "copied", copy_function=_link_or_copy))


def _link_or_copy(source: str, target: str) -> object:
    return Path(target).hardlink_to(source) if source.endswith(".safetensors") else shutil.copyfile(source, target)


@pytest.mark.parametrize("case", list(BREAKS))
def test_what_computes_is_compared(case: str, copied: Path) -> None:
    expected, change = BREAKS[case]
    change(copied)
    assert found_of(copied) == {expected}


@pytest.mark.parametrize("case", list(SPELLINGS))
def test_spellings_are_no_difference(case: str, copied: Path) -> None:
    expected, change = SPELLINGS[case]
    change(copied)
    assert found_of(copied) == expected


@pytest.mark.parametrize("case", [case for case, (rule, _) in BREAKS.items() if rule == "config-differs"])
def test_what_a_config_says_otherwise_can_be_set_back(case: str, copied: Path) -> None:
    BREAKS[case][1](copied)
    base = Checkpoint.open(BUILTIN_MODEL)
    config = json.loads((copied / "config.json").read_text())
    places = [found.place for found in differences(Subject(Checkpoint.open(copied)), base)]
    (copied / "config.json").write_text(json.dumps(restored(config, base.config, places)))
    assert found_of(copied) == set()


@pytest.mark.parametrize("case", list(ANCESTOR))
def test_what_computes_otherwise_than_an_ancestor_is_told_with_both_values(case: str, copied: Path) -> None:
    expected, words, change = ANCESTOR[case]
    change(copied)
    (finding,) = findings_of(copied, "ancestor")
    assert (finding.id, finding.severity) == (expected, "warning")
    assert words in finding.message


@pytest.mark.parametrize("case", list(OWN))
def test_what_is_a_fine_tunes_own_raises_nothing(case: str, copied: Path) -> None:
    OWN[case](copied)
    assert findings_of(copied, "ancestor") == []


def test_every_rule_has_a_case() -> None:
    cases = {rule for rule, _ in BREAKS.values()} | {rule for rule, _, _ in ANCESTOR.values()}
    assert {rule.id for rule in RULES} == cases | {"tokenizer-respelled"}
