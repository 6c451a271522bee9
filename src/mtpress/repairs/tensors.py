"""Repairs of names, dtypes and shapes: renamed, brought back from the base, cast where no value changes, dropped without a place."""

import copy
import math
import struct
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from mtpress.checkpoint.safetensors import TensorInfo, bytes_of, read_tensor, torch_dtype
from mtpress.quant_config.stored import KV_SCALES, PLAIN_DTYPES, SCALE, WEIGHT, WEIGHT_PACKED, WEIGHT_SHAPE
from mtpress.quant_config.view import Subject
from mtpress.repairs.bf16 import in_bf16, is_bf16, whole_matrix
from mtpress.repairs.compressed_groups import stored_bits
from mtpress.repairs.declaration import declare
from mtpress.repairs.from_source import base_tensor, quantized_there
from mtpress.repairs.repair import OTHER_BASE, Context, Fix, Left, Repair, Turn, needs_base
from mtpress.repairs.unplaced import ITS_NAME, NO_WEIGHT, absent, has_more_rows, may_be, told
from mtpress.rules.rule import QUANTIZE_AGAIN, Finding
from mtpress.rules.tensors import DTYPES, fp8_scale_shapes
from mtpress.terminal import count

if TYPE_CHECKING:
    import torch

BF16_BITS = 8  # of its significand
PIECE_VALUES = 4 << 20
MERGED = "merging it into the weights it belongs to; or, where the model does without it, taking it out of the checkpoint"
ITS_LAYOUT = "its right layout: turn or split it in the checkpoint, then repair again"


def from_base(ctx: Context, names: Iterable[str], what: str) -> Iterator[Fix | Left]:
    """Puts the base's tensors in place of tensors of these names; a quantized module becomes its BF16 matrix again."""
    names = list(names)
    if own := may_be(ctx.subject, names):
        yield told(own)
        names = [name for name in names if name not in own]
    if not names:
        return
    if ctx.base is None:
        yield needs_base(what)
        return
    subject = ctx.subject
    decided = {module for linear in subject.linears for module in linear.modules}
    modules, done, missing = list[str](), list[str](), list[str]()
    for name in names:
        module, _, suffix = name.rpartition(".")
        if module in decided and (suffix == WEIGHT or subject.form(module) not in ("plain", "none")):
            modules.append(module)
        elif (origin := base_tensor(ctx, name, subject.called_for.get(name))) is not None:
            ctx.overlay.put(name, origin)
            done.append(name)
        else:
            missing.append(name)
    modules = list(dict.fromkeys(modules))
    if len(quantized := [module for module in modules if subject.form(module) not in ("plain", "none")]) > len(subject.quantized) / 2:
        share = f"{len(quantized)} of {len(subject.quantized)} quantized matrices"
        yield Left(f"{share} are so: config.json or the declaration is wrong, not they", QUANTIZE_AGAIN)
        modules = [module for module in modules if module not in quantized]
    made = in_bf16(ctx, modules, damaged=True)
    if done:
        yield Fix(f"{count(len(done), 'tensor')} put from {ctx.whose}, bit for bit: {', '.join(done[:3])}{', …' * (len(done) > 3)}")
    yield from made.told(ctx)
    elsewhere = [name for name in missing if quantized_there(ctx, name) is None] + made.missing
    yield from [left for name in missing if (left := quantized_there(ctx, name)) is not None][:1]
    if elsewhere:
        yield Left(f"the base has no such tensor either ({elsewhere[0]}, …)", OTHER_BASE)


