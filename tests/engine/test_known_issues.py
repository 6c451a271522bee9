import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from launches import NVFP4, card, engine, flags, launch, machine, model, tiny
from packaging.version import Version
from pydantic import ValidationError

from mtpress.engine.launch import thinking
from mtpress.engine.launch.known_issues import FACTS, Condition, KnownIssue, known_issues
from mtpress.engine.launch.launch import Launch
from mtpress.engine.launch.meaning import Meaning
from mtpress.engine.launch.thinking import read_template
from mtpress.engine.memory import hardware
from mtpress.errors import InputError
from mtpress.stages.serve import PLUGINS

PRO, SPARK, HOPPER, B200 = "rtx-pro-6000-256k", "gb10", "hopper", card("NVIDIA B200", 178.4, (10, 0))
W4A16 = {"format": "modelopt NVFP4 (W4A16)", "quant_method": "modelopt_fp4"}
SMALL = card("NVIDIA GeForce RTX 5090", 31.8, (12, 0))
EAGER, PIECEWISE = ["--enforce-eager"], ["--compilation-config.cudagraph_mode", "PIECEWISE"]
V1 = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
THINK = ["--default-chat-template-kwargs", '{"enable_thinking": true}']
FP8_HEAD, FLY = (
    ["--spec-method", "mtp", "--spec-tokens", "2", f"--speculative-config.{name}", value]
    for name, value in (("draft_lm_head_quantization", "fp8"), ("rejection_sample_method", "fly"))
)
AVX2 = replace(machine("cpu"), cpu_flags=frozenset({"avx", "avx2", "fma"}))
AMX = replace(machine("cpu"), cpu_flags=frozenset({"avx2", "avx512f", "avx512bw", "avx512_bf16", "amx_tile", "amx_bf16"}))
TEXT = {"architecture": "Qwen3_5ForCausalLM"}
AUTOROUND = {"format": "AutoRound", "quant_method": "inc"}
NO_DRAFTS = {"num_speculative_tokens": 0}
OTHER_FP8 = (
    "compressed-tensors FP8 by row and NVFP4 (W4A4)", "compressed-tensors FP8 in blocks of 128×128", "modelopt FP8", "FP8",
    "modelopt mixed precision (NVFP4 W4A4, FP8)",
)  # fmt: skip
Call = dict[str, Any]

