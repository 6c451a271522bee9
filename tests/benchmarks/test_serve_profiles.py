import re
from pathlib import Path

import pytest

from mtpress.engine.launch import profiles
from mtpress.engine.launch.known_issues import known_issues
from mtpress.engine.memory.served_model import ServedModel
from serve_profiles import BUILDS, DOCUMENT, MARKER, Layouts, compare, dry_run, filled, generated, seeds
from served_layouts import INT4, names


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> Layouts:
    return Layouts(tmp_path_factory.mktemp("layouts"))


def test_docs_say_what_dry_runs_say(layouts: Layouts) -> None:
    document = DOCUMENT.read_text(encoding="utf-8")
    parts = generated(layouts)
    assert [found[2] for found in MARKER.finditer(document)] == list(parts)
    assert document == filled(document, parts), "run python benchmarks/serve_profiles.py --write"


def test_no_path_of_a_machine_gets_into_docs(layouts: Layouts) -> None:
    assert str(layouts.folder) not in "".join(generated(layouts).values())


def test_every_profile_serves_a_27b_build_unforced(layouts: Layouts) -> None:
    for name in profiles.profiles():
        launch = dry_run(name, layouts[BUILDS.get(name, "nvfp4-mtp-vlm")])
        assert launch.refused == ()
        assert launch.estimate.max_concurrency >= 1
        assert launch.num_speculative_tokens >= 1


def test_every_seed_is_compared_and_every_difference_has_a_reason(layouts: Layouts) -> None:
    assert {seed["seed"] for seed in seeds()} == {f"seed {number:03}" for number in range(5)}
    for seed in seeds():
        rows = compare(seed, dry_run(seed["profile"], layouts[seed["layout"]]))
        assert {row.verdict for row in rows} >= {"same", "added"}
        for row in rows:
            assert (row.why != "") == (row.verdict != "same"), row
        assert set(seed["why"]) <= {row.flag for row in rows if row.verdict in ("differs", "left out")}


def test_the_measured_concurrency_of_a_seed(layouts: Layouts) -> None:
    measured = 6.98  # seed 001: 256K, fp8 KV, MTP n=3, text only, on an RTX PRO 6000
    estimated = dry_run("rtx-pro-6000-256k", layouts["nvfp4-mtp-text"]).estimate.max_concurrency
    assert abs(estimated / measured - 1) < 0.1


def test_profiles_and_issues_stand_in_docs_by_name() -> None:
    document = DOCUMENT.read_text(encoding="utf-8")
    for name in (*profiles.profiles(), *(issue.id for issue in known_issues())):
        assert re.search(rf"^\| `?{re.escape(name)}", document, re.MULTILINE), name


@pytest.mark.parametrize(
    ("name", "form", "method"), [(INT4, "AutoRound", "inc"), ("bf16", "BF16", None), ("nvfp4-mtp-text", "NVFP4", "modelopt_fp4")]
)
def test_layouts_are_what_their_names_say(name: str, form: str, method: str | None, layouts: Layouts) -> None:
    model = layouts[name]
    assert isinstance(model, ServedModel)
    assert form in model.format
    assert model.quant_method == method
    assert 27e9 < model.num_params < 28e9
    assert model.num_mtp_layers == 1
    assert model.has_vision == (name != "nvfp4-mtp-text")
    assert name in names()
    assert sum(path.stat().st_blocks * 512 for path in Path(model.path).iterdir()) < 30 << 20  # headers, not weights
