"""The script that measures KL per byte: what it counts, what it refuses, and that it resumes."""

import hashlib
import json
import sys

import pytest
import torch

from dmc.cache import codec
from scripts import codec_search

BASE = "checkpoints/base"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("def read(path):\n    return open(path).read()\n\n" * 40)
    return path


def search(monkeypatch, capsys, text, *options):
    results = text.with_suffix(".jsonl")
    monkeypatch.setattr(
        sys,
        "argv",
        ["codec_search.py", BASE, "--text", str(text), "--prompt", "100", "--scored", "40", "--results", str(results), *options],
    )
    codec_search.main()
    return capsys.readouterr().out, [json.loads(line) for line in results.read_text().splitlines()]


def test_kl_falls_with_bits_and_results_are_resumed(monkeypatch, capsys, text):
    recipes = ("--recipe", "dense:dtype=fp32", "--recipe", "tcq:bits=8", "--recipe", "tcq-4bit", "--recipe", "tcq-2bit")
    printed, rows = search(monkeypatch, capsys, text, *recipes)
    dense, eight, four, two = (row["kl"] for row in rows)
    assert max(abs(dense), eight) < four / 10 < two / 10  # dense: but for the sinks, which are in bf16
    assert printed.count("\n") == 6 and "`tcq-2bit` | 64 | " in printed
    monkeypatch.setattr(codec_search.pretrained, "load_model", None)  # nothing may be measured again
    assert search(monkeypatch, capsys, text, *recipes) == (printed, rows)


def test_results_of_version_0_1_are_read_under_the_names_of_today(monkeypatch, capsys, text):
    """What was measured as gear-4bit is TCQ's; GEAR itself is measured."""
    _, (row,) = search(monkeypatch, capsys, text, "--recipe", "tcq-4bit")
    tokens = codec_search.window(codec_search.pretrained.load_tokenizer(BASE), text, 140).flatten().tolist()
    words = ["base", "gear-4bit", 64, 4, 100, *tokens]
    key = hashlib.sha256(json.dumps(words).encode()).hexdigest()[:16]
    text.with_suffix(".jsonl").write_text(json.dumps(row | {"key": key, "recipe": "gear-4bit", "kl": 0.125}) + "\n")
    printed, rows = search(monkeypatch, capsys, text, "--recipe", "tcq-4bit", "--recipe", "gear-4bit")
    assert len(rows) == 2 and rows[1]["recipe"] == "gear-4bit" and rows[1]["kl"] != 0.125 and rows[1]["bits"] > 6
    assert "| `tcq-4bit` | 64 | 4.688 | **0.1250** |" in printed and "`gear-4bit` | 64 | " in printed


def test_every_byte_of_the_prompt_is_counted():
    """A last page of 32 entries, sinks in bf16, and nothing left as it was."""
    keys, values = torch.randn(2, 3, 2, 100, 64, generator=torch.Generator().manual_seed(0))
    made = codec("tcq-3bit")
    k, v, held = codec_search.compress(made, keys, values, 64, 4)
    expected = sum(made.nbytes(made.encode(*torch.randn(2, n, 64))) for n in (64, 32)) + 4 * 64 * 2 * 2
    assert held == 3 * 2 * expected
    assert torch.equal(k[:, :, :4], keys[:, :, :4].bfloat16().float())
    assert k.shape == keys.shape and ((v[:, :, 4:] - values[:, :, 4:]).abs().amax(-1) > 0).all()


def test_what_is_refused(monkeypatch, capsys, text):
    with pytest.raises(ValueError, match="name=value"):
        codec_search.parse("gear:bits")
    with pytest.raises(ValueError, match="no setting bit;"):
        codec_search.parse("gear:bit=4")
    text.write_text("short")
    with pytest.raises(SystemExit, match="2"):
        search(monkeypatch, capsys, text)
    assert "text.txt has 2 tokens and 140 are needed: give a longer text" in capsys.readouterr().err


def test_the_named_recipes_exist():
    for recipes in codec_search.SETS.values():
        assert all(map(codec_search.parse, recipes))
