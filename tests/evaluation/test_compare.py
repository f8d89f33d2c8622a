"""Paired differences: against numbers by hand, from the commands' own files, and what is not the same is rejected."""

import copy
import json
import math
import statistics
from pathlib import Path

import pytest

from dmc import LLM
from dmc.cli import main
from dmc.evaluation import suite
from dmc.evaluation.compare import as_text, compare, read_entries
from dmc.evaluation.haystack import standard_prose
from dmc.evaluation.seeds import policy_seed

BASE = Path(__file__).parents[2] / "checkpoints" / "base"


def report(found, kl):
    settings = {"lengths": [64], "kinds": ["single", "pairs"], "trials": 2, "seed": 0, "seeds": 1}
    samples = [
        {"kind": kind, "length": 64, "answers": [f"{kind} {number}"], "sample": f"{kind}-{number}", "found": value}
        for (kind, number), value in zip([("single", 0), ("single", 1), ("pairs", 0), ("pairs", 1)], found, strict=True)
    ]
    texts = [
        {"length": 64, "number": number, "seed": 0, "kl": two, "same_tokens": 3, "equal": 0.5, "agreement": 0.75}
        for number, two in enumerate(kl)
    ]
    long = {"lengths": [64], "trials": 2, "new_tokens": 4, "seed": 0, "seeds": 1}
    return {
        "model": "m",
        "model_hash": "a1",
        "policy": "full",
        "codec": "dense",
        "text": [{"text": "book", "kl_windows": [0.1, 0.2, 0.4], "windows_hash": "w", "base_hash": "b"}],
        "retrieval": {"haystack_hash": "h", "settings": settings, "samples": samples},
        "long": {
            "haystack_hash": "h",
            "base_hash": "b",
            "samples_hash": ["s"],
            "settings": long,
            "segments": [[0, 1], [1, 4]],
            "samples": texts,
        },
    }


FULL, OTHER = report([1, 1, 0.5, 0], [(0.4, 0.8), (0.0, 0.4)]), report([0, 1, 0.5, 0], [(0.8, 1.2), (0.4, 0.0)])
OTHER["text"][0]["kl_windows"] = [0.2, 0.2, 0.6]


def written(folder, **reports):
    for name, content in reports.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return [folder / f"{name}.json" for name in reports]


def test_differences_and_their_errors_are_those_of_the_pairs(tmp_path):
    done = {(one.measure, one.group): one for one in compare(read_entries(written(tmp_path, full=FULL, other=OTHER)))}
    assert len(done) == 1 + 3 + 4
    pairs = {
        ("KL book", "windows"): [0.1, 0.0, 0.2],
        ("retrieval found", "single 64"): [-1, 0],
        ("retrieval found", "pairs 64"): [0, 0],
        ("retrieval found", "all"): [-1, 0, 0, 0],
        ("long kl", "prompt 64"): [0.4, -0.2],
    }  # segments of 1 and 3 tokens: 0.7 and 0.3 became 1.1 and 0.1
    for key, values in pairs.items():
        one = done[key]
        assert (one.label, one.n) == ("other", len(values))
        assert one.difference == pytest.approx(statistics.fmean(values)) == pytest.approx(one.value - one.other)
        assert one.stderr == pytest.approx(statistics.stdev(values) / math.sqrt(len(values)))
    text = as_text(list(done.values()), "full")
    assert "+0.1000 ± 0.0577" in text and "-0.2500 ± 0.2500" in text and "*: more than two" in text


def changed(change):
    made = copy.deepcopy(OTHER)
    change(made)
    return made


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r["retrieval"].update(haystack_hash="x"), "found are not the same: the haystack's hash is x in other and h"),
        (lambda r: r["retrieval"]["settings"].update(seed=3), "setting seed is 3 in other and 0 in full"),
        (lambda r: r["retrieval"]["settings"].update(kinds=["single"]), r"setting kinds is \['single'\]"),
        (lambda r: r["retrieval"]["samples"][1].update(sample="z"), r"other has single 64 \(\('single 1',\), 'z'\)"),
        (lambda r: r["long"].update(samples_hash=["t"]), r"long kl are not the same: the hash of its texts is \['t'\]"),
        (lambda r: r["text"][0].update(windows_hash="v"), "the hash of the windows is v in other and w in full"),
        (lambda r: r.pop("long"), "full has long kl and other does not"),
        (lambda r: r.update(model="n", model_hash="a2"), r"model n \(hash a2\) and full with m \(a1\): --across-models"),
    ],
)
def test_other_samples_are_rejected(tmp_path, change, said):
    with pytest.raises(ValueError, match=said):
        compare(read_entries(written(tmp_path, full=FULL, other=changed(change))))


def test_models_can_be_compared_on_equal_samples(tmp_path):
    entries = read_entries(written(tmp_path, full=FULL, other=changed(lambda r: r.update(model_hash="a2"))))
    assert len(compare(entries, across_models=True)) == 8
    assert {one.label for one in compare(entries, "other", across_models=True)} == {"full"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["full.json"], "one cache alone has nothing to be compared with"),
        (["full.json", "full.json"], "is there twice"),
        (["full.json", "x.json"], "x.json cannot be read"),
        (["full.json", "empty.json"], "has no samples to compare"),
        (["full.json", "wrong.json"], "wrong.json is not a report of dmc eval"),
        (["full.json", "other.json", "--to", "h2o"], "no report or row is called 'h2o'; there are: full, other"),
        (["full.json", "other.json", "--json", "/no/such/x"], "there is no folder /no/such"),
    ],
)
def test_wrong_use_is_one_sentence(tmp_path, monkeypatch, capsys, arguments, said):
    empty = {name: FULL[name] for name in ("model", "model_hash", "policy", "codec")}
    written(tmp_path, full=FULL, other=OTHER, empty=empty, wrong={"policy": "full"})
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *arguments]) == 2
    assert said in (err := capsys.readouterr().err) and err.count("\n") == 1


