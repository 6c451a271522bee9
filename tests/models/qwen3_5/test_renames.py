"""Names of the family under wrappers, prefixes and words of others: each finds its own, and nothing else does."""

import re
from collections.abc import Callable

import pytest

from checkpoints import PREFIX, small_config
from mtpress.checkpoint.shard_writer import OutputTensor
from mtpress.models.qwen3_5 import names as qwen3_5
from mtpress.models.qwen3_5.engine import TEXT_ARCHITECTURE, VL_ARCHITECTURE
from mtpress.models.qwen3_5.renames import engine_reads, renaming

CONFIG = small_config()
SHAPES = dict(qwen3_5.body_shapes(CONFIG, PREFIX)) | qwen3_5.mtp_shapes(CONFIG) | qwen3_5.vision_shapes(CONFIG)
TENSORS = {name: OutputTensor(name, "BF16", shape) for name, shape in SHAPES.items()}
LAST = f"{PREFIX}layers.4."


def swapped(*pairs: tuple[str, str]) -> Callable[[str], str]:
    def change(name: str) -> str:
        for old, new in pairs:
            name = name.replace(old, new, 1) if name.startswith(old) else name
        return name

    return change


WRAPPED: dict[str, Callable[[str], str]] = {
    "DDP": lambda name: f"module.{name}",
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "torch.compile inside": swapped(("model.", "model._orig_mod.")),
    "FSDP": lambda name: "_fsdp_wrapped_module." + re.sub(r"(layers\.[0-9]+\.)", r"\1_checkpoint_wrapped_module.", name),
    "PEFT": lambda name: f"base_model.model.{name}",
    "PEFT's base layers": lambda name: re.sub(r"(_proj|linear_fc.|qkv)\.(weight|bias)$", r"\1.base_layer.\2", name),
    "nobody's": lambda name: f"actor.policy_net.{name}",
    "nobody's, inside": lambda name: re.sub(r"(layers\.[0-9]+\.)", r"\1wrapped_block.", name),
    "doubled": swapped((PREFIX, PREFIX + "language_model.")),
    "tripled": swapped((PREFIX, PREFIX + "language_model.language_model.")),
    "tower inside": swapped(("model.visual.", f"{PREFIX}visual.")),
    "tower beside": swapped(("model.visual.", "language_model.visual.")),
    "another tower's": swapped(("model.visual.", "model.vision_tower.encoder.")),
    "the engine's": swapped((PREFIX, "language_model.model."), ("model.visual.", "visual."), ("lm_head", "language_model.lm_head")),
    "text only": swapped((PREFIX, "model.")),
    "bare": swapped((PREFIX, "")),
    "Bridge's head": swapped(("mtp.", "language_model.mtp.")),
    "a wrapped head": swapped(("mtp.", "mtp.module.")),
    "a head of another word": swapped(("mtp.", "draft_head.")),
    "a head without layers": swapped(("mtp.layers.0.", "mtp.0.")),
    "DeepSeek's head": swapped(
        ("mtp.layers.0.", LAST), ("mtp.fc.", f"{LAST}eh_proj."), ("mtp.norm.", f"{LAST}shared_head.norm."),
        ("mtp.pre_fc_norm_embedding.", f"{LAST}enorm."), ("mtp.pre_fc_norm_hidden.", f"{LAST}hnorm."),
    ),
    "Megatron's head": swapped(
        ("mtp.layers.0.", "language_model.mtp.layers.0.transformer_layer."), ("mtp.fc.", "language_model.mtp.layers.0.eh_proj."),
        ("mtp.norm.", "language_model.mtp.layers.0.final_layernorm."),
        ("mtp.pre_fc_norm_embedding.", "language_model.mtp.layers.0.enorm."),
        ("mtp.pre_fc_norm_hidden.", "language_model.mtp.layers.0.hnorm."),
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrapped", WRAPPED.values(), ids=WRAPPED)
def test_every_tensor_gets_its_name_back(wrapped: Callable[[str], str]) -> None:
    stored = {wrapped(name): tensor for name, tensor in TENSORS.items()}
    assert len(stored) == len(TENSORS)
    found = renaming(stored, CONFIG, VL_ARCHITECTURE)
    assert found.new_names == {wrapped(name): name for name in TENSORS if wrapped(name) != name}
    assert not found.rivals
    assert found.told()


def test_right_names_stay() -> None:
    assert not renaming(TENSORS, CONFIG, VL_ARCHITECTURE)
    text = {name.replace(PREFIX, "model."): t for name, t in TENSORS.items() if not name.startswith("model.visual.")}
    assert not renaming(text, CONFIG, TEXT_ARCHITECTURE)


@pytest.mark.parametrize(
    "name",
    [
        f"{PREFIX}layers.0.extra.weight", f"{PREFIX}layers.3.self_attn.q_proj.lora_A.default.weight", "score.weight", "x", "",
        f"{PREFIX}layers.3.self_attn.rotary_emb.inv_freq", "mtp.layers.1.mlp.up_proj.weight", "mtp.layers.0.mlp.linear_fc1.weight",
        "model.visual.deepstack_merger_list.0.linear_fc1.weight", f"{PREFIX}layers.{'9' * 5000}.mlp.up_proj.weight",
        f"{PREFIX}layers.².mlp.up_proj.weight", "." * 300,
    ],
)  # fmt: skip
def test_what_is_none_of_the_family_stays(name: str) -> None:
    assert not renaming({**TENSORS, name: OutputTensor(name, "BF16", (2, 2))}, CONFIG, VL_ARCHITECTURE)
    assert qwen3_5.natural(name) <= qwen3_5.natural(name)
    assert qwen3_5.layer_index(name) in (None, 0, 3)


def test_another_model_under_a_prefix_is_not_ours() -> None:
    others = {f"teacher.{name}": OutputTensor(name, "BF16", tuple(2 * n for n in t.shape)) for name, t in TENSORS.items()}
    assert not renaming({**TENSORS, **others}, CONFIG, VL_ARCHITECTURE)


def test_two_that_claim_one_name_are_rivals() -> None:
    name = f"{PREFIX}norm.weight"
    beside = renaming({**TENSORS, f"module.{name}": TENSORS[name]}, CONFIG, VL_ARCHITECTURE)
    assert (dict(beside.new_names), dict(beside.rivals)) == ({}, {f"module.{name}": name})
    stored = {n: t for n, t in TENSORS.items() if n != name} | {f"module.{name}": TENSORS[name], f"_orig_mod.{name}": TENSORS[name]}
    assert renaming(stored, CONFIG, VL_ARCHITECTURE).rivals == {f"module.{name}": name, f"_orig_mod.{name}": name}


def test_what_the_engine_renames_itself() -> None:
    own = WRAPPED["the engine's"]
    assert engine_reads([(own(name), name) for name in TENSORS if not name.startswith("mtp.")], VL_ARCHITECTURE)
    assert not engine_reads([(f"module.{name}", name) for name in TENSORS], VL_ARCHITECTURE)
