"""INT4 against the layout written out element by element, and against float64."""

import pytest
import torch
from torch import Tensor

from mtpress.errors import InputError
from mtpress.formats import int4

SHAPES = [(32, 128), (96, 256), (64, 384)]


def sample(n: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Codes with every value in every place of a word, and scales of both signs and all sizes that FP16 has."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=generator)
    bits = torch.randint(0, 1 << 16, (n, k // int4.GROUP_SIZE), generator=generator)
    bits = torch.where(bits & 0x7C00 == 0x7C00, bits & ~0x4000, bits)  # finite
    return codes, bits.to(torch.int32).to(torch.int16).view(torch.float16)


@pytest.mark.parametrize("by", [None, int4.EAGER])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_every_code_has_the_bits_that_gptq_gives_it(n: int, k: int, by: str | None) -> None:
    codes, _ = sample(n, k)
    words = int4.pack(codes, by)
    assert words.dtype == torch.int32 and words.is_contiguous()
    unsigned = words.to(torch.int64) & 0xFFFFFFFF
    for column in range(k):
        found = unsigned[column // 8] >> 4 * (column % 8) & 0xF
        assert torch.equal(found, codes[:, column].to(torch.int64))


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_unpacking_gives_the_codes_back(n: int, k: int) -> None:
    codes, _ = sample(n, k)
    assert torch.equal(int4.unpack(int4.pack(codes)), codes)


def test_pieces_join(monkeypatch: pytest.MonkeyPatch) -> None:
    codes, scales = sample(96, 256)
    whole = int4.tensors(codes, scales)
    weight = int4.dequantize(*whole.values())
    monkeypatch.setattr(int4, "PIECE_CODES", 7 * 256)
    assert torch.equal(int4.pack(codes, int4.EAGER), whole[int4.QWEIGHT])
    assert torch.equal(int4.unpack(whole[int4.QWEIGHT]), codes)
    assert torch.equal(int4.dequantize(*whole.values()).view(torch.int32), weight.view(torch.int32))


@pytest.mark.parametrize("view", [lambda c: c.t().contiguous().t(), lambda c: c[::2], lambda c: c[:, :128]])
def test_codes_may_lie_in_memory_as_they_like(view: object) -> None:
    assert callable(view)
    codes = view(sample(128, 256)[0])
    assert torch.equal(int4.pack(codes), int4.pack(codes.clone(memory_format=torch.contiguous_format)))


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_stored_tensors_are_as_planned(n: int, k: int) -> None:
    stored = int4.tensors(*sample(n, k))
    dtypes = {"I32": torch.int32, "F16": torch.float16}
    for suffix, (dtype, shape) in int4.output_tensors((n, k)).items():
        assert stored[suffix].dtype == dtypes[dtype]
        assert tuple(stored[suffix].shape) == shape
        assert stored[suffix].is_contiguous()
    assert stored.keys() == int4.output_tensors((n, k)).keys()
    assert set(stored[int4.QZEROS].flatten().tolist()) == {0x77777777}


@pytest.mark.parametrize("convention", [int4.STORED_LESS_ONE, int4.STORED_AS_IS])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_dequantized_weights_are_exact_in_either_convention(n: int, k: int, convention: int) -> None:
    codes, scales = sample(n, k, seed=3)
    stored = int4.tensors(codes, scales)
    found = int4.dequantize(stored[int4.QWEIGHT], int4.zeros(n, k // int4.GROUP_SIZE, convention), stored[int4.SCALES])
    expected = (codes.double() - 8).unflatten(-1, (-1, int4.GROUP_SIZE)) * scales.double().unsqueeze(-1)
    assert found.dtype == torch.float32
    assert torch.equal(found.double(), expected.flatten(-2))


def test_stored_zero_points_are_words_of_eight() -> None:
    assert int4.zeros(16, 1).tolist() == [[0x77777777] * 2]
    assert int4.zeros(8, 2, int4.STORED_AS_IS).tolist() == [[0x88888888 - (1 << 32)]] * 2
    assert set(int4.zero_points(int4.zeros(32, 3)).flatten().tolist()) == {8}
    assert set(int4.zero_points(int4.zeros(32, 3, int4.STORED_AS_IS)).flatten().tolist()) == {8}


def test_other_zero_points_are_read_as_gptq_s_first_version_has_them() -> None:
    stored = torch.tensor([[0x76543210]], dtype=torch.int32)
    assert int4.zero_points(stored).tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    codes, scales = torch.arange(8, dtype=torch.uint8).repeat(16).repeat(8, 1), torch.ones(1, 8, dtype=torch.float16)
    weight = int4.dequantize(int4.pack(codes), stored, scales)
    assert weight[:, 0].tolist() == [-1, -2, -3, -4, -5, -6, -7, -8]


@pytest.mark.parametrize("group_size", [32, 64, 256])
def test_other_group_sizes_follow_from_the_shapes(group_size: int) -> None:
    codes, _ = sample(32, 256)
    groups = 256 // group_size
    scales = torch.arange(1, 1 + 32 * groups).view(groups, 32).half()
    weight = int4.dequantize(int4.pack(codes), int4.zeros(32, groups), scales)
    assert torch.equal(weight, (codes.float() - 8) * scales.t().float().repeat_interleave(group_size, dim=1))


@pytest.mark.parametrize(
    ("qweight", "qzeros", "scales"),
    [
        ((32, 64), (2, 8), (2, 32)),
        ((32, 64), (3, 8), (2, 64)),
        ((32, 64), (2, 7), (2, 64)),
        ((32, 64), (0, 8), (0, 64)),
        ((32, 64), (3, 8), (3, 64)),
    ],
)
def test_tensors_of_different_matrices_are_refused(qweight: tuple[int, ...], qzeros: tuple[int, ...], scales: tuple[int, ...]) -> None:
    words = torch.zeros(qweight, dtype=torch.int32), torch.zeros(qzeros, dtype=torch.int32), torch.zeros(scales, dtype=torch.float16)
    with pytest.raises(InputError, match="no one INT4 matrix") as raised:
        int4.dequantize(*words)
    assert "\n" not in str(raised.value)


def test_a_code_times_a_scale_is_exact_in_float32() -> None:
    scales = torch.arange(1 << 16).to(torch.int32).to(torch.int16).view(torch.float16)
    scales = scales[scales.isfinite()]
    for code in range(int4.MIN_CODE, int4.MAX_CODE + 1):
        assert torch.equal((code * scales.float()).double(), code * scales.double())


def test_the_config_names_what_is_kept_and_what_is_not() -> None:
    config = int4.quantization_config(["lm_head", "mtp.fc"], "model.language_model.layers", iters=0)
    assert config == {
        "bits": 4, "data_type": "int", "group_size": 128, "sym": True, "iters": 0,
        "block_name_to_quantize": "model.language_model.layers", "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq",
        "extra_config": {"lm_head": {"bits": 16, "data_type": "fp"}, "mtp.fc": {"bits": 16, "data_type": "fp"}},
    }  # fmt: skip
    assert not any("version" in key for key in config)  # it is not auto-round's output
