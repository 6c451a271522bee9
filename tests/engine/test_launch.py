import json
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from launches import NVFP4, card, engine, flags, launch, machine, model, tiny

from mtpress.api_key import API_KEY
from mtpress.engine.launch.arguments import final_values, read
from mtpress.engine.launch.launch import Launch, compose
from mtpress.engine.launch.ports import free_port
from mtpress.engine.launch.settings import REASONING_PARSER, is_local
from mtpress.engine.memory.served_model import ServedModel
from mtpress.errors import InputError, ResourceError
from served_layouts import make_layout

KEY = "do-not-show-me"
FULL = "rtx-pro-6000-256k"


def test_every_setting_has_a_reason_and_a_source_and_stands_in_the_command() -> None:
    made = launch()
    assert len(made.settings) > 10
    for setting in (*made.settings, *made.left_out):
        assert setting.reason and setting.source
    for setting in made.settings:
        if setting.is_environment:
            assert made.environment[setting.flag] == setting.value
        else:
            at = made.command.index(setting.flag)
            assert made.command[at : at + len(setting.tokens)] == setting.tokens
    assert made.command[:3] == ("/env/bin/vllm", "serve", str(tiny().path))


def test_what_a_full_launch_passes() -> None:
    found = flags(launch(served=model(**NVFP4)))
    assert json.loads(found["--speculative-config"] or "") == {"method": "mtp", "num_speculative_tokens": 3}
    assert {flag: value for flag, value in found.items() if flag not in ("--speculative-config", "--served-model-name")} == {
        "--host": "127.0.0.1", "--port": "8000", "--max-model-len": "262144", "--max-num-seqs": "2", "--kv-cache-dtype": "fp8",
        "--gpu-memory-utilization": "0.9", "--reasoning-parser": "mtpress", "--reasoning-parser-plugin": str(REASONING_PARSER),
        "--enable-auto-tool-choice": None, "--tool-call-parser": "qwen3_xml",
        "--default-chat-template-kwargs": '{"preserve_thinking": true}',
        "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
    }  # fmt: skip


def test_code_from_a_checkpoint_is_never_run_and_the_format_is_vllms_to_read() -> None:
    made = launch(served=model(**NVFP4))
    assert not {"--trust-remote-code", "--quantization", "--chat-template"} & set(made.command)
    assert {"--trust-remote-code", "--quantization", "--chat-template"} < {setting.flag for setting in made.left_out}


def test_a_cpu_launch() -> None:
    made = launch("cpu")
    found = flags(made)
    assert {"--enforce-eager", "--no-enable-prefix-caching"} < set(found)
    assert (found["VLLM_CPU_KVCACHE_SPACE"], found["OMP_NUM_THREADS"]) == ("4", "1")
    assert dict(made.environment) == {flag: value for flag, value in found.items() if not flag.startswith("-")}
    assert made.num_speculative_tokens == 1
    assert made.profile == "cpu"


def test_a_stripped_build_is_served_without_its_tower() -> None:
    stripped = launch(served=model(has_vision=False, needs_language_model_only=True))
    assert "--language-model-only" in stripped.command
    assert stripped.language_model_only
    assert "--language-model-only" not in launch().command
    assert not launch().language_model_only
    assert launch(extra=["--language-model-only"]).language_model_only


@pytest.mark.parametrize(("version", "method"), [("0.32.0", "mtp"), ("0.19.0", "mtp"), ("0.18.2", "qwen3_5_mtp")])
def test_the_drafting_method_of_each_version(version: str, method: str) -> None:
    assert json.loads(flags(launch(version=version))["--speculative-config"] or "")["method"] == method


def test_no_drafts_where_there_is_no_draft_head_or_none_are_wanted() -> None:
    for made in (launch(served=model(num_mtp_layers=0)), launch(num_speculative_tokens=0)):
        assert "--speculative-config" not in made.command
        assert made.num_speculative_tokens == 0
        assert "--speculative-config" in {setting.flag for setting in made.left_out}
    with pytest.raises(InputError, match="no draft head is stored"):
        launch(served=model(num_mtp_layers=0), num_speculative_tokens=2)
    assert launch(served=model(num_mtp_layers=0), num_speculative_tokens=2, force=True).num_speculative_tokens == 2


def test_a_declared_fp8_cache_is_followed_and_not_passed() -> None:
    made = launch(served=model(kv_cache_declared="fp8"))
    assert "--kv-cache-dtype" not in made.command
    assert "declares fp8" in next(setting.reason for setting in made.left_out if setting.flag == "--kv-cache-dtype")
    plain = launch("gpu-80gb")
    declared = launch("gpu-80gb", served=model(kv_cache_declared="fp8"))
    assert declared.estimate.kv_bytes_per_token * 2 == plain.estimate.kv_bytes_per_token
    assert flags(launch("gpu-80gb", served=model(kv_cache_declared="fp8"), kv_cache_dtype="bfloat16"))["--kv-cache-dtype"] == "bfloat16"


