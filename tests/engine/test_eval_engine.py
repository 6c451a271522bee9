"""eval against the real vLLM: the bits of its NVFP4 emulation, and KL from its own log-probabilities of the whole vocabulary."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mtpress.builtin import BUILTIN_MODEL, EVALUATION_FILE
from mtpress.chat.encoder import ChatEncoder
from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.evaluation.documents import load
from mtpress.evaluation.statistics import draws, interval, ratio_of_sums
from mtpress.formats import nvfp4
from mtpress.quant_config.emulation import EMULATIONS, round_by_groups
from mtpress.rounding.max import round_group
from mtpress.stages.eval import evaluate
from real_exports import real_export

pytestmark = pytest.mark.engine

HERE = Path(__file__).parent
TIMEOUT_SECONDS = 600
NUM_DOCUMENTS = 24
DATA = [str(EVALUATION_FILE)]


def under_vllm(engine_python: Path, script: str, *arguments: Path) -> None:
    command = [str(engine_python), str(HERE / script), *(str(argument) for argument in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    assert done.returncode == 0, done.stderr[-4000:]


def test_rounding_has_the_bits_of_vllm_s_emulation(engine_python: Path, tmp_path: Path) -> None:
    dice = torch.Generator().manual_seed(5)
    x = torch.randn(96, 512, generator=dice).mul_(torch.rand(96, 1, generator=dice) * 8).to(torch.bfloat16)
    x[0] = 0  # no scale to divide by
    x[1, :16] = 1e-6  # a block whose scale is nothing in E4M3
    x[2, 16:32] = 400  # saturates under a scale that is too small
    steps = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]).to(torch.bfloat16)
    x[3, 32:40], x[3, 40:48] = steps, -steps  # ties
    weight = torch.randn(64, 512, generator=dice).to(torch.bfloat16)
    parts = round_group({"weight": weight})["weight"] | {nvfp4.INPUT_SCALE: nvfp4.global_scale(x[4:].abs().max()) / 3}
    given = {
        "x": x, "global_scale": 1.0 / parts[nvfp4.INPUT_SCALE], "codes": parts[nvfp4.WEIGHT], "block_scales": parts[nvfp4.SCALE],
        "weight_scale": parts[nvfp4.SCALE_2],
    }  # fmt: skip
    save_file({name: tensor.contiguous() for name, tensor in given.items()}, tmp_path / "in.safetensors")
    under_vllm(engine_python, "emulate_on_cpu.py", tmp_path / "in.safetensors", tmp_path / "out.safetensors")
    theirs = load_file(tmp_path / "out.safetensors")
    ours = EMULATIONS["nvfp4"].make(parts, [parts], True, torch.bfloat16)
    assert ours.rounding is not None
    rounded, _ = ours.rounding(x)
    assert len(theirs["rounded"].unique()) > 200
    assert torch.equal(rounded, theirs["rounded"])
    assert torch.equal(ours.matrix, theirs["weight"])
    assert torch.equal(ours(x), theirs["out"])
    codes, steps = theirs["fp8_codes"].float().view(96, -1, 128), theirs["fp8_scales"].float().unsqueeze(-1)
    assert torch.equal(round_by_groups(x), (codes * steps).view(x.shape))


def test_kl_agrees_with_that_of_vllm_s_own_logprobs(engine_python: Path, tmp_path: Path) -> None:
    export = real_export("modelopt")
    config = Checkpoint.open(BUILTIN_MODEL).config
    documents = load(ChatEncoder(BUILTIN_MODEL), config, DATA, 2048, NUM_DOCUMENTS)
    (tmp_path / "tokens.json").write_text(json.dumps([sample.input_ids.tolist() for sample in documents.samples]))
    logprobs = []
    for name, checkpoint in (("base", BUILTIN_MODEL), ("export", export)):
        out = tmp_path / f"{name}.safetensors"
        under_vllm(engine_python, "prompt_logprobs_on_cpu.py", checkpoint, tmp_path / "tokens.json", out)
        logprobs.append(load_file(out))
    sums: dict[str, list[float]] = {"kl": [], "same": [], "nll": [], "base_nll": [], "tokens": []}
    for number, sample in enumerate(documents.samples):
        base, quantized = (found[str(number)].double() for found in logprobs)
        assert torch.isfinite(base).all() and base.shape == (len(sample.input_ids) - 1, config["text_config"]["vocab_size"])
        kl = (base.exp() * (base - quantized)).sum(-1)
        following = sample.input_ids[1:, None]
        sums["kl"].append(float(kl.sum()))
        sums["same"].append(float((base.argmax(-1) == quantized.argmax(-1)).sum()))
        sums["nll"].append(-float(quantized.gather(-1, following).sum()))
        sums["base_nll"].append(-float(base.gather(-1, following).sum()))
        sums["tokens"].append(float(len(base)))
    of = {name: np.array(values) for name, values in sums.items()}
    drawn = draws(NUM_DOCUMENTS, 1000, seed=0)
    theirs = {name: interval(*ratio_of_sums(of[name], of["tokens"], drawn)) for name in ("kl", "same", "nll", "base_nll")}

    result = evaluate([export], BUILTIN_MODEL, DATA, limit=NUM_DOCUMENTS, silent=True)
    ours = next(iter(result.checkpoints.values())).groups["all"]
    print(f"\nKL: vLLM {theirs['kl']}, eval {ours.kl_mean}")
    print(f"top-1: vLLM {theirs['same']}, eval {ours.top1_agreement}")
    print(f"perplexity: vLLM {np.exp(theirs['nll'].value):.5f}, eval {ours.perplexity.value:.5f}")
    print(f"perplexity of BF16: vLLM {np.exp(theirs['base_nll'].value):.5f}, eval {result.base.perplexity['all'].value:.5f}")
    assert ours.num_tokens == of["tokens"].sum()
    assert theirs["kl"].low is not None and theirs["kl"].high is not None
    assert theirs["kl"].low < ours.kl_mean.value < theirs["kl"].high
    assert ours.kl_mean.value == pytest.approx(theirs["kl"].value, rel=0.15)
    assert theirs["kl"].value > 1e-4  # the checkpoint is quantized there too
    assert ours.top1_agreement.value == pytest.approx(theirs["same"].value, abs=0.01)
    assert ours.perplexity.value == pytest.approx(float(np.exp(theirs["nll"].value)), rel=2e-3)
    assert result.base.perplexity["all"].value == pytest.approx(float(np.exp(theirs["base_nll"].value)), rel=2e-3)
