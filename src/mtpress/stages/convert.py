"""convert: a checkpoint in NVFP4, FP8 or both in modelopt's layout → the same in compressed-tensors', or back; a VLM one → text only.

In: a finished checkpoint. Out: a new directory and a `ConvertResult`. Leaves out: which tensor becomes which
(quant_config/conversion.py), how shards are linked and rewritten (checkpoint/revision.py). Codes and block scales keep their bytes;
what does not is counted in the result.
"""

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtpress.chat.processor_files import IMAGE_PROCESSOR, PROCESSOR, VIDEO_PROCESSOR
from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.checkpoint.output_place import refuse_place
from mtpress.errors import InputError
from mtpress.models import family
from mtpress.models.qwen3_5.names import MTP_PREFIX
from mtpress.progress import human_bytes
from mtpress.quant_config.misnamed import refuse_misnamed
from mtpress.quant_config.view import CONFIG, HF_QUANT_CONFIG, Subject
from mtpress.terminal import say

if TYPE_CHECKING:
    from mtpress.checkpoint.revision import Revision
    from mtpress.quant_config.conversion import Conversion
    from mtpress.quant_config.conversion_kinds import Layout

CHOICES = ("modelopt", "compressed-tensors")  # quant_config/conversion_kinds.py has them too, with torch; the tests hold them together
SHOWN = 3  # fused linears that are told one by one
PROCESSOR_FILES = (PROCESSOR, IMAGE_PROCESSOR, VIDEO_PROCESSOR)


@dataclass(frozen=True)
class ConvertResult:
    """What convert did. Sizes in bytes, times in seconds.

    to: None where only the vision tower was dropped. reciprocals: how many scales are written as reciprocals, how many of them
    come back to the last bit when converted back, and the largest relative difference of the others (one ulp). rescaled: fused
    linears that got one global scale, with what that cost each member. unequal_input_scales: fused linears whose members' differ;
    vLLM takes the largest of modelopt's and the smallest of compressed-tensors'. ignore: what the config names as kept in 16 bits.
    kinds: how many linears of each kind (conversion_kinds.py) are converted. weight_only: all of them are W4A16.
    hard_links: files that are the checkpoint's own; links_said: that in words, empty where there are none.
    """

    out: str
    source_format: str
    to: str | None
    weight_only: bool | None
    text_only: bool
    num_converted: int
    kinds: dict[str, int]
    num_dropped: int
    reciprocals: dict[str, Any]
    rescaled: tuple[dict[str, Any], ...]
    unequal_input_scales: tuple[str, ...]
    ignore: tuple[str, ...]
    linked: tuple[str, ...]
    hard_links: tuple[str, ...]
    links_said: str
    rewritten: tuple[str, ...]
    bytes_linked: int
    bytes_written: int
    seconds: float
    peak_memory_bytes: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def convert(
    checkpoint: str | Path,
    out: str | Path,
    to: str | None = None,
    *,
    text_only: bool = False,
    rescale: bool = False,
    copies: bool = False,
    silent: bool = False,
) -> ConvertResult:
    """Makes `out` from `checkpoint`: in the layout `to` ("modelopt" or "compressed-tensors"), without its vision tower, or both.

    rescale: fused linears with unequal global scales may lose what their block scales cannot hold; without it they are refused.
    copies: in place of hard links.
    Raises InputError, before anything is written, where the checkpoint cannot be converted, ResourceError if the disk is too small.
    """
    from mtpress.checkpoint.revision import Revision
    from mtpress.quant_config import conversion  # torch from here on

    layout = _layout(to)
    if layout is None and not text_only:
        raise InputError("nothing to do: name a layout with --to, or --text-only, or both")
    refuse_place(Path(out), [checkpoint])
    source = Checkpoint.open(checkpoint)
    if source.unindexed:
        raise InputError(
            f"{source.path}: {len(source.unindexed)} tensors are stored but not in the index ({next(iter(source.unindexed))}, …); "
            "mtpress repair CKPT OUT first"
        )
    subject = Subject(source)
    refuse_misnamed(subject)
    vision = family(source.model_type).VISION_PREFIX
    dropped = [name for name in source.tensors if name.startswith(vision)] if text_only else []
    if text_only and not dropped:
        raise InputError(f"{source.path}: has no vision tower to drop")
    planned = None
    if layout is not None:
        planned = conversion.plan_conversion(subject, layout, without=vision if text_only else None, rescale=rescale)
    revision = Revision(source, MTP_PREFIX)
    for name in dropped:
        revision.drop(name)
    if planned is not None:
        conversion.apply(planned, revision)
    kept = _kept(subject, dropped)
    _write_configs(subject, revision, planned, kept, text_only)
    facts: dict[str, Any] = {
        "source_format": subject.declared.title if subject.declared else "none declared",
        "to": layout,
        "weight_only": planned.weight_only if planned else None,
        "text_only": text_only,
        "num_converted": len(planned.linears) if planned else 0,
        "kinds": dict(Counter(planned.kinds.values())) if planned else {},
        "num_dropped": len(dropped),
        "reciprocals": _statistics(planned.reciprocals if planned else []),
        "rescaled": tuple(asdict(found) for found in planned.rescaled) if planned else (),
        "unequal_input_scales": tuple(planned.unequal_inputs) if planned else (),
    }
    done = revision.write(Path(out), "convert", facts, copies=copies, silent=silent)
    return ConvertResult(
        out=str(out),
        **facts,
        ignore=tuple(kept),
        linked=done.linked,
        hard_links=done.hard_links,
        links_said=done.links_said,
        rewritten=tuple(done.rewritten),
        bytes_linked=done.bytes_linked,
        bytes_written=done.bytes_written,
        seconds=done.seconds,
        peak_memory_bytes=done.peak_memory_bytes,
    )


