"""Every broken class through repair: sound afterwards or left with a reason, bits where nothing may be lost, a row in the docs."""

from pathlib import Path

import pytest
import torch
from broken_classes import ALL, HEADER, VLM, break_and_repair

from breaks import Break
from checkpoints import SMALL_FORMATS
from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.rules.registry import STATIC_RULES
from mtpress.stages.check import check
from mtpress.stages.repair import RepairResult, repair

DOCS = Path(__file__).parents[2] / "docs/repair.md"
SEVERITY = {rule.id: rule.severity for rule in STATIC_RULES}

# What is left without a base, although it is an error.
NEEDS_BASE = {
    "torn_generation_config", "no_hidden_size", "no_head_dim", "rope_parameters_by_layer_type",
    "a_norm_missing", "a_quantized_linear_missing", "a_vision_tensor_missing",
    "quantized_embeddings", "conv1d_in_int8", "codes_of_another_shape", "embeddings_shorter_than_the_vocabulary",
    "an_input_size_of_no_whole_blocks", "no_block_scales", "no_global_scale",
    "a_global_scale_of_zero", "no_draft_head", "half_a_draft_head", "tower_lost",
    "tower_in_a_text_model", "no_video_processor", "no_tokenizer", "no_tokenizer_config", "an_end_token_outside",
    "pictures_divided_by_nothing",
    "a_tokenizer_larger_than_the_embedding", "think_tags_that_are_no_tokens", "compressed-tensors-no_global_scale",
    "compressed-tensors-no_block_scales",
    "compressed-tensors-a_global_scale_of_infinity",
    "compressed-tensors-codes_of_another_shape",
    "compressed-tensors-no_draft_head",
    "compressed-tensors-int4-asymmetric_without_zero_points",
    "auto-round-codes_that_lack_a_word", "auto-round-scales_in_int8",
    "auto-round-no_scales",
    "modelopt-mixed-no_weight_scale_of_fp8",
    "modelopt-mixed-a_weight_scale_of_fp8_that_is_nan", "fp8-no_scales_of_a_block", "fp8-scales_of_another_shape",
    "compressed-tensors-mixed-no_scales_of_the_rows",
}  # fmt: skip
# What is left with one, as it may be its author's: the breaker's own weights, codes, scales and settings.
LEFT_WITH_BASE = {
    "global_scale_in_bf16", "an_input_size_of_no_whole_blocks", "a_bf16_linear_not_ignored", "a_quantized_lm_head_that_is_ignored",
    "a_quantized_lm_head", "in_proj_ab_in_nvfp4", "both_processors_in_one_file", "yarn_beside_mrope", "rope_parameters_by_layer_type",
    "compressed-tensors-int4-scales_for_groups_of_32_declared_64", "auto-round-scales_for_groups_of_64_in_one_linear",
    "modelopt-mixed-a_bf16_linear_among_the_entries",
}  # fmt: skip
DEQUANTIZED = "what the codes of the head stand for; tests/repairs/test_draft_head.py has the bits"
CODES = "what the codes stand for; tests/repairs/test_codes_in_bf16.py has the numbers"
# Tensors that are neither the sound checkpoint's nor the base's afterwards, and why that is right.
OTHERWISE = {
    **dict.fromkeys((
        "no_input_scale", "an_input_scale_of_nan", "one_shard_of_q_k_v_in_bf16", "one_linear_in_gptq", "no_block_scales", "no_global_scale",
        "compressed-tensors-no_input_global_scale", "compressed-tensors-one_shard_of_q_k_v_in_bf16",
        "compressed-tensors-a_linear_in_modelopts_layout", "auto-round-zero_points_that_are_not_the_middle",
        "auto-round-scales_for_groups_of_64_in_one_linear", "auto-round-one_packed_shard_of_gate_up_in_bf16",
        "modelopt-mixed-no_input_scale_of_fp8", "modelopt-mixed-no_input_scale_of_nvfp4",
    ), "the value that the codes stand for, in BF16"),
    "a_tensor_left_out_of_the_index": "a bias of zeros, which the engine passes over",
    "tensors_that_the_engine_passes_over": "they are still there",
    "nothing_is_quantized": "the breaker's own weights, all ones",
    "a_bf16_linear_not_ignored": "the breaker's own weights, all ones",
    "a_quantized_lm_head": "the breaker's own codes",
    "a_quantized_lm_head_that_is_ignored": "the breaker's own codes",
    "in_proj_ab_in_nvfp4": "the breaker's own codes",
    "global_scale_in_bf16": "the scale that is stored, cast",
    "an_fp8_kv_cache_with_scales": "they are still there",
    "kv_scales_of_a_gdn_layer": "those of the attention layer are still there",
    "own_global_scale_for_in_proj_qkv": "the weights that are stored, half as large, under one global scale",
    "mtp_fc_quantized": "the breaker's own codes, dequantized",
    "compressed-tensors-a_quantized_draft_layer": DEQUANTIZED,
    "compressed-tensors-a_quantized_draft_layer_that_is_ignored": DEQUANTIZED,
    "auto-round-the_draft_layer_rounded_as_auto_round_does": DEQUANTIZED,
    "auto-round-the_draft_layer_rounded_and_not_declared": DEQUANTIZED,
    "auto-round-mtp_fc_packed": DEQUANTIZED,
    "auto-round-mtp_fc_packed_and_declared": DEQUANTIZED,
    "gptq-a_packed_mtp_fc": DEQUANTIZED,
    "gptq-a_packed_draft_layer": DEQUANTIZED,
    "embeddings_in_nvfp4": CODES,
    "fp8-a_draft_layer_in_fp8_that_is_spared": CODES,
    "fp8-an_lm_head_in_fp8": CODES,
    "fp8-embeddings_in_fp8": CODES,
    "fp8-in_proj_ab_in_fp8": CODES,
    "fp8-one_linear_with_a_scale_a_row": CODES,
    "compressed-tensors-mixed-an_fp8_lm_head_by_its_bare_name": "the breaker's own codes",
    "compressed-tensors-mixed-a_draft_layer_in_fp8_that_no_target_names": CODES,
    "compressed-tensors-mixed-scales_of_the_rows_without_their_second_dimension": "the same numbers in another shape",
    "modelopt-mixed-a_scale_a_row": "the breaker's own scales, the same number for each row",
    "modelopt-mixed-a_bf16_linear_among_the_entries": "the breaker's own weights, all ones",
    "modelopt-mixed-own_input_scale_for_a_shard_of_fp8": "the scale that the engine takes",
    "modelopt-mixed-a_scale_of_fp8_in_bf16": "the scale that is stored, cast",
    "compressed-tensors-own_global_scale_for_in_proj_z": "the weights that are stored, under one global scale",
    "compressed-tensors-int8_declared": "the breaker's own weights",
    "compressed-tensors-int4-scales_for_groups_of_32_declared_64": "the breaker's own weights",
    "compressed-tensors-own_input_scale_for_q": "the scale that the engine takes",
    "gptq-version_two_with_zero_points_of_version_one": "the zero points of version two",
    "auto-round-a_quantized_lm_head_without_an_entry": "the breaker's own codes",
    "auto-round-a_quantized_lm_head": "the breaker's own codes",
    "gptq-a_packed_lm_head_that_is_not_said": "the breaker's own codes",
}  # fmt: skip


