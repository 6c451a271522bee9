"""What vLLM does with the broken checkpoints of tests/breaks.py and tests/format_breaks.py, a third of them here and all in make soak:
whatever it refuses, check calls an error.

And what check calls an error though vLLM loads it is listed here, one by one: these are the silent ones, for which check is.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

import format_breaks
from breaks import CASES
from checkpoints import Edit
from mtpress.rules.registry import STATIC_RULES
from mtpress.stages.convert import convert

pytestmark = pytest.mark.engine

SCRIPT = Path(__file__).with_name("load_on_cpu.py")
SEVERITY = {rule.id: rule.severity for rule in STATIC_RULES}
# Rules on files that loading does not read.
BESIDE = {
    "json-unreadable", "index-total-size", "shard-unindexed", "torch-dtype", "processor-missing", "tokenizer-missing",
    "tokenizer-config-missing", "tokenizer-backend", "template-missing", "generation-config-missing", "token-id-outside",
    "token-id-differs", "special-tokens", "generation-ids", "generation-greedy", "template-loses", "template-behaviour", "template-choices",
    "template-twice", "processor-unsound", "code-beside",
}  # fmt: skip
NO_CPU_KERNEL = {"weight_only_needs_no_input_scale", "weight_only_with_input_scales"}  # W4A16 wants Marlin
SOAK = bool(os.environ.get("MTPRESS_SOAK"))
LOADED = [case for case in CASES if case[0] not in NO_CPU_KERNEL and not (case[1] and case[1] <= BESIDE)][:: 1 if SOAK else 3]
NO_CPU_FORMATS = ("compressed-tensors-w4a16", "fp8")  # FP8 in blocks has a CPU kernel where there is AMX alone
# Of other formats the CPU has no kernel for W4A16 NVFP4, for rows that 32 does not divide, and for a packed lm_head that it must pad.
QUICK = {
    "compressed-tensors-only_mtp_fc_not_ignored", "compressed-tensors-own_global_scale_for_in_proj_z",
    "compressed-tensors-int4-eight_bits_declared", "auto-round-no_block_names", "auto-round-mtp_fc_packed",
    "auto-round-the_draft_layer_rounded_as_auto_round_does", "gptq-dynamic_as_null", "gptq-version_two",
    "modelopt-mixed-two_formats_in_a_fused_linear", "modelopt-mixed-the_draft_layer_among_the_entries",
    "modelopt-mixed-mtp_fc_among_the_entries", "modelopt-mixed-no_input_scale_of_fp8",
}  # fmt: skip
FORMATS_LOADED = [
    case
    for case in format_breaks.CASES
    if case[1] not in NO_CPU_FORMATS
    and case[0] not in ("auto-round-in_proj_ab_in_int4", "auto-round-a_quantized_lm_head")
    and (case[0] in QUICK or SOAK)
]
EXPECTED = {name: expected for name, expected, _ in LOADED} | {name: expected for name, _, expected, _ in FORMATS_LOADED}

SILENT = {
    "a_norm_missing", "a_vision_tensor_missing", "tower_lost", "no_global_scale", "no_input_scale",
    "a_global_scale_of_zero", "an_input_scale_of_nan", "block_scales_in_bf16", "global_scale_in_bf16", "conv1d_in_int8",
    "a_k_scale_without_its_v_scale",
    "own_global_scale_for_in_proj_qkv", "no_draft_head", "half_a_draft_head", "draft_head_in_a_shard_of_its_own",
    "draft_head_left_out_of_the_index", "draft_head_in_a_folder_below", "mtp_num_hidden_layers_two", "another_algo_in_the_other_file",
    "draft_head_ignored_in_one_file_only", "fp8_kv_in_one_file_only",
    "compressed-tensors-no_global_scale", "compressed-tensors-no_block_scales", "compressed-tensors-no_input_global_scale",
    "compressed-tensors-a_global_scale_of_infinity", "compressed-tensors-own_global_scale_for_in_proj_z",
    "compressed-tensors-block_scales_in_bf16", "compressed-tensors-fp8_declared", "compressed-tensors-modelopts_file_beside_it",
    "compressed-tensors-no_draft_head", "compressed-tensors-int4-no_weight_shape", "compressed-tensors-int4-another_weight_shape",
    "compressed-tensors-int4-asymmetric_without_zero_points", "auto-round-zero_points_that_are_not_the_middle",
    "auto-round-groups_that_do_not_divide_the_input", "auto-round-scales_in_int8", "auto-round-no_scales", "auto-round-no_zero_points",
    "auto-round-mtp_fc_packed_and_declared", "gptq-a_packed_mtp_fc",
    "modelopt-mixed-entries_that_differ_between_the_files", "modelopt-mixed-the_draft_layer_among_the_entries",
    "modelopt-mixed-a_bf16_linear_among_the_entries", "modelopt-mixed-no_input_scale_of_fp8", "modelopt-mixed-no_weight_scale_of_fp8",
    "modelopt-mixed-no_input_scale_of_nvfp4", "modelopt-mixed-a_weight_scale_of_fp8_that_is_nan",
    "modelopt-mixed-a_scale_of_fp8_in_bf16",
}  # fmt: skip
IN_THE_DRAFT = {
    "a_draft_head_with_half_of_its_kv_scales", "all_under_the_engines_names",
    "mtp_fc_quantized", "draft_head_not_ignored", "draft_head_ignored_under_another_prefix", "lm_head_ignored_for_the_target_only",
    "compressed-tensors-draft_head_not_ignored", "compressed-tensors-only_mtp_fc_not_ignored",
    "compressed-tensors-a_quantized_draft_layer_that_is_ignored", "auto-round-a_bf16_draft_layer_in_the_block_names",
    "auto-round-an_entry_that_is_a_number", "auto-round-the_draft_layer_rounded_and_not_declared", "auto-round-mtp_fc_packed",
    "gptq-dynamic_as_null", "modelopt-mixed-mtp_fc_among_the_entries",
}  # fmt: skip

# What convert makes of NVFP4 beside FP8 by row, and of that: FP8 by tensor in compressed-tensors' layout has no CPU kernel.
CONVERTED = (
    ("compressed-tensors-mixed", "converted-to-modelopt", "modelopt"),
    ("converted-to-modelopt", "converted-and-back", "compressed-tensors"),
)


@pytest.fixture(scope="module")
def answers(
    small_nvfp4: dict[str, Path], small_formats: dict[str, Path], engine_python: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, str | None]]:
    """Case → what vLLM says to target and draft; a sound checkpoint goes by its format, modelopt's by ""."""
    folder = tmp_path_factory.mktemp("refusals")
    sound = {"": small_nvfp4["nvfp4-mtp-vlm"]} | {
        kind: path for kind, path in small_formats.items() if kind not in ("compressed-tensors-w4a16", "fp8")
    }
    for source, out, to in CONVERTED:
        sound[out] = folder / out
        convert(sound[source], sound[out], to, silent=True)
    paths = dict(sound)
    broken = [
        *((name, "", break_it) for name, _, break_it in LOADED),
        *((name, kind, break_it) for name, kind, _, break_it in FORMATS_LOADED),
    ]
    for name, kind, break_it in broken:
        paths[name] = folder / name
        shutil.copytree(sound[kind], paths[name])
        edit = Edit(paths[name])
        break_it(edit)
        edit.save()
    command = [str(engine_python), str(SCRIPT), str(folder / "found.json"), *map(str, paths.values())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(zip(paths, json.loads((folder / "found.json").read_text()), strict=True))


def test_the_sound_checkpoints_load(answers: dict[str, dict[str, str | None]]) -> None:
    formats = ("", "compressed-tensors", "compressed-tensors-int4", "auto-round", "gptq", "modelopt-mixed", "compressed-tensors-mixed")
    for name in (*formats, *(out for _, out, _ in CONVERTED)):
        assert answers[name] == {"target": None, "draft": None}, name


def test_whatever_vllm_refuses_is_an_error(answers: dict[str, dict[str, str | None]]) -> None:
    for name, expected in EXPECTED.items():
        refusal = answers[name]["target"] or answers[name]["draft"]
        error = any(SEVERITY[rule] == "error" for rule in expected)
        assert error or refusal is None, (name, refusal)


def test_the_errors_that_vllm_does_not_see(answers: dict[str, dict[str, str | None]]) -> None:
    errors = {name for name, expected in EXPECTED.items() if any(SEVERITY[rule] == "error" for rule in expected)}
    assert {name for name in errors if answers[name] == {"target": None, "draft": None}} == SILENT & EXPECTED.keys()


def test_what_only_the_draft_refuses(answers: dict[str, dict[str, str | None]]) -> None:
    assert {name for name, answer in answers.items() if answer["draft"]} == IN_THE_DRAFT & EXPECTED.keys()
