"""What tests run on all ranks of an engine; ranks import it."""

import os
import signal
import time

import torch

from dmc.engine.memory import automatic


def admit_all(engine, own):
    """Nobody waits for pages, so that sequences are preempted."""
    engine.predictor.pages = lambda tokens: 1


def pools(engine, own):
    """Of each rank: pages, and the automatic bytes of the pool of one rank alone and of one of two."""
    found = [engine.cache.rows.pool.capacity, *(automatic(engine.runner.model.device, ranks) for ranks in (1, 2))]
    return torch.stack(engine.ranks.group.all(torch.tensor(found)))


def preempt(engine, own):
    """Swaps the newest running sequence out."""
    if engine.scheduler.running:
        engine.scheduler.preempt(max(engine.scheduler.running, key=lambda each: each.arrival))


def states(engine, own):
    """Of each rank: a number for the state of every sequence, its tokens and its slot, as long as there are at most 64."""
    rows = [
        [one.arrival, len(one.tokens), sum(one.tokens), -1 if one.slot is None else one.slot, *one.state.value.encode()[:4]]
        for one in engine.scheduler.all
    ]
    found = torch.full((64, 8), -2)
    if rows:
        found[: len(rows)] = torch.tensor(rows)
    return engine.ranks.group.all(found)


def diverge(engine, own):
    """Rank 1 is somewhere else than the others."""
    engine.scheduler.preemptions += engine.ranks.rank == 1


def refuse(engine, word, own):
    """An argument is wrong, on all ranks alike."""
    raise ValueError(word)


def fail(engine, rank, own):
    """A rank has a fault, while the others wait for it."""
    if engine.ranks.rank == rank:
        raise KeyError("of rank")
    engine.ranks.group.least(0)


def signal_rank(engine, rank, number, own):
    """A rank gets a signal, while the others wait for it."""
    if engine.ranks.rank == rank:
        os.kill(os.getpid(), getattr(signal, number))
    engine.ranks.group.least(0)
    engine.ranks.group.least(0)


def late(engine, rank, own):
    """A rank computes for longer than the others wait."""
    if engine.ranks.rank == rank:
        time.sleep(30)
    engine.ranks.group.least(0)
