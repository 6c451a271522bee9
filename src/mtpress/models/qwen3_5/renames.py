"""Tensors of the family under other names: which of them is which, by the end of its name and its shape.

In: stored names with dtype and shape, config.json. Out: `Renaming`: stored name → the family's. Leaves out: changing a file
(repairs/names.py) and judging (rules/names.py). A name ends as the family's does, whatever stands before it: wrappers of trainers
(`module.`, `_orig_mod.`, `base_model.model.`), doubled or foreign prefixes. So the longest known end decides, all names with one prefix
together, and shapes must agree. A head may also stand as DeepSeek's and Megatron's do: in a layer after the last, or with their words.
Sources: DeepSeek-V3 modeling and vLLM 0.32 models/deepseek_mtp.py (eh_proj reads embedding, then hidden state, as mtp.fc does); Megatron
Core transformer/multi_token_prediction.py; vLLM 0.32 models/qwen3_5/names.py and utils.py (what the engine renames itself).
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

from mtpress.errors import InputError
from mtpress.models.qwen3_5 import names as qwen3_5
from mtpress.models.qwen3_5.engine import RENAMES, TEXT_ARCHITECTURE
from mtpress.models.qwen3_5.names import MTP_PREFIX, MTP_TENSORS, PLAIN_DTYPES, VISION_PREFIX, Stored, module_of

Kind = Literal["body", "lm_head", "vision", "head"]
TITLES: dict[Kind, str] = {"body": "the body", "lm_head": "lm_head", "vision": "the vision tower", "head": "the draft head"}
BODY_PREFIX, TEXT_PREFIX = "model.language_model.", "model."

# Parts of a name that trainers put in, anywhere before the last: DDP, torch.compile, FSDP, activation checkpointing, DeepSpeed, PEFT.
WRAPPERS = frozenset({
    "module", "_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module", "_forward_module", "base_layer",
    "modules_to_save", "original_module", "default", "transformer_layer", "mtp_model_layer", "parametrizations",
})  # fmt: skip
OF_A_LEAF = frozenset({"data", "original"})  # behind the tensor's own name: torch's parametrizations, and parameters saved by attribute
PARAMETRIZED = re.compile(r".*\bparametrizations\.\w+\.")  # a weight of several tensors is computed from them, and is none of them
PARAMETERS = frozenset({"A_log", "dt_bias"})  # of the mixer itself; a trainer may hold each in a module, whose weight it is
PREFIX_WORDS = frozenset({"model", "language_model", "base_model", "text_model"})  # before the layers, and of no meaning there
OTHER_PARTS = re.compile(r"lora_|exp_avg|optimizer|momentum|adapter|grad$")  # what is no weight of the model, wherever it stands

PARTS_OF_A_LAYER = (
    *(linear for linears in qwen3_5.QUANTIZABLE.values() for linear in linears), *qwen3_5.AB_LINEARS, "linear_attn.conv1d",
    "linear_attn.norm", "self_attn.q_norm", "self_attn.k_norm", "input_layernorm", "post_attention_layernorm",
)  # fmt: skip
IN_A_LAYER = "|".join(map(re.escape, PARTS_OF_A_LAYER))
INDEX = r"[0-9]{1,6}"
OF_THE_MIXER = r"linear_attn\.(?:A_log|dt_bias)|self_attn\.(?:attn\.)?[qkv]_(?:scale|zero_point)"  # no modules of their own
BODY_END = re.compile(rf"(?:embed_tokens|norm|layers\.{INDEX}\.(?:{IN_A_LAYER}))\.\w+|layers\.{INDEX}\.(?:{OF_THE_MIXER})")
VISION_END = re.compile(
    rf"(?:pos_embed|patch_embed\.proj|merger\.(?:norm|linear_fc[12])|blocks\.{INDEX}\."
    r"(?:norm[12]|attn\.(?:qkv|proj)|mlp\.linear_fc[12]))\.\w+"
)
HEAD_MODULES = {module_of(name).removeprefix(MTP_PREFIX) for name in MTP_TENSORS}
# Words of other families' heads for what this one has too.
HEAD_WORDS = {
    "eh_proj": "fc", "enorm": "pre_fc_norm_embedding", "hnorm": "pre_fc_norm_hidden", "final_layernorm": "norm", "shared_head.norm": "norm",
}  # fmt: skip
# A head's own copies of what it shares with the body.
SHARED_WORDS = {"embed_tokens": "embed_tokens", "shared_head.head": "lm_head", "lm_head": "lm_head"}
ONLY_HEADS = {*HEAD_WORDS, "fc", "pre_fc_norm_embedding", "pre_fc_norm_hidden"}
HEAD_LAYER = re.compile(rf"layers\.({INDEX})\.(.+)\.(\w+)")
WORDS = frozenset(re.findall(r"[a-z]\w*", " ".join([*PARTS_OF_A_LAYER, *HEAD_MODULES, *HEAD_WORDS, *SHARED_WORDS]))) | {
    "embed_tokens", "norm", "pos_embed", "patch_embed", "proj", "merger", "linear_fc1", "linear_fc2", "blocks", "norm1", "norm2",
    "attn", "qkv", "mtp", "visual", "lm_head",
}  # fmt: skip


@dataclass(frozen=True)
class Renaming:
    """new_names: stored name → the family's, where they differ. rivals: stored name → a family's name that another stored tensor claims
    too; of two that claim it without having it, both are rivals. kinds: stored name → what it is part of."""

    new_names: Mapping[str, str] = field(default_factory=dict)
    rivals: Mapping[str, str] = field(default_factory=dict)
    kinds: Mapping[str, Kind] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.new_names or self.rivals)

    def misnamed(self, *kinds: Kind) -> list[str]:
        """Stored names that are not the family's: of these parts, or of all."""
        return [name for name in (*self.new_names, *self.rivals) if not kinds or self.kinds[name] in kinds]

    @property
    def contested(self) -> frozenset[str]:
        """Names of the family that more than one stored tensor claims."""
        return frozenset(self.rivals.values())

    def told(self, *kinds: Kind) -> str:
        """What stands where, and where it belongs: `module.model.visual.*, must be model.visual.*`; the three that most names have."""
        counted = Counter(
            _move(old, new) for old, new in (*self.new_names.items(), *self.rivals.items()) if not kinds or self.kinds[old] in kinds
        )
        shown = [f"{old}, must be {new}" for (old, new), _ in counted.most_common(3)]
        return "; ".join([*shown, *([f"and {len(counted) - 3} more kinds"] if len(counted) > 3 else [])])


