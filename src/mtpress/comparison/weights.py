"""A finished checkpoint against the checkpoint it was made from, one tensor at a time.

In: two open checkpoints. Out: a `Comparison`: which kept tensors are equal byte for byte, how far the others and each quantized matrix
are, and what the base is to the checkpoint (comparison/relation.py). Leaves out: judging (rules/against_source.py). Memory holds one
matrix in both forms, never the model.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.checkpoint.direct_io import read_pieces
from mtpress.checkpoint.safetensors import TensorInfo, read_tensor
from mtpress.comparison.difference import Difference
from mtpress.comparison.files import differences
from mtpress.comparison.moved_tokens import moved_tokens
from mtpress.comparison.relation import Closeness, Kind, Relation, relation_of
from mtpress.progress import Progress
from mtpress.quant_config.stored import CODES, GLOBAL_SCALE, PLAIN_DTYPES, QWEIGHT, SCALE, SCALE_2, WEIGHT, WEIGHT_PACKED, Form
from mtpress.quant_config.stored_matrix import PER_WORD, StoredMatrix, pieces, stored_matrix
from mtpress.quant_config.view import Subject

if TYPE_CHECKING:
    import torch

# ‖w − ŵ‖ / ‖w‖ above which it is no rounding. NVFP4 by "max" gives 0.095 on normal weights, and 0.08 to 0.12 on trained ones; INT4 in
# groups of 128, plainly rounded, 0.117 on normal weights and 0.11 to 0.13 on trained ones; E4M3, with three bits of mantissa, 0.026 on
# normal weights, 0.025 to 0.027 on trained ones.
LARGEST_ERROR, LARGEST_INT4_ERROR, LARGEST_FP8_ERROR = 0.2, 0.25, 0.06
LARGEST: Mapping[Form, float] = {
    "nvfp4": LARGEST_ERROR, "nvfp4-pack-quantized": LARGEST_ERROR, "gptq": LARGEST_INT4_ERROR, "pack-quantized": LARGEST_INT4_ERROR,
    "fp8": LARGEST_FP8_ERROR, "plain": 0.0,
}  # fmt: skip
SAMPLED_LAYERS, SAMPLED_BYTES = 8, 1 << 20
INT4 = ("gptq", "pack-quantized")
# A channel that is lost is further from its source than this, in its own norm; channels below a tenth of the median may round to nothing.
LEAST_KEPT, LEAST_NORM = 0.9, 0.1
# What follows the prefix of a wrapper, an architecture or a trainer in the name of a tensor.
IN_THE_MODEL = re.compile(r"(?:^|\.)((?:mtp|visual)\..+|layers\.\d+\..+|embed_tokens\.\w+|lm_head\.\w+|norm\.weight)$")


@dataclass
class Comparison:
    """What was measured.

    differing: kept tensors that are neither the base's bytes nor these rounded to another dtype, and not_finite: of them, how many numbers
    are NaN or infinite. absent: without a counterpart of equal shape; grown: of them, those with other rows only.
    error: module → ‖w − ŵ‖ / ‖w‖. int4, fp8: those of these modules that are INT4, and FP8. broken_blocks: module → how many scales
    are NaN, infinite or, of NVFP4, negative; empty_blocks: zero over weights; lost_channels: rows and columns with nothing
    of the base's. closeness: of every tensor and module compared.
    relation: None where no weight was compared. differences: what the files beside the weights say otherwise. moved_tokens: those that the
    tokenizer has under another id while their rows stayed.
    """

    differing: list[str] = field(default_factory=list)
    not_finite: dict[str, int] = field(default_factory=dict)
    absent: list[str] = field(default_factory=list)
    grown: list[str] = field(default_factory=list)
    error: dict[str, float] = field(default_factory=dict)
    int4: set[str] = field(default_factory=set)
    fp8: set[str] = field(default_factory=set)
    broken_blocks: dict[str, int] = field(default_factory=dict)
    empty_blocks: dict[str, int] = field(default_factory=dict)
    lost_channels: dict[str, int] = field(default_factory=dict)
    not_compared: list[str] = field(default_factory=list)
    closeness: dict[str, Closeness] = field(default_factory=dict)
    relation: Relation | None = None
    differences: list[Difference] = field(default_factory=list)
    moved_tokens: list[str] = field(default_factory=list)

    @property
    def num_equal(self) -> int:
        """Kept tensors that are the base's, bit for bit."""
        return sum(close.equal for name, close in self.closeness.items() if name not in self.absent)

    @property
    def num_rounded(self) -> int:
        """Kept tensors that are the base's, rounded to another dtype."""
        kept = (close for name, close in self.closeness.items() if name not in self.error)
        return sum(close.state == "rounded" for close in kept)

    @property
    def kind(self) -> Kind:
        """What the base is; the source, as naming it says, where no weight was compared."""
        return self.relation.kind if self.relation is not None else "source"

    def as_json(self) -> dict[str, Any]:
        errors = sorted(self.error.values())
        return {
            "num_equal": self.num_equal,
            "num_rounded": self.num_rounded,
            "differing": {name: self.closeness[name].error for name in self.differing},
            "num_quantized": len(errors),
            "median_error": errors[len(errors) // 2] if errors else None,
            "largest_error": errors[-1] if errors else None,
            "error": self.error,
        }


@dataclass(frozen=True)
class Job:
    """Two tensors to be compared byte for byte, or two matrices by their numbers. name: of the tensor or module here."""

    name: str
    part: str
    here: StoredMatrix | TensorInfo
    there: StoredMatrix | TensorInfo

    @property
    def num_bytes(self) -> int:
        return self.here.num_bytes + self.there.num_bytes


def compare(subject: Subject, base: Checkpoint, *, given: Kind | None = None, silent: bool = False) -> Comparison:
    """Compares everything stored; a tensor without a counterpart of equal shape is listed as absent. given: the relation, by --base-is."""
    found = Comparison(differences=differences(subject, base))
    jobs = list(_jobs(subject, base, found))
    with Progress("compare", sum(job.num_bytes for job in jobs), silent=silent) as progress:
        for job in jobs:
            if isinstance(job.here, StoredMatrix) and isinstance(job.there, StoredMatrix):
                _compare_matrix(job.name, job.part, job.here, job.there, found)
            else:
                assert isinstance(job.here, TensorInfo)
                assert isinstance(job.there, TensorInfo)
                _compare_kept(job.name, job.part, job.here, job.there, found)
            progress.advance(job.num_bytes, ".".join(job.name.split(".")[-4:])[:24])
    found.moved_tokens = moved_tokens(subject, base)
    relate(found, given)
    return found


def relate(found: Comparison, given: Kind | None = None) -> None:
    """Says what the base is, by what was measured."""
    if found.closeness or found.absent:
        found.relation = relation_of(found.closeness.values(), len(found.absent), len(found.grown), given)


def sampled_relation(subject: Subject, base: Checkpoint, given: Kind | None = None) -> Relation | None:
    """What the base is by the first rows of some matrices of the body; None where it has none of them, as of a head alone."""
    theirs, found = counterparts(base), Comparison()
    layers = len(subject.model.layer_types(subject.config))
    chosen = {round(i * (layers - 1) / max(SAMPLED_LAYERS - 1, 1)) for i in range(SAMPLED_LAYERS)}
    for name, info in subject.tensors.items():
        part, there = subject.model.component(name), counterpart(name, theirs)
        inside = subject.model.layer_index(name) in (*chosen, None) and part not in ("mtp", "vision", "other") and len(info.shape) > 1
        if inside and there is not None and (there.shape, there.dtype) == (info.shape, info.dtype) and info.dtype in PLAIN_DTYPES:
            rows = max(1, min(info.shape[0], SAMPLED_BYTES * info.shape[0] // info.num_bytes))
            _compare_kept(name, part, _first_rows(info, rows), _first_rows(there, rows), found)
    relate(found, given)
    return found.relation


def counterparts(base: Checkpoint) -> Mapping[str, TensorInfo]:
    """The base's tensors by what follows the prefix in their names, and by their names: the family's, whatever they are stored under."""
    tensors = Subject(base).tensors
    return {found[1]: info for name, info in tensors.items() if (found := IN_THE_MODEL.search(name))} | dict(tensors)


def counterpart(name: str, tensors: Mapping[str, TensorInfo]) -> TensorInfo | None:
    """The base's tensor of a name, whatever the prefix here and there; `tensors` is what counterparts() gives."""
    found = IN_THE_MODEL.search(name)
    return tensors.get(name) or (tensors.get(found[1]) if found is not None else None)


def _jobs(subject: Subject, base: Checkpoint, found: Comparison) -> Iterator[Job]:
    theirs, other = counterparts(base), Subject(base)
    for module, tensors in subject.modules.items():
        form = subject.form(module)
        if form in ("plain", "none", "unknown"):
            for info in tensors.values():
                yield from _kept_jobs(subject, info, theirs, other, found)
            continue
        weight, there = counterpart(f"{module}.{WEIGHT}", theirs), _matrix_of(other, theirs, module)
        size = there.shape if there is not None else weight.shape if weight is not None else ()
        codes = next((tensors[suffix] for suffix in (QWEIGHT, WEIGHT_PACKED, WEIGHT) if suffix in tensors), None)
        here = stored_matrix(form, tensors)
        if codes is None or len(codes.shape) != 2 or (here is None and len(tensors) < 3 and form != "fp8"):
            found.not_compared.append(module)
        elif _size(form, codes) != size:
            found.absent.append(f"{module}.{WEIGHT}")
        elif here is None or there is None:
            found.not_compared.append(module)
        else:
            yield Job(module, subject.model.component(f"{module}.{WEIGHT}"), here, there)


def _kept_jobs(subject: Subject, here: TensorInfo, named: Mapping[str, TensorInfo], other: Subject, found: Comparison) -> Iterator[Job]:
    part = subject.model.component(IN_THE_MODEL.sub(r"model.\1", here.name) if subject.model.component(here.name) == "other" else here.name)
    there, mine = counterpart(here.name, named), None
    if here.dtype in PLAIN_DTYPES and here.name.endswith(f".{WEIGHT}"):
        mine = stored_matrix("plain", {WEIGHT: here})
    theirs = _matrix_of(other, named, subject.model.module_of(here.name)) if mine is not None else None
    if there is not None and there.shape == here.shape and (there.dtype == here.dtype or {there.dtype, here.dtype} <= {*PLAIN_DTYPES}):
        yield Job(here.name, part, here, there)
    elif mine is not None and theirs is not None and theirs.form != "plain" and theirs.shape == mine.shape:
        yield Job(here.name, part, mine, theirs)  # the base is quantized
    else:
        found.absent.append(here.name)
        if there is not None and part in ("embeddings", "lm_head") and here.dtype == there.dtype and here.shape[1:] == there.shape[1:]:
            found.grown.append(here.name)
            rows = min(here.shape[0], there.shape[0])
            yield Job(here.name, part, _first_rows(here, rows), _first_rows(there, rows))


def _matrix_of(base: Subject, named: Mapping[str, TensorInfo], module: str) -> StoredMatrix | None:
    """The base's matrix of a module of the checkpoint, in whatever form. named: what counterparts() gives of it."""
    info = next((info for suffix in CODES if (info := counterpart(f"{module}.{suffix}", named)) is not None), None)
    if info is None:
        return None
    theirs = base.model.module_of(info.name)
    return stored_matrix(base.form(theirs), base.modules[theirs])


def _first_rows(info: TensorInfo, rows: int) -> TensorInfo:
    return replace(info, shape=(rows, *info.shape[1:]), num_bytes=info.num_bytes // info.shape[0] * rows)


def _size(form: Form, codes: TensorInfo) -> tuple[int, int]:
    """[N, K] of a matrix of 4 bits, or of FP8, by the shape of its codes."""
    n, packed = codes.shape
    if form == "fp8":
        return n, packed
    if form == "gptq":
        return packed, n * PER_WORD
    return n, packed * (PER_WORD if form == "pack-quantized" else 2)


def same_bytes(one: TensorInfo, other: TensorInfo) -> bool:
    """Whether two stored tensors are equal byte for byte."""
    if one.num_bytes != other.num_bytes:
        return False
    pieces, others = read_pieces(one), read_pieces(other)
    here = there = memoryview(b"")
    done = 0
    while done < one.num_bytes:
        here = here if len(here) else next(pieces)
        there = there if len(there) else next(others)
        count = min(len(here), len(there))
        if here[:count].tobytes() != there[:count].tobytes():
            return False
        here, there = here[count:], there[count:]
        done += count
    return True


# ---- numbers


@dataclass
class Sums:
    """What is added up over the pieces of two tensors, in float64, of what is finite in both.

    by_row, by_column: (‖w‖², ‖w − ŵ‖²) of each, where the tensor is a matrix. zero: of each row, whether ŵ is zero there.
    """

    norm: float = 0.0
    own: float = 0.0
    distance: float = 0.0
    rows: int = 0
    rows_changed: int = 0
    not_finite: int = 0
    by_row: "list[torch.Tensor]" = field(default_factory=list)
    by_column: "torch.Tensor | None" = None
    zero: "list[torch.Tensor]" = field(default_factory=list)

    def add(self, here: "torch.Tensor", there: "torch.Tensor") -> None:
        """Rows [n, …] of both, float32."""
        import torch

        one, two = here.reshape(len(here), -1), there.reshape(len(there), -1)
        finite = one.isfinite() & two.isfinite()
        if not bool(finite.all()):
            self.not_finite += int((~one.isfinite()).sum())
            one, two = torch.where(finite, one, 0.0), torch.where(finite, two, 0.0)
        apart = one - two
        self.norm += _squares(two)
        self.own += _squares(one)
        self.distance += _squares(apart)
        self.rows += len(one)
        self.rows_changed += int((apart != 0).any(1).sum())
        if two.shape[1] > 1:
            self.zero.append((one == 0).all(1))
            self.by_row.append(torch.stack([torch.linalg.vector_norm(part, dim=1) for part in (two, apart)]))
            columns = torch.stack([torch.linalg.vector_norm(part, dim=0).double().square() for part in (two, apart)])
            self.by_column = columns if self.by_column is None else self.by_column + columns

    @property
    def lost(self) -> int:
        """Rows and columns of which less than LEAST_KEPT is left, though the source's are no smaller than others."""
        import torch

        if self.by_column is None:
            return 0
        found = 0
        for norms in (torch.cat(self.by_row, 1), self.by_column.sqrt()):
            norm, distance = norms
            found += int(((distance > LEAST_KEPT * norm) & (norm > LEAST_NORM * norm.median())).sum())
        return found

    @property
    def rows_zeroed(self) -> int:
        """Rows of zeros where the base's are no smaller than others."""
        import torch

        if not self.by_row:
            return 0
        norm, zero = torch.cat(self.by_row, 1)[0], torch.cat(self.zero)
        return int((zero & (norm > LEAST_NORM * norm.median())).sum())

    def closeness(self, part: str, matrix: bool, form: Form, limit: float) -> Closeness:
        return Closeness(
            part,
            matrix,
            quantized=form != "plain",
            norm=self.norm**0.5,
            own_norm=self.own**0.5,
            dot=(self.norm + self.own - self.distance) / 2,
            distance=self.distance**0.5,
            limit=limit,
            rows=self.rows,
            rows_changed=self.rows_changed,
            rows_zeroed=self.rows_zeroed,
            not_finite=self.not_finite,
        )


def _squares(matrix: "torch.Tensor") -> float:
    """Σ x², float32 within a row and float64 over the rows."""
    import torch

    return float(torch.linalg.vector_norm(matrix, dim=1).double().square().sum())


def _compare_kept(name: str, part: str, here: TensorInfo, there: TensorInfo, found: Comparison) -> None:
    matrix = len(here.shape) > 1
    if here.dtype == there.dtype and same_bytes(here, there):
        found.closeness[name] = Closeness(part, matrix, quantized=False, equal=True)
        return
    if here.dtype not in PLAIN_DTYPES:
        found.differing.append(name)
        found.closeness[name] = Closeness(part, matrix, quantized=False, norm=1.0, distance=1.0)
        return
    sums, rounded = Sums(), True
    one, two = (read_tensor(info).reshape(info.shape or (1,)) for info in (here, there))
    for start, stop in pieces(len(one), one[0].numel() if len(one) else 1):
        mine, theirs = one[start:stop], two[start:stop]
        sums.add(mine.float(), theirs.float())
        rounded = rounded and here.dtype != there.dtype and _rounds_to(mine, theirs)
    found.closeness[name] = close = sums.closeness(part, matrix, "plain", math.inf if rounded else 0.0)
    if close.state != "rounded":
        found.differing.append(name)
    if close.not_finite:
        found.not_finite[name] = close.not_finite


def _rounds_to(mine: "torch.Tensor", theirs: "torch.Tensor") -> bool:
    """Whether either is the other, rounded to its dtype."""
    return bool((theirs.to(mine.dtype) == mine).all()) or bool((mine.to(theirs.dtype) == theirs).all())


def _compare_matrix(name: str, part: str, here: StoredMatrix, there: StoredMatrix, found: Comparison) -> None:
    sums, broken, empty = measure(here, there)
    broken = broken or sums.not_finite
    limit = LARGEST[here.form] + LARGEST[there.form]
    close = sums.closeness(part, True, here.form, limit)
    found.closeness[name] = replace(close, not_finite=close.not_finite or broken)
    if here.form == "plain":
        found.differing += [name] * (close.error > limit)
        found.not_finite |= {name: close.not_finite} if close.not_finite else {}
        return
    found.error[name] = close.error
    if here.form in INT4:
        found.int4.add(name)
    if here.form == "fp8":
        found.fp8.add(name)
    if broken:
        found.broken_blocks[name] = broken
    if empty:
        found.empty_blocks[name] = empty
    if lost := sums.lost:
        found.lost_channels[name] = lost


def measure(here: StoredMatrix, there: StoredMatrix) -> tuple[Sums, int, int]:
    """The sums over two matrices [N, K]; how many scales here are NaN, infinite or, of NVFP4, negative; how many are zero over weights."""
    (mine, scales), (theirs, _) = here.load(), there.load()
    sums, broken, empty = Sums(), 0, 0
    for start, stop in here.pieces():
        weight = theirs(start, stop)
        sums.add(mine(start, stop), weight)
        if scales is not None:
            part = scales[start:stop].float()
            wrong = ~part.isfinite() | ((part < 0) if here.form.startswith("nvfp4") else ~part.isfinite())
            broken += int(wrong.sum())
            none = part == 0
            if bool(none.any()):
                empty += int((none & (weight.reshape(*part.shape, -1).abs().amax(-1) > 0)).sum())
    return sums, broken, empty


def relative_error(
    packed: TensorInfo, scales: TensorInfo, scale_2: TensorInfo, source: TensorInfo, *, reciprocal: bool = False
) -> tuple[float, int]:
    """(‖w − ŵ‖ / ‖w‖, block scales that are NaN, negative, or zero over weights that are not) of an NVFP4 matrix [N, K].

    reciprocal: scale_2 is compressed-tensors' weight_global_scale; vLLM takes 1 / it in float32, and so is it here.
    """
    parts = {SCALE: scales} | ({WEIGHT_PACKED: packed, GLOBAL_SCALE: scale_2} if reciprocal else {WEIGHT: packed, SCALE_2: scale_2})
    here, there = stored_matrix("nvfp4-pack-quantized" if reciprocal else "nvfp4", parts), stored_matrix("plain", {WEIGHT: source})
    assert here is not None
    assert there is not None
    sums, broken, empty = measure(here, there)
    return sums.closeness("", True, "nvfp4", 0.0).error, broken + empty