def _layout(to: str | None) -> "Layout | None":
    from mtpress.quant_config.conversion_kinds import LAYOUTS

    for layout in LAYOUTS:
        if to == layout:
            return layout
    if to is not None:
        raise InputError(f"--to {to}: must be one of {', '.join(LAYOUTS)}")
    return None


def _kept(subject: Subject, dropped: Sequence[str]) -> list[str]:
    """Modules in 16 bits that the output's quantization config must name."""
    gone = set(dropped)
    left = {name: info for name, info in subject.tensors.items() if name not in gone}
    return list(subject.model.kept_modules(left, subject.model.body_prefix(left)))


def _statistics(numbers: Sequence[float]) -> dict[str, Any]:
    """count, exact (come back to the last bit), largest_relative_difference of the others."""
    import torch

    from mtpress.formats.compressed_tensors import returns

    differences = returns(torch.tensor(numbers, dtype=torch.float32))
    largest = float(differences.max()) if numbers else 0.0
    return {"count": len(numbers), "exact": int((differences == 0).sum()), "largest_relative_difference": largest}


def _write_configs(subject: Subject, revision: "Revision", planned: "Conversion | None", kept: Sequence[str], text_only: bool) -> None:
    """config.json and the other files that engines read of a quantization; without a tower no processor files."""
    from mtpress.json_files import json_bytes
    from mtpress.quant_config.ignore_list import config_contents

    config = subject.model.text_only_config(subject.config) if text_only else subject.config
    if planned is None:
        contents = config_contents(subject, kept, subject.quantized, config)
    else:
        contents = {name: json_bytes(content) for name, content in _declarations(config, planned, kept).items()}
    for name, content in contents.items():
        revision.write_file(name, content)
    gone = [*([HF_QUANT_CONFIG] if planned and planned.to == "compressed-tensors" else []), *(PROCESSOR_FILES if text_only else [])]
    for name in gone:
        if subject.has(name):
            revision.drop_file(name)