# id → (a launch that meets it, launches that do not)
CASES: dict[str, tuple[Call, tuple[Call, ...]]] = {
    "too-old": ({"version": "0.16.0"}, ({"version": "0.17.0"}, {})),
    "turboquant-with-drafts": (
        {"kv_cache_dtype": "turboquant_k8v4"},
        ({"kv_cache_dtype": "turboquant_k8v4", "num_speculative_tokens": 0}, {"kv_cache_dtype": "fp8"}),
    ),
    "nvfp4-kv-blackwell": ({"on": B200, "kv_cache_dtype": "nvfp4"}, ({"on": B200, "kv_cache_dtype": "fp8"}, {"kv_cache_dtype": "nvfp4"})),
    "nvfp4-kv": ({"kv_cache_dtype": "nvfp4_4over6"}, ({"on": B200, "kv_cache_dtype": "nvfp4"}, {})),
    "draft-head-absent": (
        {"served": {"num_mtp_layers": 0}, "extra": ["--spec-method", "mtp", "--spec-tokens", "1"]},
        ({"served": {"num_mtp_layers": 0}}, {}),
    ),
    "tower-absent": (
        {"served": {"needs_language_model_only": True}, "extra": ["--no-language-model-only"]},
        ({"served": {"needs_language_model_only": True}}, {}),
    ),
    "backend-variables-gone": (
        {"environ": {"VLLM_NVFP4_GEMM_BACKEND": "cutlass"}},
        ({"environ": {"VLLM_NVFP4_GEMM_BACKEND": "cutlass"}, "version": "0.19.0"}, {}),
    ),
    "sm12x-illegal-instruction": ({"served": NVFP4, "version": "0.19.1"}, ({"served": NVFP4}, {"version": "0.19.1"})),
    "weight-only-marlin": ({"served": W4A16}, ({"served": NVFP4}, {"on": HOPPER, "served": W4A16})),
    "no-fp4-cores": (
        {"on": HOPPER, "served": NVFP4},
        ({"served": NVFP4}, {"on": HOPPER}, {"on": B200, "served": NVFP4}, {"on": "cpu", "served": NVFP4}),
    ),
    "gb10-host-memory": (
        {"on": SPARK, "served": NVFP4, "without": "--linear-backend"},
        ({"on": SPARK, "served": NVFP4}, {"on": SPARK, "without": "--linear-backend"}),
    ),
    "unified-memory-utilization": ({"on": SPARK, "extra": ["--gpu-memory-utilization", "0.8"]}, ({"on": SPARK}, {})),
    "mamba-blocks": ({"without": "--max-num-seqs"}, ({}, {"on": "cpu", "without": "--max-num-seqs"})),
    "graph-capture-memory": (
        {"max_num_seqs": 4},
        ({}, {"max_num_seqs": 4, "extra": EAGER}, {"max_num_seqs": 4, "num_speculative_tokens": 2}, {"on": B200, "max_num_seqs": 4}),
    ),
    "graph-capture-32gb": (
        {"on": SMALL, "max_num_seqs": 4},
        ({"on": SMALL}, {"on": SMALL, "max_num_seqs": 4, "extra": EAGER}, {"max_num_seqs": 4}),
    ),
    "short-prompt-full-graphs": (
        {"version": "0.28.0"},
        ({}, {"version": "0.28.0", "extra": EAGER}, {"version": "0.28.0", "extra": PIECEWISE}, {"version": "0.28.0", **NO_DRAFTS}),
    ),
    "v1-runner-chosen": ({"environ": V1}, ({}, {"environ": V1, "extra": PIECEWISE}, {"environ": V1, "version": "0.28.0"})),
    "mixed-batches": ({"version": "0.26.1"}, ({}, {"version": "0.26.1", "num_speculative_tokens": 0})),
    "flashinfer-piecewise": ({"extra": ["--attention-backend", "flashinfer"]}, ({}, {"extra": ["--attention-backend", "FLASH_ATTN"]})),
    "fp8-capacity": ({}, ({"kv_cache_dtype": "auto"},)),
    "measure-drafts": ({}, ({"num_speculative_tokens": 1},)),
    "prefix-cache-hits": ({}, ({"num_speculative_tokens": 0}, {"extra": ["--no-enable-prefix-caching"]})),
    "thinking-budget": ({}, ({"num_speculative_tokens": 0},)),
    "empty-content": (
        {"version": "0.31.0", "without": "--default-chat-template-kwargs"},
        ({"without": "--default-chat-template-kwargs"}, {"version": "0.31.0"}, {"version": "0.31.0", "extra": THINK}),
    ),
    "think-on-tag": ({"version": "0.31.0"}, ({}, {"version": "0.31.0", "extra": THINK})),
    "tokenizer-backend": (
        {"tokenizer": {"tokenizer_class": "TokenizersBackend"}},
        ({}, {"tokenizer": {"tokenizer_class": "Qwen2Tokenizer"}}),
    ),
    "draft-lm-head-quantization": ({"extra": FP8_HEAD}, ({}, {"extra": FP8_HEAD, "version": "0.33.0"})),
    "draft-lm-head-quantization-runner": (
        {"extra": FP8_HEAD, "version": "0.33.0", "environ": V1},
        ({"extra": FP8_HEAD, "version": "0.33.0"}, {"version": "0.33.0", "environ": V1}),
    ),
    "lossy-acceptance": ({"extra": FLY, "version": "0.33.0"}, ({"version": "0.33.0"}, {"extra": FLY})),
    "cpu-sampling": ({"on": "cpu"}, ({}, {"on": "cpu", **NO_DRAFTS}, {"on": "cpu", "plugins": ("mtpress_sampling_cpu",)})),
    "cpu-short-draft-rows": (
        {"on": "cpu"},
        ({}, {"on": "cpu", **NO_DRAFTS}, {"on": "cpu", "version": "0.33.0"}, {"on": "cpu", "plugins": ("mtpress_gdn_cpu",)}),
    ),
    "cpu-one-token-prompt": ({"on": AMX}, ({"on": "cpu"}, {"on": AVX2}, {"on": AMX, "plugins": ("mtpress_gdn_cpu",)})),
    "cpu-text-architecture-drafts": (
        {"on": "cpu", "served": TEXT},
        ({"on": "cpu"}, {"served": TEXT}, {"on": "cpu", "served": TEXT, **NO_DRAFTS}),
    ),
    "cpu-int4-activations": (
        {"on": AMX, "served": AUTOROUND},
        ({"on": AMX}, {"on": AVX2, "served": AUTOROUND}, {"on": AMX, "served": AUTOROUND, "plugins": ("mtpress_int4_cpu",)}),
    ),
    "cpu-int4-kernel": (
        {"on": AVX2, "served": AUTOROUND},
        ({"on": AVX2}, *({"on": on, "served": AUTOROUND} for on in (AMX, "cpu", PRO)),
         {"on": AVX2, "served": AUTOROUND, "plugins": ("mtpress_int4_cpu",)}),
    ),
    "cpu-nvfp4": (
        {"on": "cpu", "served": NVFP4},
        ({"served": NVFP4}, {"on": "cpu"}, {"on": "cpu", "served": NVFP4, "plugins": ("other", "mtpress_nvfp4_cpu")}),
    ),
    "cpu-nvfp4-weight-only": ({"on": "cpu", "served": W4A16}, ({"on": "cpu", "served": NVFP4}, {"served": W4A16})),
    "cpu-fp8-by-tensor": (
        {"on": "cpu", "served": {"format": "compressed-tensors NVFP4 (W4A4) and FP8"}},
        ({"served": {"format": "compressed-tensors FP8"}}, *({"on": "cpu", "served": {"format": format_}} for format_ in OTHER_FP8)),
    ),
    "cpu-fp8-kv": (
        {"on": AVX2, "kv_cache_dtype": "fp8"},
        ({"on": AMX, "kv_cache_dtype": "fp8"}, {"on": AVX2, "kv_cache_dtype": "auto"}, {"kv_cache_dtype": "fp8"},
         {"on": "cpu", "kv_cache_dtype": "fp8"}),
    ),
}  # fmt: skip


