"""`dmc frontier`: the grid, going on after a kill, cells that fail, the report and what the command refuses."""

import json
import math
import multiprocessing
import time
from pathlib import Path

import pytest
import torch

from dmc.cache import CODECS, POLICIES
from dmc.cli import main
from dmc.evaluation import former, frontier, grid
from dmc.evaluation.grid import Cell, cells, choose
from dmc.evaluation.plot import plot_frontier
from dmc.evaluation.report import leaders, report, sizes, table, words
from dmc.evaluation.windows import Windows
from tests.model import tiny

SMALL = ("--prompt", "12", "--scored", "3", "--windows", "2", "--device", "cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    fields = tiny.config()
    return tiny.write(tmp_path_factory.mktemp("models") / "base", fields, tiny.weights(fields))


@pytest.fixture(scope="module")
def retrofit(base):
    fields = tiny.config("head")
    return tiny.write(base.parent / "cr2", fields, tiny.weights(fields))


@pytest.fixture(scope="module")
def text(base):
    path = base.parent / "text.txt"
    path.write_text("".join(chr(33 + i * i % 94) for i in range(200)))
    return path


def command(base, text, out, *more):
    return ["frontier", "--base", str(base), "--text", str(text), "--out", str(out), *SMALL, *more]


def rows(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------ grid


def test_default_grid_has_every_policy_and_codec(base, retrofit):
    cells = grid.cells([base, retrofit])
    assert {cell.policy.name for cell in cells if cell.model == base} == set(POLICIES) - {*grid.LEARNT, *grid.NAMED}
    assert {cell.policy.name for cell in cells if cell.model == retrofit} == {"dmc"}
    for model in (base, retrofit):
        assert {cell.codec.name for cell in cells if cell.model == model} == set(CODECS) - {"eigen", "gear", "tcq"}
    budgets = [dict(cell.policy.settings)["share"] for cell in cells if cell.policy.name == "h2o"]
    assert set(budgets) == set(grid.BUDGETS)
    assert len(set(cells)) == len(cells)


def test_recipes_are_valid(base):
    for choice in grid.codec_choices():
        own, cache = grid.codec_settings(choice)
        frontier.LLM(base, codec=choice.name, codec_settings=own, device="cpu", **cache)
    assert str(choose("gear", bits=2, outliers=0.02)) == "gear:bits=2,outliers=0.02"


def test_the_default_grid_has_gear_and_tcq(base, retrofit):
    """Each under its own name, for the base and for what was retrofitted; neither twice."""
    chosen = cells([base, retrofit], budgets=[0.5])
    names = ["gear-4bit", "gear-2bit", "tcq-4bit", "tcq-3bit", "tcq-2bit"]
    for model, policy in ((base, "full"), (retrofit, "dmc")):
        found = [cell.codec.name for cell in chosen if cell.model == model and cell.policy.name == policy]
        assert [name for name in dict.fromkeys(found) if name.startswith(("gear", "tcq"))] == names
    assert not any(cell.codec.name in ("gear", "tcq") for cell in chosen)


# ------------------------------------------------------------------------------------------------ names of version 0.1


def old(codec, made, *, device="auto"):
    """A row as version 0.1 wrote it."""
    result = row("m", "full", codec.partition(":")[0], 0.3, 0.1)["result"]
    result |= {"windows_hash": "w", "settings": {"policy": {}, "codec": made, "cache": {}}}
    key = former.key(["m", "full", codec, "w", "base", device, "auto"])
    return {"key": key, "model": "m", "policy": "full", "codec": codec, "result": result, "seconds": 1.0}


TRELLIS, MIN_MAX = {"key_bits": 4.5, "value_bits": 3.5, "rank": 0}, {"key_bits": 4, "value_bits": 4, "rank": 4}


@pytest.mark.parametrize(
    "codec, made, now",
    [
        ("gear-4bit", TRELLIS, "tcq-4bit"),
        ("gear-3bit:page_size=32", TRELLIS, "tcq-3bit:page_size=32"),
        ("gear:bits=4", TRELLIS, "tcq:bits=4"),
        ("gear:key_bits=4,value_bits=3,page_size=32", TRELLIS, "tcq:key_bits=4,value_bits=3,page_size=32"),
        ("gear:bits=4,backbone=kcvt,rank=4,outliers=0.02,page_size=64", MIN_MAX, "gear-4bit"),
        ("gear:bits=2,backbone=kivi,rank=4,outliers=0.02,page_size=64", MIN_MAX, "gear-2bit"),
        (
            "gear:bits=2,backbone=kivi,rank=4,outliers=0.02,group=32",
            MIN_MAX,
            "gear:bits=2,backbone=kivi,rank=4,outliers=0.02,group=32,page_size=32",
        ),
        ("gear:backbone=token,rank=0,outliers=0", MIN_MAX, "gear:backbone=token,rank=0,outliers=0,page_size=32"),
        ("gear:backbone=token", MIN_MAX, "gear:backbone=token,rank=1,outliers=0.02,page_size=32"),
    ],
)
def test_rows_of_version_0_1_are_read_under_the_names_of_today(codec, made, now):
    """With the key that the same measurement has today, so that it is not measured again."""
    before = old(codec, made)
    after = former.renamed(before, "auto", "auto")
    assert after["codec"] == now
    assert after["result"]["codec"] == ("bare token" if "rank=0" in now else now.partition(":")[0])
    assert after["key"] == former.key(["m", "full", now, "w", "base", "auto", "auto"]) != before["key"]
    assert {name: after["result"][name] for name in ("kl", "share")} == {"kl": 0.1, "share": 0.3}
    assert former.renamed(after, "auto", "auto") is after
    assert former.renamed(before, "cuda", "auto")["key"] == f"{before['key']}-0.1"  # of another device: of nothing today


def test_rows_of_today_are_left_alone():
    for one in (
        old("gear-4bit", {"backbone": "kcvt"}),
        old("tcq-4bit", {}),
        old("kivi", {"bits": 2}),
        {"key": "k", "codec": "gear-4bit", "error": "failed"},
    ):
        assert former.renamed(one, "auto", "auto") is one


@pytest.mark.parametrize("name", ["base", "smollm2-135m"])
def test_published_rows_call_nothing_gear_that_is_not(name):
    """GEAR has a low rank or outliers, TCQ neither; all rows have the names of today."""
    path = Path(__file__).parents[2] / "docs" / "results" / "frontier" / f"{name}.jsonl"
    published = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(former.renamed(one, "auto", "auto") is one for one in published)
    named = {kind: [one["result"] for one in published if one["result"]["codec"].startswith(kind)] for kind in ("gear", "tcq")}
    assert named["gear"] and all(one["settings"]["codec"]["rank"] == 4 for one in named["gear"])
    assert named["tcq"] and not any(one["settings"]["codec"].get("rank") for one in named["tcq"])
    assert {one["codec"] for one in named["gear"]} >= {"gear-4bit", "gear-2bit"}


def test_a_run_does_not_take_the_trellis_for_gear(base, text, tmp_path):
    """A results file of version 0.1 has both names' rows measured under the name gear-4bit: TCQ's is kept, GEAR's is new."""
    assert main(command(base, text, tmp_path, "--policies", "full", "--codecs", "tcq-4bit:page_size=4")) == 0
    (mine,) = rows(tmp_path)
    result = mine["result"]
    result |= {"codec": "gear-4bit", "kl": 0.125}
    parts = [result["model_hash"], "full", "gear-4bit:page_size=4", result["windows_hash"], result["base_hash"], "cpu", "auto"]
    (tmp_path / "results.jsonl").write_text(
        json.dumps(mine | {"codec": "gear-4bit:page_size=4", "key": former.key(parts), "result": result}) + "\n"
    )
    both = "tcq-4bit:page_size=4", "gear-4bit:page_size=4"
    assert main(command(base, text, tmp_path, "--policies", "full", "--codecs", *both)) == 0
    before, new = rows(tmp_path)
    assert before["codec"] == "gear-4bit:page_size=4" == new["codec"] and new["result"]["settings"]["codec"]["rank"] == 4
    report = (tmp_path / "report.md").read_text()
    assert "`tcq-4bit:page_size=4`" in report and "0.1250" in report and "`gear-4bit:page_size=4`" in report


def test_a_name_that_is_gone_is_measured_under_its_new_one(base, text, tmp_path):
    assert main(command(base, text, tmp_path, "--policies", "full", "--codecs", "gear-3bit:page_size=4")) == 0
    assert [one["codec"] for one in rows(tmp_path)] == ["tcq-3bit:page_size=4"]


# ------------------------------------------------------------------------------------------------ running


def test_a_killed_run_goes_on_and_nothing_is_measured_twice(base, text, tmp_path):
    arguments = command(
        base,
        text,
        tmp_path / "out",
        "--policies",
        "full",
        "streaming",
        "--codecs",
        "dense:dtype=bf16",
        "int8",
        "--budgets",
        "1/2",
        "1",
    )
    results = tmp_path / "out" / "results.jsonl"
    frontier.LLM(base).tokenizer.encode("")  # what takes seconds to import is imported once, before the fork
    process = multiprocessing.get_context("fork").Process(target=main, args=(arguments,))
    process.start()
    while process.is_alive() and not (results.exists() and results.stat().st_size):
        time.sleep(0.01)
    process.kill()
    process.join()
    before = rows(tmp_path / "out")
    assert 1 <= len(before)
    with results.open("a") as file:
        file.write(results.read_text().splitlines()[0][:50])  # what a kill in the middle of a write leaves
    assert main(arguments) == 0
    after = rows(tmp_path / "out")
    assert after[: len(before)] == before and len(after) == len({row["key"] for row in after}) == 6
    stamp = results.stat().st_mtime_ns
    assert main(arguments) == 0
    assert results.stat().st_mtime_ns == stamp
    written = (tmp_path / "out" / "report.md").read_text()
    assert all(f"`{row['policy']}`" in written and f"`{row['codec']}`" in written for row in after)


def test_rows_are_what_measure_says(base, retrofit, text, tmp_path):
    assert (
        main(
            command(base, text, tmp_path, "--models", str(retrofit), "--codecs", "dense:page_size=2", "--policies", "full", "dmc")
        )
        == 0
    )
    found = {(row["model"], row["policy"]): row["result"] for row in rows(tmp_path)}
    assert all(row["schema"] == frontier.SCHEMA for row in rows(tmp_path))
    assert found["base", "full"]["kl"] == pytest.approx(0, abs=1e-6) and found["base", "full"]["cr"] == 1
    assert found["cr2", "dmc"]["kl"] > 1e-3 and found["cr2", "dmc"]["cr"] > 1.2
    assert found["cr2", "dmc"]["share"] < found["base", "full"]["share"]
    assert found["cr2", "dmc"]["base_hash"] == found["base", "full"]["model_hash"] != found["cr2", "dmc"]["model_hash"]
    assert (tmp_path / "frontier.png").read_bytes()[:4] == b"\x89PNG"


def test_a_cell_that_fails_is_a_row_and_is_tried_again(base, tmp_path, monkeypatch):
    windows = Windows(torch.randint(3, 97, (2, 16), generator=torch.Generator().manual_seed(0)), 12, "random")
    cells = [Cell(base, choose("full"), choose("int8")), Cell(base, choose("full"), choose("dense"))]

    def encode(*_):
        raise RuntimeError("this codec\nis broken")

    with monkeypatch.context() as patch:
        patch.setattr(CODECS["int8"], "encode", encode)
        broken, fine = frontier.run(cells, windows, base, tmp_path, device="cpu")
    assert broken["error"] == "RuntimeError: this codec is broken" and "result" not in broken
    assert fine["result"]["kl"] == pytest.approx(0, abs=1e-6)
    text = report([broken, fine], command="dmc frontier", plot="x.png")
    assert "base, full x int8: RuntimeError: this codec is broken" in text
    mended, same = frontier.run(cells, windows, base, tmp_path, device="cpu")
    assert "result" in mended and "error" not in mended and same == fine
    with pytest.raises(ValueError, match="no cell could be measured"):
        report([broken], command="", plot="")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"schema": 2}, "line 1 of .*results.jsonl has schema 2, of a later version of dmc: give another --out"),
        ({"schema": "new"}, "line 1 of .*results.jsonl is not a result of a frontier"),
    ],
)
def test_rows_of_a_later_version_are_rejected_and_stay(tmp_path, row, message):
    path = tmp_path / frontier.RESULTS
    path.write_text(json.dumps({"key": "a", "model": "m", "policy": "full", "codec": "int8", "error": "x"} | row) + "\n")
    before = path.read_text()
    with pytest.raises(ValueError, match=message), frontier._opened(path) as file:
        frontier._rows(file, "cpu", "auto")
    assert path.read_text() == before


