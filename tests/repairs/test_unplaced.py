"""What stands under a name that nobody knows, beside something that is missing, is the author's: neither dropped nor replaced."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import PREFIX, Edit, write_small
from mtpress.errors import InputError
from mtpress.stages.check import check
from mtpress.stages.repair import repair
from trainer_layouts import RENAMED, UNPLACED, Tensors, named

L0, L3 = f"{PREFIX}layers.0.", f"{PREFIX}layers.3."


def renamed(old: str, new: str) -> Callable[[Edit], object]:
    return lambda e: [e.tensors.update({name.replace(old, new): e.tensors.pop(name)}) for name in list(e.tensors) if old in name]


def turned(tensors: Tensors) -> Tensors:
    name = f"{L0}mlp.down_proj.weight"
    return tensors | {name: tensors[name].t().contiguous()}


LEFT = UNPLACED | {
    "another head": named(("lm_head.weight", "output_layer.weight")),
    "other embeddings": named((r".*embed_tokens\.weight", "wte.weight")),
    "another last norm": named((r"^model\.language_model\.norm\.weight", "final_layernorm.weight")),
    "a body of no known word": named(
        (r"^model\.language_model\.layers", "decoder.h"), (r"^decoder(.*)\.(mlp|self|lin|in|post)", r"decoder\1.x\2")
    ),
    "a turned matrix": turned,
}
ALONE = ("qkvz and ba as one", "a tower of no known word", "halves", "adapters beside the weights", "a head of other words")
REFUSED = "adapters in place of the weights"


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


@pytest.mark.parametrize(("how", "with_base"), [*((how, True) for how in LEFT if how != REFUSED), *((how, False) for how in ALONE)])
def test_it_stays(how: str, with_base: bool, small_bf16: Path, tmp_path: Path) -> None:
    """Nothing is dropped or taken from the base, and check names an error."""
    edit = trained(tmp_path, small_bf16)
    edit.tensors = LEFT[how](edit.tensors)
    edit.tensors[f"{L3}extra.rotary_emb.inv_freq"] = torch.ones(4)
    edit.change("tokenizer_config.json", backend="tokenizers")  # something to mend, so that OUT is written
    edit.save()
    result = repair(edit.path, tmp_path / "out", small_bf16 if with_base else None, silent=True)
    assert not result.sound
    inv_freq = {(torch.Size([4]), torch.ones(4).view(torch.uint8).numpy().tobytes())}
    assert numbers(edit.path) - inv_freq <= numbers(tmp_path / "out") <= numbers(edit.path)
    assert any(left.why.endswith(("nothing is dropped", "nothing is put in its place", "it stays")) for o in result.left for left in o.left)


@pytest.mark.parametrize("how", RENAMED)
def test_what_is_certain_is_renamed(how: str, small_bf16: Path, tmp_path: Path) -> None:
    edit = trained(tmp_path, small_bf16)
    wanted = dict(edit.tensors)
    edit.tensors = RENAMED[how](edit.tensors)
    edit.save()
    assert repair(edit.path, tmp_path / "out", small_bf16, silent=True).sound
    made = load_file(tmp_path / "out/model.safetensors")
    assert made.keys() == wanted.keys() and all(torch.equal(made[name], wanted[name]) for name in wanted)


def test_adapters_are_not_dropped(small_bf16: Path, tmp_path: Path) -> None:
    edit = trained(tmp_path, small_bf16)
    edit.tensors = LEFT[REFUSED](edit.tensors)
    edit.save()
    (found,) = (finding for finding in check(edit.path, silent=True).findings if finding.id == "tensor-unexpected")
    assert "merge it into the model" in found.remedy
    with pytest.raises(InputError, match="merge it into the model first"):
        repair(edit.path, tmp_path / "out", small_bf16, silent=True)


def test_what_is_no_weight_is_dropped(small_bf16: Path, tmp_path: Path) -> None:
    edit = trained(tmp_path, small_bf16)
    wanted = dict(edit.tensors)
    edit.tensors |= {f"{L0}mlp.up_proj.exp_avg": torch.ones(96, 64), f"{L3}extra.weight": torch.zeros(3, 5)}
    edit.save()
    assert repair(edit.path, tmp_path / "out", silent=True).sound
    assert load_file(tmp_path / "out/model.safetensors").keys() == wanted.keys()


def test_zeros_that_may_be_missing_stay(small_bf16: Path, tmp_path: Path) -> None:
    """A norm of zeros is the identity in this family."""
    edit = trained(tmp_path, small_bf16)
    edit.tensors[f"{L0}ln_1.scale"] = torch.zeros_like(edit.tensors.pop(f"{L0}input_layernorm.weight"))
    edit.save()
    result = repair(edit.path, tmp_path / "out", small_bf16, silent=True)
    assert not result.written and not result.sound


def test_a_shard_of_unknown_names_stays(small_bf16: Path, tmp_path: Path) -> None:
    edit = trained(tmp_path, small_bf16)
    edit.change("tokenizer_config.json", backend="tokenizers")
    edit.save()
    (edit.path / "model.safetensors.index.json").unlink()
    save_file({"audio.proj.weight": torch.ones(8, 4)}, edit.path / "model-2.safetensors")
    repair(edit.path, tmp_path / "out", small_bf16, silent=True)
    assert numbers(edit.path) <= numbers(tmp_path / "out")


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
