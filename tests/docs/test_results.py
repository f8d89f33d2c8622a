"""Tables of docs/results are what their data files say."""

import json
import math
import re
import statistics

import pytest

from dmc.evaluation.styles import method
from scripts import make_results, results_rows, results_tables
from scripts.results_tables import RESULTS

PAGES = [path for path in sorted(RESULTS.parent.rglob("*.md")) if "<!-- table:" in path.read_text()]


def frontier_row(policy, share, windows, *, model="base", codec="int8"):
    result = {
        "base": "base",
        "model": model,
        "model_hash": model,
        "base_hash": "base",
        "windows_hash": "w",
        "share": share,
        "cr": 2.0,
        "kl": statistics.fmean(windows),
        "kl_stderr": 0.01,
        "kl_windows": windows,
        "perplexity": 7.0,
        "agreement": 0.9,
        "settings": {"policy": {}},
    }
    return {"model": model, "policy": policy, "codec": codec, "result": result}


@pytest.fixture
def data(tmp_path, monkeypatch):
    for module in (make_results, results_tables):
        monkeypatch.setattr(module, "RESULTS", tmp_path)

    def write(*rows):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    return write


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_a_page_is_current(page):
    said = "not current: run `python scripts/make_results.py` and commit docs/results"
    assert make_results.filled(page.name, page.read_text()) == page.read_text(), said


def test_every_table_comes_from_data():
    """But for the parts of TCQ, which are no measurements."""
    typed = {}
    for path in sorted(RESULTS.glob("*.md")):
        rest = re.sub(r"^<!-- table:.*?^<!-- end -->$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
        typed[path.name] = re.findall(r"^ *(\|(?!-).*)\n *\|-", rest, re.MULTILINE)
    assert {name: heads for name, heads in typed.items() if heads} == {"tcq.md": ["| part | why | bits per element |"]}


def test_every_data_file_is_used():
    """By a page, which links to it."""
    pages = "".join(path.read_text() for path in RESULTS.glob("*.md"))
    files = {path.relative_to(RESULTS).as_posix() for path in RESULTS.rglob("*.json*")}
    assert {name for name in files if f"]({name})" not in pages} == set()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("<!-- table: none x -->\n<!-- end -->\n", "unknown table 'none'; known: rows, frontier"),
        ("<!-- table: frontier no.jsonl -->\n<!-- end -->\n", "page.md: table 'frontier no.jsonl': FileNotFoundError"),
        ("<!-- table:  -->\n<!-- end -->\n", "page.md: unknown table ''"),
        ("<!-- table: rows none.jsonl\nx := {x}\n-->\n<!-- end -->\n", "page.md: table 'rows none.jsonl': FileNotFoundError"),
        ("<!-- table: retrieval frontier/base.jsonl -->\n<!-- end -->\n", "page.md: table 'retrieval frontier/base.jsonl'"),
        ("<!-- table: runs late/runs.jsonl -->\n", "1 tables begin with '<!-- table: ... -->' and 0 of them end"),
    ],
)
def test_a_block_that_cannot_be_filled_is_named(text, says):
    with pytest.raises(ValueError, match=says.replace("(", r"\(")):
        make_results.filled("page.md", text)


def test_what_is_outside_of_a_table_stays_and_filling_twice_changes_nothing():
    text = "before\n\n<!-- table: kept policies/base.jsonl -->\nold\n<!-- end -->\n\nafter\n"
    once = make_results.filled("page.md", text)
    assert once.startswith("before\n\n<!-- table") and once.endswith("<!-- end -->\n\nafter\n") and "old" not in once
    assert make_results.filled("page.md", once) == once