def test_two_runs_do_not_share_a_folder(base, tmp_path):
    windows = Windows(torch.full((1, 16), 5), 12)
    cells = [Cell(base, choose("full"), choose("dense"))]
    with frontier._opened(tmp_path / frontier.RESULTS), pytest.raises(ValueError, match="another run is writing"):
        frontier.run(cells, windows, base, tmp_path, device="cpu")


# ------------------------------------------------------------------------------------------------ report


def row(model, policy, codec, share, kl, windows=(0.0, 0.0)):
    result = {
        "model_hash": model,
        "base_hash": "base",
        "policy": policy,
        "codec": codec,
        "share": share,
        "kl": kl,
        "kl_stderr": 0.1,
        "kl_windows": [kl + w for w in windows],
        "cr": 1.0,
        "perplexity": 2.0,
        "agreement": 1.0,
        "base": "base",
        "text": "text",
        "windows": 2,
        "prompt_tokens": 8,
        "scored_tokens": 4,
        "text_hash": "0",
        "base_perplexity": 2.0,
        "commit": "c",
        "windows_hash": "w",
        "versions": {"torch": "2"},
        "dtype": "float32",
        "device": "cpu",
    }
    return {"model": model, "policy": policy, "codec": codec, "result": result, "seconds": 1.0}