def _move(old: str, new: str) -> tuple[str, str]:
    """A name before and after, by what stands before its end where no more changes, and whole with N for numbers where it does."""
    prefix = next(start for start in (BODY_PREFIX, VISION_PREFIX, MTP_PREFIX, TEXT_PREFIX, "") if new.startswith(start))
    end = new.removeprefix(prefix)
    if prefix and (old == end or old.endswith(f".{end}")):
        return f"{old.removesuffix(end)}*" if old != end else "names without a prefix", f"{prefix}*"
    whole = [re.sub(rf"\.{INDEX}(?=\.)", ".N", name)[:160] for name in (old, new)]
    return whole[0], whole[1]


@dataclass(frozen=True)
class _Found:
    """A stored name read from its end. before: what stands ahead of it, without wrappers; end: from there on."""

    name: str
    before: tuple[str, ...]
    end: str
    kinds: frozenset[Kind]
    guessed: bool  # unknown parts were taken out of the middle


def renaming(tensors: Mapping[str, Stored], config: Mapping[str, Any], architecture: str) -> Renaming:
    """Which stored tensors stand under names that are not the family's, and which names these are."""
    shapes = _shapes(config)
    groups: dict[tuple[str, ...], list[_Found]] = defaultdict(list)
    parametrized = Counter(match[0] for name in tensors if (match := PARAMETRIZED.match(name)))
    for name in tensors:
        computed = (match := PARAMETRIZED.match(name)) is not None and parametrized[match[0]] > 1
        found = _read(name) if not computed else None
        if found is not None:
            groups[found.before].append(found)
    wanted: dict[str, tuple[Kind, str]] = {}
    for group in groups.values():
        wanted |= _placed(group, tensors, shapes)
    prefix = _body_prefix(wanted, architecture)
    targets = {name: _target(kind, end, prefix) for name, (kind, end) in wanted.items()}
    claims: dict[str, list[str]] = defaultdict(list)
    for name, target in targets.items():
        claims[target].append(name)
    new_names, rivals = dict[str, str](), dict[str, str]()
    for target, names in claims.items():
        others = [name for name in names if name != target]
        if {wanted[name][0] for name in names} == {"head"} and not target.startswith(MTP_PREFIX):
            continue  # what a head shares with a body, and there is none
        if len(names) == 1:
            new_names |= dict.fromkeys(others, target)
        else:
            rivals |= dict.fromkeys(others, target)
    return Renaming(new_names, rivals, {name: wanted[name][0] for name in (*new_names, *rivals)})


