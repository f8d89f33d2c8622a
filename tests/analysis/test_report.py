"""The report as a whole: every head is named, the page parses and needs nothing else, it is written whole or not at all."""

import contextlib
import io
import json
import re
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from dmc import cli
from dmc.analysis import markup, output
from dmc.analysis.figures import number
from dmc.analysis.inspection import listed
from tests.model import tiny

TEXT = "How-vexingly-quick-daft-zebras-jump;" * 12


class Page(HTMLParser):
    """Collects tooltips, tables' shapes and what the page would load; checks that elements close in order."""

    VOID = {"meta", "br", "link", "img", "input"}

    def __init__(self, text):
        super().__init__()
        self.open, self.titles, self.loads, self.ids, self.captions = [], [], [], [], 0
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        fields = dict(attributes)
        if tag not in self.VOID:
            self.open.append(tag)
        self.captions += tag == "caption"
        self.titles.append(fields.get("title"))
        self.ids.append(fields.get("id"))
        self.loads += [value for name, value in attributes if name in ("src", "href", "xlink:href") and value[0] != "#"]

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def run(capsys, *arguments):
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    fields = tiny.config("head")
    return tiny.write(tmp_path_factory.mktemp("model"), fields, tiny.weights(fields))


@pytest.fixture(scope="module")
def common(directory, tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT)
    return (
        "inspect",
        directory,
        "--prompt-file",
        file,
        "--device",
        "cpu",
        "--codec",
        "tcq",
        "--page-size",
        8,
        "--windows",
        2,
        "--window-tokens",
        80,
        "--attention-tokens",
        40,
    )


@pytest.fixture(scope="module")
def written(common, tmp_path_factory):
    """A report's directory, alone in another, and what was printed."""
    out, printed = tmp_path_factory.mktemp("out") / "report", io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert cli.main([*map(str, common), "--out", str(out)]) == 0
    return out, printed.getvalue()


def test_report(written):
    out, printed = written
    assert "merges" in printed and f"report: {out}/report.html" in printed and "CR per layer" in printed
    assert {path.name for path in out.parent.iterdir()} == {"report"}
    text = (out / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    for layer in range(tiny.LAYERS):
        for kind, heads in (("head", 2), ("query head", tiny.QUERY_HEADS)):
            for head in range(heads):
                assert sum(bool(title and title.startswith(f"layer {layer}, {kind} {head}: ")) for title in page.titles) >= 2
                assert kind != "head" or f"layer {layer}, head {head}: 80 tokens in " in text
    assert all(load.startswith("data:") for load in page.loads) and "<script" not in text and "@import" not in text
    assert "url(http" not in text and "currentColor" in text
    ids = [one for one in page.ids if one]
    assert len(ids) == len(set(ids))
    assert text.count("<svg") == text.count("role=img") == 3 and page.captions == 1 + 1 + 1 + 8 + 4 + 4 + 1
    for name in ("cr", "cr_positions", "ranks", "stable_ranks", "spectra", "attention", "entropy_positions"):
        with Image.open(out / f"{name}.png") as image:
            assert image.format == "PNG" and len(image.convert("RGB").getcolors(2**24)) > 10


def test_numbers(written):
    out, printed = written
    numbers = json.loads((out / "inspect.json").read_text(), parse_constant=pytest.fail)
    assert numbers["format"] == "dmc-inspect-1" and f"{numbers['cache']['entries']:,} entries" in printed
    assert numbers["cr_learnt"] == [[pytest.approx(cr, rel=1e-4) for cr in row] for row in numbers["cache"]["cr_per_head"]]
    assert numbers["texts"][0]["tokens"] == len(TEXT) and numbers["window_tokens"] == 80 and numbers["windows"] == 2
    for kind, heads in (("keys_before_rope", 2), ("keys", 2), ("values", 2), ("attention", 4)):
        for name in ("effective_rank", "stable_rank", "singular_values"):
            found = numbers[name][kind]
            assert len(found) == tiny.LAYERS and {len(row) for row in found} == {heads}
    assert {len(row) for row in numbers["entropy_share"]} == {4}


def test_a_report_is_replaced_and_nothing_else_is(capsys, common, tmp_path):
    out = tmp_path / "report"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    code, printed, err = run(capsys, *common, "--out", out)
    assert code == 2 and printed == "" and "is not a report of dmc inspect" in err and err.count("\n") == 1
    (out / "mine.txt").rename(out / output.REPORT)
    with output.replaced(out) as fresh:
        (fresh / "new").write_text("new")
        assert (out / output.REPORT).read_text() == "mine"
    assert [path.name for path in out.iterdir()] == ["new"] and [path.name for path in tmp_path.iterdir()] == ["report"]


def test_a_failure_leaves_what_was_there(tmp_path):
    out = tmp_path / "report"
    with output.replaced(out) as fresh:
        (fresh / output.REPORT).write_text("first")
    with pytest.raises(RuntimeError), output.replaced(out) as fresh:
        (fresh / output.REPORT).write_text("second")
        raise RuntimeError
    assert (out / output.REPORT).read_text() == "first" and [path.name for path in tmp_path.iterdir()] == ["report"]


@pytest.mark.parametrize(
    "changed, said",
    [
        (("--windows", 0), "windows must be at least 1"),
        (("--window-tokens", 2000), "more than the model's 256 positions"),
        (("--window-tokens", 1), "too short"),
        (("--precision", "fp16"), "fp32, fp64"),
        (("--attention-tokens", 1), "at least 2"),
        (("--prompt-file", "/no/such/file"), "cannot be read"),
        (("--policy", "lru"), "known: full, dmc"),
    ],
)
def test_wrong_use(capsys, common, tmp_path, changed, said):
    code, out, err = run(capsys, *common, "--out", tmp_path / "report", *changed)
    assert code == 2 and out == "" and said in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_short_text_and_missing_parent(capsys, directory, tmp_path):
    code, _, err = run(
        capsys, "inspect", directory, "--prompt", "short", "--out", tmp_path / "report", "--device", "cpu", "--window-tokens", 100
    )
    assert code == 2 and "the longest has 5" in err
    code, _, err = run(capsys, "inspect", directory, "--prompt", "x", "--out", tmp_path / "no/report", "--device", "cpu")
    assert code == 2 and "not a writable directory" in err


def test_segments_of_a_text():
    entries = markup.entries_of(["a", " <b>", "\n", "&"], torch.tensor([True, True, False, True]))
    text = markup._templates().get_template("parts.html").module.segments(entries)
    assert re.findall(r">([^<]+)</span>", text) == ["a\u00b7&lt;b&gt;", "\u21b5\n&amp;"]
    assert text.count('title="entry 0: 2 tokens"') == text.count('title="entry 1: 2 tokens"') == 1


@pytest.mark.parametrize(
    "value, shown",
    [(1, "1.00"), (9.994, "9.99"), (9.996, "10.0"), (99.96, "100"), (1024.0, "1024"), (None, "–"), (float("nan"), "–")],
)
def test_numbers_as_cells_show_them(value, shown):
    assert number(value) == shown


def test_what_is_missing_is_null():
    assert listed(torch.tensor([[1 / 3, float("nan"), float("inf")]])) == [[0.33333, None, None]]
