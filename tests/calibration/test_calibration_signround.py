"""Sign-gradient rounding on the stream: mtpress-tiny's layers, text and a picture, samples of different lengths."""

import pytest
import torch
from PIL import Image
from torch import Tensor

from mtpress.builtin import BUILTIN_MODEL
from mtpress.calibration.forward import CalibrationPass
from mtpress.calibration.samples import load_calibration
from mtpress.calibration.signround import SignRoundPass, _Block
from mtpress.chat.encoder import ChatEncoder
from mtpress.chat.sample import Sample
from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.formats import int4
from mtpress.models.qwen3_5.layers import StreamedBody
from mtpress.plan.plan import Plan, Step, make_plan
from mtpress.plan.recipe import CalibrationSource, load_recipe
from mtpress.rounding import batches as tuning_batches
from mtpress.rounding.rtn import round_matrix
from mtpress.rounding.signround import Settings

CPU = torch.device("cpu")
Rounded = dict[str, tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(Checkpoint.open(BUILTIN_MODEL), load_recipe("nvfp4-mtp-vlm"))


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    """Twelve texts of 18 to 40 tokens, then a picture with a question."""
    texts = load_calibration(BUILTIN_MODEL, CalibrationSource(num_samples=40, max_seq_len=40), []).samples
    texts = [Sample(text.input_ids[: 40 - 2 * i]) for i, text in enumerate(t for t in texts if len(t.input_ids) == 40)][:12]
    picture = {"type": "image", "image": Image.new("RGB", (64, 64), (200, 30, 30))}
    return [*texts, ChatEncoder(BUILTIN_MODEL).encode([{"role": "user", "content": [picture, {"type": "text", "text": "What color?"}]}])]


def layers(plan: Plan) -> list[Step]:
    return [step for step in plan.steps if step.layer is not None]


def tensors_of(plan: Plan, step: Step) -> dict[str, Tensor]:
    return {info.name: plan.source.read(info.name) for job in step.jobs for info in job.sources}


def equal(one: Rounded, other: Rounded) -> bool:
    return one.keys() == other.keys() and all(torch.equal(a, b) for name in one for a, b in zip(one[name], other[name], strict=True))


def block_error(plan: Plan, step: Step, rounded: Rounded, states: list[Tensor]) -> float:
    """Mean squared error of the layer's output on BF16 states."""
    body = StreamedBody(plan.source.config, CPU)
    start = f"{plan.prefix}layers.{step.layer}."
    outputs = []
    for changed in ({}, {f"{name}.weight": dequantized(*found) for name, found in rounded.items()}):
        weights = {name.removeprefix(start): tensor for name, tensor in (tensors_of(plan, step) | changed).items()}
        module = body.decoder_layer(step.layer, weights)
        with torch.no_grad(), body.delta_rule(module):
            positions = [torch.arange(x.shape[1]).expand(3, 1, -1) for x in states]
            outputs.append(torch.cat([body.through(module, x, p)[0] for x, p in zip(states, positions, strict=True)]).float())
    return float((outputs[0] - outputs[1]).square().mean())


def dequantized(codes: Tensor, scales: Tensor) -> Tensor:
    weight = (codes.float().view(*scales.shape, -1) - int4.ZERO) * scales.float().unsqueeze(-1)
    return weight.flatten(1).bfloat16()


def test_tuned_layers_beat_plain_rounding_on_other_tokens(plan, samples, tmp_path):
    tuning = SignRoundPass(plan, samples[:8], CPU, tmp_path, Settings())
    (tmp_path / "others").mkdir()
    others = CalibrationPass(plan, samples[:12], CPU, tmp_path / "others")
    for step in layers(plan):
        tensors = tensors_of(plan, step)
        if step.layer == 0:
            others.states.settle()
        held_out = [others.states.peek(i) for i in range(8, 12)]
        tuning.settings = Settings(iterations=40 if step.layer in (0, 3) else 1)  # one of each kind
        found = tuning.layer(step, tensors)
        assert sorted(f"{name}.weight" for name in found) == sorted(step.quantized)
        plain = {name: round_matrix(tensors[f"{name}.weight"]) for name in found}
        if tuning.settings.iterations == 1:
            assert equal(found, plain)
        else:
            losses = tuning.losses[step.layer]
            assert losses.best < 0.8 * losses.before
            # by how much depends on the last bits of this CPU's products: 0.74 to 0.93 was seen
            assert block_error(plan, step, found, held_out) < block_error(plan, step, plain, held_out)
        others.layer(step, tensors)
    # the BF16 stream is the one that calibration moves
    assert all(torch.equal(tuning.exact.peek(i), others.states.peek(i)) for i in range(8))
    assert not any(torch.equal(tuning.exact.peek(i), tuning.rounded.peek(i)) for i in range(8))
    tuning.close()
    others.close()


def test_a_stopped_run_goes_on_to_the_same_bytes(plan, samples, tmp_path):
    settings, steps = Settings(iterations=4, batch_size=3), layers(plan)
    whole = SignRoundPass(plan, samples, CPU, tmp_path, settings)
    made = [whole.layer(step, tensors_of(plan, step)) for step in steps]
    whole.close()
    (tmp_path / "stopped").mkdir()
    stopped = SignRoundPass(plan, samples, CPU, tmp_path / "stopped", settings)
    assert equal(stopped.layer(steps[0], tensors_of(plan, steps[0])), made[0])
    stopped.sync(steps[0])
    stopped.layer(steps[1], tensors_of(plan, steps[1]))  # not journaled: done again
    stopped.close()
    goes_on = SignRoundPass(plan, samples, CPU, tmp_path / "stopped", settings, first_layer=1)
    for step in steps[1:]:
        assert equal(goes_on.layer(step, tensors_of(plan, step)), made[step.layer])
    goes_on.close()


def test_side_by_side_is_one_by_one(plan, samples, tmp_path, monkeypatch):
    tuning = SignRoundPass(plan, samples, CPU, tmp_path, Settings(iterations=1))
    batch = [0, 12, 5]  # of other lengths, one with a picture
    assert len({len(samples[i].input_ids) for i in batch}) == 3
    for step in (layers(plan)[0], layers(plan)[3]):
        start = f"{plan.prefix}layers.{step.layer}."
        module = tuning.body.decoder_layer(step.layer, {n.removeprefix(start): t for n, t in tensors_of(plan, step).items()})
        block = _Block(tuning, module)
        # any states will do for what to compare with: those in front of the layer
        with torch.no_grad(), tuning.body.delta_rule(module):
            assert block.pieces(batch) == [sorted(batch, key=lambda i: -len(samples[i].input_ids))]
            together = float(block.loss(batch, batch))
            alone = sum(float(block.loss([i], batch)) for i in batch)
        assert together == pytest.approx(alone, rel=1e-3)
    tuning.close()


def test_a_batch_that_is_too_large_goes_in_pieces(plan, samples, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning_batches, "PIECE_BYTES", 80 * tuning_batches.kept_bytes(plan.source.text_config))
    settings, step = Settings(iterations=3, batch_size=4), layers(plan)[0]
    tuning = SignRoundPass(plan, samples, CPU, tmp_path, settings)
    pieces = _Block(tuning, torch.nn.Identity()).pieces([0, 1, 2, 3])
    assert [len(piece) for piece in pieces] == [2, 2]
    (tmp_path / "again").mkdir()
    again = SignRoundPass(plan, samples, CPU, tmp_path / "again", settings)
    assert equal(tuning.layer(step, tensors_of(plan, step)), again.layer(step, tensors_of(plan, step)))
    tuning.close()
    again.close()
