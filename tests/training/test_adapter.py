"""Adapter mode: the base model stays as it is, bit for bit, and only the added decision heads learn."""

import json

import pytest
import torch

from dmc.training.config import load
from dmc.training.setup import attach_teacher, build_student
from dmc.weights import Weights
from tests.checkpoints.tiny import tiny
from tests.training.helpers import assert_same_run, metrics, small_run, weights
from tests.training.models import hf_config

ADAPTER = ("dmc.train=decision", "dmc.hold_steps=14", "optim.lr=1e-3", "optim.weight_decay=0.1")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("adapter")
    return tmp, small_run(tmp, "adapter", *ADAPTER)


def test_only_the_decision_heads_learn(run):
    tmp, output = run
    original, trained = Weights(tmp / "model"), weights(output)
    heads = {name for name in trained if name.endswith("decision.weight")}
    assert len(heads) == 2 and all(trained[name].abs().max() > 0 for name in heads)
    for name in trained.keys() - heads:
        assert torch.equal(trained[name], original(name)), name
    assert metrics(output)[-1]["measured_cr"] > 1.5


def test_its_teacher_is_the_frozen_model_itself(run):
    """The same run as with the original model loaded a second time as the teacher, without its memory."""
    tmp, output = run
    assert_same_run(small_run(tmp, "twice", *ADAPTER, f"distill.teacher={tmp / 'model'}"), output, tolerance=1e-6)


def test_recomputation_follows_the_gradient_through_frozen_embeddings(run):
    tmp, output = run
    assert_same_run(small_run(tmp, "full", *ADAPTER, "parallel.recompute=full"), output, tolerance=2e-4, absolute=1e-5)


@pytest.mark.slow
def test_through_a_pipeline(run):
    """Both models' hidden states travel; the shared embeddings have no gradients to exchange."""
    tmp, output = run
    two = small_run(tmp, "pipeline", *ADAPTER, "parallel.pipeline=2", processes=2)
    assert_same_run(two, output, tolerance=2e-4, absolute=1e-5)


def test_a_checkpoint_says_what_was_trained(run):
    _, output = run
    assert json.loads((output / "checkpoints" / "final" / "meta.json").read_text())["config"]["dmc"]["train"] == "decision"


def test_no_gradients_or_optimizer_state_for_the_base(process_group):
    config = load(overrides=["data.sequence_length=64", "dmc.train=decision"])
    student = build_student(config, hf_config(tiny("head", heads=2)), None)
    attach_teacher(config, hf_config(tiny("head", heads=2)), student, None)
    held = {id(w) for group in student.optimizer.param_groups for w in group["params"]}
    wanted = {id(w) for n, w in student.chunks[0].named_parameters() if n.endswith("decision.weight")}
    assert held == wanted and sum(b.grad_data.numel() for b in student.ddp[0].buffers) < 2000
