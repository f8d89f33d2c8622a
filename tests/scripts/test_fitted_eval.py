"""The measure of fitted decisions: each method token by token, and what a row says."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from dmc.fitted import FittedDecisions
from dmc.model import Decoder
from dmc.model.fingerprint import model_hash
from scripts import fitted_eval
from tests.model import tiny

LENGTH = 40


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    fields = tiny.config()
    return tiny.write(tmp_path_factory.mktemp("model"), fields, tiny.weights(fields))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("decisions") / "decisions.safetensors"


@pytest.fixture(scope="module")
def decisions(directory, file):
    draw = torch.Generator().manual_seed(0)
    fitted = FittedDecisions(
        torch.randn(2, 2, 32, generator=draw) / 6,
        torch.randn(2, 2, 32, generator=draw) / 6,
        torch.zeros(2, 2),
        5,
        2,
        torch.linspace(-2, 2, 100),
        model_hash(directory),
        {"text": "x", "tokens": 7},
    )
    fitted.save(file)
    return fitted


def heads(seed=0):
    draw = torch.Generator().manual_seed(seed)
    query, key, value = torch.randn(4, LENGTH, 8, generator=draw), *torch.randn(2, 2, LENGTH, 8, generator=draw)
    angles = torch.outer(torch.arange(LENGTH).float(), 10000.0 ** -(torch.arange(4) / 4)).repeat(1, 2)
    return fitted_eval.Heads(torch.randn(LENGTH, 32, generator=draw), query, key, value, (angles.cos(), angles.sin()), 1)


def rotated(x, table):
    cos, sin = table
    return torch.stack([row * c + torch.cat([-row[4:], row[:4]]) * s for row, c, s in zip(x, cos, sin, strict=True)])


def token_by_token(x, visible):
    """Attention of each query head over the tokens that ``visible(i, head, received)`` names."""
    out = torch.zeros_like(x.query)
    received = torch.zeros(2, LENGTH)
    for i in range(LENGTH):
        for head in range(2):
            tokens = sorted(visible(i, head, received))
            total = torch.zeros(len(tokens))
            for query in (2 * head, 2 * head + 1):
                q = rotated(x.query[query], x.rope)[i]
                weights = (rotated(x.key[head], x.rope)[tokens] @ q / math.sqrt(8)).softmax(0)
                out[query, i] = weights @ x.value[head, tokens]
                total += weights
            received[head, tokens] += total
    return out


def test_full():
    x, counted = heads(), fitted_eval.Counted()
    torch.testing.assert_close(fitted_eval.full(x, counted), token_by_token(x, lambda i, *_: range(i + 1)))
    assert counted == fitted_eval.Counted(2 * LENGTH, 2 * LENGTH)


def test_evict(decisions):
    x, counted = heads(), fitted_eval.Counted()
    scores = x.hidden @ decisions.arrival[1].T
    scores[:-5] += x.hidden[5:] @ decisions.late[1].T
    kept = [[t for t in range(LENGTH) if t < 2 or scores[t, head] >= 0.3] for head in range(2)]
    got = fitted_eval.evict(decisions, 0.3)(x, counted)
    expected = token_by_token(x, lambda i, head, _: {t for t in kept[head] if t <= i} | set(range(max(0, i - 5), i + 1)))
    torch.testing.assert_close(got, expected)
    last = set(range(LENGTH - 6, LENGTH))
    assert counted == fitted_eval.Counted(2 * LENGTH, sum(len(set(part) | last) for part in kept))
    assert 20 < counted.entries < 60


def test_merge_at_the_ends_of_the_threshold_is_full(decisions):
    x = heads()
    counted = fitted_eval.Counted()
    got = fitted_eval.merge(decisions, -math.inf, 1.0, protect=True)(x, counted)
    torch.testing.assert_close(got, fitted_eval.full(x, fitted_eval.Counted()))
    assert counted.entries == 2 * LENGTH


@pytest.mark.parametrize("protect", [True, False])
def test_merge_last_query(decisions, protect):
    """The last query of a sequence sees the window, and behind it what Algorithm 1 of the paper made of the other tokens."""
    x, counted = heads(), fitted_eval.Counted()
    got = fitted_eval.merge(decisions, 0.3, 0.5, protect=protect)(x, counted)
    behind, entries = LENGTH - 6, 0
    scores = (x.hidden @ decisions.arrival[1].T)[:behind] + x.hidden[5:][:behind] @ decisions.late[1].T
    alpha = (scores < 0.3).float().T
    alpha[:, : 2 + protect] = 0
    omega = torch.exp(0.5 * (scores - scores[2:].amax(0))).T
    omega[:, :2] = 1
    for head in range(2):
        states, start = [], 0
        for t in range(1, behind + 1):
            if t == behind or alpha[head, t] == 0:
                weights = omega[head, start:t] / omega[head, start:t].sum()
                key = rotated(torch.zeros(LENGTH, 8).index_put((torch.tensor(t - 1),), weights @ x.key[head, start:t]), x.rope)
                states.append((key[t - 1], weights @ x.value[head, start:t]))
                start = t
        entries += len(states) + 6
        keys = torch.cat([torch.stack([key for key, _ in states]), rotated(x.key[head], x.rope)[behind:]])
        values = torch.cat([torch.stack([value for _, value in states]), x.value[head, behind:]])
        for query in (2 * head, 2 * head + 1):
            weights = (keys @ rotated(x.query[query], x.rope)[-1] / math.sqrt(8)).softmax(0)
            torch.testing.assert_close(got[query, -1], weights @ values)
    assert counted == fitted_eval.Counted(2 * LENGTH, entries)


def test_streaming():
    x, counted = heads(), fitted_eval.Counted()
    got = fitted_eval.streaming(4.0)(x, counted)
    torch.testing.assert_close(got, token_by_token(x, lambda i, *_: set(range(min(4, i + 1))) | set(range(max(0, i - 5), i + 1))))
    assert counted == fitted_eval.Counted(80, 20)


def test_h2o():
    """10 tokens: 5 recent ones, and of the older ones those that received most."""
    x, counted, alive = heads(), fitted_eval.Counted(), [set(), set()]

    def visible(i, head, received):
        if len(alive[head]) > 10:
            old = [t for t in alive[head] if t < i - 5]
            alive[head].remove(min(old, key=lambda t: received[head, t]))
        alive[head].add(i)
        return set(alive[head])

    got = fitted_eval.h2o(4.0)(x, counted)
    torch.testing.assert_close(got, token_by_token(x, visible))
    assert counted == fitted_eval.Counted(80, 20)


def test_random_keeps_its_share(decisions):
    counted, method = fitted_eval.Counted(), fitted_eval.random_eviction(decisions, 2.0)
    for seed in range(50):
        method(heads(seed), counted)
    assert counted.tokens / counted.entries == pytest.approx(2, abs=0.1)


def test_full_model_is_the_engine_s(directory):
    tokens = torch.randint(3, 90, (LENGTH,), generator=torch.Generator().manual_seed(0))
    model = Decoder.load(directory, dtype=torch.float32)
    hidden = fitted_eval.forward(model, tokens, fitted_eval.full, fitted_eval.Counted())
    fields, tensors = json.loads((directory / "config.json").read_text()), load_file(directory / "model.safetensors")
    logits, _ = tiny.token_by_token(fields, tensors, tokens.tolist())
    torch.testing.assert_close(model.logits(hidden), logits.float(), rtol=1e-3, atol=1e-3)


def test_rows(directory, decisions, file, tmp_path, capsys):
    text, out = tmp_path / "text.txt", tmp_path / "rows.jsonl"
    text.write_text("".join(chr(40 + i * 7 % 60) for i in range(500)))
    command = [str(directory), "--text", str(text), "--length", "40", "--sequences", "3", "--out", str(out), "--note", "why"]
    every = ["--how", *fitted_eval.METHODS, "--cr", "1", "2.5", "--power", "0", "1"]
    assert fitted_eval.main([*command, "--decisions", str(file), *every]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["how"], row["target_cr"], row.get("power")) for row in rows] == [
        ("evict", 1, None),
        ("evict", 2.5, None),
        ("merge", 1, 0),
        ("merge", 1, 1),
        ("merge", 2.5, 0),
        ("merge", 2.5, 1),
        ("h2o", 1, None),
        ("h2o", 2.5, None),
        ("streaming", 1, None),
        ("streaming", 2.5, None),
        ("random", 1, None),
        ("random", 2.5, None),
    ]
    for row in rows:
        assert row["note"] == "why" and row["sequences"] == 3 and row["text"] == "text.txt" and row["base_perplexity"] > 1
        assert len(row["kl_last_quarter_of_each"]) == 3
        if row["target_cr"] == 1:
            assert row["cr"] == 1 and abs(row["kl"]) < 1e-5
        else:
            assert row["cr"] > 1.5 and row["kl"] > 1e-4
    for arguments, said in (
        (["--how", "evict"], "evict need --decisions"),
        (["--decisions", str(file), "--cr", "30"], "largest CR at this length is 5.00"),
        (["--decisions", str(file), "--text", str(tmp_path / "no")], "cannot be read"),
    ):
        assert fitted_eval.main([*command, *arguments]) == 2
        assert said in capsys.readouterr().err
    assert len(out.read_text().splitlines()) == len(rows)
