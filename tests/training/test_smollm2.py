"""A few DMC steps of a real model, SmolLM2-135M, under two processes equal those of one.

Slow, and only where the environment names its directory (docs/training.md says how to make one):
    DMC_SMOLLM2=models/smollm2-135m python -m pytest --slow tests/training/test_smollm2.py
"""

import os
from pathlib import Path

import pytest

from tests.training.helpers import assert_same_run, metrics, tiny_text, train

MODEL = os.environ.get("DMC_SMOLLM2", "")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not MODEL, reason="DMC_SMOLLM2 names no model directory")]

# Batch 2 x 256 so that two data-parallel ranks have one each; a gain that makes the first steps merge.
STEPS = (
    "data.sequence_length=256",
    "optim.micro_batch=1",
    "optim.global_batch=2",
    "log.eval_sequences=2",
    "run.threads=1",
    "dmc.ramp_steps_per_unit=3",
    "dmc.hold_steps=1",
    "dmc.gain=100",
    "dmc.offset=2.5",
    "optim.lr=3e-4",
    "optim.decay_steps=0",
    "optim.warmup_steps=0",
    "--target-cr",
    "2",
)


def run(tmp: Path, name: str, *layout: str, processes: int) -> Path:
    if not (tmp / "text.jsonl").exists():
        tiny_text(tmp / "text.jsonl", words=400)
    train(
        "--model",
        MODEL,
        "--output",
        tmp / name,
        f"data.text={tmp / 'text.jsonl'}",
        f"data.cache={tmp / 'cache'}",
        *STEPS,
        *layout,
        processes=processes,
        timeout=1800,
    )
    return tmp / name


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("smollm2")
    return tmp, run(tmp, "one", processes=1)


@pytest.mark.parametrize("layout", [(), ("parallel.pipeline=2",), ("parallel.context=2",)])
def test_two_processes_run_the_same_steps(one, layout):
    tmp, reference = one
    output = run(tmp, "-".join(layout) or "data", *layout, processes=2)
    assert len(metrics(output)) == 4
    assert_same_run(output, reference, tolerance=1e-3, absolute=1e-4)


def test_its_heads_do_not_divide_by_two(tmp_path):
    tiny_text(tmp_path / "text.jsonl", words=400)
    done = train(
        "--model",
        MODEL,
        "--output",
        tmp_path / "tp",
        f"data.text={tmp_path / 'text.jsonl'}",
        f"data.cache={tmp_path / 'cache'}",
        *STEPS,
        "parallel.tensor=2",
        processes=2,
        check=False,
        timeout=600,
    )
    assert done.returncode and "parallel.tensor 2 does not divide the model's num_key_value_heads 3" in done.stderr
    assert "Traceback" not in done.stderr.split("error:")[0]