def test_what_the_user_asks_for_comes_before_the_profile() -> None:
    made = launch(num_speculative_tokens=1, max_model_len=1000, max_num_seqs=1, kv_cache_dtype="auto", host="0.0.0.0", port=8001)
    found = {setting.flag: setting for setting in made.settings}
    assert (found["--max-model-len"].value, found["--max-num-seqs"].value, found["--kv-cache-dtype"].value) == ("1000", "1", "auto")
    assert {found[flag].source for flag in ("--max-model-len", "--max-num-seqs", "--kv-cache-dtype", "--speculative-config")} == {"you"}
    assert (made.host, made.port, made.url, made.num_speculative_tokens) == ("0.0.0.0", 8001, "http://127.0.0.1:8001", 1)


def test_context_ends_where_the_checkpoints_positions_do() -> None:
    assert flags(launch(served=model(max_position_embeddings=512)))["--max-model-len"] == "512"
    assert flags(launch(served=model(max_position_embeddings=512), max_model_len=256))["--max-model-len"] == "256"


@pytest.mark.parametrize(
    ("extra", "flag"),
    [
        (["--max-model-len", "4096"], "--max-model-len"),
        (["--max_model_len=4096"], "--max-model-len"),
        (["--max-num-seqs=1"], "--max-num-seqs"),
        (["--device-memory-utilization", "0.5"], "--gpu-memory-utilization"),
        (["--speculative-config", '{"method": "ngram", "num_speculative_tokens": 4}'], "--speculative-config"),
        (["--spec-tokens", "4", "--spec-method", "mtp"], "--speculative-config"),
        (["--speculative_config.num_speculative_tokens=4", "--speculative-config.method", "mtp"], "--speculative-config"),
        (["-sc", "{}"], "--speculative-config"),
        (["--no-enable-auto-tool-choice"], "--enable-auto-tool-choice"),
        (["--port=9000"], "--port"),
        (["--served-model-name", "a", "b"], "--served-model-name"),
        (["--default-chat-template-kwargs", '{"enable_thinking": true}'], "--default-chat-template-kwargs"),
    ],
)
def test_what_stands_behind_the_dashes_wins(extra: list[str], flag: str) -> None:
    assert flag in launch().command
    made = launch(extra=extra)
    assert made.command[-len(extra) :] == tuple(extra)
    assert flag not in made.command[: -len(extra)]
    assert [setting.source for setting in made.settings[-1:]] == ["you"]


def test_a_switch_that_was_turned_off_can_be_turned_on() -> None:
    assert "--no-enable-prefix-caching" in launch("cpu").command
    assert "--no-enable-prefix-caching" not in launch("cpu", extra=["--enable_prefix_caching"]).command


