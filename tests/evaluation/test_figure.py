"""Figures of frontiers: which rows make a line, that a method always looks alike, and what the command says."""

import itertools
import json

import pytest

from dmc.cache import POLICIES
from dmc.cli import main
from dmc.evaluation import styles
from dmc.evaluation.figure import Look, best, lines, numbered, read_rows
from dmc.evaluation.labels import place
from tests.training.helpers import ROOT

Text = pytest.importorskip("matplotlib.text").Text
ROWS = ROOT / "docs" / "results" / "policies" / "base.jsonl"


def row(policy, share, kl, codec="dense", model="base", **made):
    result = {
        "model": model,
        "base": "base",
        "share": share,
        "kl": kl,
        "kl_stderr": 0.01,
        "perplexity": 7.0 + kl,
        "agreement": 0.9,
        "text": "t",
        "windows": 2,
        "prompt_tokens": 10,
        "scored_tokens": 5,
        "dense_bytes_end": 3000.0,
        "settings": {"policy": made},
    }
    return {"model": model, "policy": policy, "codec": codec, "result": result}


MADE = [
    row("h2o:share=0.5", 0.5, 0.1),
    row("h2o:share=0.25", 0.3, 0.3),
    row("h2o:share=0.25", 0.2, 0.2, "tcq-2bit"),
    row("mine:Own:recent=3", 0.4, 0.05),
    row("full", 0.9, 0.0, "int8"),
]


def test_a_line_holds_what_no_other_row_of_its_method_beats():
    drawn = lines(MADE, Look())
    assert list(drawn) == ["every token, codes alone", "H2O", "mine"]
    assert [(point.share, point.loss) for point in drawn["H2O"]] == [(0.5, 0.1), (0.2, 0.2)]
    assert drawn["every token, codes alone"][0].loss == 1e-5  # a log axis has no 0


def test_a_curve_is_a_policy_and_a_codec_over_all_budgets():
    drawn = lines(MADE, Look(curves=True))
    assert [(point.share, point.loss) for point in drawn["H2O, dense"]] == [(0.5, 0.1), (0.3, 0.3)]
    assert drawn["H2O, tcq-2bit"][0].label == "share=0.25 tcq-2bit" and list(drawn) == ["H2O, dense", "H2O, tcq-2bit"]


def test_the_lines_with_the_lowest_loss_stay():
    assert list(lines(MADE, Look(most=2))) == ["every token, codes alone", "mine"]
    assert lines(MADE, Look("disagreement"))["H2O"][0].loss == pytest.approx(0.1)


def test_a_method_looks_alike_everywhere_and_unlike_the_others():
    assert len(set(styles.STYLES.values())) == len(styles.STYLES) == len({colour for colour, _ in styles.STYLES.values()})
    assert set(POLICIES) - {"dmc"} == set(styles.POLICIES)
    assert styles.style("mine") == styles.style("mine") != styles.style("yours")
    assert styles.style("H2O") == styles.STYLES["H2O"]


def test_late_methods_are_told_by_their_settings_whatever_the_model_is_called():
    made = [
        row("dmc", 0.2, 0.1, model="cr4-hf", window=64, max_entries=None),
        row("dmc", 0.2, 0.1, model="late-hf"),
        row("dms", 0.2, 0.1, model="mine", window=64, sinks=1),
        row("dms", 0.2, 0.1, model="dmslate", window=64, sinks=0),
        row("gate", 0.2, 0.1, target_cr=4),
        row("gate", 0.2, 0.1, target_cr=4, trained=True),
    ]
    names = ["DMC, late merging", "DMC, merging at once", "late eviction", "DMS"]
    assert [styles.method(one) for one in made] == [*names, "fitted decisions, nothing trained", "trained decision heads"]


def test_best_of_equal_shares_is_the_lower_one():
    drawn = lines([row("tova:a", 0.5, 0.3), row("tova:b", 0.5, 0.2)], Look())["TOVA"]
    assert [point.loss for point in drawn] == [0.2] and best([]) == []


