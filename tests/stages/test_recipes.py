import json
import re
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from mtpress.cli import main
from mtpress.errors import InputError
from mtpress.plan.recipe import RECIPES_DIR, load_recipe, parse_recipe, shipped
from mtpress.stages.recipes import recipes


def test_the_list_has_a_line_for_every_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(shipped())
    for line, name in zip(lines, shipped(), strict=True):
        assert line.endswith(load_recipe(name).summary)


def test_one_recipe_is_printed_as_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "nvfp4-mtp-text"]) == 0
    assert capsys.readouterr().out == (RECIPES_DIR / "nvfp4-mtp-text.yaml").read_text(encoding="utf-8")


def test_json_holds_yaml_and_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "nvfp4-mtp-text", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["recipe"] == load_recipe("nvfp4-mtp-text").canonical()
    assert yaml.safe_load(shown["yaml"])["vision"] == "drop"


def test_a_file_of_ones_own_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    text = "name: mine\nsummary: a test\nformat: nvfp4\nquantize: [mlp]"
    path.write_text(text)
    assert recipes(path).yaml == text
    path.write_text(text.replace("mlp", "mpl"))
    with pytest.raises(InputError, match="'mpl' is not one of"):
        recipes(path)


def test_the_readme_names_the_recipes_that_take_weight_only() -> None:
    said = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8").partition("--weight-only SCALE` by ")[2].partition(";")[0]
    taken = set()
    for name in shipped():
        with suppress(InputError):
            parse_recipe({**load_recipe(name).canonical(), "constant_input_scale": 0.004}, name)
            taken.add(name)
    assert set(re.findall(r"`([\w-]+)`", said)) == taken