def tensors(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(path)
    assert not checkpoint.unindexed
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def same(one: torch.Tensor | None, other: torch.Tensor) -> bool:
    if one is None or one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.view(-1).view(torch.uint8), other.view(-1).view(torch.uint8))


def assert_nothing_lost(name: str, result: RepairResult, sound: Path, base: Path) -> None:
    """Codes, scales and kept tensors are those of the sound checkpoint or, in BF16 again, those of the base."""
    made, right, source = tensors(Path(result.out)), tensors(sound), tensors(base)
    other = [n for n, tensor in made.items() if not same(right.get(n), tensor) and not same(source.get(n), tensor)]
    assert bool(other) <= (name in OTHERWISE), other
    gone = {n.rpartition(".")[0] for n in right.keys() - made.keys()} - {n.rpartition(".")[0] for n in made}
    assert gone == set(), gone


@pytest.fixture(scope="module")
def sound(small_nvfp4: dict[str, Path], small_formats: dict[str, Path]) -> dict[str, Path]:
    """Format → a sound checkpoint in it."""
    return {VLM: small_nvfp4[VLM], **small_formats}


@pytest.mark.parametrize(("name", "kind", "expected", "function"), ALL, ids=[case[0] for case in ALL])
def test_a_broken_class(
    name: str, kind: str, expected: set[str], function: Break, sound: dict[str, Path], small_bf16: Path, tmp_path: Path
) -> None:
    case = break_and_repair(name, function, sound[kind], small_bf16, tmp_path)
    assert set(case.said) == expected
    errors = {rule for rule in expected if SEVERITY[rule] == "error"}
    assert {outcome.finding.id for outcome in case.alone.outcomes} >= expected
    for result in (case.alone, case.with_base):
        assert result.written == bool(result.fixed) == Path(result.out).exists()
        if result.written:
            made = check(result.out, silent=True)
            assert made.findings == result.findings[: len(made.findings)]
            assert made.sound == result.sound or result.compared
        for outcome in result.outcomes:
            assert outcome.fixed or outcome.left
    assert case.alone.sound == (name not in NEEDS_BASE)
    assert case.with_base.sound == (name not in LEFT_WITH_BASE), case.with_base.findings
    if name in NEEDS_BASE:
        left = {outcome.finding.id: outcome.left[0] for outcome in case.alone.left}
        assert left.keys() >= {finding.id for finding in case.alone.findings if finding.severity == "error"}
        assert any("--base SRC" in reason.takes for reason in left.values())
        assert errors
    for result in (case.alone, case.with_base):
        if result.written and result.sound:
            assert_nothing_lost(name, result, sound[kind], small_bf16)
    if not expected:
        assert case.alone.outcomes == ()
    assert case.row in DOCS.read_text(encoding="utf-8").splitlines(), f"docs/repair.md lacks this row:\n{case.row}"


def test_the_documented_classes_are_those_of_the_table() -> None:
    lines = DOCS.read_text(encoding="utf-8").splitlines()
    start = lines.index(HEADER[0])
    end = next(number for number in range(start, len(lines) + 1) if number == len(lines) or not lines[number])
    assert len(lines[start + 2 : end]) == len(ALL)


@pytest.mark.parametrize("kind", [VLM, *SMALL_FORMATS])
def test_nothing_is_done_to_a_sound_checkpoint(kind: str, sound: dict[str, Path], small_bf16: Path, tmp_path: Path) -> None:
    for base in (None, small_bf16):
        result = repair(sound[kind], tmp_path / "out", base, silent=True)
        assert not result.fixed
        assert result.sound
        assert not (tmp_path / "out").exists()


def test_the_lists_here_name_cases() -> None:
    names = {name for name, _, _, _ in ALL}
    assert NEEDS_BASE | LEFT_WITH_BASE | OTHERWISE.keys() <= names
