"""The published decode steps of late merging reach the target, and the page names their command."""

import json

from tests.training.helpers import ROOT

RESULTS = ROOT / "docs" / "results"


def test_published_ratios():
    found = json.loads((RESULTS / "late" / "decode.json").read_text())
    page = (RESULTS / "late-costs.md").read_text()
    assert found["command"] in page and {row["codec"] for row in found["rows"]} == {"dense", "int8", "tcq-4bit"}
    for row in found["rows"]:
        assert row["ratio"] <= 1.05 and abs(row["entries_before"][0] / row["entries_before"][1] - 1) < 0.02