def tensor_missing(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    yield from from_base(ctx, finding.where, count(len(finding.where), "tensor") + " that is missing" * (len(finding.where) == 1))


def tensor_unexpected(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    """Drops what is no weight: by its name, or as all of its numbers are 0. Anything else may be its author's work and stays."""
    subject = ctx.subject
    num_layers = len(subject.model.layer_types(subject.config))
    beyond = {i for name in finding.where if (i := subject.model.layer_index(name)) is not None and i >= num_layers}
    whole = [i for i in sorted(beyond) if f"{subject.prefix}layers.{i}.input_layernorm.weight" in subject.tensors]
    if whole:
        yield Left(
            f"layer {whole[0]} is whole, so it may be num_hidden_layers {num_layers} in config.json that is wrong",
            "restore config.json: mtpress repair CKPT OUT --base SRC",
        )
        return
    own = may_be(subject, absent(subject))
    names = [name for name in finding.where if name in subject.tensors]
    dropped = [name for name in names if NO_WEIGHT.search(name) or (not own and _holds_nothing(ctx, name))]
    for name in dropped:
        ctx.overlay.drop(name)
    if dropped:
        yield Fix(f"dropped: {', '.join(dropped[:3])}{', …' if len(dropped) > 3 else ''}")
    stay = [name for name in names if name not in dropped]
    if stay and own:
        first, *more = dict.fromkeys(own.values())
        others = f", and {len(more)} more" if more else ""
        yield Left(f"{first} may be a tensor that is missing ({next(iter(own))}){others}: nothing is dropped", ITS_NAME)
    elif stay:
        others = f" and {len(stay) - 1} more have" if len(stay) > 1 else " has"
        yield Left(f"{stay[0]}{others} no place in the model and may be its author's work: nothing is dropped", MERGED)


def _holds_nothing(ctx: Context, name: str) -> bool:
    """Whether all numbers of a tensor are 0; a dry run takes it so."""
    if ctx.overlay.is_computed(name):
        return False
    return not ctx.may_read or not any(bool(piece.any()) for piece in _pieces(ctx.overlay.places[name].info))


def weight_dtype(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    """Scales are cast where every value is a number of the right dtype too; codes where no engine reads codes (embeddings) are
    dequantized; other weights come from the base."""
    subject = ctx.subject
    decided = {module for linear in subject.linears for module in linear.modules}
    codes = [m for m in map(subject.model.module_of, finding.where) if m in subject.quantized and m not in decided]
    matrices = {module: matrix for module in codes if (matrix := whole_matrix(ctx, module)) is not None}
    exact = ctx.may_read and all(map(is_bf16, matrices.values()))
    made = in_bf16(ctx, matrices, damaged=False)
    yield from made.told(ctx, ", to the last bit" if exact else f", rounded to {BF16_BITS} bits")
    cast, others = list[str](), list[str]()
    for name in finding.where:
        if subject.model.module_of(name) in made.dequantized:
            continue
        info, suffix = subject.tensors[name], name.rpartition(".")[2]
        known = DTYPES.get(subject.form(subject.model.module_of(name)), {}).get(suffix)
        wanted = known[0] if known else "F32" if suffix in KV_SCALES else None
        castable = wanted not in (None, info.dtype) and not ctx.overlay.is_computed(name)
        if castable and wanted and _is_float(wanted) == _is_float(info.dtype) and (not ctx.may_read or _fits(info, wanted)):
            put_cast(ctx, info, wanted)
            cast.append(name)
        else:
            others.append(name)
    if cast:
        yield Fix(f"{count(len(cast), 'scale')} cast, no value changes" + ("" if ctx.may_read else ", if every value allows it"))
    if others:
        yield from from_base(ctx, tuple(others), f"{others[0]} in its dtype")


def _is_float(dtype: str) -> bool:
    return dtype in PLAIN_DTYPES or dtype.startswith("F8_")


def weight_precision(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    """A cast where every value is a BF16 number; the others stay: how they are to be rounded is for who quantizes them, or the engine."""
    subject = ctx.subject
    cast, inexact, broken = 0, list[str](), list[str]()
    for name in finding.where:
        info = subject.tensors[name]
        if ctx.overlay.is_computed(name):
            continue  # its finite numbers are what they were
        if ctx.may_read and not is_finite(info):
            broken.append(name)
        elif not ctx.may_read or is_exact(info, "BF16"):
            put_cast(ctx, info, "BF16")
            cast += 1
        else:
            inexact.append(name)
    if cast:
        matrices = count(cast, "matrix" if cast == 1 else "matrice")
        yield Fix(f"{matrices} cast to BF16, no value changes" + ("" if ctx.may_read else ", if that is so"))
    if inexact:
        yield Left(f"{inexact[0]} holds values that BF16 rounds, by {relative_change(subject.tensors[inexact[0]]):.2g} in all",
                   "nothing: the engine rounds them when it loads them, and so does mtpress quantize")  # fmt: skip
    if broken:
        yield Left(f"{broken[0]} holds NaN or infinite numbers", "other numbers in their place: --base SRC, if that is its source")


def is_exact(info: TensorInfo, dtype: str) -> bool:
    """Whether every finite value of a stored tensor is a number of another dtype too; reads it."""
    return all(bool(((piece.to(torch_dtype(dtype)).to(piece.dtype) == piece) | ~piece.isfinite()).all()) for piece in _pieces(info))


def _fits(info: TensorInfo, dtype: str) -> bool:
    return is_finite(info) and is_exact(info, dtype)


def is_finite(info: TensorInfo) -> bool:
    """Whether a stored tensor holds neither NaN nor infinity; reads it."""
    return all(bool(piece.isfinite().all()) for piece in _pieces(info))


def relative_change(info: TensorInfo) -> float:
    """‖bf16(w) − w‖ / ‖w‖ of a stored tensor; reads it."""
    change = norm = 0.0
    for piece in _pieces(info):
        exact = piece.double()
        change += float((piece.to(torch_dtype("BF16")).double() - exact).square().sum())
        norm += float(exact.square().sum())
    return math.sqrt(change / norm) if norm else math.inf


def _pieces(info: TensorInfo) -> "Iterator[torch.Tensor]":
    """A stored tensor in pieces; FP8 as float32, which holds all of it and can be compared."""
    tensor = read_tensor(info).view(-1)
    for start in range(0, len(tensor), PIECE_VALUES):
        piece = tensor[start : start + PIECE_VALUES]
        yield piece.float() if info.dtype.startswith("F8_") else piece


def put_cast(ctx: Context, info: TensorInfo, dtype: str) -> None:
    """The tensor in another dtype, cast when it is written; a float32 scalar at once, so that the rules can read it."""
    where = ctx.overlay.places[info.name].info

    def produce() -> "torch.Tensor":
        return read_tensor(where).to(torch_dtype(dtype))

    if dtype == "F32" and info.num_params == 1 and ctx.may_read:
        ctx.overlay.put_scalar(info.name, bytes(bytes_of(produce().contiguous())), info.shape)
    else:
        ctx.overlay.compute(info.name, dtype, info.shape, produce)


def weight_shape(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    """From the base; but the shape that compressed-tensors stores beside INT4 codes follows from config.json, if they have it."""
    subject, names = ctx.subject, set(finding.where)
    if (rows := _stored_vocabulary(subject)) is not None and names <= {f"{subject.prefix}embed_tokens.weight", "lm_head.weight"}:
        config = copy.deepcopy(ctx.overlay.config)
        (config["text_config"] if isinstance(config.get("text_config"), dict) else config)["vocab_size"] = rows
        ctx.overlay.set_config(config)
        yield Fix(f"vocab_size of config.json set to {rows}, the rows that embeddings and lm_head have")
        return
    modules = {subject.model.module_of(name) for name in names}
    schemes = {module: subject.schemes[module].bits for module in modules if module in subject.schemes}
    if schemes and all(stored_bits(subject, module) not in (None, bits) for module, bits in schemes.items()):
        yield from declare(ctx)  # the bits that are declared are wrong
        return
    said = [name for name in finding.where if name.endswith(f".{WEIGHT_SHAPE}")]
    alone = [name for name in said if not names & {name.replace(WEIGHT_SHAPE, suffix) for suffix in (WEIGHT_PACKED, SCALE)}]
    for name in alone:
        shape = subject.called_for[name.replace(WEIGHT_SHAPE, WEIGHT)]
        ctx.overlay.put_bytes(name, "I64", (2,), struct.pack("<2q", *shape))
    if alone:
        yield Fix(f"{count(len(alone), WEIGHT_SHAPE)} set to what the codes have")
    turned = [name for name in finding.where if _reshaped(ctx, name)]
    if turned:
        yield Fix(f"{count(len(turned), 'scale')} of FP8 in the shape that the declared layout has them in, every number as it was")
    flat = [name for name in finding.where if name not in turned and _as_called_for(ctx, name)]
    if flat:
        yield Fix(f"{count(len(flat), 'tensor')} in the shape that config.json calls for, every number as it was: {', '.join(flat[:3])}")
    laid = [name for name in finding.where if name not in (*turned, *flat) and _as_many(ctx, name)]
    if laid:
        yield Left(f"{laid[0]} has as many numbers as config.json calls for, in another layout (turned, perhaps): it stays", ITS_LAYOUT)
    wide = [name for name in finding.where if has_more_rows(subject.tensors[name], subject.called_for.get(name))]
    if wide:
        yield Left(f"{wide[0]} has more rows than config.json calls for, of other tensors or tokens, perhaps: it stays", ITS_LAYOUT)
    if rest := tuple(name for name in finding.where if name not in (*alone, *turned, *flat, *laid, *wide)):
        yield from from_base(ctx, rest, f"{rest[0]} in its shape")


def _as_many(ctx: Context, name: str) -> bool:
    """Whether a tensor in 16 or 32 bits holds as many numbers as it should, in another shape."""
    info, shape = ctx.subject.tensors[name], ctx.subject.called_for.get(name)
    if shape is None or info.dtype not in PLAIN_DTYPES or ctx.overlay.is_computed(name):
        return False
    return info.shape != shape and math.prod(info.shape) == math.prod(shape)


def _as_called_for(ctx: Context, name: str) -> bool:
    """Whether only dimensions of 1 are too many or too few; it has its shape then."""
    if not _as_many(ctx, name):
        return False
    info, shape = ctx.overlay.places[name].info, ctx.subject.called_for[name]
    if [size for size in info.shape if size != 1] != [size for size in shape if size != 1]:
        return False
    ctx.overlay.compute(name, info.dtype, shape, lambda: read_tensor(info).reshape(shape))
    return True


def _stored_vocabulary(subject: Subject) -> int | None:
    """The rows that embeddings and lm_head have alike, where these are not vocab_size: tokens that were added to both."""
    shapes = [subject.tensors[name].shape for name in (f"{subject.prefix}embed_tokens.weight", "lm_head.weight") if name in subject.tensors]
    hidden = subject.model.text_config(subject.config).get("hidden_size")
    alike = len(shapes) == 2 and shapes[0] == shapes[1] and len(shapes[0]) == 2 and shapes[0][1] == hidden
    return shapes[0][0] if alike and shapes[0][0] != subject.vocab_size else None


def _reshaped(ctx: Context, name: str) -> bool:
    """Whether a scale of FP8 holds the numbers of the declared layout in another shape, [N] for [N, 1]; it has the right one then."""
    module, _, suffix = name.rpartition(".")
    shape = ctx.subject.called_for.get(f"{module}.{WEIGHT}", ())
    if ctx.subject.form(module) != "fp8" or len(shape) != 2 or ctx.overlay.is_computed(name):
        return False
    wanted = fp8_scale_shapes(ctx.subject, module, *shape).get(suffix)
    info = ctx.overlay.places[name].info
    if wanted is None or math.prod(wanted[0]) != info.num_params:
        return False
    ctx.overlay.compute(name, info.dtype, wanted[0], lambda: read_tensor(info).reshape(wanted[0]))
    return True


def n_not_divisible(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    yield Left("in BF16 it would take more room and be slower on a GPU, where it is only padded", "keep it in BF16 when quantizing again")


def blocks_across_shards(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    made = in_bf16(ctx, finding.where, damaged=False)
    yield from made.told(ctx)
    if made.missing:
        yield needs_base(f"{made.missing[0]} in BF16")


def k_not_divisible(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    yield from from_base(ctx, tuple(f"{module}.{WEIGHT}" for module in finding.where), f"{finding.where[0]} in BF16")


REPAIRS = (
    Repair("tensor-missing", "put from the base in BF16 (`--base`), with the shards that the engine fuses it with", tensor_missing),
    Repair("tensor-unexpected", "dropped where it is no weight: by its name (an optimizer's state, a buffer), or as all of its "
           "numbers are 0; anything else is left, with what it may be", tensor_unexpected, Turn.DROPS),
    Repair("weight-dtype", "scales are cast where no value changes; quantized embeddings are dequantized to BF16; others are put from the "
           "base (`--base`)", weight_dtype),
    Repair("weight-precision", "cast where every value is a BF16 number; else left, with what rounding changes",
           weight_precision),
    Repair("weight-shape", "FP8 scales get the declared layout's shape; vocab_size is set to the rows of embeddings and lm_head, where "
           "alike; others: in BF16 from the base (`--base`)", weight_shape),
    Repair("blocks-across-shards", "the shards are dequantized to BF16, the value that their codes stand for", blocks_across_shards),
    Repair("n-not-divisible", "left: on a GPU it works", n_not_divisible),
    Repair("k-not-divisible", "put from the base in BF16 (`--base`)", k_not_divisible),
)  # fmt: skip
