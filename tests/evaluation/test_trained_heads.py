"""Trained decision heads as a decisions file: the same kept tokens as the export's own rule, and what is rejected."""

import shlex
from dataclasses import replace

import pytest
import torch

from dmc import LLM, SamplingParams, cli
from dmc.evaluation.fit_levels import dropped_share
from dmc.evaluation.measure import cache_settings
from dmc.evaluation.sequences import Sequences
from dmc.evaluation.trained_heads import trained_decisions
from dmc.fitted import FittedDecisions
from dmc.model import Decoder
from dmc.model.config import read_config
from dmc.model.decisions import decide
from tests.model import tiny

WINDOW = 6


def text(count=9, length=60, seed=0):
    tokens = torch.randint(3, 90, (count, length), generator=torch.Generator().manual_seed(seed))
    return Sequences(tokens, "random", "0" * 16)


def write(folder, decide="late", **dmc):
    """A base model and its retrofit with other heads alone."""
    fields = tiny.config("head")
    fields["dmc"] |= {"method": "dms", "window": WINDOW, "decide": decide} | dmc
    both = tiny.weights(fields)
    plain = {name: tensor for name, tensor in both.items() if ".decision." not in name}
    base = tiny.write(folder / "base", tiny.config(), plain)
    return base, tiny.write(folder / "export", fields, both), fields, both


@pytest.mark.parametrize("when", ["late", "arrival"])
def test_scores_are_minus_the_logits(tmp_path, when):
    """Those of the model as served (`dmc.model.decisions.decide`), on hidden states that no test made."""
    base, export, _, tensors = write(tmp_path, when)
    heads = trained_decisions(base, export, text(), sinks=1)
    config, model = read_config(export), Decoder.load(base, dtype=torch.float32)
    assert heads.looks_ahead == (when == "late") and heads.window == WINDOW and heads.sinks == 1
    for layer in range(2):
        hidden = torch.randn(40, 32, generator=torch.Generator().manual_seed(layer))
        own = f"model.layers.{layer}.self_attn.decision."
        query, key = torch.zeros(40, 4, 8), torch.zeros(40, 2, 8)
        logit, _, *late = decide(config, tensors[f"{own}weight"], tensors.get(f"{own}bias"), hidden, query, key)
        if late:
            logit = logit[:-WINDOW] + late[0][WINDOW:]
        scores = heads.scores(layer, hidden)
        kept = slice(1, 40 - WINDOW - 1)
        torch.testing.assert_close(scores[kept], -logit[kept], rtol=1e-5, atol=1e-4)
    assert model.config.decision is None


def test_generation_at_the_trained_threshold_is_the_exports(tmp_path):
    """With threshold 0 a file keeps what the export keeps: the same tokens and the same bytes."""
    base, export, *_ = write(tmp_path)
    heads = replace(trained_decisions(base, export, text(), sinks=1), quantiles=torch.zeros(2))  # 0 is the export's own
    prompt, sampling = list(range(5, 45)), SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    settings = {"device": "cpu", "dtype": "fp32", "page_size": 4}
    ours = LLM(export, **settings)
    theirs = LLM(base, policy="gate", decisions=heads, target_cr=2, **settings)
    (a,), (b,) = ours.generate([prompt], sampling), theirs.generate([prompt], sampling)
    assert a.token_ids == b.token_ids
    assert a.stats.cr == b.stats.cr > 1.2


def test_reports_say_that_the_heads_are_trained(tmp_path):
    base, export, *_ = write(tmp_path)
    heads = trained_decisions(base, export, text())
    llms = [LLM(base, policy="gate", decisions=one, target_cr=2, device="cpu") for one in (heads, replace(heads, meta={}))]
    assert [cache_settings(llm)["policy"].get("trained") for llm in llms] == [True, None]


def test_a_target_is_met(tmp_path):
    """The share that a threshold drops with eviction on, measured apart from the fit."""
    base, export, *_ = write(tmp_path)
    heads, model, tokens = (
        trained_decisions(base, export, text(16)),
        Decoder.load(base, dtype=torch.float32),
        text(8, seed=1).tokens,
    )
    for target in (1.5, 2.5):
        dropped = dropped_share(model, heads, tokens, heads.threshold(target, 60), block=16)
        always = heads.window + 1 + heads.sinks
        assert (always + (1 - dropped) * (60 - always)) * target / 60 == pytest.approx(1, abs=0.12)


def test_a_base_model_of_another_retrofit(tmp_path):
    base, export, fields, tensors = write(tmp_path)
    changed = tensors | {"model.layers.1.mlp.up_proj.weight": tensors["model.layers.1.mlp.up_proj.weight"] * 1.01}
    tiny.write(tmp_path / "all", fields, changed)
    with pytest.raises(ValueError, match="model.layers.1.mlp.up_proj.weight is not .*only a retrofit with dmc.train=decision"):
        trained_decisions(base, tmp_path / "all", text())
    with pytest.raises(ValueError, match="holds a retrofitted model"):
        trained_decisions(export, export, text())


@pytest.mark.parametrize("length, words", [(11, "are too short"), (257, "longer than the model's 256 positions")])
def test_sequences_that_do_not_fit(tmp_path, length, words):
    base, export, *_ = write(tmp_path)
    with pytest.raises(ValueError, match=words):
        trained_decisions(base, export, text(length=length))


def test_an_export_of_another_method(tmp_path):
    base, export, *_ = write(tmp_path, method="dmc")
    with pytest.raises(ValueError, match="come from a retrofit with dmc.method=dms, dmc.decision=head and dmc.train=decision"):
        trained_decisions(base, export, text())


def test_nothing_is_written_of_a_model_with_nan(tmp_path):
    base, _, fields, tensors = write(tmp_path)
    for name, own in (("base", tiny.config()), ("export", fields)):
        broken = {key: tensor.clone() for key, tensor in tensors.items() if name == "export" or ".decision." not in key}
        broken["model.layers.1.mlp.down_proj.weight"][0, 0] = float("inf")
        tiny.write(tmp_path / "broken" / name, own, broken)
    with pytest.raises(ValueError, match="NaN or infinity"):
        trained_decisions(tmp_path / "broken/base", tmp_path / "broken/export", text(), out=tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_the_command(tmp_path, capsys, monkeypatch):
    base, export, *_ = write(tmp_path)
    (tmp_path / "text.txt").write_text("".join(chr(97 + i * i % 23) for i in range(2000)))
    command = ["calibrate", str(base), "--decisions", "--heads", str(export), "--text", str(tmp_path / "text.txt")]
    command += ["--out", str(tmp_path / "d"), "--device", "cpu", "--context", "100"]
    monkeypatch.setattr("sys.argv", ["dmc", *command, "--sinks", "2"])
    assert cli.main([*command, "--sinks", "2"]) == 0
    assert f"every CR up to {100 / 9:.1f} at 100 tokens, trained ({export}), scores measured" in capsys.readouterr().out
    heads = FittedDecisions.load(tmp_path / "d")
    assert heads.window == WINDOW and heads.sinks == 2 and heads.meta["command"] == shlex.join(["dmc", *command, "--sinks", "2"])
    for flag in (["--window", "6"], ["--ridge", "1"], ["--arrival-only"], ["--target", "both"]):
        assert cli.main([*command, *flag]) == 2
        assert f"{flag[0]} does nothing with --heads" in capsys.readouterr().err
    assert cli.main(["calibrate", str(base), "--heads", "x", "--text", "x", "--out", str(tmp_path / "e")]) == 2
    assert "--heads does nothing without --decisions" in capsys.readouterr().err