ROWS = [
    row("base", "full", "dense", 1.0, 0.0),
    row("base", "full", "int8", 0.5, 0.001),
    row("base", "full", "tcq-4bit", 0.3, 0.01),
    row("base", "full", "tcq-2bit", 0.2, 0.5),
    row("base", "full", "rotated", 0.15, 0.3),
    row("base", "h2o", "dense", 0.25, 0.4),
    row("base", "full", "gear-2bit", 0.35, 0.09),
    row("cr4", "dmc", "dense", 0.25, 0.2, (-0.3, 0.3)),
    row("cr4", "dmc", "tcq-4bit", 0.06, 0.25),
]


def test_words_follow_from_the_rows():
    said = words(ROWS)
    assert "At 1/2 of dense bf16: base, full x int8 leads with a KL of 0.001; the best other is cr4, dmc x dense" in said
    assert "At 1/4 of dense bf16: cr4, dmc x dense leads with a KL of 0.2000; the best other is base, full x rotated" in said
    assert "1.5 times as much" in said and "so not settled" in said
    assert "At 1/16 of dense bf16: cr4, dmc x tcq-4bit leads with a KL of 0.2500; no other family is that small" in said
    assert "DMC x its best codec has the lowest KL of all rows at 1/4, 1/8 and 1/16, not at 1/2; interpolated" in said
    assert "equal bytes, at 1/8 and 1/16, not at 1/2 and 1/4." in said  # full has .3 at .15 and .01 at .3: .05 at 1/4
    assert "tcq-4bit is on the frontier" in said
    assert "tcq-2bit is not on the frontier: it holds 0.2000 of dense at a KL of 0.5000, and base, full x rotated" in said
    assert "gear-2bit is not on the frontier: it holds 0.3500 of dense at a KL of 0.0900, and base, full x tcq-4bit" in said
    assert "no row is that small" in words(ROWS[:4])


