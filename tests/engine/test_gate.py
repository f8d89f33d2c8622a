"""Policy gate on a whole model, against a dense computation; the commands; and what is rejected."""

import json
from pathlib import Path

import pytest
import torch

from dmc import LLM
from dmc.cli import main
from dmc.engine.runner import Chunk
from dmc.evaluation.fit_decisions import FitSettings, fit_decisions
from dmc.evaluation.sequences import read_sequences
from dmc.functional_dms import attention
from dmc.model import Decoder
from dmc.model.fingerprint import model_hash
from tests.cache.decisions import random_decisions
from tests.model import tiny

BASE = Path(__file__).parents[2] / "checkpoints" / "base"
WINDOW, SINKS, LENGTH = 7, 3, 60


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    fields = tiny.config()
    return tiny.write(tmp_path_factory.mktemp("model"), fields, tiny.weights(fields))


@pytest.fixture(scope="module")
def retrofitted(tmp_path_factory):
    fields = tiny.config("neuron")
    return tiny.write(tmp_path_factory.mktemp("retrofitted"), fields, tiny.weights(fields))


@pytest.fixture(scope="module")
def file(directory, tmp_path_factory):
    path = tmp_path_factory.mktemp("decisions") / "decisions.safetensors"
    random_decisions(window=WINDOW, sinks=SINKS, model=model_hash(directory)).save(path)
    return path