def _target(kind: Kind, end: str, prefix: str) -> str:
    shared = kind == "head" and end.startswith("embed_tokens.")
    return prefix + end if kind == "body" or shared else end


def engine_reads(names: Iterable[tuple[str, str]], architecture: str) -> bool:
    """Whether vLLM's target loads the first name of each pair where it loads the second: it applies its renames to both."""
    return all(_engine_name(old, architecture) == _engine_name(new, architecture) for old, new in names)


def _engine_name(name: str, architecture: str) -> str:
    for old, new in RENAMES[architecture]:
        if name.startswith(old):
            name = new + name.removeprefix(old)
    return name


# ---- one name


@lru_cache(maxsize=16384)
def _read(name: str) -> _Found | None:
    """The longest end of a name that is the family's; first with wrappers taken out, then with every word that the family lacks."""
    *parts, last = name.split(".")
    if (last in OF_A_LEAF and parts and parts[-1] in ("weight", "bias")) or (last == "weight" and parts and parts[-1] in PARAMETERS):
        last = parts.pop()
    if not parts or len(parts) > 40 or any(OTHER_PARTS.match(part) for part in name.split(".")):
        return None
    bare = [part for part in parts if part not in WRAPPERS]
    if (found := _longest(name, [*bare, last], guessed=False)) is not None or {"weight", "bias"} & {*bare}:
        return found  # what stands behind a tensor's own name is a part of it, or something else
    start = next((i for i, part in enumerate(bare) if part in WORDS), len(bare))
    known = [part for part in bare[start:] if part in WORDS or re.fullmatch(INDEX, part)]
    return _longest(name, [*bare[:start], *known, last], guessed=True) if len(known) < len(bare[start:]) else None


def _longest(name: str, parts: list[str], *, guessed: bool) -> _Found | None:
    """The longest end that is the family's, if no word of a module stands ahead of it: `norm.weight` of a layer is not the last norm."""
    for i in range(len(parts) - 1):
        before, end = parts[:i], ".".join(parts[i:])
        if kinds := _kinds(end, "mtp" in before):
            whole = not WORDS.intersection(before) - {"mtp", "visual"}
            return _Found(name, tuple(before), end, kinds, guessed) if whole else None
    return None


def _kinds(end: str, below_mtp: bool) -> frozenset[Kind]:
    """What an end may be of; below `mtp`, of the head alone."""
    if below_mtp:
        return frozenset({"head"} if _head_end(end, below_mtp=True) is not None else ())
    if re.fullmatch(r"lm_head\.\w+", end):
        return frozenset({"lm_head"})
    found: dict[Kind, bool] = {
        "head": _head_end(end) is not None, "body": bool(BODY_END.fullmatch(end)), "vision": bool(VISION_END.fullmatch(end)),
    }  # fmt: skip
    return frozenset(kind for kind, fits in found.items() if fits)


def _head_end(end: str, *, below_mtp: bool = False) -> str | None:
    """The name that an end has in a head of this family; None for one that it has no place for. Below `mtp` the layer may go unsaid."""
    module, _, last = end.rpartition(".")
    found = HEAD_LAYER.fullmatch(end)
    if found and below_mtp and found[1] != "0":
        return None  # of a second layer
    inner = found[2] if found else module
    if (found or below_mtp) and f"layers.0.{inner}" in HEAD_MODULES:
        return f"{MTP_PREFIX}layers.0.{inner}.{last}"
    if inner in {*HEAD_WORDS, *HEAD_MODULES}:
        return f"{MTP_PREFIX}{HEAD_WORDS.get(inner, inner)}.{last}"
    return f"{SHARED_WORDS[inner]}.{last}" if inner in SHARED_WORDS else None


