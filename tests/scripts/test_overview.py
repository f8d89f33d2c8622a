"""The README's figure and table: drawn from the rows that the repository holds."""

import json

import pytest

from dmc.evaluation.styles import POLICIES
from scripts import overview
from tests.training.helpers import ROOT

FILES = [ROOT / "docs" / "results" / "frontier" / f"{name}.jsonl" for name in ("base", "smollm2-135m")]


def row(model, policy, share, kl, base="base", **made):
    result = {"model": model, "base": base, "share": share, "kl": kl, "kl_stderr": 0.0, "settings": {"policy": made}}
    return {"model": model, "policy": policy, "result": result}


def test_the_readme_shows_the_rows():
    assert overview.table(FILES) in (ROOT / "README.md").read_text()


def test_a_front_holds_what_no_other_row_of_the_method_beats():
    rows = [
        row("base", "h2o:share=0.5", 0.5, 0.1),
        row("base", "h2o:share=0.25", 0.25, 0.2),
        row("base", "h2o:share=0.3", 0.3, 0.25),
        row("cr4-hf", "dmc", 0.2, 0.03, window=64),
        row("late-hf", "dmc", 0.2, 0.05),
        row("gqa1-hf", "full", 0.5, 0.01),
    ]
    assert overview.fronts(rows) == {
        "H2O": [(0.5, 0.1, 0.0), (0.25, 0.2, 0.0)],
        "DMC, merging at once": [(0.2, 0.05, 0.0)],
        "DMC, late merging": [(0.2, 0.03, 0.0)],
    }


def test_every_policy_of_the_rows_has_a_style():
    policies = {json.loads(line)["policy"].split(":")[0] for path in FILES for line in path.read_text().splitlines()}
    assert policies - {"dmc"} <= POLICIES.keys()


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_figure_is_written(tmp_path, suffix):
    path = tmp_path / "base.jsonl"
    path.write_text("".join(json.dumps(row("base", "full", share, share**3)) + "\n" for share in (0.5, 0.25)))
    overview.draw([path], tmp_path / f"out.{suffix}")
    assert (tmp_path / f"out.{suffix}").stat().st_size > 5000
