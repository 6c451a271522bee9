"""GPTQ on the stream: mtpress-tiny's layers, text and a picture, samples of different lengths."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mtpress.builtin import BUILTIN_MODEL
from mtpress.calibration import gptq as gptq_pass
from mtpress.calibration.forward import CalibrationPass
from mtpress.calibration.gptq import GptqPass, Kernel, Settings, held_out, in_order
from mtpress.calibration.samples import InputAmax, load_calibration
from mtpress.chat.encoder import ChatEncoder
from mtpress.chat.sample import Sample
from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.errors import InputError
from mtpress.formats import nvfp4
from mtpress.plan.plan import Plan, Step, make_plan
from mtpress.plan.recipe import CalibrationSource, load_recipe
from mtpress.rounding import gptq
from mtpress.rounding.gptq import FORMATS, SCALES

CPU = torch.device("cpu")
Stored = dict[str, dict[str, Tensor]]
WITHOUT_DATA = {"nvfp4": "max", "int4": "rtn"}
BOTH = pytest.mark.parametrize("form", list(FORMATS))


@pytest.fixture(scope="module")
def plans() -> dict[str, Plan]:
    source = Checkpoint.open(BUILTIN_MODEL)
    return {"nvfp4": make_plan(source, load_recipe("nvfp4-mtp-vlm")), "int4": make_plan(source, load_recipe("int4-mtp-vlm"))}


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    """Fifteen texts of up to 32 tokens, then a picture with a question."""
    texts = load_calibration(BUILTIN_MODEL, CalibrationSource(num_samples=15, max_seq_len=32), []).samples
    picture = {"type": "image", "image": Image.new("RGB", (64, 64), (200, 30, 30))}
    return [*texts, ChatEncoder(BUILTIN_MODEL).encode([{"role": "user", "content": [picture, {"type": "text", "text": "What color?"}]}])]


def begun(plan: Plan, samples: list[Sample], directory: Path, **more: Any) -> GptqPass:
    directory.mkdir(exist_ok=True)
    return GptqPass(plan, samples, CPU, directory, Settings(WITHOUT_DATA[plan.recipe.format]), **more)


def layers(plan: Plan) -> list[Step]:
    return [step for step in plan.steps if step.layer is not None]


def tensors_of(plan: Plan, step: Step) -> dict[str, Tensor]:
    return {info.name: plan.source.read(info.name) for job in step.jobs for info in job.sources}


def bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def same(one: Stored, other: Stored) -> bool:
    return one.keys() == other.keys() and all(
        one[name].keys() == other[name].keys()
        and all(torch.equal(bits(tensor), bits(other[name][suffix])) for suffix, tensor in one[name].items())
        for name in one
    )


def nearest_of(plan: Plan, step: Step) -> Stored:
    """The nearest codes at the same scales."""
    form, found = FORMATS[plan.recipe.format], {}
    choose = SCALES[plan.recipe.format][WITHOUT_DATA[plan.recipe.format]]
    for job in step.jobs:
        if job.kind == "quantize":
            weights = {info.name.removesuffix(".weight"): plan.source.read(info.name) for info in job.sources}
            for name, scales in choose(weights, torch.empty(0)).items():
                found[name] = form.store(gptq.nearest(weights[name], scales, form), scales)
    return found


def without_input_scales(stored: Stored) -> Stored:
    return {name: {suffix: tensor for suffix, tensor in of.items() if suffix != nvfp4.INPUT_SCALE} for name, of in stored.items()}


@BOTH
def test_layers_come_closer_to_bf16_on_samples_that_gptq_has_not_seen(
    form: str, plans: dict[str, Plan], samples: list[Sample], tmp_path: Path
) -> None:
    plan = plans[form]
    passing = begun(plan, samples, tmp_path)
    (tmp_path / "others").mkdir()
    others = CalibrationPass(plan, samples, CPU, tmp_path / "others")
    for step in layers(plan)[:2]:
        found, seen = passing.layer(step, tensors_of(plan, step)), others.layer(step, tensors_of(plan, step))
        assert sorted(f"{name}.weight" for name in found) == sorted(step.quantized)
        losses, nearest = passing.losses[step.layer], nearest_of(plan, step)
        assert losses.kept_gptq and losses.gptq < 0.95 * losses.nearest
        for name, stored in without_input_scales(found).items():
            scales = nvfp4.SCALE if form == "nvfp4" else "scales"
            assert torch.equal(stored[scales], nearest[name][scales])
            assert not same({name: stored}, {name: nearest[name]})
        if form == "nvfp4":  # as a run with rounding max stores it
            for name, stored in found.items():
                group = next(job.sources for job in step.jobs if f"{name}.weight" in [info.name for info in job.sources])
                names = [info.name.split(f"layers.{step.layer}.")[1].removesuffix(".weight") for info in group]
                assert torch.equal(stored[nvfp4.INPUT_SCALE], nvfp4.global_scale(seen.of_group(names)))
    # the BF16 stream is the one that calibration moves
    assert all(torch.equal(passing.exact.peek(i), others.states.peek(i)) for i in range(len(samples)))
    assert not any(torch.equal(passing.exact.peek(i), passing.rounded.peek(i)) for i in range(len(samples)))
    passing.close()
    others.close()


@BOTH
def test_a_layer_keeps_its_nearest_codes_where_gptq_does_not_help(
    form: str, plans: dict[str, Plan], samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, step = plans[form], layers(plans[form])[0]
    passing = begun(plan, samples[:9], tmp_path)
    monkeypatch.setattr(gptq, "round_matrix", lambda weight, scales, _, form: gptq.nearest(-weight, scales, form))
    found = passing.layer(step, tensors_of(plan, step))
    losses = passing.losses[0]
    assert losses.as_json() == {"nearest": losses.nearest, "gptq": losses.gptq, "kept_gptq": False}
    assert losses.gptq > losses.nearest > 0
    assert same(without_input_scales(found), nearest_of(plan, step))
    # and what goes on to the next layer is what these weights make
    kept = [passing.rounded.peek(i) for i in passing.held_out]
    exact = [passing.exact.peek(i) for i in passing.held_out]
    error = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(kept, exact, strict=True))
    assert error / sum(float(b.double().square().sum()) for b in exact) == pytest.approx(losses.nearest)
    passing.close()


@BOTH
def test_linears_are_fitted_to_what_rounded_ones_before_them_make(
    form: str, plans: dict[str, Plan], samples: list[Sample], tmp_path: Path
) -> None:
    """H by the definition, from a whole forward of a layer whose linears were rounded group by group."""
    plan = plans[form]
    passing = begun(plan, samples[-4:], tmp_path)
    assert passing.fitted == [0, 1, 2]
    caught: dict[tuple[str, ...], Tensor] = {}
    original = GptqPass._hessian

    def hessian(self: GptqPass, module: nn.Module, size: int, names: list[str], kernel: Kernel) -> Tensor:
        read: list[Tensor] = []

        def seen(name: str, inputs: Tensor) -> None:
            if name == names[0]:
                read.append(inputs[0])

        for i in self.fitted:
            with gptq_pass.reading(module, seen):
                self._through(module, i)
        x = torch.cat([nvfp4.round_activations(x, kernel.scale) if kernel.scale is not None else x for x in read]).double()
        found = original(self, module, size, names, kernel)
        torch.testing.assert_close(found.double(), x.T @ x, rtol=1e-4, atol=1e-5 * float((x.T @ x).max()))
        caught[tuple(sorted(names))] = found
        return found.clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GptqPass, "_hessian", hessian)
        for step in layers(plan):
            caught.clear()
            passing.layer(step, tensors_of(plan, step))
            mixer = [("linear_attn.in_proj_qkv", "linear_attn.in_proj_z"), ("linear_attn.out_proj",)]
            if step.layer == 3:
                mixer = [("self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj"), ("self_attn.o_proj",)]
            assert list(caught) == [*mixer, ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)]
    passing.close()


@BOTH
def test_a_stopped_run_goes_on_to_the_same_bytes(form: str, plans: dict[str, Plan], samples: list[Sample], tmp_path: Path) -> None:
    plan, steps = plans[form], layers(plans[form])[:3]
    whole = begun(plan, samples[-4:], tmp_path / "whole")
    made = [whole.layer(step, tensors_of(plan, step)) for step in steps]
    whole.close()
    stopped = begun(plan, samples[-4:], tmp_path / "stopped")
    assert same(stopped.layer(steps[0], tensors_of(plan, steps[0])), made[0])
    stopped.sync(steps[0])
    stopped.layer(steps[1], tensors_of(plan, steps[1]))  # not journaled: done again
    stopped.close()
    goes_on = begun(plan, samples[-4:], tmp_path / "stopped", first_layer=1)
    for step in steps[1:]:
        assert same(goes_on.layer(step, tensors_of(plan, step)), made[step.layer])
        assert goes_on.losses[step.layer] == whole.losses[step.layer]
    goes_on.close()


def test_the_order_in_which_samples_are_met_changes_nothing(plans: dict[str, Plan], samples: list[Sample], tmp_path: Path) -> None:
    plan, step = plans["int4"], layers(plans["int4"])[0]
    made = []
    for name in ("forwards", "backwards"):
        passing = begun(plan, samples[:9], tmp_path / name)
        if name == "backwards":
            passing.fitted.reverse()
        made.append(passing.layer(step, tensors_of(plan, step)))
        passing.close()
    assert same(*made)


def test_which_samples_are_held_out() -> None:
    assert [held_out(count) for count in (2, 7, 8, 9, 16, 20)] == [[1], [6], [7], [7], [7, 15], [7, 15]]
    assert len(held_out(128)) == 16


def test_one_sample_is_too_few(plans: dict[str, Plan], samples: list[Sample], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="rounding gptq needs at least two calibration samples: one is held out"):
        begun(plans["nvfp4"], samples[:1], tmp_path)
    assert not list(tmp_path.iterdir())


def test_fused_linears_round_their_input_once() -> None:
    kernel, x = Kernel(torch.tensor(0.01)), torch.randn(1, 3, 32).bfloat16()
    first, again, other = kernel(nn.Identity(), (x,)), kernel(nn.Identity(), (x,)), kernel(nn.Identity(), (2 * x,))
    assert torch.equal(first[0], nvfp4.round_activations(x, torch.tensor(0.01)))
    assert again[0] is first[0]
    assert torch.equal(other[0], nvfp4.round_activations(2 * x, torch.tensor(0.01)))
    assert Kernel(None)(nn.Identity(), (x,))[0] is x


def test_groups_come_in_the_order_of_computation(plans: dict[str, Plan]) -> None:
    step = layers(plans["nvfp4"])[0]
    seen = InputAmax()
    for name in (
        "mlp.up_proj",
        "mlp.gate_proj",
        "linear_attn.in_proj_z",
        "mlp.down_proj",
        "linear_attn.in_proj_qkv",
        "linear_attn.out_proj",
    ):
        seen(name, torch.ones(1))
    start = f"{plans['nvfp4'].prefix}layers.0."
    expected = [
        ["mlp.gate_proj", "mlp.up_proj"], ["linear_attn.in_proj_qkv", "linear_attn.in_proj_z"], ["mlp.down_proj"], ["linear_attn.out_proj"],
    ]  # fmt: skip
    assert [sorted(group) for group in in_order(step, start, list(seen.amax))] == expected


@pytest.mark.parametrize("damage", [float("nan"), float("inf")])
def test_a_damaged_matrix_is_named(damage: float, plans: dict[str, Plan], samples: list[Sample], tmp_path: Path) -> None:
    plan, step = plans["nvfp4"], layers(plans["nvfp4"])[0]
    tensors = tensors_of(plan, step)
    name = next(name for name in tensors if name.endswith("mlp.up_proj.weight"))
    tensors[name] = tensors[name].clone()
    tensors[name][3, 5] = damage
    passing = begun(plan, samples[:3], tmp_path)
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.up_proj\.weight holds NaN or infinite values"):
        passing.layer(step, tensors)
    passing.close()


def test_a_matrix_that_no_scale_reaches_is_named(plans: dict[str, Plan], samples: list[Sample], tmp_path: Path) -> None:
    plan, step = plans["int4"], layers(plans["int4"])[0]
    tensors = tensors_of(plan, step)
    name = next(name for name in tensors if name.endswith("in_proj_z.weight"))
    tensors[name] = tensors[name].clone()
    tensors[name][3, 5] = 1e6
    passing = begun(plan, samples[:3], tmp_path)
    with pytest.raises(InputError, match=r"layer 0: linear_attn\.in_proj_z holds numbers up to 9\.99e\+05; no scale is so large"):
        passing.layer(step, tensors)
    passing.close()