@pytest.mark.parametrize(
    ("suffix", "flags"),
    [("pdf", ("--width", "column")), ("svg", ("--curves", "--measure", "perplexity")), ("png", ("--labels", "--most", "3"))],
)
def test_the_command_draws(suffix, flags, tmp_path, capsys):
    out = tmp_path / f"figure.{suffix}"
    assert main(["plot", str(ROWS), str(ROWS), "--out", str(out), *flags]) == 0
    assert out.stat().st_size > 5000
    said = capsys.readouterr().out
    assert ("were left out" in said) == ("--most" in flags or "--curves" in flags)
    if suffix == "svg":
        text = out.read_text()
        assert "SnapKV, dense" in text and "KV bytes per token" in text and "perplexity" in text


@pytest.mark.parametrize(
    ("rows", "flags", "said"),
    [
        ("none.jsonl", (), "none.jsonl cannot be read"),
        ("bad.jsonl", (), "does not hold rows of dmc frontier"),
        ("empty.jsonl", (), "has no row with a result"),
        ("less.jsonl", ("--measure", "disagreement"), "does not hold rows of dmc frontier"),
        ("good.jsonl", ("--measure", "loss"), "known are kl, perplexity, disagreement"),
        ("good.jsonl", ("--width", "huge"), "give inches from 1 to 50, or one of column"),
        ("full.jsonl", ("--curves",), "no row has a policy with a share"),
        ("good.jsonl", ("--most", "0"), "at least 1"),
        ("good.jsonl", ("--out", "x.gif"), "figures are .pdf, .svg, .png"),
        ("good.jsonl", ("--out", "no/x.pdf"), "there is no folder"),
    ],
)
def test_bad_requests_are_one_sentence(rows, flags, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"policy": 3}\n{"result": {"kl": 1}}\n')
    (tmp_path / "empty.jsonl").write_text(json.dumps({"error": "failed"}) + "\n")
    less = row("full", 0.9, 0.0)
    del less["result"]["agreement"]
    (tmp_path / "less.jsonl").write_text(json.dumps(less) + "\n")
    (tmp_path / "full.jsonl").write_text(json.dumps(MADE[-1]) + "\n")
    (tmp_path / "good.jsonl").write_text("".join(json.dumps(one) + "\n" for one in MADE))
    out = () if "--out" in flags else ("--out", "x.pdf")
    assert main(["plot", rows, *out, *flags]) == 2
    assert said in capsys.readouterr().err


def test_numbered_points_are_those_that_no_other_beats_and_equal_rows_have_equal_numbers():
    drawn = lines(MADE, Look())
    keys, (first, second) = numbered([drawn, {name: drawn[name] for name in ("H2O", "mine")}])
    assert keys == {"H2O, share=0.25 tcq-2bit": 1, "mine, Own:recent=3 dense": 2, "every token, codes alone, int8": 3}
    assert [(number, point.loss) for number, point in first.items()] == [(1, 0.2), (2, 0.05), (3, 1e-5)]
    assert list(second) == [1, 2]


def test_a_label_names_a_retrofit_and_a_file_without_its_folder():
    made = [
        row("gate:decisions=/a/b/w16.safetensors,target_cr=3", 0.2, 0.1, "tcq:page_size=32"),
        row("dmc", 0.2, 0.1, model="cr4-hf", window=16),
    ]
    drawn = lines(made, Look())
    assert drawn["fitted decisions, nothing trained"][0].label == "decisions=w16,target_cr=3 tcq:page 32"
    assert drawn["DMC, late merging"][0].label == "cr4-hf dense"


def test_labels_cover_neither_each_other_nor_the_points():
    """Close points on a log axis; the boxes are what the finished figure reports, not what was asked for while placing."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    at = [(2.0 ** (-i / 9), 10.0 ** (-i / 7)) for i in range(24)]
    axis.plot(*zip(*at, strict=True), "o", ms=4)
    axis.set(xscale="log", yscale="log")
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    made = place(axis, [(x, y, f"{i:02d}") for i, (x, y) in enumerate(at)], at)
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(label) for label in made]
    assert len(made) == 24 and not any(one.overlaps(two) for one, two in itertools.combinations(boxes, 2))
    points = axis.transData.transform(at)
    assert not any(box.contains(*point) for box in boxes for point in points)
    frame = axis.get_window_extent()
    assert all(frame.contains(*box.min) and frame.contains(*box.max) for box in boxes)


def test_the_rows_of_the_repository_can_be_read():
    assert len(read_rows(ROWS)) == 62