def test_leaders_are_compared_over_the_same_windows(data):
    ours, theirs = [0.1, 0.2, 0.3], [0.3, 0.3, 0.6]
    data(frontier_row("h2o", 0.2, theirs), frontier_row("tova", 0.24, ours), frontier_row("full", 0.4, [0.0, 0.0, 0.1]))
    lines = results_tables.leaders("rows.jsonl").splitlines()[2:]
    differences = [b - a for a, b in zip(ours, theirs, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(3)
    assert len(lines) == 2 and "every token" in lines[0]
    assert "TOVA: `tova` `int8`, **0.200**" in lines[1] and "H2O: `h2o` `int8`, **0.400**" in lines[1]
    assert f"{statistics.fmean(differences):.3f}\u00a0±\u00a0{error:.3f} (n 3)" in lines[1]


def test_a_difference_within_two_errors_is_not_settled(data):
    data(frontier_row("h2o", 0.2, [0.1, 0.9]), frontier_row("tova", 0.2, [0.9, 0.0]))
    assert "not settled" in results_tables.leaders("rows.jsonl")


def test_the_best_within_a_budget(data):
    data(frontier_row("h2o", 0.5, [0.1]), frontier_row("h2o", 0.25, [0.2]), frontier_row("tova", 0.26, [0.15]))
    cells = {line.split(" | ")[0].strip("| "): line for line in results_tables.budgets("rows.jsonl").splitlines()[2:]}
    assert cells["H2O"] == "| H2O | **0.100** | **0.200** | – | – |" and cells["TOVA"] == "| TOVA | *0.150* | – | – | – |"


def test_a_row_that_another_one_beats_is_not_on_the_frontier(data):
    data(frontier_row("h2o", 0.5, [0.1]), frontier_row("tova", 0.5, [0.2]), frontier_row("streaming", 0.1, [0.9]))
    assert [line.split(" | ")[1] for line in results_tables.frontier("rows.jsonl").splitlines()[2:]] == ["H2O", "StreamingLLM"]


def test_a_policy_on_a_changed_model_is_no_row_of_the_policy():
    assert method(frontier_row("h2o:share=0.5", 0.2, [0.1])) == "H2O"
    assert method(frontier_row("h2o:share=0.5", 0.2, [0.1], model="gqa1-hf")) is None
    assert results_tables.competitor(frontier_row("h2o:share=0.5", 0.2, [0.1], model="gqa1-hf")) == "gqa1-hf"


def test_the_fields_of_a_report_of_the_suite():
    rows = results_tables.suite("policies/smollm2-suite.jsonl", "single").splitlines()
    assert rows[0] == "| row | CR | MB | of dense bf16 | single |"
    assert rows[2] == "| full, fp32 | 1.00 | 24.4 | 1/0.5 | 1.00 ± 0.00 (5) |"


def test_two_caches_are_compared_over_the_same_samples(data):
    def report(row, ratio, found, policy="h2o"):
        samples = [{"kind": "single", "length": 64, "answers": [str(i)], "found": one} for i, one in enumerate(found)]
        whole = {"found": statistics.fmean(found), "held_bytes": 100, "byte_ratio": ratio}
        return {"row": row, "policy": policy, "retrieval": {"all": whole, "samples": samples, "cells": [{"length": 64}]}}

    data(
        report("full, bf16", 1.0, [1, 1, 1]),
        report("a", 3.9, [1, 0, 1]),
        report("d", 4.1, [0, 1, 1]),
        report("b", 4.2, [0, 0, 1], "tova:share=0.2"),
        report("c", 8, [0, 0, 0]),
    )
    lines = results_tables.retrieval("rows.jsonl").splitlines()[2:]
    assert lines[1] == "| 64 | 1/4 | 1.00 | a (1/3.9), **0.67** | b (1/4.2), **0.33** | 0.33 ± 0.33 (n 3), not settled |"
    assert lines[2] == "| 64 | 1/8 | 1.00 | c (1/8.0), **0.00** | – | – |"


def test_a_page_says_the_columns(data):
    data({"x": 1.5, "of": {"a": 4}, "n": None}, {"x": 3.0, "of": {"a": 1}, "n": 7})
    mark = """rows rows.jsonl
        [r for r in rows
         if r.x > 0]
        twice, of rows := {2 * x:.1f} of {len(rows)}
        := {of.a / rows[0].of.a}
        a | n := {n:.2f} {"set" if n else "not"}"""
    text = f"<!-- table: {mark}\n-->\nold\n<!-- end -->\n"
    made = make_results.filled("page.md", text)
    assert made.splitlines()[-5:-2] == ["|---|---|---|", "| 3.0 of 2 | 1.0 | – not |", "| 6.0 of 2 | 0.25 | 7.00 set |"]
    assert made.startswith(f"<!-- table: {mark}\n-->\n\n| twice, of rows |  | a ") and "old" not in made
    assert make_results.filled("page.md", made) == made


@pytest.mark.parametrize(
    ("mark", "says"),
    [
        ("rows.jsonl", "every line is a column"),
        ("rows.jsonl\nx := {x}\ny {x}", "every line is a column"),
        ("rows.jsonl [r for r in rows if r.x > 1]\nx := {x}", "selects no rows"),
        ("rows.jsonl\nx := {y}", "NameError"),
        ("rows.jsonl\nx := {row.y}", "no field 'y'; there are x"),
        ("rows.jsonl rows.y\nx := {x}", "AttributeError"),
    ],
)
def test_a_mark_that_is_wrong_is_named(data, mark, says):
    data({"x": 1})
    with pytest.raises(ValueError, match=says):
        results_rows.rows(mark, results_tables.RESULTS)


def test_the_rows_of_a_json_file(data, tmp_path):
    (tmp_path / "one.json").write_text('{"unit": 10, "rows": [{"x": 1}], "other": {"rows": [[2, 3]]}}')
    assert results_rows.rows("one.json\nx := {x * unit}", tmp_path).endswith("| 10 |")
    assert results_rows.rows('one.json [1]\nx := {load("one.json").rows[0].x + row}', tmp_path).endswith("| 2 |")
    assert results_rows.rows("one.json other.rows\nx := {row[1] + file.unit}", tmp_path).endswith("| 13 |")


def test_interpolation_in_logarithms():
    points = [(4, 0.4), (2, 0.1), (8, 0.8)]  # grows with the square, then linearly
    assert [results_rows.at(points, x) for x in (1, 3, 6, 16)] == pytest.approx([0.025, 0.225, 0.6, 1.6])
    assert results_rows.limits([0.2, 0.1], 1) == "0.1 to 0.2" and results_rows.limits([0.11, 0.12], 1) == "0.1"
    assert results_rows.spread([1, 2, 6], 1) == "3.0 (1.0 to 6.0)" and results_rows.spread([2]) == "2.000"


def test_cr_is_that_of_the_samples_and_lengths_are_not_mixed(data):
    sample = {"kind": "single", "length": 64, "held_bytes": 50, "dense_bytes": 100}
    row = {
        "row": "a",
        "retrieval": {
            "settings": {"lengths": [64]},
            "samples": [sample | {"tokens": 10, "entries": 5.0}, sample | {"tokens": 90, "entries": 15.0}],
            "cells": [{"kind": "single", "length": 64, "found": 0.5, "stderr": None, "n": 2}],
        },
    }
    data(row)
    assert results_tables.suite("rows.jsonl", "single").splitlines()[2] == "| a | 5.00 | 0.0 | 1/2.0 | 0.50 (2) |"
    row["retrieval"]["settings"]["lengths"] = [64, 128]
    data(row)
    with pytest.raises(ValueError, match="a has several lengths"):
        results_tables.suite("rows.jsonl", "single")