def masked(model, fitted, threshold, tokens):
    """Logits ``[T, V]`` and entries ``[L, H]`` of a forward pass over all tokens at once; scores token by token."""
    x, rope, entries = model.embedding[tokens], model.rope(torch.arange(len(tokens))), []
    for index in range(len(model.layers)):
        hidden = model.normed(x, index).double()
        gone = torch.zeros(fitted.arrival.shape[1], len(tokens))
        for t in range(SINKS, len(tokens) - WINDOW):
            score = fitted.arrival[index].double() @ hidden[t] + fitted.bias[index]
            gone[:, t] = (score + fitted.late[index].double() @ hidden[t + WINDOW]) < threshold
        entries.append(len(tokens) - gone.sum(-1))

        def attend(_, query, key, value, *__, gone=gone):
            parts = (part.transpose(0, 1)[None] for part in (query, key, value))
            return attention(*parts, gone[None], window=WINDOW, rope=rope)[0].transpose(0, 1)

        x = model.block(x, index, attend)
    return model.logits(model.finish(x, len(model.layers), attend)), torch.stack(entries)


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize(("prompt", "chunk"), [(1, 1), (25, 6), (LENGTH, LENGTH)])
def test_logits_and_entries_are_the_dense_ones(directory, ahead, prompt, chunk):
    fitted = random_decisions(window=WINDOW, sinks=SINKS, model=model_hash(directory), ahead=ahead)
    llm = LLM(
        directory,
        policy="gate",
        decisions=fitted,
        target_cr=2,
        policy_settings={"length": LENGTH},
        page_size=4,
        device="cpu",
        dtype="fp32",
    )
    tokens = torch.randint(3, 90, (LENGTH,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want, entries = masked(Decoder.load(directory, dtype=torch.float32), fitted, fitted.threshold(2, LENGTH), tokens)
    runner, made, hidden = llm.engine.runner, llm.cache.prompt(), []
    for start in range(0, prompt, chunk):
        part = tokens[start : min(prompt, start + chunk)].tolist()
        hidden.append(runner.step([], [], [], [Chunk(made, part)])[1][0])
    slot = llm.cache.load(made)
    for position in range(prompt, LENGTH):
        hidden.append(runner.step([slot], [int(tokens[position])], [position])[0])
    torch.testing.assert_close(runner.logits(torch.cat(hidden)), want, rtol=1e-4, atol=1e-4)
    assert torch.equal(llm.cache.entries(slot).float(), entries)
    assert 2 * LENGTH * 2 * 0.3 < entries.sum() < 2 * LENGTH * 2 * 0.9  # a part is gone, a part is not


def test_the_commands_take_the_file(directory, file, tmp_path, capsys):
    prompt = ["--prompt", "a b c d e f g h i j k l m n o p" * 2, "--device", "cpu", "--json"]
    figures = []
    for given in (
        ["--policy", "gate", "--decisions", str(file), "--target-cr", "3"],
        ["--policy", f"gate:decisions={file},target_cr=3,length=1024"],
    ):
        assert main(["inspect", str(directory), *given, *prompt]) == 0
        figures.append(json.loads(capsys.readouterr().out))
    assert figures[0] == figures[1] and figures[0]["policy"] == "gate" and figures[0]["cr"] > 1.1
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(33 + i * i % 94) for i in range(200)))
    arguments = [
        "frontier",
        "--base",
        str(directory),
        "--text",
        str(text),
        "--out",
        str(tmp_path / "out"),
        "--prompt",
        "40",
        "--scored",
        "4",
        "--windows",
        "1",
        "--codecs",
        "dense",
        "--device",
        "cpu",
        "--policies",
        "full",
        f"gate:decisions={file},target_cr=3",
    ]
    assert main(arguments) == 0
    full, gate = (json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines())
    assert gate["policy"].startswith("gate:") and gate["result"]["cr"] > full["result"]["cr"] == 1
    random_decisions(window=WINDOW, sinks=SINKS, model=model_hash(directory), seed=1).save(file)  # another file, same name
    assert main(arguments) == 0
    assert len((tmp_path / "out" / "results.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--policy", "gate"], "policy gate needs decisions"),
        (["--policy", "gate", "--decisions", "FILE"], "policy gate needs target_cr"),
        (["--decisions", "FILE", "--target-cr", "3"], "decisions and target_cr are for policy gate, and no policy was given"),
        (["--policy", "h2o", "--target-cr", "3"], "target_cr is for policy gate, and policy h2o was given"),
        (["--policy", "gate:decisions=FILE,target_cr=2", "--target-cr", "3"], "target_cr is given twice"),
        (["--policy", "gate", "--decisions", "FILE", "--target-cr", "300"], "target CR 300 is impossible at 1024 tokens"),
        (["--policy", "gate", "--decisions", "none", "--target-cr", "3"], "none is missing"),
    ],
)
def test_wrong_use(directory, file, capsys, given, words):
    given = [part.replace("FILE", str(file)) for part in given]
    assert main(["generate", str(directory), "--prompt", "a", "--device", "cpu", *given]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_wrong_models(directory, retrofitted, file, capsys):
    common = ["--prompt", "a", "--device", "cpu", "--policy", "gate", "--decisions", str(file), "--target-cr", "3"]
    assert main(["generate", str(retrofitted), *common]) == 2
    assert "was retrofitted with dmc and makes decisions of its own" in capsys.readouterr().err
    with pytest.raises(ValueError, match="makes decisions of its own"):
        LLM(retrofitted, policy=LLM(directory, policy="gate", decisions=file, target_cr=3, device="cpu").cache.policy)
    other = random_decisions(window=WINDOW, heads=1, model="f" * 16)
    with pytest.raises(ValueError, match="model fingerprint ffffffffffffffff, not .*key/value heads 1, not 2"):
        LLM(directory, policy="gate", decisions=other, target_cr=3, device="cpu")
    with pytest.raises(ValueError, match="and a policy that is ready made was given"):
        LLM(directory, policy=LLM(directory, device="cpu").cache.policy, decisions=file, target_cr=3)


@pytest.mark.slow
@pytest.mark.parametrize("merge", [False, True])
def test_the_base_model_reaches_its_target(tmp_path_factory, merge):
    """The CR on the next part of the text is near the target; 4,096 tokens of calibration give 18 % more than asked for."""
    text = read_sequences("stdlib", BASE, length=512, count=9)
    fitted = fit_decisions(BASE, type(text)(text.tokens[:8], text.name, text.text_hash), FitSettings(window=32, min_queries=32))
    llm = LLM(BASE, policy="gate", decisions=fitted, target_cr=2.5, policy_settings={"merge": merge}, device="cpu", dtype="fp32")
    (score,) = llm.score([text.tokens[8].tolist()], prompt_tokens=400)
    assert score.stats.cr == pytest.approx(2.5, rel=0.3)
    (full,) = LLM(BASE, device="cpu", dtype="fp32").score([text.tokens[8].tolist()], prompt_tokens=400)
    assert float(full.logprobs.mean() - score.logprobs.mean()) < 0.2
