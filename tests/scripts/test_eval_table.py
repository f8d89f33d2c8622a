"""The evaluation table: its questions, its rows, its errors."""

import json
import statistics
from pathlib import Path

import pytest

from scripts import eval_table

BASE = "checkpoints/base"


def test_questions_have_one_right_answer_that_follows_the_text(tmp_path):
    eval_table.write_choices(tmp_path, 5)
    questions = [json.loads(line) for line in (tmp_path / "next_line.jsonl").read_text().splitlines()]
    assert len(questions) == 5
    sources = ["\n".join(document.text.splitlines()) for document in eval_table.split(eval_table.documents(("src",)))[1]]
    for question in questions:
        assert len(set(question["choices"])) == 4
        assert any(question["text"] + question["choices"][question["answer"]] in source for source in sources)


def test_other_models_run_under_what_they_were_trained_for(tmp_path, monkeypatch):
    monkeypatch.setattr(eval_table, "runnable", lambda path: ["dms"] if path.name == "dms4" else ["full", "h2o"])
    rows = eval_table.runs(BASE, [tmp_path / "dms4", tmp_path / "gqa1"])
    assert list(rows)[: len(eval_table.CACHES)] == list(eval_table.CACHES)
    for name, codec in (("GEAR 4 bit", ["gear-4bit"]), ("TCQ 4 bit", ["tcq", "--bits", "4"])):
        assert rows[f"dms4, dms, {name}"] == [str(tmp_path / "dms4"), "--policy", "dms", "--codec", *codec]
        assert rows[f"full, {name}"] == [BASE, "--policy", "full", "--codec", *codec]
    assert rows["gqa1, full, dense bf16"][:3] == [str(tmp_path / "gqa1"), "--policy", "full"]


def test_table_gives_standard_errors():
    margins = [1.0, 2.0, 6.0]
    needle = {"exact": 0.0, "choice": 0.5, "margin": 3.0, "cr": 2.0, "held_bytes": 1234.5, "byte_ratio": 1.5}
    report = {
        "needle": {"kinds": {"passkey": needle}, "trials": [{"margin": margin} for margin in margins]},
        "tasks": {"tasks": {"arc": {"metrics": {"acc": 0.25}, "stderr": {"acc": 0.125}}}},
    }
    lines = eval_table.table({"full": report}).splitlines()
    error = statistics.stdev(margins) / 3**0.5
    assert lines[0].startswith("| cache | exact | choice | margin, nats | arc, acc | CR |")
    assert lines[2] == f"| full | 0.00 | 0.50 | +3.00 ± {error:.2f} | 0.250 ± 0.125 | 2.00 | 1,234 | 1.50 |"


@pytest.mark.parametrize("more", [["--tasks", "arc"], ["--task-dir", "somewhere"]])
def test_tasks_need_their_folder(more, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("sys.argv", ["eval_table.py", BASE, "--out", str(tmp_path / "out"), *more])
    with pytest.raises(SystemExit) as stopped:
        eval_table.main()
    assert stopped.value.code == 2 and "belong together" in capsys.readouterr().err


def test_what_is_no_model_is_refused_before_anything_is_written(monkeypatch, tmp_path, capsys):
    out = tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["eval_table.py", BASE, "--out", str(out), "--models", str(tmp_path / "none")])
    assert eval_table.main() == 2 and "none" in capsys.readouterr().err and not out.exists()


def test_tasks_of_ones_own_in_a_new_folder(monkeypatch, tmp_path):
    """Each row is one `dmc eval` of these tasks; its report is read back."""
    calls = []

    def fake(words):
        calls.append(words)
        report = {
            "needle": {
                "kinds": {"passkey": {"exact": 0, "choice": 0, "margin": 0, "cr": 1, "held_bytes": 1, "byte_ratio": 1}},
                "trials": [{"margin": 0.0}, {"margin": 0.0}],
            },
            "tasks": {"tasks": {"arc": {"metrics": {"acc": 1.0}, "stderr": {"acc": 0.0}}}},
        }
        Path(words[words.index("--json") + 1]).write_text(json.dumps(report))
        return 0

    monkeypatch.setattr(eval_table, "dmc", fake)
    out = tmp_path / "new" / "out"
    monkeypatch.setattr("sys.argv", ["eval_table.py", BASE, "--out", str(out), "--tasks", "arc", "--task-dir", "mine"])
    assert eval_table.main() == 0
    assert len(calls) == len(eval_table.CACHES) and (out / "table.md").read_text().count("1.000 ± 0.000") == len(calls)
    assert all(words[words.index("--task-dir") + 1] == "mine" and words[words.index("--limit") + 1] == "48" for words in calls)
