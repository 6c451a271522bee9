"""Repairs of tokenizer, chat template and generation defaults: the base's files, and what a newer library added taken out."""

from collections.abc import Iterator

from mtpress.quant_config.tokenizer_files import (
    CONFIG_IDS,
    GENERATION,
    GENERATION_IDS,
    SAMPLING,
    TEMPLATES,
    TOKENIZER,
    TOKENIZER_CONFIG,
    token_ids,
)
from mtpress.repairs.files import copy_files
from mtpress.repairs.repair import Context, Fix, Left, Repair, Turn, needs_base
from mtpress.repairs.template import install
from mtpress.rules.rule import Finding
from mtpress.rules.tokenizer import greedy_keys, pad_id, turn_end

LEGACY_CLASS = "Qwen2TokenizerFast"
OF_ANOTHER_VOCABULARY = Left(
    "the tokenizer is its author's, and an ancestor's would take away tokens that were added to it",
    "the tokenizer of the checkpoint that this one was made from",
)


def missing(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    """The file of the finding, from the base."""
    if ctx.base is None:
        yield needs_base(finding.where[0])
    else:
        yield from copy_files(ctx, finding.where)


def tokenizer_missing(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    if ctx.base is None:
        yield needs_base("the tokenizer")
    else:
        yield from copy_files(ctx, (TOKENIZER,) if (ctx.base.path / TOKENIZER).is_file() else ("vocab.json", "merges.txt"))
        size, theirs = ctx.subject.vocab_size, ctx.base.text_config.get("vocab_size")
        if ctx.ancestor and size != theirs:
            yield Fix(f"it is the ancestor's: the {size} embeddings are not those of its {theirs}, tokens that were added are not in it")


def template_missing(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    there = tuple(name for name in TEMPLATES if ctx.base is not None and (ctx.base.path / name).is_file())
    inside = (ctx.base.json_file(TOKENIZER_CONFIG) or {}).get("chat_template") if ctx.base is not None else None
    if there:
        yield from copy_files(ctx, there[:1])
    elif not inside:
        yield from install(ctx, finding)
    elif isinstance(inside, str):
        ctx.overlay.write_file(TEMPLATES[0], inside.encode())
        yield Fix(f"{TEMPLATES[0]} written from the base's {TOKENIZER_CONFIG}")
    else:
        yield Left(f"the base's {TOKENIZER_CONFIG} holds several templates", f"write the one that is meant into {TEMPLATES[0]}")


def tokenizer_backend(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    content = dict(ctx.subject.json(TOKENIZER_CONFIG) or {})
    content.pop("backend", None)
    if content.get("tokenizer_class") == "TokenizersBackend":
        content["tokenizer_class"] = LEGACY_CLASS
    ctx.overlay.write_json(TOKENIZER_CONFIG, content)
    yield Fix(f"taken out of {TOKENIZER_CONFIG}; the class is {content.get('tokenizer_class', 'not named')}")


def token_id_outside(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    """The files that name such an id, from the base; ids of config.json too."""
    if ctx.base is None:
        yield needs_base("the ids of this model's tokens")
        return
    if ctx.ancestor and f"{TOKENIZER} " in finding.message:
        yield OF_ANOTHER_VOCABULARY
        return
    files = [name for name in (GENERATION, TOKENIZER) if f"{name} " in finding.message]
    if TOKENIZER in files:
        files += [name for name in (TOKENIZER_CONFIG,) if (ctx.base.path / name).is_file()]
    if files:
        yield from copy_files(ctx, tuple(files))
    if "config.json " in finding.message.replace(GENERATION, "").replace(TOKENIZER_CONFIG, ""):
        config, theirs = ctx.overlay.config, ctx.base.config
        changed = config | {key: theirs[key] for key in CONFIG_IDS if key in config and key in theirs}
        ours, source = changed.get("text_config"), ctx.base.text_config
        if isinstance(ours, dict):
            changed["text_config"] = ours | {key: source[key] for key in GENERATION_IDS if key in ours and key in source}
        elif config.get("model_type") == source.get("model_type"):
            changed |= {key: source[key] for key in GENERATION_IDS if key in config and key in source}
        ctx.overlay.set_config(changed)
        yield Fix("the token ids of config.json are the base's")


def token_id_differs(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    """The tokenizer makes the ids, so config.json follows it; where it has no such token, both must come from the base."""
    config, known, size = ctx.overlay.config, token_ids(ctx.subject), ctx.subject.vocab_size
    right = {key: known[token] for key, token in CONFIG_IDS.items() if key in config and token in known}
    lacking = [token for key, token in CONFIG_IDS.items() if config.get(key) is not None and token not in known]
    if lacking or any(size is not None and not 0 <= number < size for number in right.values()):
        if ctx.base is None:
            yield needs_base(f"a tokenizer with {', '.join(lacking or right)}")
        elif ctx.ancestor:
            yield OF_ANOTHER_VOCABULARY
        else:
            yield from copy_files(ctx, tuple(n for n in (TOKENIZER, TOKENIZER_CONFIG) if (ctx.base.path / n).is_file()))
        return
    ctx.overlay.set_config(config | right)
    yield Fix("the token ids of config.json set to the tokenizer's")


def special_tokens(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    if ctx.base is None:
        yield needs_base("this model's tokenizer")
    elif ctx.ancestor:
        yield OF_ANOTHER_VOCABULARY
    else:
        yield from copy_files(ctx, tuple(n for n in (TOKENIZER, TOKENIZER_CONFIG) if (ctx.base.path / n).is_file()))


def generation_ids(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    content, known = dict(ctx.subject.json(GENERATION) or {}), token_ids(ctx.subject)
    if "eos_token_id" in finding.message:
        said = content.get("eos_token_id")
        others = [number for number in (said if isinstance(said, list) else [said]) if type(number) is int]
        content["eos_token_id"] = [known[turn_end(ctx.subject)], *others]
    else:
        content["pad_token_id"] = pad_id(ctx.subject)
    ctx.overlay.write_json(GENERATION, content)
    yield Fix(f"{GENERATION} set to the tokenizer's ids")


def generation_greedy(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    if ctx.base is None:
        yield needs_base("the sampling that this model was made for")
        return
    theirs, mine = ctx.base.json_file(GENERATION) or {}, ctx.subject.json(GENERATION) or {}
    if greedy_keys(theirs) or "temperature" not in theirs:
        yield Left(f"the base's {GENERATION} names no sampling either", "set temperature, top_p and top_k in it")
        return
    kept = {key: value for key, value in mine.items() if key not in SAMPLING}
    ctx.overlay.write_json(GENERATION, kept | {key: theirs[key] for key in SAMPLING if key in theirs})
    yield Fix(f"the sampling of {GENERATION} is the base's")


REPAIRS = (
    Repair("tokenizer-missing", "copied from the base (`--base`)", tokenizer_missing),
    Repair("tokenizer-config-missing", "copied from the base (`--base`)", missing),
    Repair("tokenizer-backend", f"the key is taken out, the class becomes {LEGACY_CLASS}", tokenizer_backend),
    Repair("template-missing", "copied from the base (`--base`); without one mtpress's is installed", template_missing),
    Repair("generation-config-missing", "copied from the base (`--base`)", missing),
    Repair("token-id-outside", "the file that names the id is copied from the base (`--base`)", token_id_outside, Turn.CONFIG),
    Repair("token-id-differs", "config.json gets the ids that the tokenizer has", token_id_differs, Turn.CONFIG),
    Repair("special-tokens", "the tokenizer is copied from the base (`--base`)", special_tokens, Turn.CONFIG),
    Repair("generation-ids", "set to the tokenizer's", generation_ids),
    Repair("generation-greedy", "the sampling is the base's (`--base`)", generation_greedy),
)