def test_the_table_says_how_many_windows():
    title, _, *lines = table(ROWS).splitlines()
    column = title.split(" | ").index("n")
    assert len(lines) == len(ROWS) and all(line.split(" | ")[column] == "2" for line in lines)


def test_table_of_leaders_marks_one_a_line():
    lines = leaders(ROWS).splitlines()
    assert lines[0] == "| held, at most | full | h2o | dmc |"
    assert all(line.count("**") == 2 for line in lines[2:])
    assert lines[5] == "| 1/16 | – | – | **0.2500: cr4, dmc x tcq-4bit** |"


def test_table_of_sizes_interpolates():
    lines = sizes(ROWS).splitlines()
    assert lines[0] == "| held | full | h2o | dmc |"
    assert lines[2].startswith("| 1/2 | **0.001** | 0.4000 | 0.2000 |")
    expected = 0.3 * (0.01 / 0.3) ** (math.log(0.25 / 0.15) / math.log(2))
    assert float(lines[3].split("|")[2].strip(" *")) == pytest.approx(expected, abs=5e-5)
    assert lines[5] == "| 1/16 | – | – | **0.2484** |"


def test_another_plain_model_competes_under_its_own_name():
    """One column, whichever policies it ran under."""
    gqa = [row("gqa", "full", "dense", 0.5, 0.1), row("gqa", "h2o", "dense", 0.12, 0.2)]
    lines = leaders([*ROWS, *gqa]).splitlines()
    assert lines[0] == "| held, at most | full | h2o | dmc | gqa |"
    assert lines[4] == "| 1/8 | – | – | 0.2500: cr4, dmc x tcq-4bit | **0.2000: gqa, h2o x dense** |"


