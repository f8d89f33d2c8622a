"""What tests do to a rank of a run from inside: signals, deaths and bad gradients at an exact moment."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import torch


def at_step(rank: int, *, step: int, ranks: list[int], action: str, value: str = "") -> None:
    """Do ``action`` on ``ranks`` when training step ``step`` (from 1) begins."""
    from dmc.training.trainer import Trainer

    train_step = Trainer.train_step

    def wrapped(self, plan):  # noqa: ANN001, ANN202
        if rank in ranks and self.step + 1 == step:
            _act(action, value)
        return train_step(self, plan)

    Trainer.train_step = wrapped


def in_save(rank: int, *, ranks: list[int], action: str, name: str, value: str = "") -> None:
    """Do ``action`` on ``ranks`` while checkpoint ``name`` is being written."""
    from checkpoints.shards import Shards

    start = Shards._start

    def wrapped(self):  # noqa: ANN001, ANN202
        if rank in ranks and f".{name}." in str(self.directory):
            _act(action, value)
        start(self)

    Shards._start = wrapped


def poison(rank: int, *, steps: list[int], poisoned_ranks: list[int], value: float | str, log: str) -> None:
    """Put ``value`` into a gradient on ``poisoned_ranks`` before it is reduced; write a hash of all state after each step."""
    from dmc.training import setup
    from dmc.training.trainer import Trainer

    finalize, train_step = setup.finalize_model_grads, Trainer.train_step
    now = [0]

    def poisoned(model, *args, **kwargs):  # noqa: ANN001, ANN002, ANN003, ANN202
        if now[0] in steps and rank in poisoned_ranks:
            weights = dict(model[0].module.named_parameters())
            weights["decoder.layers.1.mlp.linear_fc2.weight"].main_grad[0, 0] = float(value)
        finalize(model, *args, **kwargs)

    def wrapped(self, plan):  # noqa: ANN001, ANN202
        now[0] = self.step + 1
        try:
            return train_step(self, plan)
        finally:
            with Path(log, f"hashes{rank}").open("a") as file:
                file.write(state_hash(self.student) + "\n")
            with Path(log, f"generators{rank}").open("a") as file:
                drawn = torch.get_rng_state().numpy().tobytes(), random.getstate(), str(np.random.get_state())
                file.write(hashlib.sha256(repr(drawn).encode()).hexdigest() + "\n")

    setup.finalize_model_grads, Trainer.train_step = poisoned, wrapped


def state_hash(student) -> str:  # noqa: ANN001
    """Of every weight and every tensor of the optimizer's state on this rank."""
    found = hashlib.sha256()
    weights = [weight for chunk in student.chunks for weight in chunk.parameters()]
    for weight in weights + [w for part in student.optimizer.chained_optimizers for w in part.get_parameters()]:
        found.update(weight.detach().numpy().tobytes())
    for part in student.optimizer.chained_optimizers:
        for state in part.optimizer.state.values():
            for key, tensor in sorted(state.items()):
                found.update(key.encode() + tensor.detach().numpy().tobytes())
    return found.hexdigest()


def _act(action: str, value: str) -> None:
    if action == "signal":
        os.kill(os.getpid(), signal.Signals[value])
    elif action == "raise":
        raise RuntimeError(value)
    else:
        raise ValueError(action)
    time.sleep(0)  # Python runs the handler of a signal between two instructions
