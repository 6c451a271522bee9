"""The reference generator: its logits are transformers' own, and the draft head changes nothing but the number of steps."""

from collections import Counter

import pytest
import torch
from transformers import Qwen3_5ForConditionalGeneration

from mtpress.builtin import BUILTIN_MODEL
from mtpress.chat.encoder import ChatEncoder
from mtpress.chat.sample import Sample
from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.errors import InputError
from mtpress.formats import nvfp4
from mtpress.models.qwen3_5.generate import Generator, Sampling, _Run
from mtpress.stages.demo import drawn_circle
from mtpress.stages.quantize import quantize

QUESTIONS = ["Which river is Brook on?", "How do I make tea?", "What is 20 + 31?", "Sort these words: wolf, cat, hen, bee", "Hello!"]


@pytest.fixture(scope="module")
def encoder() -> ChatEncoder:
    return ChatEncoder(BUILTIN_MODEL)


@pytest.fixture(scope="module")
def generator() -> Generator:
    return Generator(Checkpoint.open(BUILTIN_MODEL))


def ask(encoder: ChatEncoder, content: object, **more: object) -> Sample:
    return encoder.encode([{"role": "user", "content": content}], add_generation_prompt=True, **more)


def test_greedy_tokens_are_the_argmax_of_the_whole_model(encoder: ChatEncoder, generator: Generator) -> None:
    whole = Qwen3_5ForConditionalGeneration.from_pretrained(BUILTIN_MODEL, dtype=torch.float32).eval()
    for question in QUESTIONS[:3]:
        sample = ask(encoder, question)
        found = generator.generate(sample, 24).token_ids
        ids = torch.cat([sample.input_ids, torch.tensor(found)])[None]
        with torch.no_grad():
            expected = whole(input_ids=ids, use_cache=False).logits[0].argmax(-1)
        assert expected[len(sample.input_ids) - 1 : -1].tolist() == found


@pytest.mark.parametrize("num_drafts", [1, 2, 3])
def test_drafts_do_not_change_greedy_text(num_drafts: int, encoder: ChatEncoder, generator: Generator) -> None:
    stop = frozenset({encoder.tokenizer.eos_token_id})
    picture = [{"type": "image", "image": drawn_circle()}, {"type": "text", "text": "What is in the image?"}]
    samples = [ask(encoder, q) for q in QUESTIONS] + [ask(encoder, picture), ask(encoder, QUESTIONS[2], enable_thinking=True)]
    steps = tokens = 0
    for sample in samples:
        plain = generator.generate(sample, 60, stop_ids=stop)
        found = generator.generate(sample, 60, num_drafts=num_drafts, stop_ids=stop)
        assert found.token_ids == plain.token_ids
        assert plain.num_steps == len(plain.token_ids)
        steps, tokens = steps + found.num_steps, tokens + len(found.token_ids)
        assert sorted(found.accepted, reverse=True) == found.accepted
    assert tokens / steps > 1.4


def test_the_quantized_build_drafts_too(encoder: ChatEncoder, tmp_path_factory: pytest.TempPathFactory) -> None:
    out = tmp_path_factory.mktemp("generate") / "out"
    quantize(BUILTIN_MODEL, out, "nvfp4-mtp-vlm", calibration=["builtin"], silent=True)
    generator = Generator(Checkpoint.open(out))
    stop = frozenset({encoder.tokenizer.eos_token_id})
    accepted, drafts = 0, 0
    for question in QUESTIONS:
        found = generator.generate(ask(encoder, question), 60, num_drafts=3, stop_ids=stop)
        accepted, drafts = accepted + found.accepted[0], drafts + found.num_drafts
    assert accepted / drafts > 0.6


def test_rejection_sampling_keeps_the_distribution(generator: Generator) -> None:
    """The first token of a speculative step follows the body's distribution, whatever the draft's is."""
    sampling = Sampling(temperature=1.0, top_k=0, top_p=1.0)
    run = _Run(generator, Sample(torch.tensor([1])), sampling, 1)
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0], [3.0, 0.0, 0.0, 0.0]])
    draft_odds = torch.tensor([0.7, 0.1, 0.1, 0.1])
    wanted = logits[0].softmax(-1)
    counts: Counter[int] = Counter()
    trials = 20_000
    for _ in range(trials):
        draft = int(torch.multinomial(draft_odds, 1, generator=run.dice))
        accepted, following = run._accept(logits, [draft], [draft_odds])
        counts[draft if accepted else following] += 1
    for token, odds in enumerate(wanted.tolist()):
        assert abs(counts[token] / trials - odds) < 4 * (odds * (1 - odds) / trials) ** 0.5


def test_sampling_cuts_by_top_k_and_top_p() -> None:
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    assert (Sampling(1.0, top_k=2, top_p=1.0).probabilities(logits)[0] > 0).tolist() == [True, True, False, False]
    assert (Sampling(1.0, top_k=0, top_p=0.5).probabilities(logits)[0] > 0).tolist() == [True, False, False, False]


def test_sampled_text_is_fixed_by_its_seed(encoder: ChatEncoder, generator: Generator) -> None:
    sample = ask(encoder, "Tell me a story about Mia, Tom and a red kite in Brook.")
    runs = [generator.generate(sample, 30, num_drafts=2, sampling=Sampling(0.9, seed=seed)).token_ids for seed in (1, 1, 2)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_activations_are_rounded_in_blocks() -> None:
    x = torch.randn(5, 64, dtype=torch.float32, generator=torch.Generator().manual_seed(3)) * 3
    input_scale = nvfp4.global_scale(x.abs().max())
    rounded = nvfp4.round_activations(x, input_scale)
    for row, blocks in zip(x.double().view(5, 4, 16), rounded.view(5, 4, 16), strict=True):
        for values, got in zip(row, blocks, strict=True):
            scale = (values.abs().max() / 6 / input_scale.double()).clamp(max=448).to(torch.float8_e4m3fn).double() * input_scale.double()
            grid = torch.tensor([*nvfp4.E2M1_VALUES, *(-v for v in nvfp4.E2M1_VALUES)]).double() * scale
            nearest = (values[:, None] - grid).abs().min(-1).values
            assert torch.allclose((values - got).abs(), nearest, rtol=1e-5, atol=1e-5)
    assert torch.equal(nvfp4.round_activations(torch.zeros(2, 16), input_scale), torch.zeros(2, 16))


def test_what_it_cannot_do_is_one_line(encoder: ChatEncoder, tmp_path: pytest.TempPathFactory) -> None:
    out = tmp_path / "text"
    quantize(BUILTIN_MODEL, out, "nvfp4-mtp-text", calibration=["builtin"], silent=True)
    picture = [{"type": "image", "image": drawn_circle()}, {"type": "text", "text": "What is in the image?"}]
    with pytest.raises(InputError, match="no vision tower"):
        Generator(Checkpoint.open(out)).generate(ask(encoder, picture), 4)
