"""A request that cannot be is refused before the engine is started; the plugin does nothing where it must not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mtpress.engine.plugins import nvfp4_cpu, probe

REFUSED = {
    "unknown keys promts; known: prompts": {"promts": []},
    "no prompts": {"prompts": []},
    "prompt 1 must have one of token_ids, text, messages": {"prompts": [{"text": "a"}, {"text": "a", "token_ids": [1]}]},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_bad_request_leaves_no_result(reason: str, tmp_path: Path) -> None:
    (tmp_path / "request.json").write_text(json.dumps(REFUSED[reason]))
    command = [
        sys.executable,
        "-m",
        "mtpress.engine.plugins.probe",
        "nowhere",
        str(tmp_path / "request.json"),
        str(tmp_path / "result.json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert reason in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "result.json").exists()


def test_groups_keep_their_order() -> None:
    prompts = [{"text": "a", "group": "late"}, {"text": "b"}, {"text": "c", "group": "late"}]
    assert probe.groups({"prompts": prompts}) == {"late": [0, 2], "all": [1]}


def test_counters_are_differences() -> None:
    before = {"drafts": 4, "accepted_per_position": [3, 1]}
    assert probe.counted_since(before, {"drafts": 9, "accepted_per_position": [7, 2]}) == {"drafts": 5, "accepted_per_position": [4, 1]}
    empty = {"drafts": 0, "accepted_per_position": []}
    assert probe.counted_since(empty, before) == before


def test_without_vllm_the_plugin_registers_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    nvfp4_cpu.register()


@pytest.mark.engine
def test_vllm_finds_the_plugin_and_calls_it(engine_python: Path) -> None:
    code = (
        "from vllm.plugins import load_general_plugins; load_general_plugins(); load_general_plugins()\n"
        "from vllm.model_executor.kernels import linear; from vllm.platforms import PlatformEnum\n"
        "print([k.__name__ for k in linear._POSSIBLE_NVFP4_KERNELS[PlatformEnum.CPU]])\n"
        "from vllm.model_executor.layers.quantization import modelopt\n"
        "print(type(modelopt.init_nvfp4_linear_kernel(use_a16=True)).__name__)"
    )
    done = subprocess.run([str(engine_python), "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["['HoldingEmulation']", "HoldingEmulation"]


HELD_AGAINST_VLLM = """
import torch
from types import SimpleNamespace
from mtpress.engine.plugins import nvfp4_cpu
from vllm.model_executor.kernels.linear import EmulationNvFp4LinearKernel as Stock
from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import dequantize_to_dtype

Holding = nvfp4_cpu.holding(Stock)
assert issubclass(Holding, Stock) and Holding is not Stock
torch.manual_seed(0)
layer = SimpleNamespace(
    weight=torch.randint(0, 256, (48, 64), dtype=torch.uint8),
    weight_scale=(torch.rand(48, 8) * 4).to(torch.float8_e4m3fn),
    weight_global_scale=torch.tensor(0.01),
    input_global_scale_inv=torch.tensor(3.0),
)
x, bias = torch.randn(5, 128, dtype=torch.bfloat16), torch.randn(48, dtype=torch.bfloat16)
stock, holding = Stock.apply_weights(Stock.__new__(Stock), layer, x), Holding.__new__(Holding)
for given in (x, x, x.float(), x):
    expected = Stock.apply_weights(Stock.__new__(Stock), layer, given, bias.to(given.dtype))
    assert torch.equal(holding.apply_weights(layer, given, bias.to(given.dtype)), expected)
assert getattr(layer, nvfp4_cpu.HELD).shape == (48, 128)
nvfp4_cpu.MEMORY_SHARE = 1 << 60
delattr(layer, nvfp4_cpu.HELD)
assert torch.equal(holding.apply_weights(layer, x), stock) and not hasattr(layer, nvfp4_cpu.HELD)
del layer.input_global_scale_inv  # W4A16: no activation is rounded
weight = dequantize_to_dtype(layer.weight, layer.weight_scale, layer.weight_global_scale, x.dtype, 16, swizzle=False)
assert torch.equal(holding.apply_weights(layer, x, bias), x @ weight.t() + bias)
print("equal")
"""


@pytest.mark.engine
def test_what_is_kept_of_a_weight_gives_the_bits_of_vllms_emulation(engine_python: Path) -> None:
    """Also for another dtype of the input, and where memory is short and nothing is kept."""
    done = subprocess.run([str(engine_python), "-c", HELD_AGAINST_VLLM], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "equal"
