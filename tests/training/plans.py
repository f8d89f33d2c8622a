"""Run as ``python -m tests.training.plans``: what needs pretended worlds, in a process of its own; prints one JSON object.

``recipes``: the lines of the dry run of every recipe, or its error. ``layouts``: what a rank of some layouts holds by
the plan and by the model that was built.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import dmc.training  # noqa: F401 - before anything of megatron
from data.batches import Batch
from dmc.families import count, read_shape
from dmc.training import dryrun, planning, pretend, setup
from dmc.training.config import load
from tests.training.helpers import ROOT, tiny_shape

LAYOUTS = (
    (4, 0, ["parallel.tensor=2"]),
    (4, 0, ["parallel.tensor=2", "parallel.sequence=true", "run.precision=bf16", "dmc.decision=neuron"]),
    (4, 0, ["parallel.pipeline=2", "distill.weight=0", "distill.lm_weight=1"]),
    (4, 2, ["parallel.pipeline=2", "distill.weight=0", "distill.lm_weight=1", "run.precision=bf16"]),
    (4, 3, ["parallel.pipeline=2", "parallel.virtual=2"]),
    (4, 1, ["parallel.context=2", "run.precision=bf16", "parallel.distributed_optimizer=true"]),
    (4, 0, ["parallel.distributed_optimizer=true"]),
    (2, 0, ["dmc.train=decision", "run.precision=bf16"]),
)


@functools.cache
def plans() -> dict:
    """What this module prints when it runs; once for all tests of a session."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.plans"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def recipe(path: Path) -> dict:
    """The dry run of a recipe, in its shape from configs/shapes wherever its model is."""
    try:
        config = load(path)
        hf = read_shape(ROOT / (config.plan.shape or config.run.model))
        return {"lines": list(dryrun.run(config, hf, batch=Batch)), "parameters": count(hf)}
    except Exception as error:  # noqa: BLE001 - reported, for the test to show
        return {"error": f"{type(error).__name__}: {error}"}


def layout(size: int, rank: int, overrides: list[str]) -> dict:
    """Bytes of weights, gradient buffers and optimizer states of a rank: planned and measured."""
    config = load(overrides=["data.sequence_length=64", "optim.global_batch=8", "run.threads=1", *overrides])
    hf = tiny_shape(num_hidden_layers=4)
    shape = planning.Layout.of(config, size)
    plan = planning.memory(config, hf, shape, rank * shape.pipeline // size, on_gpu=False)
    with pretend.world(config, size, rank):
        measured = held(setup.build_student(config, hf, None))
    return {"planned": [plan.weights, plan.gradients, plan.optimizer], "measured": measured}


def held(student: setup.Student) -> list[int]:
    """Bytes of the weights, the gradient buffers, and the optimizer's states and copies after a step."""
    weights = [weight for chunk in student.chunks for weight in chunk.parameters()]
    for weight in weights:
        if weight.requires_grad:
            weight.main_grad.fill_(0.0)
    assert student.optimizer.step()[0]
    own, states = {weight.untyped_storage().data_ptr() for weight in weights}, 0
    for part in getattr(student.optimizer, "chained_optimizers", [student.optimizer]):
        for group in part.optimizer.param_groups:
            for weight in group["params"]:
                tensors = [x for x in part.optimizer.state[weight].values() if getattr(x, "dim", int)()]  # no step counts
                states += sum(x.nbytes for x in [*tensors, *([] if weight.untyped_storage().data_ptr() in own else [weight])])
    gradients = sum(buffer.grad_data.nbytes for ddp in student.ddp for buffer in ddp.buffers)
    return [sum(w.nbytes for w in weights), gradients, states]


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(
        json.dumps(
            {
                "recipes": {path.name: recipe(path) for path in sorted((ROOT / "configs").glob("*.yaml"))},
                "layouts": [layout(*case) for case in LAYOUTS],
            }
        )
    )
