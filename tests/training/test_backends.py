"""The choice of optional libraries, with a stand-in where transformer-engine would be."""

import sys
import types

import pytest
import torch

from dmc.training import backends
from tests.training.helpers import small_run, train


@pytest.fixture
def engine(monkeypatch):
    """A machine that has transformer-engine and a GPU, as far as the choice can see."""
    column, row = type("Column", (), {}), type("Row", (), {})
    module = types.ModuleType("megatron.core.extensions.transformer_engine")
    module.TEColumnParallelLinear, module.TERowParallelLinear = column, row
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: object() if name == "transformer_engine" else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return column, row


@pytest.mark.skipif(backends.missing() is None, reason="transformer-engine can be used here")
def test_without_it():
    assert backends.layers("auto") == backends.layers("never") == backends.Layers()
    with pytest.raises(ValueError, match="run.transformer_engine=always, but .*use auto or never"):
        backends.layers("always")
    assert "linear layers of megatron-core, Adam of torch" in backends.describe("auto")


@pytest.mark.parametrize("choice", ["auto", "always"])
def test_with_it(engine, choice):
    chosen = backends.layers(choice)
    assert (chosen.column, chosen.row, chosen.name) == (*engine, "transformer-engine")
    assert backends.layers("never") == backends.Layers()


def test_a_run_says_what_it_computes_with(tmp_path):
    small_run(tmp_path, "one")
    arguments = (
        "--model",
        tmp_path / "model",
        "--output",
        tmp_path / "two",
        f"data.text={tmp_path / 'text.jsonl'}",
        f"data.cache={tmp_path / 'cache'}",
        "data.sequence_length=64",
        "log.eval_sequences=4",
        "dmc.hold_steps=1",
        "dmc.ramp_steps_per_unit=0",
        "run.threads=1",
    )
    assert "linear layers of megatron-core" in train(*arguments).stdout
    refused = train(*arguments, "run.transformer_engine=always", "run.overwrite=true", check=False)
    assert refused.returncode == 2 and "run.transformer_engine=always, but" in refused.stderr
