"""Retrofits on conversations: the loss is that of the assistant's tokens, all tokens count for the CR, in every layout, and a
killed run continues exactly."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from data import batches, tokens
from dmc.training.config import load
from tests.data.chats import PLAIN, conversations, write_chats
from tests.training.helpers import SMALL, assert_same_run, evaluations, metrics, tiny_model, weights

ONE_STEP = ("dmc.ramp_steps_per_unit=1", "dmc.hold_steps=0")
UNDER_TEST = ("data.loss_on=assistant", "optim.lr=3e-3", "run.save_every=4")


@pytest.fixture(scope="module")
def run(tmp_path_factory, rank_server):
    """Runs train.py on conversations; returns the run's directory."""
    tmp = tmp_path_factory.mktemp("chat")
    tiny_model(tmp / "model", num_hidden_layers=4, pad_token_id=None)  # the template uses the token, which must have an embedding
    (tmp / "model" / "chat_template.jinja").write_text(PLAIN)
    write_chats(tmp / "chats.jsonl", conversations(200))

    def start(name, *extra, processes=1, codes=None, **hook):
        started = rank_server.start(
            tmp / f"{name}-log",
            [
                "--model",
                tmp / "model",
                "--output",
                tmp / name,
                f"data.text={tmp / 'chats.jsonl'}",
                "data.chat=true",
                f"data.cache={tmp / 'cache'}",
                *SMALL,
                *extra,
            ],
            ranks=processes,
            **hook,
        )
        assert started.wait() == (codes or [0] * processes), started.said()
        return tmp / name

    return start


@pytest.fixture(scope="module")
def reference(run):
    return run("one", *UNDER_TEST)


def source(output):
    """The batches of a run."""
    config = load(
        overrides=[
            f"data.text={output.parent / 'chats.jsonl'}",
            f"data.cache={output.parent / 'cache'}",
            *(arg for arg in SMALL if "=" in arg),
        ]
    )
    tokenizer = tokens.load_tokenizer(output.parent / "model")
    texts = tokens.corpora(config.data.text, "", tokenizer, config.data.cache, chat=True, loss_on="assistant")
    return batches.Source(*texts, 64, config.optim, config.log, 0)


def loop(model, found):
    """``(mean cross entropy of the scored labels, how many, of how many)``, document by document by transformers' own model."""
    total, count, every = 0.0, 0, 0
    for batch in found:
        for row, labels, starts, scored in zip(batch.tokens, batch.labels, batch.starts, batch.scored, strict=True):
            bounds = [*starts.nonzero().flatten().tolist(), len(row)]
            for a, b in zip(bounds, bounds[1:], strict=False):
                losses = F.cross_entropy(model(row[None, a:b]).logits[0], labels[a:b], reduction="none")
                total = total + losses[scored[a:b]].sum()
            count, every = count + int(scored.sum()), every + len(row)
    return total / count, count, every


def test_the_evaluation_is_that_of_a_loop_over_documents(reference):
    model = AutoModelForCausalLM.from_pretrained(reference.parent / "model").eval()
    with torch.no_grad():
        loss, count, every = loop(model, source(reference).evaluation(rank=0, ranks=1))
    assert 0 < count < every
    assert evaluations(reference)[0]["eval_perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert len(lines := metrics(reference)) == 8 and lines[-1]["measured_cr"] > 1.1
    assert all(1 <= e["eval_cr"] < 8 for e in evaluations(reference))
    assert "loss on" in (said := (reference.parent / "one-log" / "rank0.txt").read_text()) and "its assistant turns" in said


def test_a_step_of_training_is_that_of_a_loop_over_documents(run):
    """Loss and gradient are means over the assistant's tokens of the step, not over all of them."""
    output = run("sft", "--method", "none", "run.steps=1", "data.loss_on=assistant")
    model = AutoModelForCausalLM.from_pretrained(output.parent / "model")
    loss, _, _ = loop(model, source(output).micro_batches(0, rank=0, ranks=1))
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    (line,) = metrics(output)
    assert line["lm_loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)


def test_the_compression_loss_counts_all_tokens(run):
    """Without the other losses its gradient is the same, whatever share of the tokens these count."""
    only = ("distill.weight=1e-12", *ONE_STEP)
    everything, assistant = (run(f"cr-{on}", f"data.loss_on={on}", *only) for on in ("everything", "assistant"))
    (first, *_), (second, *_) = metrics(everything), metrics(assistant)
    assert first["grad_norm"] > 1e-4 and first["cr_loss"] > 0
    assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-4)


@pytest.mark.parametrize(
    "layout",
    [
        ("parallel.context=2",),
        *(
            pytest.param(one, marks=pytest.mark.slow)
            for one in [
                (),
                ("parallel.tensor=2", "parallel.sequence=true"),
                ("parallel.pipeline=2",),
                ("parallel.pipeline=2", "parallel.virtual=2"),
            ]
        ),
    ],
    ids=lambda layout: "-".join(part.split(".")[1] for part in layout) or "data",
)
def test_two_processes_are_the_run_of_one(run, reference, layout):
    output = run("-".join(["two", *layout]), *UNDER_TEST, *layout, processes=2)
    assert_same_run(output, reference, tolerance=2e-4, absolute=1e-5)
    for mine, other in zip(evaluations(output), evaluations(reference), strict=True):
        assert mine["eval_perplexity"] == pytest.approx(other["eval_perplexity"], rel=2e-4)


def test_a_killed_run_continues_exactly(run, reference):
    kill = {"step": 7, "ranks": [0], "action": "signal", "value": "SIGKILL"}
    run("killed", *UNDER_TEST, codes=[-9], hook="at_step", settings=kill)
    output = run("killed", *UNDER_TEST, "run.resume=auto")
    assert_same_run(output, reference, tolerance=0, steps=4)
    theirs = weights(reference)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in weights(output).items())


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (("data.loss_on=everything",), "was trained with data.loss_on=assistant, here it is everything: a resumed run keeps it"),
        (("data.bos=true", "data.loss_on=assistant"), "the chat template writes the first tokens: set data.bos=auto"),
        (("data.chat=false", "data.loss_on=assistant"), "line 1 of .* has no column 'text', it has id, messages"),
        (("data.loss_on=user",), "data.loss_on is 'user': it must be one of everything, assistant"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(run, reference, extra, said):
    output = run("one", *UNDER_TEST, *extra, "run.resume=auto", codes=[2])
    (line,) = [line for line in (output.parent / "one-log" / "rank0.txt").read_text().splitlines() if line.startswith("error")]
    assert re.search(said, line), line
