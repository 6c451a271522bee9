"""Passes over the numbers of a checkpoint once, whatever form they are stored in.

In: a `Subject`. Out: a `Survey`: the `Statistics` of every tensor, quantized matrices by what they stand for. Leaves out: judging.

Everything is read and looked at for what is not finite, rows of zeros and block scales; sums are made of every STRIDEth row of a large
tensor, which is enough for a distribution. A sample reads only some rows of the large ones. Memory holds a few pieces of PIECE_BYTES
and, of a quantized matrix, its codes.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mtpress.checkpoint.safetensors import TensorInfo, read_tensor
from mtpress.comparison.weights import same_bytes
from mtpress.progress import Progress
from mtpress.quant_config.stored import PLAIN_DTYPES, SUFFIXES
from mtpress.quant_config.stored_matrix import StoredMatrix, stored_matrix
from mtpress.quant_config.view import Subject
from mtpress.values.statistics import Statistics

if TYPE_CHECKING:
    import torch

STRIDE, LARGE = 16, 1 << 20  # numbers of a large tensor
PIECE_BYTES = 16 << 20
SAMPLED_PLACES, SAMPLED_BYTES = 4, 128 << 10  # of a large tensor, in a sample: so many places, so much at each
AHEAD = 2  # pieces that are read while one is looked at
NO_CHANCE = 4096  # numbers, from which on two equal matrices are no chance
# What the bits of a finite number without its sign are below, by width of the exponent.
INFINITE = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}


@dataclass
class Survey:
    """statistics: tensor, or module of a quantized matrix → its numbers. copies: names that hold the same bytes, of large matrices.

    not_read: what is stored in a form that is not known, or quantized in parts that do not fit together. sampled: whether only some rows
    of the large tensors were read.
    """

    subject: Subject
    sampled: bool
    statistics: dict[str, Statistics] = field(default_factory=dict)
    copies: list[tuple[str, ...]] = field(default_factory=list)
    not_read: list[str] = field(default_factory=list)
    num_bytes: int = 0


@dataclass(frozen=True)
class Step:
    """One read and what becomes of it."""

    name: str
    num_bytes: int
    read: Callable[[], Any]
    look: Callable[[Any], None]


def survey(subject: Subject, *, sample: bool = False, silent: bool = False) -> Survey:
    """Looks at every tensor (sample: at some rows of the large ones), in the order in which they are stored."""
    found = Survey(subject, sample)
    places = _places(subject, found)
    steps = [step for name, place in sorted(places.items(), key=lambda item: _order(item[1])) for step in _steps(name, place, found)]
    found.num_bytes = sum(step.num_bytes for step in steps)
    waiting: deque[tuple[Step, Future[Any]]] = deque()
    with Progress("values", found.num_bytes, silent=silent) as progress, ThreadPoolExecutor(1) as reader:
        for step in [*steps, *[None] * AHEAD]:
            if step is not None:
                waiting.append((step, reader.submit(step.read)))
            if waiting and (step is None or len(waiting) > AHEAD):
                done, future = waiting.popleft()
                done.look(future.result())
                progress.advance(done.num_bytes, ".".join(done.name.split(".")[-4:])[:24])
    found.copies = list(_copies(found, places))
    return found


Place = TensorInfo | StoredMatrix


def _order(place: Place) -> tuple[str, int]:
    info = place if isinstance(place, TensorInfo) else place.infos[0]
    return info.file.name, info.offset


def _places(subject: Subject, found: Survey) -> dict[str, Place]:
    """Tensor, or module of a quantized matrix → what is read for it."""
    places: dict[str, Place] = {}
    for module, tensors in subject.modules.items():
        form = subject.form(module)
        quantized = form not in ("plain", "none", "unknown")
        own = SUFFIXES[form] if quantized else ()
        if quantized:
            matrix = stored_matrix(form, tensors)
            if matrix is None:
                found.not_read.append(module)
            else:
                places[module] = matrix
        for suffix, info in tensors.items():
            if suffix in own or info.num_params < 2:
                continue  # float32 scalars are read by the rules on scales
            if info.dtype in INFINITE:
                places[info.name] = info
            elif info.dtype not in PLAIN_DTYPES or not quantized:
                found.not_read.append(info.name)
    return places


def _steps(name: str, place: Place, found: Survey) -> Iterator[Step]:
    if isinstance(place, StoredMatrix):
        statistics = found.statistics[name] = Statistics(place.shape, quantized=True)
        yield Step(name, place.num_bytes, lambda: (*place.load(), read_tensor(place.infos[0])), _look_at_matrix(place, statistics))
        return
    info = place if len(place.shape) > 1 else replace(place, shape=(1, *place.shape))
    statistics = found.statistics[name] = Statistics(place.shape)
    large = info.num_params >= LARGE
    stride = STRIDE if large and not found.sampled else 1
    for start, stop in _pieces(info, large and found.sampled):
        part = _rows(info, start, stop)
        yield Step(name, part.num_bytes, _reading(part), _look_at_rows(info.dtype, statistics, stride))


def _reading(info: TensorInfo) -> Callable[[], "torch.Tensor"]:
    return lambda: read_tensor(info)


def _pieces(info: TensorInfo, sampled: bool) -> Iterator[tuple[int, int]]:
    """Rows, (start, stop), of a tensor; of a sample, a few in many places, the first and the last among them."""
    n = info.shape[0]
    row_bytes = max(1, info.num_bytes // n)
    if not sampled:
        rows = max(1, PIECE_BYTES // row_bytes)
        yield from ((start, min(start + rows, n)) for start in range(0, n, rows))
        return
    rows = max(1, SAMPLED_BYTES // row_bytes)
    if rows * SAMPLED_PLACES >= n:
        yield 0, n
        return
    last = n - rows
    yield from ((start, start + rows) for start in (last * i // (SAMPLED_PLACES - 1) for i in range(SAMPLED_PLACES)))


def _rows(info: TensorInfo, start: int, stop: int) -> TensorInfo:
    row_bytes = info.num_bytes // info.shape[0]
    return replace(
        info, shape=(stop - start, *info.shape[1:]), offset=info.offset + start * row_bytes, num_bytes=(stop - start) * row_bytes
    )


def _look_at_rows(dtype: str, statistics: Statistics, stride: int) -> Callable[["torch.Tensor"], None]:
    def look(piece: "torch.Tensor") -> None:
        import torch

        rows = piece.reshape(len(piece), -1)
        bits = rows.view(torch.int32 if dtype == "F32" else torch.int16) & (0x7FFFFFFF if dtype == "F32" else 0x7FFF)
        largest = bits.amax(1)  # the bits of a float are in the order of its size
        if int(largest.amax()) >= INFINITE[dtype]:
            statistics.not_finite += int((bits >= INFINITE[dtype]).sum())
        statistics.pass_rows(largest == 0)
        statistics.look_at(rows[::stride].float())
        if len(statistics.shape) == 1:
            statistics.vector = rows[0].float()

    return look


def _look_at_matrix(matrix: StoredMatrix, statistics: Statistics) -> Callable[[Any], None]:
    def look(read: Any) -> None:
        import torch

        rows, scales, codes = read
        # of FP8 they stand beside the codes: one a matrix, a row or a block
        statistics.look_at_scales(read_tensor(matrix.infos[1]) if scales is None else scales)
        if matrix.form in ("nvfp4", "nvfp4-pack-quantized", "fp8"):
            sign = 0x7F if matrix.form == "fp8" else 0x77
            bits = codes.view(torch.uint8) & sign
            if matrix.form == "fp8":
                statistics.not_finite += int((bits == 0x7F).sum())
            zero = bits.amax(1) == 0
        else:
            zero = torch.zeros(matrix.shape[0], dtype=torch.bool)
        n, k = matrix.shape
        large = n * k >= LARGE
        for start in range(0, n, STRIDE * STRIDE if large else n):
            numbers = rows(start, min(start + (STRIDE if large else n), n))
            zero[start : start + len(numbers)] |= (numbers == 0).all(1)
            statistics.look_at(numbers)
        statistics.pass_rows(zero)

    return look


def _copies(found: Survey, places: dict[str, Place]) -> Iterator[tuple[str, ...]]:
    """Large matrices that hold the same bytes; of a sample, the same numbers in every row that was read."""
    alike: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for name, statistics in found.statistics.items():
        if len(statistics.shape) > 1 and statistics.looked_at >= NO_CHANCE and not statistics.is_constant:
            alike[statistics.fingerprint].append(name)
    for names in alike.values():
        first = _infos(places[names[0]])
        same = [names[0], *(name for name in names[1:] if found.sampled or _equal(first, _infos(places[name])))]
        if len(same) > 1:
            yield tuple(same)


def _infos(place: Place) -> tuple[TensorInfo, ...]:
    return (place,) if isinstance(place, TensorInfo) else place.infos


def _equal(one: tuple[TensorInfo, ...], other: tuple[TensorInfo, ...]) -> bool:
    return len(one) == len(other) and all(map(same_bytes, one, other))
