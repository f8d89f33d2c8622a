"""Long generation: against transformers with a mask, token by token, and what the command says."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from dmc import LLM
from dmc.cli import main
from dmc.evaluation import long
from dmc.evaluation.haystack import standard_prose
from tests.model import tiny

BASE, HAY = Path(__file__).parents[2] / "checkpoints" / "base", standard_prose()
SINKS, RECENT = 2, 12
SETTINGS = long.LongSettings(lengths=(30,), trials=3, new_tokens=26, seed=1)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    llm, store = LLM(BASE, policy="full", device="cpu"), tmp_path_factory.mktemp("store")
    first = long.write_full(BASE, llm.tokenizer, HAY, SETTINGS, store=store, device="cpu", dtype="fp64")
    again = long.write_full(BASE, llm.tokenizer, HAY, SETTINGS, store=store, device="cpu", dtype="fp64")
    assert len(list(store.iterdir())) == 2 and torch.equal(first[0].windows.tokens, again[0].windows.tokens)
    return first


@pytest.fixture(scope="module")
def theirs():
    return LlamaForCausalLM.from_pretrained(BASE, dtype=torch.float64)


def logprobs(model, tokens, recent):
    """Next-token log-probabilities ``[T, V]``: a query sees the first tokens and the newest ones."""
    at = torch.arange(len(tokens))
    seen = (at <= at[:, None]) & ((at < SINKS) | (at > at[:, None] - recent))
    mask = torch.where(seen, 0.0, -torch.inf).double()[None, None]
    with torch.no_grad():
        return model(torch.tensor([tokens]), attention_mask=mask).logits[0].log_softmax(-1)


def greedy(model, prompt, count, recent):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(logprobs(model, tokens, recent)[-1].argmax()))
    return tokens[len(prompt) :]


def test_equals_a_loop_over_transformers(written, theirs):
    settings = {"sinks": SINKS, "recent": RECENT}
    llm = LLM(BASE, policy="streaming", policy_settings=settings, device="cpu", dtype="fp64", max_batch=2)
    done, seen = [], []
    continued = long.run(llm, written, done.append)
    for one, row in zip(continued, written[0].windows.tokens.tolist(), strict=True):
        prompt, full = row[:30], row[30:]
        assert full == greedy(theirs, prompt, 26, 1000)
        own = greedy(theirs, prompt, 26, RECENT)
        assert one.generated == llm.tokenizer.decode(own) and one.full == llm.tokenizer.decode(full)
        same = [a == b for a, b in zip(own, full, strict=True)]
        assert one.same_tokens == (same.index(False) if False in same else 26) and one.equal == pytest.approx(sum(same) / 26)
        wanted, found = (logprobs(theirs, row[:-1], recent)[29:] for recent in (1000, RECENT))
        kl = (wanted.exp() * (wanted - found)).sum(-1)
        parts = [kl[first:end].mean().item() for first, end in long.segments(26)]
        assert one.kl == pytest.approx(parts, rel=1e-6) and max(parts) > 1e-3
        assert one.agreement == pytest.approx((wanted.argmax(-1) == found.argmax(-1)).double().mean().item())
        assert one.tokens == 55 and one.entries == SINKS + RECENT - 1  # and the next query
        seen.append((one.same_tokens, kl.mean().item()))
    assert sum(done) == 2 * 3 * 26 and min(first for first, _ in seen) < 26
    figures = long.report(continued, written, HAY, SETTINGS)
    (cell,) = figures["cells"]
    each = torch.tensor([kl for _, kl in seen], dtype=torch.float64)
    assert (cell["kl"], cell["kl_stderr"]) == pytest.approx((each.mean().item(), each.std().item() / 3**0.5))
    assert cell["n"] == 3 and cell["same_tokens_median"] == sorted(first for first, _ in seen)[1]


def test_the_full_cache_writes_its_own_text(written):
    continued = long.run(LLM(BASE, policy="full", device="cpu", dtype="fp64"), written)
    assert all(one.same_tokens == 26 and one.equal == one.agreement == 1 and max(one.kl) < 1e-9 for one in continued)
    assert long.summary(continued, 26)["unchanged"] == 3


def test_segments_cover_the_text():
    assert long.segments(1000)[:2] == [(0, 125), (125, 250)] and long.segments(3) == [(0, 1), (1, 2), (2, 3)]
    assert long.segments(26)[0][0] == 0 and [a[1] for a in long.segments(26)][:-1] == [b[0] for b in long.segments(26)][1:]


def test_new_tokens_are_those_that_the_positions_leave():
    assert long.LongSettings().count(2048) == 1000 and long.LongSettings().count(512) == 257


def test_the_command(tmp_path, capsys):
    out = tmp_path / "figures.json"
    flags = ["--lengths", "20,24", "--trials", "2", "--new-tokens", "9", "--policy", "h2o:heavy=4,recent=4", "--json", str(out)]
    arguments = [*flags, "--device", "cpu", "--no-progress", "--references", str(tmp_path / "store")]
    assert main(["eval", str(BASE), "--suite", "long", *arguments]) == 0
    figures = json.loads(out.read_text())["long"]
    assert [cell["length"] for cell in figures["cells"]] == [20, 24] and figures["all"]["n"] == 4
    assert figures["settings"]["new_tokens"] == 9 and len(figures["samples"]) == 4 and figures["all"]["cr"] > 2
    said = capsys.readouterr().out
    assert "9 tokens over this cache" in said and "(n 4): CR" in said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ("--new-tokens", "2000"),
            "a prompt of 256 tokens and 2000 new tokens need more than the model's 2048 positions: ask for at "
            "most 1793 new tokens",
        ),
        (("--lengths", "3000"), "3000 tokens and 1 new token need more than the model's 2048 positions: ask for shorter prompts"),
        (("--kinds", "single"), "--kinds are those of needles and retrieval"),
        (("--trials", "0"), "trials must be at least 1"),
        (("--lengths", "1"), "each at least 2"),
        (("--suite", "quick", "--new-tokens", "5"), "--new-tokens is for long generation"),
    ],
)
def test_bad_requests_are_one_sentence(flags, said, capsys):
    assert main(["eval", str(BASE), "--suite", "long", "--device", "cpu", "--no-progress", *flags]) == 2
    assert said in capsys.readouterr().err


def test_a_retrofit_needs_its_base(tmp_path, capsys):
    fields = tiny.config("head")
    directory = tiny.write(tmp_path / "model", fields, tiny.weights(fields))
    assert main(["eval", str(directory), "--suite", "long", "--device", "cpu", "--new-tokens", "4", "--lengths", "20"]) == 2
    assert "is a retrofit: give --base" in capsys.readouterr().err
