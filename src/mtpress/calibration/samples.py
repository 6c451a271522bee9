"""Calibration: the samples, and what the body's linears read when the samples pass through it.

In: JSON-lines files, a Hub data set named in a recipe, or the set that ships with mtpress. Out: `CalibrationSet`, whose
samples the streamed body moves layer by layer, and `InputAmax`, the running max of each linear's input. Leaves out: the
layers themselves (models/) and what is made of the statistics (rounding/, quantization/rounders.py).
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtpress.builtin import CALIBRATION_FILE, CALIBRATION_IMAGES_FILE
from mtpress.chat.messages import part_kind
from mtpress.data import hub_rows
from mtpress.errors import InputError
from mtpress.plan.recipe import CalibrationSource

if TYPE_CHECKING:
    import torch

    from mtpress.calibration.block_hessian import InputHessian
    from mtpress.chat.sample import Sample

BUILTIN = "builtin"
# The sets that ship with mtpress, by name; a set of several files has a row of each in turn.
BUILTIN_SETS = {
    BUILTIN: (CALIBRATION_FILE,),
    "builtin-images": (CALIBRATION_IMAGES_FILE,),
    "builtin-mixed": (CALIBRATION_FILE, CALIBRATION_IMAGES_FILE),
}
MAX_LINE_BYTES = 16_000_000  # parsed, a line takes up to twenty times as much memory
ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass
class CalibrationSet:
    """Encoded samples with where they came from. `identity` is a SHA-256 over the token ids in order."""

    source: str
    samples: "list[Sample]"
    num_truncated: int = 0
    parts: tuple["CalibrationSet", ...] = ()  # of a set of several sources: each of them

    @property
    def num_tokens(self) -> int:
        return sum(len(s.input_ids) for s in self.samples)

    @property
    def identity(self) -> str:
        digest = hashlib.sha256()
        for sample in self.samples:
            digest.update(len(sample.input_ids).to_bytes(8, "little") + sample.input_ids.numpy().tobytes())
            for pixels in (sample.pixel_values, sample.pixel_values_videos):
                if pixels is not None:
                    digest.update(pixels.numpy().tobytes())
        return digest.hexdigest()

    def record(self) -> dict[str, Any]:
        record = {
            "source": self.source, "num_samples": len(self.samples), "num_tokens": self.num_tokens,
            "num_truncated": self.num_truncated, "sha256": self.identity,
        }  # fmt: skip
        return record | ({"sources": [part.record() for part in self.parts]} if self.parts else {})


def check_row(row: Any, where: str) -> dict[str, Any]:
    """A row of a calibration or evaluation file: {"messages": [...]} or {"text": "..."}; InputError says what is wrong."""
    if not isinstance(row, dict):
        raise InputError(f'{where}: must be an object with "messages" or "text", is a {type(row).__name__}')
    if isinstance(row.get("text"), str):
        if not row["text"].strip():
            raise InputError(f"{where}: its text is empty")
        return row
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise InputError(f'{where}: has neither "messages" (a list of turns) nor "text" (a string)')
    for i, message in enumerate(messages, 1):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise InputError(f"{where}: message {i} has no role of {', '.join(ROLES)}")
        content = message.get("content")
        if content is not None and not isinstance(content, str | list):
            raise InputError(f"{where}: message {i}: content must be a string or a list of parts")
        if isinstance(content, list) and not all(isinstance(part, dict) for part in content):
            raise InputError(f"{where}: message {i}: each content part must be an object")
        for part in content if isinstance(content, list) else ():
            if not _is_picture(part) and (part.get("type", "text") != "text" or not isinstance(part.get("text"), str)):
                raise InputError(f"{where}: message {i}: a content part must be a text, an image or a video, got {str(part)[:80]}")
        calls = message.get("tool_calls")
        if calls is not None and not (isinstance(calls, list) and all(_is_tool_call(call) for call in calls)):
            raise InputError(f"{where}: message {i}: tool_calls must be a list of objects with a function or a name")
    tools = row.get("tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise InputError(f"{where}: tools must be a list of objects")
    return row


def _is_picture(part: dict[str, Any]) -> bool:
    """An image or a video that says where it is."""
    kind = part_kind(part)
    return kind in ("image", "video") and any(part.get(key) is not None for key in (kind, f"{kind}_url"))


def _is_tool_call(call: Any) -> bool:
    return (
        isinstance(call, dict) and isinstance(call.get("function", call), dict) and isinstance(call.get("function", call).get("name"), str)
    )


def read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of every line of a calibration or evaluation file; blank lines are skipped."""
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: is not a file; name one of JSON lines")
        with path.open("rb") as file:
            # a file without line ends must not come into memory whole
            for number, raw in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), 1):
                where = f"{path}:{number}"
                if len(raw) > MAX_LINE_BYTES:
                    raise InputError(f"{where}: line over {MAX_LINE_BYTES // 1_000_000} MB; name images by path instead of inlining them")
                if not raw.strip():
                    continue
                try:
                    row = json.loads(raw)
                except (ValueError, RecursionError) as error:
                    raise InputError(f"{where}: not JSON ({str(error)[:80]}); each line is one object") from None
                yield where, check_row(row, where)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None


