"""What vLLM does with every broken checkpoint of tests/breaks.py: whatever it refuses, check calls an error.

And what check calls an error though vLLM loads it is listed here, one by one: these are the silent ones, for which check is.
"""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from breaks import CASES
from checkpoints import Edit
from mtpress.rules.registry import STATIC_RULES

pytestmark = pytest.mark.engine

SCRIPT = Path(__file__).with_name("load_on_cpu.py")
SEVERITY = {rule.id: rule.severity for rule in STATIC_RULES}
# Rules on files that loading does not read.
BESIDE = {
    "json-unreadable", "index-total-size", "shard-unindexed", "torch-dtype", "processor-missing", "tokenizer-missing",
    "tokenizer-config-missing", "tokenizer-backend", "template-missing", "generation-config-missing", "token-id-outside",
    "token-id-differs",
}  # fmt: skip
NO_CPU_KERNEL = {"weight_only_needs_no_input_scale", "weight_only_with_input_scales"}  # W4A16 wants Marlin
LOADED = [case for case in CASES if case[0] not in NO_CPU_KERNEL and not (case[1] and case[1] <= BESIDE)]

SILENT = {
    "a_norm_missing", "a_vision_tensor_missing", "body_under_a_foreign_prefix", "tower_lost", "no_global_scale", "no_input_scale",
    "a_global_scale_of_zero", "an_input_scale_of_nan", "block_scales_in_bf16", "global_scale_in_bf16", "conv1d_in_int8",
    "own_global_scale_for_in_proj_qkv", "no_draft_head", "half_a_draft_head", "draft_head_in_a_shard_of_its_own",
    "draft_head_left_out_of_the_index", "mtp_num_hidden_layers_two", "another_algo_in_the_other_file",
    "draft_head_ignored_in_one_file_only", "fp8_kv_in_one_file_only",
}  # fmt: skip
IN_THE_DRAFT = {
    "mtp_fc_quantized", "draft_head_not_ignored", "draft_head_ignored_under_another_prefix", "lm_head_ignored_for_the_target_only",
}  # fmt: skip


@pytest.fixture(scope="module")
def answers(
    small_nvfp4: dict[str, Path], engine_python: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, str | None]]:
    """Case → what vLLM says to target and draft; "" is the sound checkpoint."""
    folder = tmp_path_factory.mktemp("refusals")
    paths = {"": small_nvfp4["nvfp4-mtp-vlm"]}
    for name, _, break_it in LOADED:
        paths[name] = folder / name
        shutil.copytree(paths[""], paths[name])
        edit = Edit(paths[name])
        break_it(edit)
        edit.save()
    command = [str(engine_python), str(SCRIPT), str(folder / "found.json"), *map(str, paths.values())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(zip(paths, json.loads((folder / "found.json").read_text()), strict=True))


def test_the_sound_checkpoint_loads(answers: dict[str, dict[str, str | None]]) -> None:
    assert answers[""] == {"target": None, "draft": None}


def test_whatever_vllm_refuses_is_an_error(answers: dict[str, dict[str, str | None]]) -> None:
    for name, expected, _ in LOADED:
        refusal = answers[name]["target"] or answers[name]["draft"]
        error = any(SEVERITY[rule] == "error" for rule in expected)
        assert error or refusal is None, (name, refusal)


def test_the_errors_that_vllm_does_not_see(answers: dict[str, dict[str, str | None]]) -> None:
    errors = {name for name, expected, _ in LOADED if any(SEVERITY[rule] == "error" for rule in expected)}
    assert {name for name in errors if answers[name] == {"target": None, "draft": None}} == SILENT


def test_what_only_the_draft_refuses(answers: dict[str, dict[str, str | None]]) -> None:
    assert {name for name, answer in answers.items() if answer["draft"]} == IN_THE_DRAFT
