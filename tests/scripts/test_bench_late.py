"""The published decode steps of late merging: the page has the numbers of the data, and they reach the target."""

import json

from tests.training.helpers import ROOT

RESULTS = ROOT / "docs" / "results"


def test_published_ratios():
    found = json.loads((RESULTS / "late" / "decode.json").read_text())
    page = (RESULTS / "late.md").read_text()
    assert found["command"] in page and {row["codec"] for row in found["rows"]} == {"dense", "int8", "tcq-4bit"}
    for row in found["rows"]:
        numbers = [f"{row['late_ms']:.2f}", f"{row['at_once_ms']:.2f}", f"{row['ratio']:.3f}", f"{row['ratio_wall']:.3f}"]
        assert " | ".join([f"| {row['codec']}", str(row["batch"]), *numbers]) + " |" in page
        assert row["ratio"] <= 1.05 and abs(row["entries_before"][0] / row["entries_before"][1] - 1) < 0.02
