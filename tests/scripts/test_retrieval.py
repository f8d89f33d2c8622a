"""scripts/retrieval.py: its texts ask for what was said, and a budget as large as the text loses nothing."""

import json

import pytest

from scripts import retrieval
from tests.model import tiny


def test_a_question_repeats_a_definition():
    one = retrieval.text(lambda piece: [ord(letter) for letter in piece], 7, 3, seed=1)
    said, asked = ("".join(map(chr, part)) for part in (one.tokens[: one.prompt], one.tokens[one.prompt :]))
    assert said.count("\n") == 8 and asked.count("\n") == 3
    assert all(line in said for line in asked.splitlines())
    values = ["".join(chr(one.tokens[place]) for place in places) for places in one.answers]
    assert len(values) == 3 and all(value[0] == " " and f"{value}\n" in said for value in values)
    assert one != retrieval.text(lambda piece: [ord(letter) for letter in piece], 7, 3, seed=2)


@pytest.mark.parametrize("read", ["prompt", "tokens"])
def test_a_budget_as_large_as_the_text_is_the_full_cache(tmp_path, capsys, read):
    fields = tiny.config()
    directory = tiny.write(tmp_path / "model", fields, tiny.weights(fields))
    output = tmp_path / "rows.json"
    arguments = ["--read", read, "--lines", 4, "--questions", 2, "--texts", 2, "--budgets", 200, 12, "--output", output]
    assert retrieval.main([str(argument) for argument in (directory, *arguments)]) == 0
    facts = json.loads(output.read_text())
    full, *rows = facts["rows"]
    assert [(row["policy"], row["budget"]) for row in rows] == [
        (policy, budget) for budget in (200, 12) for policy in ("streaming", "h2o", "tova")
    ]
    for row in rows:
        large = row["budget"] == 200
        assert (abs(row["loss"] - full["loss"]) < 1e-4) == large
        assert large or row["held_bytes"] < 0.3 * full["held_bytes"]
    assert len(capsys.readouterr().out.splitlines()) == 8


def test_wrong_use_is_one_sentence(tmp_path, capsys):
    assert retrieval.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("retrieval: ")
    with pytest.raises(SystemExit) as stop:
        retrieval.main([str(tmp_path), "--budgets", "3"])
    assert stop.value.code == 2 and "budgets of at least 8" in capsys.readouterr().err
