"""A signal ends a run after its step with a resume point, and the continued run is the run that was not stopped."""

import json
import signal

import pytest
import torch

from checkpoints.convert import load_hf_state
from checkpoints.store import CheckpointStore
from dmc.training.signals import EXIT_CODE, Stopped, StopSignals
from tests.training.helpers import SMALL, metrics, tiny_model, tiny_text


@pytest.fixture(scope="module")
def ground(tmp_path_factory, rank_server):
    """A directory with model and text, and a complete run of one process in it."""
    tmp = tmp_path_factory.mktemp("signals")
    tiny_model(tmp / "model")
    tiny_text(tmp / "text.jsonl")
    assert rank_server.start(tmp / "log", arguments(tmp, "whole")).wait() == [0]
    return tmp


def arguments(tmp, name, *extra):
    return [
        "--model",
        tmp / "model",
        "--output",
        tmp / name,
        f"data.text={tmp / 'text.jsonl'}",
        f"data.cache={tmp / 'cache'}",
        *SMALL,
        *extra,
    ]


def weights(output):
    return load_hf_state(output / "checkpoints" / "final")[0]


@pytest.mark.parametrize(
    ("name", "first", "second", "exact"),
    [
        ("SIGUSR1", (), (), True),
        ("SIGTERM", (), ("parallel.tensor=2",), False),
        ("SIGUSR1", ("ranks 2", "run.async_save=true"), (), False),
        pytest.param("SIGTERM", ("ranks 2", "parallel.tensor=2"), ("parallel.tensor=2",), False, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_continues_as_if_it_had_not_stopped(ground, rank_server, tmp_path, name, first, second, exact):
    """On the same layout bit for bit; saved by data-parallel or tensor-parallel ranks and resumed otherwise, to fp32 tolerance.

    Of two ranks only the second gets the signal.
    """
    ranks = 2 if "ranks 2" in first else 1
    log, first = tmp_path / "log", [a for a in first if a != "ranks 2"]
    stopped = rank_server.start(
        log,
        arguments(ground, tmp_path / "run", *first),
        ranks=ranks,
        hook="at_step",
        settings={"step": 5, "ranks": [ranks - 1], "action": "signal", "value": name},
    )
    assert stopped.wait() == [EXIT_CODE] * ranks
    sentence = f"stopped by {name} after step 5: run the same command with --resume auto"
    assert sentence in stopped.said() and (tmp_path / "run" / "stopped").read_text() == sentence + "\n"
    assert CheckpointStore(tmp_path / "run" / "checkpoints").newest().name == "step000005"

    processes = 2 if second else 1
    again = rank_server.start(log, arguments(ground, tmp_path / "run", "--resume", "auto", *second), ranks=processes)
    assert again.wait() == [0] * processes
    assert not (tmp_path / "run" / "stopped").exists()
    mine, other = metrics(tmp_path / "run"), metrics(ground / "whole")
    assert [m["step"] for m in mine] == [m["step"] for m in other] == list(range(1, 9))
    tolerance = 0 if exact else 2e-4
    for key in ("loss", "grad_norm", "lr", "target_cr", "measured_cr", "soft_cr"):
        assert [m[key] for m in mine] == pytest.approx([m[key] for m in other], rel=tolerance, abs=tolerance / 1000), key
    for tensor_name, tensor in weights(ground / "whole").items():
        if exact:
            assert torch.equal(weights(tmp_path / "run")[tensor_name], tensor), tensor_name
        else:
            torch.testing.assert_close(weights(tmp_path / "run")[tensor_name], tensor, rtol=1e-3, atol=2e-4)


def test_a_signal_in_the_last_step_changes_nothing(ground, rank_server, tmp_path):
    """Nothing is left to do: the run is complete and says so by its exit code."""
    run = rank_server.start(
        tmp_path,
        arguments(ground, tmp_path / "run"),
        hook="at_step",
        settings={"step": 8, "ranks": [0], "action": "signal", "value": "SIGTERM"},
    )
    assert run.wait() == [0]
    assert not (tmp_path / "run" / "stopped").exists()
    names = {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()}
    assert names == {"cr2", "final", "newest"}


def test_the_meta_data_holds_the_whole_position(ground):
    meta = json.loads((ground / "whole" / "checkpoints" / "final" / "meta.json").read_text())
    assert meta["step"] == 8 and meta["guard"] == {"norms": [m["grad_norm"] for m in metrics(ground / "whole")], "skipped": 0}


def test_all_ranks_hear_of_a_signal(process_group):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)]
    try:
        signals = StopSignals()
        assert signals.agreed() == 0
        signal.raise_signal(signal.SIGUSR1)
        assert signals.agreed() == signal.SIGUSR1
        signal.raise_signal(signal.SIGTERM)
        assert signals.agreed() == signal.SIGTERM
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGUSR1), before, strict=True):
            signal.signal(number, handler)
    assert Stopped(signal.SIGTERM, 3).code == EXIT_CODE == 75
