"""Rules on the draft head: its 15 tensors are there, in BF16, where the draft looks for them, and every config spares them."""

from collections.abc import Iterator, Mapping
from typing import Any

from mtpress.models.qwen3_5.engine import EngineLinear
from mtpress.quant_config import stored
from mtpress.quant_config.view import CONFIG, Subject
from mtpress.rules.ignore_lists import stored_forms
from mtpress.rules.rule import Problem, Rule
from mtpress.terminal import count

GRAFT = "mtpress graft CKPT OUT --from BASE"
FC = "mtp.fc"


def mtp_missing(subject: Subject) -> Iterator[Problem]:
    elsewhere = {*subject.unindexed_mtp, *subject.loaded_beside, *subject.names.contested}
    missing = []
    for name in subject.model.MTP_TENSORS:
        packed = name.endswith(".weight") and subject.form(subject.model.module_of(name)) not in ("plain", "none")
        if name not in subject.tensors and name not in elsewhere and not packed:
            missing.append(name)
    begun = any(name.startswith(subject.model.MTP_PREFIX) for name in (*subject.stored_mtp, *elsewhere))
    promised = subject.model.num_mtp_layers(subject.config) or begun
    if missing and promised:
        of = len(subject.model.MTP_TENSORS)
        yield Problem(f"the draft head lacks {len(missing)} of its {of} tensors", tuple(missing))


def mtp_unindexed(subject: Subject) -> Iterator[Problem]:
    if found := subject.unindexed_mtp:
        files = " and ".join(sorted({file for file, _ in found.values()})[:3])
        yield Problem(f"{count(len(found), 'tensor')} of the draft head stored in {files}, but not in the index", tuple(found))


def _forms(subject: Subject, names: tuple[str, ...]) -> str:
    return ", ".join(sorted({stored.TITLES[subject.form(module)] for module in names}))


def _loads(subject: Subject, module: str) -> bool:
    """Whether the engine loads a quantized module of the draft as such: where the config takes it as quantized, mtp.fc in FP8 alone."""
    return module in subject.schemes and (module != FC or (subject.form(module) == "fp8" and not _fc_is_spared(subject)))


def _head(subject: Subject, *, loads: bool) -> tuple[str, ...]:
    """The quantized modules of the head that the engine loads as such, or those that it does not."""
    head = (module for module in subject.quantized if module.startswith(subject.model.MTP_PREFIX))
    return tuple(module for module in head if (subject.covered and _loads(subject, module)) == loads)


def mtp_quantized(subject: Subject) -> Iterator[Problem]:
    names = _head(subject, loads=False)
    if names:
        yield Problem(f"{count(len(names), 'module')} of the draft head stored as {_forms(subject, names)}, not BF16", names)


def mtp_rounded(subject: Subject) -> Iterator[Problem]:
    names = tuple(module for module in _head(subject, loads=True) if subject.form(module) != "fp8")
    if names:
        yield Problem(f"{count(len(names), 'module')} of the draft layer stored as {_forms(subject, names)}, not BF16", names)


def mtp_fp8(subject: Subject) -> Iterator[Problem]:
    names = tuple(module for module in _head(subject, loads=True) if subject.form(module) == "fp8")
    if names:
        yield Problem(f"{count(len(names), 'module')} of the draft head stored as FP8, as the config says", names)


def _draft_quantized(subject: Subject) -> Iterator[EngineLinear]:
    """Linears of the draft that lie in BF16 and that the engine takes as quantized."""
    target = {linear.modules: verdict for linear, verdict in subject.verdicts.items() if linear.part == "lm_head"}
    for linear, verdict in subject.verdicts.items():
        if linear.part != "draft" or verdict != "quantized" or stored_forms(subject, linear) != {"plain"}:
            continue
        if target.get(linear.modules) != "quantized":  # else ignore-too-little says it of lm_head
            yield linear


def _fc_is_spared(subject: Subject) -> bool:
    """Whether vLLM builds mtp.fc in BF16 whatever is declared: it does so for modelopt NVFP4 alone."""
    return subject.declared is not None and subject.declared.format == "nvfp4"


def mtp_not_ignored(subject: Subject) -> Iterator[Problem]:
    found = [linear for linear in _draft_quantized(subject) if linear.prefix != FC or not _fc_is_spared(subject)]
    names = tuple(module for linear in found for module in linear.modules)
    if names:
        yield Problem(f"{count(len(names), 'module')} of the draft in BF16 that the engine takes as quantized", names)


def mtp_fc_not_ignored(subject: Subject) -> Iterator[Problem]:
    if _fc_is_spared(subject) and any(linear.prefix == FC for linear in _draft_quantized(subject)):
        yield Problem("the ignore list does not match mtp.fc", (FC,))