def meets(issue: KnownIssue, tmp_path: Path, call: Call) -> bool:
    """Whether the final command of a launch meets an issue; `without` takes a flag of ours out of it."""
    call = dict(call)
    without, tokenizer, on = call.pop("without", None), call.pop("tokenizer", None), call.pop("on", PRO)
    served = model(**call.pop("served", {}))
    if tokenizer is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
        served = model(path=tmp_path)
    plugins = call.pop("plugins", ())
    made = launch(on, served=served, force=True, plugins=plugins, **call)
    hardware = machine(on) if isinstance(on, str) else on
    built = engine(call.get("version", "0.32.0"), "cuda" if hardware.gpus else "cpu", plugins)
    meaning = Meaning(served, built, hardware, read_template(served.path), call.get("environ", {}), ())
    return issue.applies(built.release, meaning.facts([setting for setting in made.settings if setting.flag != without]))


def issue(name: str) -> KnownIssue:
    return next(issue for issue in known_issues() if issue.id == name)


def test_every_issue_has_a_case() -> None:
    assert [issue.id for issue in known_issues()] == list(CASES)


@pytest.mark.parametrize("name", list(CASES))
def test_an_issue_is_met_by_its_launch_and_not_by_others(name: str, tmp_path: Path) -> None:
    fires, silent = CASES[name]
    changed = {"short-prompt-full-graphs": "--compilation-config"}.get(name)  # what it sets itself hides it afterwards
    assert meets(issue(name), tmp_path, {"without": changed} | fires)
    for call in silent:
        assert not meets(issue(name), tmp_path, {"without": changed} | call), call


def test_the_dangerous_pair_is_refused_unless_forced() -> None:
    for asked in ({"kv_cache_dtype": "turboquant_4bit_nc"}, {"extra": ["--kv_cache_dtype=tq-t4nc"]}):
        with pytest.raises(InputError, match=r"TurboQuant.*loops.*--mtp 0 \(vllm#40880.*seed 004\); --force"):
            launch(**asked)
        assert "loops" in launch(force=True, **asked).warnings[0]
    assert launch(num_speculative_tokens=0, kv_cache_dtype="turboquant_4bit_nc").refused == ()


@pytest.mark.parametrize(
    ("call", "word"),
    [
        ({"version": "0.16.0"}, "does not know"),
        ({"on": B200, "kv_cache_dtype": "nvfp4"}, "GSM8K"),
        ({"served": model(needs_language_model_only=True), "extra": ["--no-language-model-only"]}, "random one"),
    ],
)
def test_what_else_is_refused(call: Call, word: str) -> None:
    with pytest.raises(InputError, match=word):
        launch(**call)
    assert any(word in text for text in launch(force=True, **call).warnings)


