"""One rank of two dies or fails: the other ends in bounded time with a sentence, and the store is as before.

No torchrun stands above these ranks, as none does above the ranks of another node.
"""

import os
import signal
import time

import pytest

from checkpoints.store import CheckpointStore
from tests.training.helpers import SMALL, tiny_model, tiny_text

BOUND = 60  # seconds, on a loaded machine


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("peers")
    tiny_model(tmp / "model")
    tiny_text(tmp / "text.jsonl")
    return tmp


def start(ground, tmp_path, rank_server, hook, *extra, **settings):
    return rank_server.start(
        tmp_path,
        [
            "--model",
            ground / "model",
            "--output",
            tmp_path / "run",
            f"data.text={ground / 'text.jsonl'}",
            f"data.cache={ground / 'cache'}",
            *SMALL,
            "run.save_every=2",
            "run.peer_timeout=8",
            *extra,
        ],
        ranks=2,
        hook=hook,
        settings=settings,
    )


def survivor(run, dead, code):
    """The exit code and words of the rank that is left, once ``dead`` has ended with ``code``; bounded."""
    assert run.wait(dead) == [code], run.said(dead)
    begun = time.monotonic()
    (left,) = run.wait(1 - dead, timeout=BOUND)
    assert left is not None, f"still waiting after {time.monotonic() - begun:.0f} s: {run.said(1 - dead)}"
    return left, run.said(1 - dead)


@pytest.mark.parametrize("dead", [0, 1])
def test_a_rank_killed_while_training_ends_the_other(ground, tmp_path, rank_server, dead):
    run = start(ground, tmp_path, rank_server, "at_step", step=5, ranks=[dead], action="signal", value="SIGKILL")
    code, said = survivor(run, dead, -signal.SIGKILL)
    assert code == 1 and "error: " in said and "Traceback" not in said
    assert "another rank ended or cannot be reached" in said or "rank 0 or its node ended" in said
    assert CheckpointStore(tmp_path / "run" / "checkpoints").newest().name == "step000004"


def test_a_rank_killed_while_saving_ends_the_other_and_leaves_the_store(ground, tmp_path, rank_server):
    run = start(ground, tmp_path, rank_server, "in_save", name="step000004", ranks=[1], action="signal", value="SIGKILL")
    code, said = survivor(run, 1, -signal.SIGKILL)
    assert code == 1 and "error: " in said and "Traceback" not in said
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    assert store.newest().name == "step000002"
    again = rank_server.start(
        tmp_path,
        [
            "--model",
            ground / "model",
            "--output",
            tmp_path / "run",
            f"data.text={ground / 'text.jsonl'}",
            f"data.cache={ground / 'cache'}",
            *SMALL,
            "--resume",
            "auto",
        ],
    )
    assert again.wait() == [0] and "resumed at step 2" in again.said()
    assert not [p for p in store.directory.iterdir() if p.name.startswith(".")]


def test_a_rank_that_cannot_write_ends_both_with_its_reason(ground, tmp_path, rank_server):
    run = start(ground, tmp_path, rank_server, "in_save", name="step000004", ranks=[1], action="raise", value="no room on node 1")
    assert run.wait() == [2, 2]
    for rank in (0, 1):
        assert "error: the checkpoint was not written: RuntimeError: no room on node 1 (rank 1)" in run.said(rank)
    assert {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()} == {"step000002", "newest"}


def test_a_rank_that_hangs_is_named(ground, tmp_path, rank_server):
    """Stopped, not dead: its connections stay open, and no collective call would end before half an hour."""
    run = start(ground, tmp_path, rank_server, "at_step", step=5, ranks=[1], action="signal", value="SIGSTOP")
    (code,) = run.wait(0, timeout=200)
    os.kill(run.pids[1], signal.SIGKILL)
    assert code == 1
    assert "error: rank 0 ends: rank 1 gave no sign of life for 8 s (run.peer_timeout)" in run.said(0)


def test_a_rank_that_fails_tells_the_other_why(ground, tmp_path, rank_server):
    run = start(ground, tmp_path, rank_server, "at_step", step=5, ranks=[1], action="raise", value="cosmic ray")
    code, said = survivor(run, 1, 1)
    assert "RuntimeError: cosmic ray" in run.said(1)
    assert code == 1 and "rank 1 failed: RuntimeError: cosmic ray" in said