# ---- names of one prefix together


def _placed(group: list[_Found], tensors: Mapping[str, Stored], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[Kind, str]]:
    """Stored name → its part and the name there (of the body without its prefix), for the names that have one prefix in common."""
    before = group[0].before
    heads = _layers_of_heads(group)
    is_head = "mtp" in before or _is_bare_head(group)
    if "mtp" in before and any(part.isdecimal() and part != "0" for part in before):
        return {}  # a second layer
    has_body = set(before) <= PREFIX_WORDS or any(one.end.startswith(("layers.", "embed_tokens.")) for one in group)
    placed: dict[str, tuple[Kind, str]] = {}
    for one in group:
        layer = HEAD_LAYER.fullmatch(one.end)
        end: str | None
        if is_head or (layer is not None and layer[1] in heads):
            if (end := _head_end(one.end, below_mtp="mtp" in before)) is not None:
                placed[one.name] = ("head", end)
        elif "vision" in one.kinds:
            placed[one.name] = ("vision", VISION_PREFIX + one.end)
        elif "lm_head" in one.kinds:
            placed[one.name] = ("lm_head", one.end)
        elif "body" in one.kinds and has_body:
            placed[one.name] = ("body", one.end)
    fitting = {name: _fits(tensors[name], *place, shapes) for name, place in placed.items()}
    known = set(before) <= PREFIX_WORDS | {"mtp", "visual"}
    if not known and sum(fit is True for fit in fitting.values()) < sum(fit is False for fit in fitting.values()):
        return {}  # of something else, whatever its names are
    guessed = {one.name for one in group if one.guessed}
    return {name: place for name, place in placed.items() if name not in guessed or fitting[name] is not False}


def _layers_of_heads(group: list[_Found]) -> set[str]:
    """The layer that holds what only a head has, as DeepSeek stores it after the body's; none where there are several, or it has a mixer
    that no head has."""
    inner: dict[str, set[str]] = defaultdict(set)
    for one in group:
        if found := HEAD_LAYER.fullmatch(one.end):
            inner[found[1]].add(found[2])
    heads = {layer for layer, names in inner.items() if names & ONLY_HEADS and not any(name.startswith("linear_attn") for name in names)}
    return heads if len(heads) == 1 else set()


def _is_bare_head(group: list[_Found]) -> bool:
    """Whether it is the head that stands under a prefix: what only a head has at the top, and no more than its one layer."""
    tops = {module_of(one.end) for one in group if not HEAD_LAYER.fullmatch(one.end)}
    layers = {found[1] for one in group if (found := HEAD_LAYER.fullmatch(one.end))}
    return bool(tops & ONLY_HEADS) and "embed_tokens" not in tops and layers <= {"0"} and not any(".linear_attn" in o.end for o in group)


def _fits(stored: Stored, kind: Kind, end: str, shapes: Mapping[str, tuple[int, ...]]) -> bool | None:
    """Whether a plain tensor has the shape that config.json gives that name; None where nothing says."""
    shape = shapes.get(BODY_PREFIX + end if kind == "body" else end)
    return stored.shape == shape if shape is not None and stored.dtype in PLAIN_DTYPES else None


def _shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """What config.json calls for, as far as it says."""
    found: dict[str, tuple[int, ...]] = {}
    try:
        found |= dict(qwen3_5.body_shapes(config, BODY_PREFIX)) | qwen3_5.mtp_shapes(config)
        if "vision_config" in config:
            found |= qwen3_5.vision_shapes(config)
    except InputError:
        pass  # config-incomplete says it
    return found


def _body_prefix(wanted: Mapping[str, tuple[Kind, str]], architecture: str) -> str:
    """The prefix of the body that the architecture reads: of two, the one that most names have."""
    if architecture != TEXT_ARCHITECTURE:
        return BODY_PREFIX
    ends = [(name, end) for name, (kind, end) in wanted.items() if kind == "body"]
    num_full = sum(name == BODY_PREFIX + end for name, end in ends)
    num_text = sum(name == TEXT_PREFIX + end for name, end in ends)
    if num_full == num_text == 0:
        return BODY_PREFIX if any(kind == "vision" for kind, _ in wanted.values()) else TEXT_PREFIX
    return BODY_PREFIX if num_full > num_text else TEXT_PREFIX