@pytest.mark.parametrize(("flags", "refused"), [("avx avx2 fma", True), ("avx2 avx512f avx512bw", False), ("avx2 amx_tile", False)])
def test_an_fp8_cache_on_a_cpu_without_its_kernel(flags: str, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for, and declared by the checkpoint, whose own word goes under `auto`."""
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags : {flags}\n")
    monkeypatch.setattr(hardware, "CPUINFO", tmp_path / "cpuinfo")
    here = replace(machine("cpu"), cpu_flags=hardware.read_hardware().cpu_flags)
    declared = model(kv_cache_declared="fp8")
    calls: tuple[Call, ...] = ({"kv_cache_dtype": "fp8"}, {"served": declared}, {"served": declared, "kv_cache_dtype": "auto"})
    for call in calls:
        assert any("AVX-512 or AMX" in text for text in launch(here, force=True, **call).warnings) == refused
    assert not any("AVX-512 or AMX" in t for t in launch(here, force=True, served=declared, kv_cache_dtype="bfloat16").warnings)
    if refused:
        with pytest.raises(InputError, match=r"AVX-512 or AMX only.*--kv-cache-dtype auto"):
            launch(here, kv_cache_dtype="fp8")


def setting_of(made: Launch, flag: str) -> tuple[str | None, str]:
    return next((setting.value, setting.source) for setting in made.settings if setting.flag == flag)


def test_what_is_worked_around_is_set_with_its_source() -> None:
    assert setting_of(launch(version="0.28.0"), "--compilation-config") == ('{"cudagraph_mode": "PIECEWISE"}', "vllm#47123, vllm#53051")
    assert setting_of(launch(version="0.31.0"), "--default-chat-template-kwargs") == ('{"enable_thinking": false}', "vllm#53284")
    assert "--compilation-config" not in flags(launch())


def test_what_the_user_wrote_is_warned_of_and_not_changed() -> None:
    made = launch(version="0.28.0", extra=["--compilation-config", '{"cudagraph_mode": "FULL"}'])
    assert any("1 + n tokens" in text for text in made.warnings)
    assert made.command.count("--compilation-config") == 1


def test_what_is_only_to_be_known_is_a_note() -> None:
    made = launch()
    assert any("1.84" in text for text in made.notes)
    assert not any("1.84" in text for text in made.warnings)


def test_a_cpu_launch_of_the_built_in_model_has_no_warnings() -> None:
    assert launch("cpu", served=tiny(), plugins=PLUGINS).warnings == ()
    assert any("install this mtpress" in text for text in launch("cpu", served=tiny()).warnings)


@pytest.mark.parametrize(
    ("condition", "holds", "fails"),
    [
        (True, [True], [False, None]),
        (["a", "b"], ["a", "b"], ["c", None]),
        ({"at_least": 2}, [2, 3.5], [1, None]),
        ({"at_most": 2, "at_least": 1}, [1, 2], [0, 3, None]),
        ({"matches": "^fp8"}, ["fp8_e4m3"], ["xfp8", None]),
        ({"not_matches": "fp8"}, ["auto", None], ["fp8"]),
        ({"not_in": ["9.0"]}, ["8.9", None], ["9.0"]),
        ({"present": True}, ["x", False], [None]),
        ({"present": False}, [None], ["x"]),
    ],
)
def test_conditions(condition: Any, holds: list[Any], fails: list[Any]) -> None:
    held = Condition.model_validate(condition)
    assert [held.holds(fact) for fact in (*holds, *fails)] == [True] * len(holds) + [False] * len(fails)


@pytest.mark.parametrize(
    "change",
    [
        {"when": {"moon": "full"}},
        {"when": {"mtp": {"more_than": 1}}},
        {"when": {"format": {"matches": "("}}},
        {"versions": "new"},
        {"action": "hope"},
        {"action": "set"},
        {"set": {"--x": "1"}},
        {"sources": []},
        {"since": "0.1"},
    ],
)
def test_an_issue_that_makes_no_sense_is_refused(change: dict[str, Any]) -> None:
    sound = {"id": "x", "sources": ["s"], "when": {"mtp": 1}, "effect": "e", "remedy": "r", "action": "warn"}
    assert KnownIssue.model_validate(sound).applies(Version("0.32"), dict.fromkeys(FACTS) | {"mtp": 1})
    with pytest.raises(ValidationError):
        KnownIssue.model_validate(sound | change)


def test_a_build_on_the_way_to_a_version_counts_as_it() -> None:
    old = issue("mixed-batches")
    facts = dict.fromkeys(FACTS) | {"platform": "cuda", "mtp": 1}
    assert [old.applies(Version(v), facts) for v in ("0.26.2rc1.dev5", "0.27.0rc1", "0.32.0")] == [True, False, False]


def test_files_and_flags_are_read_once_for_all_issues(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def counting(name: str, real: Any) -> Any:
        return lambda *given: asked.append(name) or real(*given)

    monkeypatch.setattr(thinking, "tokenizer_config", counting("tokenizer", thinking.tokenizer_config))
    monkeypatch.setattr(Meaning, "facts", counting("facts", Meaning.facts))
    launch()
    assert asked == ["tokenizer", "facts", "tokenizer"]  # the first for the template
    asked.clear()
    launch(version="0.28.0")  # two issues set something, which those further down see
    assert (asked.count("facts"), asked.count("tokenizer")) == (3, 2)
