"""The policy of docs/tutorials/policy.md and the codec of docs/add-something.md: their files, Python and commands."""

import sys

import pytest
import torch

from dmc import LLM
from dmc.cache import codec, policy
from dmc.cache.policies.streaming import StreamingPolicy
from dmc.cli import main
from dmc.evaluation.spec import named
from tests.docs.blocks import ROOT, blocks, commands
from tests.model import tiny

PAGE = list(blocks((ROOT / "docs" / "tutorials" / "policy.md").read_text()))
FILE, USE = [block.text for block in PAGE if block.language == "python"]
ADD = blocks((ROOT / "docs" / "add-something.md").read_text())
CODEC, CODEC_TEST = [block.text for block in ADD if block.language == "python"]


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A tiny model; the file of the page can be imported as its reader imports it."""
    (tmp_path / "strided.py").write_text(FILE)
    monkeypatch.syspath_prepend(str(tmp_path))
    fields = tiny.config()
    yield tiny.write(tmp_path / "model", fields, tiny.weights(fields))
    sys.modules.pop("strided", None)


def score(path, tokens, kind):
    return LLM(path, device="cpu", policy=kind).score([tokens], prompt_tokens=1)[0]


def test_the_policy_keeps_what_the_page_says(model):
    tokens = torch.randint(3, tiny.VOCAB, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    mine = score(model, tokens, policy("strided:Strided", recent=6, stride=4))
    assert int(mine.stats.entries.max()) == int(mine.stats.entries.min()) == 14  # positions 34 to 38, and 0, 4, ... 32
    for stride, same in ((1000, StreamingPolicy(sinks=1, recent=6)), (1, policy("full"))):
        known, found = score(model, tokens, same), score(model, tokens, policy("strided:Strided", recent=6, stride=stride))
        assert torch.allclose(found.logprobs, known.logprobs, atol=1e-5)
        assert torch.equal(found.stats.entries, known.stats.entries)


def test_the_python_of_the_page_runs(model, capsys):
    exec(USE.replace("checkpoints/base", str(model)), {})
    assert capsys.readouterr().out


def test_the_commands_of_the_page_name_the_policy(model, capsys):
    asked = [
        word
        for block in PAGE
        if block.language == "bash"
        for each in commands(block.text)
        for word in each.words
        if word.startswith("strided:")
    ]
    assert len(asked) == 3
    for text in asked:
        name, settings = named(text)
        assert type(policy(name, **settings)).__name__ == "Strided"
    rest = ["--prompt", "abcdefgh", "--max-tokens", "3", "--device", "cpu", "--policy"]
    assert main(["generate", str(model), *rest, asked[0]]) == 0
    assert main(["generate", str(model), *rest, "strided:Strided:recent=1"]) == 2
    assert "recent=1 must be at least 2" in capsys.readouterr().err


def test_the_codec_and_its_test(tmp_path, monkeypatch):
    (tmp_path / "levels.py").write_text(CODEC)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(ROOT)
    found = {}
    exec(CODEC_TEST, found)
    assert (found["scores"] - found["known"]).abs().mean() > 1e-4  # pages were read, not only full precision
    made, inputs = codec("levels:Levels", bits=6), torch.randn(2, 3, 16, 64)
    blocks_of = made.encode(*inputs)
    assert made.nbytes(blocks_of) == 3 * 2 * 16 * (64 * 6 // 8 + 4)
    for x, got in zip(inputs, made.decode(blocks_of), strict=True):
        assert ((got - x).norm() / x.norm()).item() < 0.03
    with pytest.raises(ValueError, match="bits must be 3 to 8"):
        codec("levels:Levels", bits=9)
    sys.modules.pop("levels")