def test_the_launch_says_what_the_users_arguments_come_to() -> None:
    made = launch(extra=["--host=::1", "--port", "9000", "--served-model-name", "a", "b", "--spec-tokens=4", "--spec-method", "mtp"])
    assert (made.host, made.port, made.url) == ("::1", 9000, "http://[::1]:9000")
    assert made.served_model_name == "a"
    assert made.num_speculative_tokens == 4


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--uds", "/tmp/x"], "--uds"),
        (["model"], "belongs to no flag"),
        (["--port", "http"], "not a port"),
        (["--port", "70000"], "not a port"),
        (["--max-model-len", "long"], "not a whole number"),
        (["--gpu-memory-utilization", "most"], "not a number"),
        (["--api-key", "a", "b"], "one value"),
    ],
)
def test_arguments_that_cannot_be(extra: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        launch(extra=extra)


@pytest.mark.parametrize(
    "asked",
    [
        {"api_key": KEY},
        *({"extra": extra} for extra in (["--api-key", KEY], [f"--api_key={KEY}"], ["--api-ke", KEY], [f"--API-KEY={KEY}"])),
        {"environ": {API_KEY: KEY}},
    ],
)  # fmt: skip
def test_the_key_travels_in_the_environment_and_is_never_shown(asked: dict[str, object]) -> None:
    made = launch(**asked)
    assert made.environment[API_KEY] == KEY
    assert not any(KEY in token for token in made.command)
    for shown in (made.shown(), repr(made), str(made.settings), json.dumps(made.as_json())):
        assert KEY not in shown
    assert f'{API_KEY}="${API_KEY}"' in made.shown()
    assert made.as_json()["api_key"] is True
    assert API_KEY not in launch().environment


@pytest.mark.parametrize("extra", [["--api-key.x", KEY], ["--no-api-key", KEY], ["--api-key", KEY, "other"], ["--api-keys"]])
def test_a_key_that_vllm_would_read_otherwise_is_refused_unseen(extra: list[str]) -> None:
    with pytest.raises(InputError, match="--api-key: one value") as raised:
        launch(extra=extra)
    assert KEY not in str(raised.value)


def test_other_secrets_leave_the_command_too(tmp_path: Path) -> None:
    made = launch(extra=["--hf-token", KEY, "--otlp-traces-endpoint", f"http://u:{KEY}@collector:4317"])
    assert made.environment["HF_TOKEN"] == KEY
    for shown in (made.shown(), repr(made.settings), json.dumps(made.as_json())):
        assert KEY not in shown
    assert "http://collector:4317" in made.shown()
    assert launch(extra=["--hf-token"]).command[-1] == "--hf-token"
    config = tmp_path / "vllm.yaml"
    config.write_text(f"api-key: {KEY}\n")
    with pytest.raises(InputError, match="holds --api-key, which vLLM would write into its log") as raised:
        launch(extra=["--config", str(config)])
    assert KEY not in str(raised.value)


def test_a_directory_is_no_flag() -> None:
    made = launch(served=replace(model(), path=Path("--trust-remote-code"), name="--trust-remote-code"))
    assert made.command[made.command.index("serve") + 1] == str(Path.cwd() / "--trust-remote-code")
    assert "--trust-remote-code" not in made.command
    assert made.served_model_name == "trust-remote-code"
    assert launch(served=replace(model(), name="a b\x1b")).served_model_name == "a-b"


@pytest.mark.parametrize("host", ["127.0.0.1.evil.example", "0.0.0.0", "::", "10.0.0.1", "127.evil.example", "localhost.evil.example"])
def test_what_others_reach_is_not_local(host: str) -> None:
    assert not is_local(host)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.10", "::1", "localhost", "LOCALHOST"])
def test_what_only_this_machine_reaches(host: str) -> None:
    assert is_local(host)


def test_an_open_door_is_warned_of() -> None:
    assert any("--api-key closes it" in text for text in launch(host="0.0.0.0").warnings)
    assert any("--api-key closes it" in text for text in launch(extra=["--host", "192.168.0.1"]).warnings)
    assert not any("--api-key" in text for text in launch(host="0.0.0.0", api_key=KEY).warnings)
    assert not any("--api-key" in text for text in launch().warnings)


def test_what_the_environment_says_already_is_kept() -> None:
    made = launch("cpu", environ={"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "0"})
    assert flags(made)["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert not {"VLLM_CPU_KVCACHE_SPACE", "HF_HUB_OFFLINE"} & set(made.environment)
    assert made.estimate.kv_room_bytes == 1 << 30


def test_older_versions_get_variables_for_flags_they_do_not_have() -> None:
    new = launch("gb10", served=model(**NVFP4))
    assert flags(new)["--linear-backend"] == "cutlass"
    old = launch("gb10", served=model(**NVFP4), version="0.19.1")
    assert old.environment["VLLM_NVFP4_GEMM_BACKEND"] == "cutlass"
    assert "--linear-backend" not in old.command
    assert flags(old)["--attention-backend"] == "TRITON_ATTN"
    assert "VLLM_NVFP4_GEMM_BACKEND" not in new.environment


def test_enable_weights_track() -> None:
    assert flags(launch(enable_weights_track=True))["--model-loader-extra-config"] == '{"enable_weights_track": true}'
    assert "--model-loader-extra-config" not in launch().command


def test_without_a_template_there_is_nothing_to_parse(tmp_path: Path) -> None:
    found = flags(launch(served=model(path=tmp_path)))
    assert not {"--reasoning-parser", "--tool-call-parser", "--default-chat-template-kwargs"} & set(found)


def parser_of(made: Launch) -> tuple[str | None, str | None, bool]:
    """(--reasoning-parser, --default-chat-template-kwargs, whether the plugin is passed) of what the command ends up with."""
    values = final_values(read(list(made.command[3:])))
    return values.get("--reasoning-parser"), values.get("--default-chat-template-kwargs"), "--reasoning-parser-plugin" in values


OFF, KEEP, ON = '{"enable_thinking": false}', '{"preserve_thinking": true}', '{"enable_thinking": true}'
ENDS = "{% if add_generation_prompt %}<|im_start|>assistant\n"


def test_the_reasoning_parser_is_the_one_that_knows_the_template(tmp_path: Path) -> None:
    """Ours for a template that a tag can switch on; vLLM's, told that thinking is off or not told, for others and on older versions."""
    assert REASONING_PARSER.is_absolute() and REASONING_PARSER.is_file()
    assert parser_of(launch()) == ("mtpress", KEEP, True)
    assert parser_of(launch(version="0.33.1")) == ("mtpress", KEEP, True)
    assert parser_of(launch(version="0.31.0")) == ("qwen3", OFF, False)
    template = tmp_path / "chat_template.jinja"
    template.write_text(f"{ENDS}<think>\n\n</think>\n\n{{% endif %}}")
    assert parser_of(launch(served=model(path=tmp_path))) == ("qwen3", OFF, False)
    template.write_text(f"{ENDS}<think>\n{{% endif %}}")
    assert parser_of(launch(served=model(path=tmp_path))) == ("qwen3", None, False)
    template.write_text(f"{{# <|think_on|> #}}{ENDS}<think>\n{{% endif %}}")
    assert parser_of(launch(served=model(path=tmp_path))) == ("qwen3", None, False)


def test_another_parser_or_default_of_the_users_wins() -> None:
    made = launch(extra=["--reasoning-parser", "qwen3"])
    assert parser_of(made)[:2] == ("qwen3", OFF)
    assert any("<|think_on|>" in note for note in made.notes)
    made = launch(extra=["--reasoning-parser=qwen3", "--default-chat-template-kwargs", KEEP])
    assert parser_of(made)[:2] == ("qwen3", KEEP)
    assert any("content is null" in warning for warning in made.warnings)
    assert parser_of(launch(extra=["--default-chat-template-kwargs", ON])) == ("mtpress", ON, True)
    assert launch().warnings == ()


def test_what_cannot_fit_is_refused_with_what_frees_memory() -> None:
    huge = model(weight_bytes={"mlp": 90 << 30})
    with pytest.raises(ResourceError, match=r"weights.*take.*; --.*--force") as caught:
        launch(served=huge)
    assert "\n" not in str(caught.value)
    forced = launch(served=huge, force=True)
    assert [type(error) for error in forced.refused] == [ResourceError]
    assert forced.warnings[0] == str(forced.refused[0])


def test_a_cache_of_unknown_size_is_served_by_force() -> None:
    with pytest.raises(InputError, match="a-forks-own: not one whose size is known"):
        launch(kv_cache_dtype="a-forks-own")
    made = launch(kv_cache_dtype="a-forks-own", force=True)
    assert "size is known" in made.warnings[0]
    assert made.estimate.kv_bytes_per_token == launch(kv_cache_dtype="auto").estimate.kv_bytes_per_token


def test_the_profiles_sequences_are_fewer_where_no_more_fit(tmp_path: Path) -> None:
    whole = ServedModel.read(make_layout(tmp_path / "bf16", "bf16"))
    made = launch("gb10", served=whole)
    found = {setting.flag: setting for setting in made.settings}["--max-num-seqs"]
    assert (found.value, found.source) == ("32", "mtpress")
    assert "64 do not fit" in found.reason
    assert 32 <= made.estimate.num_sequences < 64
    with pytest.raises(ResourceError, match="--max-num-seqs 32"):
        launch("gb10", served=whole, max_num_seqs=64)


def test_a_profile_for_other_hardware_is_refused() -> None:
    small = card("NVIDIA GeForce RTX 4090", 24, (8, 9))
    with pytest.raises(ResourceError, match=r"profile gb10 is not for this machine: .*this is NVIDIA GeForce RTX 4090.*--dry-run"):
        launch(small, profile="gb10")
    assert "not for this machine" in launch(small, profile="gb10", force=True).warnings[0]
    with pytest.raises(InputError, match="did you mean gb10"):
        launch(small, profile="gb1")


def test_a_cuda_engine_without_a_gpu_is_refused_even_by_force() -> None:

    for profile in (None, "gb10"):
        with pytest.raises(ResourceError):
            compose(model(), engine(), machine("cpu"), profile=profile, force=True, environ={})


def test_shown_is_a_shell_command_one_flag_a_line() -> None:
    lines = launch("cpu", extra=["--max_model_len=64", "-tp", "1"]).shown().split(" \\\n")
    assert lines[0].startswith("HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 ")
    assert lines[1] == f"/env/bin/vllm serve {tiny().path}"
    assert """  --default-chat-template-kwargs '{"preserve_thinking": true}'""" in lines
    assert lines[-2:] == ["  --max_model_len=64", "  -tp 1"]
    assert len(lines) == len(set(lines))


def test_a_free_port_is_free() -> None:
    port = launch(port=None).port
    assert port == int(flags(launch(port=port))["--port"] or "")
    with socket.socket() as server:
        server.bind(("127.0.0.1", port))
    with pytest.raises(InputError, match="--host"):
        free_port("192.0.2.1")


def test_a_snapshot_of_the_hub_is_served_by_its_repository(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--someone--Model-NVFP4/snapshots/0123abc"
    assert launch(served=replace(model(), path=snapshot, name="0123abc")).served_model_name == "someone/Model-NVFP4"
    assert launch().served_model_name == "mtpress-tiny"