def _levels(subject: Subject) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Where vLLM looks for the number of draft layers, in its order."""
    return subject.config, subject.model.text_config(subject.config)


def mtp_not_declared(subject: Subject) -> Iterator[Problem]:
    if subject.stored_mtp and all(level.get("mtp_num_hidden_layers") is None for level in _levels(subject)):
        other = any("num_nextn_predict_layers" in level for level in _levels(subject))
        only = "; it has num_nextn_predict_layers, which is not read for this family" if other else ""
        yield Problem(f"a draft head is stored, config.json says mtp_num_hidden_layers nowhere{only}", (CONFIG,))


def mtp_layer_count(subject: Subject) -> Iterator[Problem]:
    said = next((v for level in _levels(subject) if (v := level.get("mtp_num_hidden_layers")) is not None), None)
    if subject.stored_mtp and said is not None and said != 1:
        yield Problem(f"a draft head of one layer is stored, config.json says mtp_num_hidden_layers {str(said)[:40]}", (CONFIG,))


def mtp_none(subject: Subject) -> Iterator[Problem]:
    if not (subject.stored_mtp or subject.unindexed_mtp or subject.names.misnamed("head") or subject.model.num_mtp_layers(subject.config)):
        yield Problem("no draft head, and config.json promises none: no speculative decoding with this checkpoint")


RULES = (
    Rule(
        "mtp-missing",
        "error",
        "config.json promises a draft head, or part of one is there, and tensors are missing. If the ignore list names them, vLLM drafts "
        "with random weights, accepts about nothing, and says nothing; if not, it stops.",
        GRAFT,
        mtp_missing,
    ),
    Rule(
        "mtp-unindexed",
        "error",
        "The draft head lies on disk, beside the shards or in a folder below, and the index does not name it: it is not lost. In a file of "
        "its own it is skipped, and vLLM drafts with random weights; in a shard that the index names, vLLM loads it, and whoever goes by "
        "the index loses it.",
        "take it into the index: mtpress repair CKPT OUT",
        mtp_unindexed,
    ),
    Rule(
        "mtp-quantized",
        "error",
        "mtp.fc is quantized, or the draft layer is and the config takes it as BF16. The draft does not load. A packed mtp.fc vLLM 0.32 "
        "loads where a config other than modelopt's takes it as quantized; older builds pass over it and accept nothing (FP8 excepted).",
        GRAFT + "; without the base, mtpress repair CKPT OUT dequantizes it",
        mtp_quantized,
    ),
    Rule(
        "mtp-rounded",
        "warning",
        "The draft layer is quantized, and the config says so (auto-round does this by default). It loads and drafts, and fewer of its "
        "tokens are accepted than in BF16.",
        GRAFT,
        mtp_rounded,
    ),
    Rule(
        "mtp-fp8",
        "note",
        "The draft head is stored in FP8, as Qwen's own FP8 releases store it, and the config says so: vLLM drafts with it.",
        "nothing needs to be done; in BF16 it is as " + GRAFT + " takes it from the BF16 release",
        mtp_fp8,
    ),
    Rule(
        "mtp-not-ignored",
        "error",
        "The draft head is BF16 and the ignore list does not match it (of modelopt, `model.mtp*` and `re:.*mtp.*` match nothing; AutoRound "
        "without block_name_to_quantize takes all of it as quantized): the draft waits for scales that never come, and stops or drafts at "
        "random.",
        "mtpress repair CKPT OUT, or name every mtp module in the list",
        mtp_not_ignored,
    ),
    Rule(
        "mtp-fc-not-ignored",
        "warning",
        "mtp.fc is not in a modelopt ignore list. vLLM 0.32 keeps it in BF16 by itself; older builds and other engines do not.",
        "mtpress repair CKPT OUT, or add mtp.fc to both lists",
        mtp_fc_not_ignored,
    ),
    Rule(
        "mtp-not-declared",
        "warning",
        "A draft head is stored, and neither the top of config.json nor text_config has mtp_num_hidden_layers. vLLM 0.32 drafts if "
        "num_speculative_tokens is given; older builds and other engines do not.",
        "set mtp_num_hidden_layers to 1 in text_config: mtpress repair CKPT OUT",
        mtp_not_declared,
    ),
    Rule(
        "mtp-layer-count",
        "error",
        "mtp_num_hidden_layers is not 1, and a head of one layer is stored: with 0 vLLM stops, with more it drafts with layers that "
        "have no weights.",
        "set mtp_num_hidden_layers to 1 in text_config: mtpress repair CKPT OUT",
        mtp_layer_count,
    ),
    Rule("mtp-none", "note", "The checkpoint has no draft head and does not claim one.", GRAFT, mtp_none),
)
