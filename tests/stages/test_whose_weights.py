"""Whose weights win: what a checkpoint holds, finite and in its shape, stays, whatever the base has; and what the base is, is found out."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import weight_only
from fine_tunes import FINE_TUNES, Tensors, merged, trained
from mtpress.builtin import BUILTIN_MODEL
from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.cli import main
from mtpress.comparison.relation import Relation
from mtpress.errors import InputError
from mtpress.stages.check import CheckResult, check
from mtpress.stages.quantize import quantize
from mtpress.stages.repair import RepairResult, repair

PROCESSORS = ("preprocessor_config.json", "video_preprocessor_config.json")
L = "model.language_model."


@pytest.fixture(scope="module")
def tiny() -> Path:
    return BUILTIN_MODEL


def put(out: Path, tensors: Tensors, like: Path, drop: tuple[str, ...] = (), **config: Any) -> Path:
    """A checkpoint of one shard and no index, with the small files of another; config: keys of text_config that are set."""
    out.mkdir(parents=True)
    for file in like.iterdir():
        if file.suffix != ".safetensors" and file.name not in ("model.safetensors.index.json", "README.md", *drop):
            shutil.copy(file, out / file.name)
    content = json.loads((like / "config.json").read_text())
    content["text_config"] |= config
    (out / "config.json").write_text(json.dumps(content))
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, out / "model.safetensors", metadata={"format": "pt"})
    return out


def stored(path: Path | str) -> Tensors:
    checkpoint = Checkpoint.open(path)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(
        one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)
    )


def relation(result: CheckResult | RepairResult) -> Relation:
    found = result.comparison.relation if isinstance(result, CheckResult) and result.comparison is not None else None
    found = result.relation if isinstance(result, RepairResult) else found
    assert found is not None
    return found


@pytest.mark.parametrize("kind", list(FINE_TUNES))
def test_a_fine_tune_without_its_head_and_processors(kind: str, tiny: Path, tmp_path: Path) -> None:
    """The head and the processors come from the ancestor; every tensor that is there stays, to the bit."""
    mine = FINE_TUNES[kind](load_file(tiny / "model.safetensors"))
    body = {name: tensor for name, tensor in mine.items() if not name.startswith("mtp.")}
    broken = put(tmp_path / "broken", body, tiny, PROCESSORS)
    result = repair(broken, tmp_path / "out", tiny, silent=True)
    made, base = stored(tmp_path / "out"), load_file(tiny / "model.safetensors")
    assert relation(result).kind == "ancestor"
    assert result.sound, result.findings
    assert all(same(made[name], tensor) for name, tensor in body.items())
    assert all(same(made[name], base[name]) for name in made.keys() - body.keys())
    assert len(made) == len(base)
    assert all((tmp_path / "out" / name).read_bytes() == (tiny / name).read_bytes() for name in PROCESSORS)
    assert "fewer of its drafts" in next(o for o in result.fixed if o.finding.id == "mtp-missing").fixed[0].how
    again = check(tmp_path / "out", base=tiny, silent=True)
    assert again.findings == result.findings
    assert relation(again).kind == "ancestor"
    assert json.loads((tmp_path / "out" / "mtpress.json").read_text())["base"]["relation"]["kind"] == "ancestor"


@pytest.mark.parametrize("change", [trained, merged])
def test_a_quantized_fine_tune_keeps_what_was_kept(change: Callable[[Tensors], Tensors], tiny: Path, tmp_path: Path) -> None:
    """in_proj_a and in_proj_b, norms and the head are its own."""
    source = put(tmp_path / "source", change(load_file(tiny / "model.safetensors")), tiny)
    quantize(source, tmp_path / "made", weight_only("nvfp4-mtp-vlm"), silent=True)
    (tmp_path / "made" / "preprocessor_config.json").unlink()
    before = stored(tmp_path / "made")
    result = repair(tmp_path / "made", tmp_path / "out", tiny, silent=True)
    after = stored(tmp_path / "out")
    assert result.sound, result.findings
    assert before.keys() == after.keys()
    assert all(same(after[name], tensor) for name, tensor in before.items())
    assert {outcome.finding.id for outcome in result.fixed} == {"processor-missing"}
    own = check(tmp_path / "out", base=source, silent=True)
    assert relation(own).kind == "source"
    assert own.sound


def test_added_tokens_stay(tiny: Path, tmp_path: Path) -> None:
    """Four rows more than the ancestor's vocabulary, and a tokenizer that has them."""
    mine = trained(load_file(tiny / "model.safetensors"))
    for name in (f"{L}embed_tokens.weight", "lm_head.weight"):
        mine[name] = torch.cat([mine[name], mine[name][:4]])
    body = {name: tensor for name, tensor in mine.items() if not name.startswith("mtp.")}
    broken = put(tmp_path / "broken", body, tiny, vocab_size=1284)
    tokenizer = json.loads((tiny / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][-1] | {"id": 1283, "content": "<|mine|>"})
    (broken / "tokenizer.json").write_text(json.dumps(tokenizer))
    result = repair(broken, tmp_path / "out", tiny, silent=True)
    made = stored(tmp_path / "out")
    assert relation(result).kind == "ancestor"
    assert all(same(made[name], tensor) for name, tensor in body.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]["vocab_size"] == 1284
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text()) == tokenizer
    assert "1284 embeddings" in next(o for o in result.fixed if o.finding.id == "mtp-missing").fixed[0].how


