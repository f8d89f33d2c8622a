"""What a BOS token is worth: the script on a tiny model, and the page against the numbers that it shows."""

import json
import sys

import pytest
import torch
from transformers import LlamaForCausalLM

from scripts import bos_effect
from tests.data.prepared import bos_tokenizer, texts, write_jsonl
from tests.training.helpers import ROOT, tiny_config, tiny_model

PAGE = ROOT / "docs" / "results" / "bos.md"


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["bos_effect.py", *map(str, arguments)])
    bos_effect.main()


def test_the_page_shows_the_numbers():
    result = json.loads(PAGE.with_suffix(".json").read_text())
    assert bos_effect.table(result) in PAGE.read_text() and result["command"] in PAGE.read_text()
    assert {row["model"] for row in result["rows"]} == {"base", "trained with BOS", "trained without"}


def test_losses_are_of_the_same_tokens_with_and_without():
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config()).eval()
    documents = [torch.randint(2, 2048, (length,)).tolist() for length in (150, 200)]
    for begin in ([], [0], [0, 1]):
        expected = {name: [] for name in bos_effect.BUCKETS}
        for ids in documents:
            logits = model(torch.tensor([[*begin, *ids]])).logits[0].double().log_softmax(-1)
            for place in range(1, len(ids)):
                loss = -logits[len(begin) + place - 1, ids[place]].item()
                for name, (first, stop) in bos_effect.BUCKETS.items():
                    if first <= place and (stop is None or place < stop):
                        expected[name].append(loss)
        found = bos_effect._scored(model, documents, begin)
        assert found == pytest.approx({name: sum(all_) / len(all_) for name, all_ in expected.items()}, abs=1e-5)


def test_a_tokenizer_without_a_bos_is_refused(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, tiny_model(tmp_path / "model"), write_jsonl(tmp_path / "a.jsonl", texts(20)))
    assert ended.value.code == 2 and "adds no BOS token: name a model whose tokenizer does" in capsys.readouterr().err


@pytest.mark.slow
def test_a_small_run(tmp_path, monkeypatch, capsys):
    model = tiny_model(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    for path in bos_tokenizer(tmp_path / "tokenizer").glob("tokenizer*"):
        path.rename(model / path.name)
    text = write_jsonl(tmp_path / "a.jsonl", texts(80, words=100))
    flags = {"runs": tmp_path / "runs", "output": tmp_path / "out.json", "steps": 2, "batch": 2, "length": 160, "seeds": 1}
    run(monkeypatch, model, text, *(part for name, value in flags.items() for part in (f"--{name}", value)))
    result = json.loads((tmp_path / "out.json").read_text())
    assert [(row["model"], row["prompt"]) for row in result["rows"]] == [
        (model, prompt) for model in ("base", "trained with BOS", "trained without") for prompt in ("with BOS", "without")
    ]
    assert result["held_out"] == 4 and bos_effect.table(result) in capsys.readouterr().out