def _declarations(config: Mapping[str, Any], planned: "Conversion", kept: Sequence[str]) -> dict[str, dict[str, Any]]:
    """config.json, and for modelopt hf_quant_config.json, in the new layout; every other key as it was."""
    from mtpress.formats import compressed_tensors, mixed_precision, nvfp4
    from mtpress.quant_config.conversion_kinds import compressed_tensors_groups

    old = ("quantization_config", "compression_config")
    new = {key: value for key, value in config.items() if key not in old}
    if isinstance(inner := new.get("text_config"), Mapping):
        new["text_config"] = {key: value for key, value in inner.items() if key not in old}
    fp8, kinds = planned.kv_cache_fp8, planned.kinds
    if planned.to == "compressed-tensors":
        scheme = dict(compressed_tensors.FP8) if fp8 else None
        declared = compressed_tensors.grouped_config(compressed_tensors_groups(kinds), kept, scheme)
        return {CONFIG: new | {"quantization_config": declared}}
    declared, other = nvfp4.quantization_config(list(kept), fp8), nvfp4.hf_quant_config(list(kept), fp8)
    if set(kinds.values()) != {"nvfp4"}:
        declared, other = mixed_precision.quantization_config(declared, kinds), mixed_precision.hf_quant_config(other, kinds)
    return {CONFIG: new | {"quantization_config": declared}, HF_QUANT_CONFIG: other}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CKPT", help="a finished checkpoint: a directory or a Hub id")
    parser.add_argument("out", metavar="OUT", help="the directory to make; it must not exist")
    parser.add_argument("--to", choices=CHOICES, help="the layout to convert NVFP4 and FP8 to, without quantizing again")
    parser.add_argument("--text-only", action="store_true", help="drop the vision tower (of a checkpoint in any format)")
    parser.add_argument(
        "--rescale", action="store_true", help="give fused linears one global scale even where their block scales must be rounded for it"
    )
    parser.add_argument("--copy", action="store_true", help="copy the files that do not change, in place of hard links to CKPT's own")


def run(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """The stage as the command line calls it: (exit code, result for --json)."""
    result = convert(
        options.checkpoint, options.out, options.to, text_only=options.text_only, rescale=options.rescale, copies=options.copy,
        silent=options.json,
    )  # fmt: skip
    if not options.json:
        show(result)
    return 0, result.as_json()


def show(result: ConvertResult) -> None:
    """The result in lines on stdout."""
    lines = [f"{result.out}: {result.source_format}{f' → {result.to}' if result.to else ''}{', text only' if result.text_only else ''}"]
    if result.to:
        lines.append(f"{result.num_converted} linears converted{_kinds(result)}: codes and block scales byte for byte{_exceptions(result)}")
        count, exact = result.reciprocals["count"], result.reciprocals["exact"]
        largest = result.reciprocals["largest_relative_difference"]
        others = f", the others differ by one ulp (at most {largest:.1e})" if exact < count else ""
        if count:
            lines.append(f"{count} scales are reciprocals: converted back, to the last bit for {exact} of {count}{others}")
    worst_first = sorted(result.rescaled, key=lambda found: -max(found["relative_errors"].values()))
    for found in worst_first[:SHOWN]:
        errors = ", ".join(f"{module.rpartition('.')[2]} {error:.2%}" for module, error in found["relative_errors"].items())
        lines.append(f"{found['linear']}: one global scale, {'exactly' if found['exact'] else f'its weights moved by {errors} (RMS)'}")
    if len(worst_first) > SHOWN:
        lines.append(f"… and {len(worst_first) - SHOWN} more fused linears with no larger difference (--json lists them)")
    if result.unequal_input_scales:
        lines.append(
            f"{len(result.unequal_input_scales)} fused linears have unequal input scales: vLLM takes the largest of modelopt's, the "
            "smallest of compressed-tensors'"
        )
    if result.num_dropped:
        lines.append(f"{result.num_dropped} tensors of the vision tower dropped; serve with --language-model-only, as mtpress serve does")
    lines.append(
        f"{human_bytes(result.bytes_written)} written, {human_bytes(result.bytes_linked)} linked, in {result.seconds:.1f} s; "
        f"peak memory {human_bytes(result.peak_memory_bytes)}"
    )
    lines += [result.links_said] if result.links_said else []
    for line in lines:
        say(line)


def _kinds(result: ConvertResult) -> str:
    from mtpress.quant_config.conversion_kinds import KINDS

    return f" ({', '.join(f'{number} {KINDS[kind]}' for kind, number in result.kinds.items())})" if len(result.kinds) > 1 else ""


def _exceptions(result: ConvertResult) -> str:
    modules = sum(len(found["scales_2"]) for found in result.rescaled)
    return f", but for new block scales of {modules}" if modules else ""
