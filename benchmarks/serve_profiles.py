"""Dry runs of every profile on Qwen3.6-27B at full size, as the tables of docs/serving.md.

In: profiles.yaml, known_issues.yaml, the launches of seed_launches.yaml, headers of 27B checkpoints (served_layouts.py).
Out: Markdown on stdout, or with --write in docs/serving.md between its markers. Leaves out: hardware, vLLM, weights: each
dry run is made on the profile's own hardware with vLLM 0.32.0.

    python benchmarks/serve_profiles.py            prints the tables
    python benchmarks/serve_profiles.py --write    puts them into docs/serving.md
"""

import re
import shlex
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mtpress.engine.launch import profiles
from mtpress.engine.launch.arguments import final_values, json_object, read
from mtpress.engine.launch.installed import Engine
from mtpress.engine.launch.known_issues import Condition, known_issues
from mtpress.engine.launch.launch import Launch, compose
from mtpress.engine.launch.settings import REASONING_PARSER, Setting
from mtpress.engine.memory.served_model import ServedModel
from served_layouts import INT4, make_layout

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs/serving.md"
SEEDS = Path(__file__).with_name("seed_launches.yaml")
VERSION, PORT, MODEL, PACKAGE = "0.32.0", 8000, "CKPT", "MTPRESS"
PLUGINS = ("mtpress_gdn_cpu", "mtpress_int4_cpu", "mtpress_nvfp4_cpu", "mtpress_sampling_cpu")  # as `make engine` installs them
MARKER = re.compile(r"(<!-- generated: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
BUILDS = {"cpu": "nvfp4-mtp-vlm", "int4-rtx-5090": INT4, "gpu-24gb": "nvfp4-mtp-text"}  # the others: the VLM build


@dataclass(frozen=True)
class Row:
    """One flag of a seed's launch and of ours. verdict: same, differs, left out (by us), or added."""

    flag: str
    theirs: str | None
    ours: str | None
    verdict: str
    why: str


class Layouts:
    """27B checkpoints of headers, each made when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: dict[str, ServedModel] = {}

    def __getitem__(self, name: str) -> ServedModel:
        if name not in self.made:
            self.made[name] = ServedModel.read(make_layout(self.folder / name, name))
        return self.made[name]


def dry_run(profile: str, model: ServedModel) -> Launch:
    """The launch of a profile on its own hardware; raises where it is refused."""
    chosen = profiles.named(profile)
    engine = Engine(Path("python"), ("vllm",), VERSION, chosen.match.platform, PLUGINS)
    return compose(model, engine, chosen.hardware.as_hardware(), profile=profile, port=PORT, environ={})


def seeds() -> list[dict[str, Any]]:
    return list(yaml.safe_load(SEEDS.read_text(encoding="utf-8")))


def compare(seed: Mapping[str, Any], launch: Launch) -> list[Row]:
    """Flag by flag: the seed's in its order, then what only we pass."""
    theirs = dict(seed.get("environment", {})) | final_values(read(shlex.split(seed["command"])))
    ours = {_plain(s): _value(s) for s in launch.settings}
    reasons = {_plain(s): s for s in (*launch.settings, *launch.left_out)}
    rows = []
    for flag, value in theirs.items():
        mine = ours.get(flag)
        verdict = "same" if _same(value, mine) else "left out" if mine is None else "differs"
        why = "" if verdict == "same" else seed["why"].get(flag) or _reason(reasons.get(flag))
        rows.append(Row(flag, value, mine, verdict, why))
    return rows + [Row(flag, None, mine, "added", _reason(reasons[flag])) for flag, mine in ours.items() if flag not in theirs]


def _plain(setting: Setting) -> str:
    return "--" + setting.flag.removeprefix("--no-") if setting.flag.startswith("--no-") else setting.flag


def _value(setting: Setting) -> str:
    if setting.value is not None:
        return setting.value
    return "false" if setting.flag.startswith("--no-") else "true"


def _same(theirs: str, ours: str | None) -> bool:
    if ours is None:
        return False
    return theirs == ours or (bool(json_object(theirs)) and json_object(theirs) == json_object(ours))


def _reason(setting: Setting | None) -> str:
    return f"{setting.reason} ({setting.source})" if setting is not None else ""


# ---- Markdown


def table(headings: list[str], rows: list[list[str]]) -> str:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (headings, ["---"] * len(headings), *rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells) + "\n"


def code(text: str | None) -> str:
    return "–" if text is None else "on" if text == "true" else "off" if text == "false" else f"`{text}`"


def profile_table(layouts: Layouts) -> str:
    rows = []
    for name, profile in profiles.profiles().items():
        launch = dry_run(name, layouts[BUILDS.get(name, "nvfp4-mtp-vlm")])
        value = {_plain(s): s.value for s in launch.settings}
        fits = launch.estimate
        name_shown = f"`{name}`{' (by name only)' if profile.by_name_only else ''}"
        stated = [value.get(flag) or "–" for flag in ("--max-model-len", "--max-num-seqs", "--kv-cache-dtype", "--gpu-memory-utilization")]
        watchdog = f"{profile.min_available_gib.text} GiB" if profile.min_available_gib is not None else "–"
        room = [f"{fits.num_tokens:,}", f"{fits.max_concurrency:.2f}"]
        rows.append([name_shown, profile.summary, profile.source, *stated, str(launch.num_speculative_tokens), watchdog, *room])
    headings = ["profile", "for", "source", "context", "sequences", "KV", "memory", "MTP n", "watchdog", "KV tokens", "× context"]
    return table(headings, rows)


def comparison(layouts: Layouts) -> str:
    parts = []
    for seed in seeds():
        launch = dry_run(seed["profile"], layouts[seed["layout"]])
        model = layouts[seed["layout"]]
        rows = [[f"`{r.flag}`", code(r.theirs), code(r.ours and _portable(r.ours, model)), r.verdict, r.why] for r in compare(seed, launch)]
        title = f"### {seed['seed']} and `{seed['profile']}`\n\n{seed['card']}; {seed['engine']}. Ours on the `{seed['layout']}` build:\n"
        command = _portable(launch.shown(), model)
        heads = table(["flag", "seed", "mtpress", "", "why"], rows)
        parts.append(f"{title}\n```sh\n{command}\n```\n\n{heads}")
    return "\n".join(parts)


def _portable(text: str, model: ServedModel) -> str:
    """Without the paths of this machine."""
    return text.replace(str(model.path), MODEL).replace(str(REASONING_PARSER.parents[1]), PACKAGE)


def commands(layouts: Layouts) -> str:
    """The profiles that no seed stands behind, as commands."""
    behind = {seed["profile"] for seed in seeds()}
    parts = []
    for name in profiles.profiles():
        if name not in behind:
            build = BUILDS.get(name, "nvfp4-mtp-vlm")
            shown = _portable(dry_run(name, layouts[build]).shown(), layouts[build])
            parts.append(f"`{name}`, {build}:\n\n```sh\n{shown}\n```\n")
    return "\n".join(parts)


def issue_table() -> str:
    does = {"refuse": "refused", "warn": "warned of", "set": "set", "note": "noted"}
    rows = []
    for issue in known_issues():
        done = f"sets `{shlex.join(word for pair in issue.set_.items() for word in pair)}`" if issue.set_ else does[issue.action]
        rows.append([issue.id, issue.versions or "all", when(issue.when), issue.effect, issue.remedy, done, issue.source])
    return table(["issue", "vLLM", "when", "what happens", "what helps", "mtpress", "source"], rows)


def when(conditions: Mapping[str, Condition]) -> str:
    return "; ".join(f"`{fact}` {_condition(condition)}" for fact, condition in conditions.items()) or "always"


WORDS = {
    "is_": "is", "one_of": "one of", "not_in": "none of", "at_least": "≥", "at_most": "≤", "matches": "matches",
    "not_matches": "does not match",
}  # fmt: skip


def _condition(condition: Condition) -> str:
    said = {key: value for key, value in condition.model_dump().items() if value not in (None, ())}
    if "present" in said:
        return "passed" if said["present"] else "not passed"
    return " and ".join(f"{WORDS[key]} {_shown(value, 'match' in key)}" for key, value in said.items())


def _shown(value: Any, pattern: bool) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    if pattern:
        return f"`{value}`"
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def generated(layouts: Layouts) -> dict[str, str]:
    """Marker → what stands behind it in docs/serving.md."""
    return {"profiles": profile_table(layouts), "seeds": comparison(layouts), "commands": commands(layouts), "issues": issue_table()}


def filled(document: str, parts: Mapping[str, str]) -> str:
    return MARKER.sub(lambda found: f"{found[1]}\n{parts[found[2]]}\n{found[3]}", document)


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--write"]):
        print(__doc__)
        return 2
    with tempfile.TemporaryDirectory(prefix="mtpress-layouts-") as folder:
        parts = generated(Layouts(Path(folder)))
    if arguments:
        DOCUMENT.write_text(filled(DOCUMENT.read_text(encoding="utf-8"), parts), encoding="utf-8")
    else:
        print("\n".join(parts.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