def read_builtin_or_file(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of every row of a file, or of a set that ships with mtpress."""
    for together in zip_longest(*(read_jsonl(path) for path in BUILTIN_SETS.get(name, (Path(name),)))):
        yield from (pair for pair in together if pair is not None)


def read_hub(source: CalibrationSource) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of the first num_samples rows of a Hub data set; data/hub_rows.py says which columns are understood."""
    where = "/".join(filter(None, (source.dataset, source.subset, source.split)))
    fallback = "pass --calibration FILE.jsonl, or --calibration builtin for the set that ships with mtpress"
    try:
        import datasets
    except ImportError:
        raise InputError(f"{where}: Hub data sets need `pip install mtpress[hub]`; or {fallback}") from None
    try:
        # streamed: a large set is not fetched whole for its first rows
        streamed = datasets.load_dataset(source.dataset, name=source.subset, split=source.split, streaming=True)
        rows = list(islice(streamed, source.num_samples))
        if rows and all(hub_rows.file_names(row) for row in rows):
            files, archives = _archives(source)
            rows = hub_rows.from_archives(streamed, files, archives, source.num_samples) if archives else rows
    except Exception as error:  # datasets raises errors of every library below it
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise InputError(f"{where}: cannot be fetched ({reason}); {fallback}") from None
    for number, row in enumerate(rows, 1):
        at = f"{where} row {number}"
        yield at, check_row(hub_rows.calibration_row(row), at)


def _archives(source: CalibrationSource) -> tuple[Any, list[str]]:
    """Where the pictures of a set lie whose rows only name them: a file system and the archives on it, in order."""
    if Path(source.dataset).is_dir():
        from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]

        files, root = LocalFileSystem(), str(Path(source.dataset).absolute())
    else:
        from huggingface_hub import HfFileSystem

        files, root = HfFileSystem(), f"datasets/{source.dataset}"
    return files, sorted(files.glob("/".join(filter(None, (root, source.subset, "media/*.tar")))))


def calibration_rows(source: CalibrationSource, files: Sequence[str]) -> tuple[str, Iterable[tuple[str, dict[str, Any]]]]:
    """What is read, and its rows: --calibration files (or names of BUILTIN_SETS) if any, else what the recipe names."""
    if not files and source.dataset not in BUILTIN_SETS:
        return f"{source.dataset} {source.subset or ''} {source.split}[:{source.num_samples}]".replace("  ", " "), read_hub(source)
    names = files or (source.dataset,)
    shown = ", ".join(name if name in BUILTIN_SETS else Path(name).name for name in names)
    return shown, (pair for name in names for pair in read_builtin_or_file(name))


def load_calibration(
    directory: Path, sources: CalibrationSource | Sequence[CalibrationSource], files: Sequence[str], chat_template: str | None = None
) -> CalibrationSet:
    """Reads, renders by the checkpoint's own chat template or the one given, and encodes at most num_samples samples of at most
    max_seq_len tokens of each source, in order. files stand for all sources together: as many samples as those, as long as the longest.
    """
    from mtpress.chat.encoder import ChatEncoder

    encoder = ChatEncoder(directory, chat_template)
    several = (sources,) if isinstance(sources, CalibrationSource) else tuple(sources)
    if files and len(several) > 1:
        longest = max(source.max_seq_len for source in several)
        several = (CalibrationSource(num_samples=sum(source.num_samples for source in several), max_seq_len=longest),)
    parts = tuple(_load_source(encoder, source, files) for source in several)
    if len(parts) == 1:
        return parts[0]
    samples = [sample for part in parts for sample in part.samples]
    return CalibrationSet(" + ".join(part.source for part in parts), samples, sum(part.num_truncated for part in parts), parts)


def _load_source(encoder: Any, source: CalibrationSource, files: Sequence[str]) -> CalibrationSet:
    shown, rows = calibration_rows(source, files)
    loaded = CalibrationSet(shown, [])
    for where, row in rows:
        if len(loaded.samples) == source.num_samples:
            break
        sample = encode_row(encoder, row, where)
        if len(sample.input_ids) > source.max_seq_len:
            if sample.has_pictures:
                raise InputError(f"{where}: {len(sample.input_ids)} tokens with pictures, over max_seq_len {source.max_seq_len}; raise it")
            sample.input_ids = sample.input_ids[: source.max_seq_len]
            loaded.num_truncated += 1
        if len(sample.input_ids):
            loaded.samples.append(sample)
    if not loaded.samples:
        raise InputError(f"{shown}: holds no calibration samples")
    return loaded


def encode_row(encoder: Any, row: dict[str, Any], where: str) -> "Sample":
    """One row as a Sample; messages go through the chat template, text is taken as it is."""
    if "messages" not in row:
        return encoder.encode_text(row["text"], where=where)  # type: ignore[no-any-return]
    options = {key: row[key] for key in ("tools", "enable_thinking") if row.get(key) is not None}
    return encoder.encode(row["messages"], where=where, **options)  # type: ignore[no-any-return]


@dataclass
class InputAmax:
    """The largest |x| that each linear of one layer has read: name within the layer → float32 scalar.

    hessian: where the rounding wants it, what the linears named in `weighted` have read.
    """

    amax: "dict[str, torch.Tensor]" = field(default_factory=dict)
    hessian: "InputHessian | None" = None
    weighted: Collection[str] = ()

    def __call__(self, name: str, inputs: "torch.Tensor") -> None:
        low, high = inputs.aminmax()
        largest = high.float().maximum(-low.float())
        self.amax[name] = largest if name not in self.amax else self.amax[name].maximum(largest)
        if self.hessian is not None and name in self.weighted:
            self.hessian.add(name, inputs)

    def merge(self, amax: Mapping[str, float]) -> None:
        """Takes in what another worker's samples showed."""
        import torch

        for name, value in amax.items():
            self.amax[name] = torch.tensor(value).maximum(self.amax.get(name, torch.tensor(0.0)))

    def of_group(self, names: Iterable[str]) -> "torch.Tensor":
        """One amax for linears that are fused, on the CPU."""
        import torch

        return torch.stack([self.amax[name].cpu() for name in names]).max()