def test_a_vocabulary_that_config_json_missed(tiny: Path, tmp_path: Path) -> None:
    """Embeddings and lm_head were resized and config.json was not: it follows them."""
    mine = load_file(tiny / "model.safetensors")
    for name in (f"{L}embed_tokens.weight", "lm_head.weight"):
        mine[name] = torch.cat([mine[name], mine[name][:4]])
    result = repair(put(tmp_path / "broken", mine, tiny), tmp_path / "out", tiny, silent=True)
    assert [outcome.finding.id for outcome in result.fixed] == ["weight-shape"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]["vocab_size"] == 1284
    assert all(same(stored(tmp_path / "out")[name], tensor) for name, tensor in mine.items())


def classifier(tensors: Tensors) -> Tensors:
    return {name: t for name, t in tensors.items() if name != "lm_head.weight"} | {"score.weight": torch.ones(2, 256, dtype=torch.bfloat16)}


def with_an_adapter(tensors: Tensors) -> Tensors:
    name = f"{L}layers.3.self_attn.q_proj"
    return tensors | {f"{name}.lora_A.weight": torch.ones(4, 256), f"{name}.lora_B.weight": torch.ones(512, 4)}


def bitsandbytes(tensors: Tensors) -> Tensors:
    name = f"{L}layers.0.mlp.down_proj.weight"
    packed = torch.zeros(tensors[name].numel() // 2, 1, dtype=torch.uint8)
    parts = {f"{name}.absmax": torch.ones(tensors[name].numel() // 64), f"{name}.quant_map": torch.linspace(-1, 1, 16)}
    return tensors | {name: packed, f"{name}.quant_state.bitsandbytes__nf4": torch.zeros(8, dtype=torch.uint8)} | parts


OTHERS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "a classifier": (classifier, "score.weight"),
    "an adapter": (with_an_adapter, "merge it into the model first"),
    "bitsandbytes": (bitsandbytes, "bitsandbytes"),
}


@pytest.mark.parametrize("kind", list(OTHERS))
def test_what_is_none_of_the_known_kinds_is_refused(kind: str, tiny: Path, tmp_path: Path) -> None:
    change, word = OTHERS[kind]
    broken = put(tmp_path / "broken", change(load_file(tiny / "model.safetensors")), tiny)
    for base in (None, tiny):
        with pytest.raises(InputError, match=word) as raised:
            repair(broken, tmp_path / "out", base, silent=True)
        assert "\n" not in str(raised.value)
        assert not (tmp_path / "out").exists()


def test_a_source_with_damage_is_a_source(tiny: Path, tmp_path: Path) -> None:
    """Only the numbers that are NaN become the source's, and that makes it whole."""
    base = load_file(tiny / "model.safetensors")
    mine = {name: tensor.clone() for name, tensor in base.items()}
    mine[f"{L}layers.1.mlp.down_proj.weight"][3, 5] = float("nan")
    mine[f"{L}norm.weight"][7] = float("inf")
    del mine["model.visual.blocks.0.attn.qkv.bias"]
    broken = put(tmp_path / "broken", mine, tiny)
    told = check(broken, base=tiny, silent=True)
    assert relation(told).kind == "source"
    assert {finding.id for finding in told.findings if finding.severity == "error"} == {"not-finite", "tensor-missing"}
    result = repair(broken, tmp_path / "out", tiny, silent=True)
    assert result.sound, result.findings
    assert all(same(tensor, base[name]) for name, tensor in stored(tmp_path / "out").items())
    said = {outcome.finding.id: outcome.fixed[0].how for outcome in result.fixed}
    assert said["tensor-missing"] == "1 tensor put from the base, bit for bit: model.visual.blocks.0.attn.qkv.bias"


def test_the_numbers_of_a_fine_tune_that_are_no_damage_stay(tiny: Path, tmp_path: Path) -> None:
    mine = trained(load_file(tiny / "model.safetensors"))
    name = f"{L}layers.1.mlp.down_proj.weight"
    mine[name][3, 5] = float("nan")
    result = repair(put(tmp_path / "broken", mine, tiny), tmp_path / "out", tiny, silent=True)
    made = stored(tmp_path / "out")[name]
    mine[name][3, 5] = load_file(tiny / "model.safetensors")[name][3, 5]
    assert same(made, mine[name])
    assert relation(result).kind == "ancestor"


def test_damage_under_a_wrapper_is_found_and_mended(tiny: Path, tmp_path: Path) -> None:
    """Names are put right first; what was measured is known by the new ones."""
    base = load_file(tiny / "model.safetensors")
    mine = {f"module.{name}": tensor.clone() for name, tensor in base.items()}
    mine[f"module.{L}norm.weight"][7] = float("inf")
    result = repair(put(tmp_path / "broken", mine, tiny), tmp_path / "out", tiny, silent=True)
    assert result.sound, result.findings
    assert "not-finite" in {outcome.finding.id for outcome in result.fixed}
    made = stored(tmp_path / "out")
    assert made.keys() == base.keys()
    assert all(same(tensor, base[name]) for name, tensor in made.items())


def noise(tensors: Tensors) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    return {n: (0.05 * torch.randn(t.shape, generator=generator)).to(t.dtype) for n, t in tensors.items() if not n.startswith("mtp.")}


def test_nothing_is_taken_from_a_stranger(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = put(tmp_path / "broken", noise(load_file(tiny / "model.safetensors")), tiny, ("tokenizer_config.json",))
    found = check(broken, base=tiny, silent=True)
    assert relation(found).kind == "stranger"
    assert {finding.id for finding in found.findings if finding.severity == "error"} >= {"base-stranger", "mtp-missing"}
    result = repair(broken, tmp_path / "out", tiny, silent=True)
    assert relation(result).kind == "stranger"
    assert not result.sound
    assert not any("base" in fix.how for outcome in result.fixed for fix in outcome.fixed)
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert main(["repair", str(broken), str(tmp_path / "out"), "--base", str(tiny), "--base-is", "ancestor", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["base_relation"]
    assert (said["kind"], said["given"], said["found"]) == ("ancestor", True, "stranger")
    assert stored(tmp_path / "out").keys() == load_file(tiny / "model.safetensors").keys()


def test_what_the_index_lost_comes_from_the_checkpoint_and_not_from_the_base(tiny: Path, tmp_path: Path) -> None:
    tensors = FINE_TUNES["trained"](load_file(tiny / "model.safetensors"))
    broken = put(tmp_path / "broken", tensors, tiny, PROCESSORS)
    lost = {name: tensor for name, tensor in tensors.items() if "layers.2." in name or name == "lm_head.weight" or "visual" in name}
    rest = {name: tensor.contiguous().clone() for name, tensor in tensors.items() if name not in lost}
    save_file(rest, broken / "model.safetensors", metadata={"format": "pt"})
    save_file({name: tensor.contiguous().clone() for name, tensor in lost.items()}, broken / "extra.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(rest, "model.safetensors")}
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    assert repair(broken, tmp_path / "out", tiny, silent=True).written
    made = stored(tmp_path / "out")
    assert made.keys() == tensors.keys()
    assert all(same(made[name], tensor) for name, tensor in tensors.items())


def test_repair_tells_of_tokens_that_moved_without_their_rows(tiny: Path, tmp_path: Path) -> None:
    broken = put(tmp_path / "broken", FINE_TUNES["trained"](load_file(tiny / "model.safetensors")), tiny, PROCESSORS)
    tokenizer = json.loads((broken / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    one, other = list(vocab)[400:402]
    vocab[one], vocab[other] = vocab[other], vocab[one]
    (broken / "tokenizer.json").write_text(json.dumps(tokenizer))
    result = repair(broken, tmp_path / "out", tiny, silent=True)
    assert result.written and not result.sound
    assert "tokens-moved" in {outcome.finding.id for outcome in result.left}


def test_base_is_goes_with_a_base(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for stage in (["check", str(tiny)], ["repair", str(tiny), str(tmp_path / "out")]):
        assert main([*stage, "--base-is", "source"]) == 2
        assert "goes with --base SRC" in capsys.readouterr().err


def test_shards_that_stay_are_hashed_when_weights_are_read(tiny: Path, tmp_path: Path) -> None:
    body = {name: tensor for name, tensor in load_file(tiny / "model.safetensors").items() if not name.startswith("mtp.")}
    repair(put(tmp_path / "broken", body, tiny), tmp_path / "out", tiny, silent=True)
    hashes = json.loads((tmp_path / "out" / "mtpress.json").read_text())["output_sha256"]
    assert hashes.keys() >= {"model.safetensors", "model-mtp.safetensors"}
    assert check(tmp_path / "out", hashes=True, silent=True).sound