def test_plot_has_a_shape_for_each_policy_and_a_colour_for_each_codec(tmp_path):
    plot_frontier([*ROWS, {"model": "x", "policy": "y", "codec": "z", "error": "failed"}], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_frontier([{"error": "failed"}], tmp_path / "none.png")


# ------------------------------------------------------------------------------------------------ command line


@pytest.mark.parametrize(
    "more, message",
    [
        (["--budgets", "2"], "budget 2.0 must be above 0"),
        (["--budgets", "many"], "budget 'many' is not a share"),
        (["--codecs", "zip"], "unknown codec 'zip'"),
        (["--codecs", "gear:bits=7"], "bits must be one of"),
        (["--policies", "lru"], "unknown policy 'lru'"),
        (["--policies", "streaming:sinks"], "is not SETTING=VALUE"),
        (["--policies", "dmc"], "no model of these runs any of the policies dmc"),
        (["--windows", "99"], "give a longer text"),
        (["--text", "no.txt"], "no.txt cannot be read"),
        (["--models", "nowhere"], "has no config.json"),
        (["--prompt", "300"], "give a longer text"),
        (["config.yaml"], "config.yaml cannot be read"),
    ],
)
def test_wrong_use_is_one_sentence_and_leaves_nothing(base, text, tmp_path, monkeypatch, capsys, more, message):
    monkeypatch.chdir(tmp_path)
    assert main(command(base, text, tmp_path / "out", *more[:1], *more[1:])) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content, message",
    [
        ("budget: [1]", "has no setting budget; it can have: base, models"),
        ("- 1", "is not a table of settings"),
        ("codecs: int8", "codecs must be a list"),
        ("prompt: many", "prompt must be a whole number, got 'many'"),
        ("a: [", "as YAML"),
    ],
)
def test_wrong_configs_are_refused(base, text, tmp_path, capsys, content, message):
    (tmp_path / "config.yaml").write_text(content)
    assert main(command(base, text, tmp_path / "out")[:1] + [str(tmp_path / "config.yaml"), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_config_and_flags(base, text, tmp_path):
    (tmp_path / "config.yaml").write_text(
        f"base: {base}\ntext: {text}\nprompt: 12\nscored: 3\nwindows: 2\npolicies: [full]\ncodecs: [int8, dense]\ndevice: cpu\n"
    )
    out = tmp_path / "out"
    assert main(["frontier", str(tmp_path / "config.yaml"), "--out", str(out), "--codecs", "int8"]) == 0
    plan = json.loads((out / "plan.json").read_text())
    assert plan["codecs"] == ["int8"] and plan["prompt"] == 12 and plan["budgets"] == ["1/2", "1/4", "1/8", "1/16"]
    assert [r["codec"] for r in rows(out)] == ["int8"]
