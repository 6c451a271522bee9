"""recipes: the recipes that ship with mtpress, or one of them in full.

In: nothing, or the name of a recipe (or a YAML file, to see whether it is sound). Out: a `RecipesResult`: name and
summary of each, and for the one asked for its YAML as it stands. Leaves out: what a recipe does to a checkpoint
(`mtpress inspect`, `mtpress quantize --dry-run`).
"""

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mtpress.plan.recipe import load_recipe, recipe_file, shipped
from mtpress.terminal import say, visible


@dataclass(frozen=True)
class RecipesResult:
    """summaries: name → one line. yaml and recipe (as plain data, defaults filled in) only where one was asked for."""

    summaries: dict[str, str]
    yaml: str | None = None
    recipe: dict[str, Any] | None = None

    def as_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}


def recipes(name_or_file: str | Path | None = None) -> RecipesResult:
    """All shipped recipes, or one; InputError where there is no such recipe or the file is no sound one."""
    if name_or_file is None:
        return RecipesResult({name: load_recipe(name).summary for name in shipped()})
    recipe = load_recipe(name_or_file)
    return RecipesResult({recipe.name: recipe.summary}, recipe_file(name_or_file).read_text(encoding="utf-8"), recipe.canonical())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="print this recipe in full; a YAML file of your own is checked and printed")


def run(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """The stage as the command line calls it: (exit code, result for --json)."""
    result = recipes(options.name)
    if not options.json:
        if result.yaml is not None:
            print(visible(result.yaml), end="" if result.yaml.endswith("\n") else "\n")
        else:
            widest = max(len(name) for name in result.summaries)
            for name, summary in result.summaries.items():
                say(f"{name:<{widest}}  {summary}")
    return 0, result.as_json()