def odd(change):
    row = copy.deepcopy(FULL)
    change(row)
    return row


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (odd(lambda row: row["text"][0].pop("kl_windows")), "odd.json lacks 'kl_windows': it is of another version"),
        (odd(lambda row: row.pop("model_hash")), "odd.json lacks 'model_hash'"),
        (odd(lambda row: row["long"].pop("samples_hash")), "odd.json lacks 'samples_hash'"),
        (odd(lambda row: row["retrieval"].update(samples=3)), "odd.json has fields of other kinds"),
        (odd(lambda row: row["retrieval"].update(schema=2)), "schema 2 of retrieval, this version reads up to 1"),
        (odd(lambda row: row["text"].append(dict(row["text"][0], windows_hash="v"))), "odd.json has two texts of one name"),
        (
            {
                "model": "m",
                "model_hash": "a1",
                "policy": "full",
                "codec": "dense",
                "retrieval": FULL["retrieval"] | {"samples": []},
            },
            "odd.json has no samples to compare",
        ),
    ],
)
def test_a_report_that_is_not_whole_is_one_sentence(tmp_path, row, said):
    with pytest.raises(ValueError, match=said):
        read_entries(written(tmp_path, full=FULL, odd=row))


def test_an_empty_file_of_rows_is_named(tmp_path):
    (tmp_path / "results.jsonl").write_text("")
    with pytest.raises(ValueError, match="results.jsonl holds no row that was measured"):
        read_entries([tmp_path])


def test_differences_are_written_whole_or_not_at_all(tmp_path, capsys):
    files = [str(path) for path in written(tmp_path, full=FULL, other=OTHER)]
    assert main(["compare", *files, "--json", str(tmp_path)]) == 2 and "is a folder: name a file" in capsys.readouterr().err
    assert main(["compare", *files, "--json", str(tmp_path / "out.json")]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["to"] == "full" and not list(tmp_path.glob("*.part"))


def test_the_commands_own_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    common = [
        "--suite",
        "quick",
        "--kinds",
        "single,multikey",
        "--lengths",
        "130",
        "--trials",
        "2",
        "--seeds",
        "2",
        "--device",
        "cpu",
        "--no-progress",
    ]
    for name, policy in (("full", "full"), ("random", "random:budget=20")):
        assert main(["eval", str(BASE), *common, "--policy", policy, "--json", f"{name}.json"]) == 0
    said = capsys.readouterr().out
    assert "by seed: 0:" in said and "; 1:" in said
    assert main(["compare", "full.json", "random.json", "--json", "differences.json"]) == 0
    (*_, whole) = json.loads(Path("differences.json").read_text())["differences"]
    assert (whole["label"], whole["group"], whole["n"]) == ("random", "all", 8)


def test_rows_of_a_frontier(tmp_path, capsys):
    def row(model, policy, kl):
        result = {"model_hash": model, "text": "book", "kl_windows": kl, "windows_hash": "w", "base_hash": "b"}
        return {"model": model, "policy": policy, "codec": "int8", "result": result}

    rows = [
        row("m", "full", [0.1, 0.2]),
        row("m", "h2o:share=0.25", [0.3, 0.5]),
        row("cr4", "dmc", [0.2, 0.2]),
        {"model": "m", "policy": "x", "codec": "y", "error": "ValueError: no"},
    ]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    assert main(["compare", str(tmp_path), "--to", "full x int8"]) == 2
    assert "--across-models compares them" in capsys.readouterr().err
    assert main(["compare", str(tmp_path), "--to", "full x int8", "--across-models"]) == 0
    title, h2o, dmc, _ = capsys.readouterr().out.splitlines()
    assert h2o.startswith("h2o:share=0.25 x int8") and h2o.endswith("+0.2500 ± 0.0500 *") and dmc.endswith("+0.0500 ± 0.0500")


def test_a_seed_gives_other_samples_and_other_draws():
    llm = LLM(BASE, device="cpu", policy="random", policy_settings={"budget": 16, "seed": 7}, max_batch=4)
    settings = suite.SuiteSettings(lengths=(100,), kinds=("single",), trials=2, seed=3, seeds=2)
    answered = suite.run(llm, standard_prose(), settings)
    assert [one.seed for one in answered] == [3, 3, 4, 4] and len({one.sample for one in answered}) == 4
    alone = LLM(BASE, device="cpu", policy="random", policy_settings={"budget": 16, "seed": 8}, max_batch=4)
    assert answered[2:] == suite.run(alone, standard_prose(), suite.SuiteSettings((100,), ("single",), 2, 4))
    with pytest.raises(RuntimeError), policy_seed(llm, 5):
        assert llm.cache.policy.seed == 12
        raise RuntimeError
    assert llm.cache.policy.seed == 7
