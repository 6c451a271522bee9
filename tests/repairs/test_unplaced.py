"""What stands under a name that nobody knows, beside something that is missing, is the author's: neither dropped nor replaced."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoints import PREFIX, Edit, write_small
from mtpress.stages.repair import repair

L0, L3 = f"{PREFIX}layers.0.", f"{PREFIX}layers.3."


def renamed(old: str, new: str) -> Callable[[Edit], object]:
    return lambda e: [e.tensors.update({name.replace(old, new): e.tensors.pop(name)}) for name in list(e.tensors) if old in name]


def gate_and_up_as_one(e: Edit) -> None:
    for i in range(4):
        parts = [e.tensors.pop(f"{PREFIX}layers.{i}.mlp.{part}_proj.weight") for part in ("gate", "up")]
        e.tensors[f"{PREFIX}layers.{i}.mlp.gate_up_proj.weight"] = torch.cat(parts)


def turned(e: Edit) -> None:
    name = f"{L0}mlp.down_proj.weight"
    e.tensors[name] = e.tensors[name].t().contiguous()


LEFT: dict[str, Callable[[Edit], object]] = {
    "gate and up as one": gate_and_up_as_one,
    "other words for attention": renamed(".self_attn.", ".attention."),
    "another leaf": renamed("down_proj.weight", "down_proj.w"),
    "another head": renamed("lm_head.weight", "output_layer.weight"),
    "other embeddings": renamed(f"{PREFIX}embed_tokens.weight", "wte.weight"),
    "another last norm": renamed(f"{PREFIX}norm.weight", "final_layernorm.weight"),
    "a turned matrix": turned,
}


def trained(folder: Path, base: Path) -> Edit:
    """A fine-tune of the small checkpoint: every weight a little otherwise."""
    made = Edit(write_small(folder / "trained"))
    generator = torch.Generator().manual_seed(1)
    for name, weight in load_file(base / "model.safetensors").items():
        noise = 1 + 0.01 * torch.randn(weight.shape, generator=generator)
        made.tensors[name] = (weight.float() * noise).to(weight.dtype)
    return made


def numbers(path: Path) -> set[tuple[torch.Size, bytes]]:
    return {(t.shape, t.view(torch.uint8).numpy().tobytes()) for file in path.glob("*.safetensors") for t in load_file(file).values()}


@pytest.mark.parametrize("how", LEFT)
@pytest.mark.parametrize("with_base", [True, False])
def test_it_stays(how: str, with_base: bool, small_bf16: Path, tmp_path: Path) -> None:
    edit = trained(tmp_path, small_bf16)
    LEFT[how](edit)
    edit.tensors[f"{L3}extra.rotary_emb.inv_freq"] = torch.ones(4)
    edit.change("tokenizer_config.json", backend="tokenizers")  # something to mend, so that OUT is written
    edit.save()
    result = repair(edit.path, tmp_path / "out", small_bf16 if with_base else None, silent=True)
    assert not result.sound
    assert numbers(edit.path) - {(torch.Size([4]), torch.ones(4).view(torch.uint8).numpy().tobytes())} <= numbers(tmp_path / "out")
    assert how == "another last norm" or any("may be" in o.left[0].why or "another layout" in o.left[0].why for o in result.left if o.left)


@pytest.mark.parametrize(
    ("old", "new"), [(".down_proj.weight", ".down_proj.parametrizations.weight.original"), ("norm.weight", "norm.weight.data")]
)
def test_what_torch_hangs_behind_a_name_is_taken_off(old: str, new: str, small_bf16: Path, tmp_path: Path) -> None:
    edit = trained(tmp_path, small_bf16)
    wanted = dict(edit.tensors)
    renamed(old, new)(edit)
    edit.save()
    assert repair(edit.path, tmp_path / "out", small_bf16, silent=True).sound
    made = load_file(tmp_path / "out/model.safetensors")
    assert made.keys() == wanted.keys() and all(torch.equal(made[name], wanted[name]) for name in wanted)


def test_a_dimension_of_one_is_put_back(small_bf16: Path, tmp_path: Path) -> None:
    edit = trained(tmp_path, small_bf16)
    name = f"{L0}linear_attn.conv1d.weight"
    wanted = edit.tensors[name]
    edit.tensors[name] = wanted.squeeze(1).contiguous()
    edit.save()
    assert repair(edit.path, tmp_path / "out", small_bf16, silent=True).sound
    assert torch.equal(load_file(tmp_path / "out/model.safetensors")[name], wanted)
