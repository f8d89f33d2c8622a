"""Decision heads by ridge regression: against a dense computation with transformers, memory, resume, bad input."""

import math
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaForCausalLM

from dmc import cli
from dmc.evaluation import fit_decisions as module
from dmc.evaluation.blocks import attend_in_blocks, mask_near
from dmc.evaluation.fit_decisions import FLOOR, FitSettings, fit_decisions, quantiles
from dmc.evaluation.fit_levels import LEVELS, dropped_share, with_eviction
from dmc.evaluation.moments import Moments
from dmc.evaluation.sequences import Sequences
from dmc.fitted import QUANTILES, FittedDecisions, levels
from dmc.model import Decoder
from tests.model import tiny

LENGTH = 60
SETTINGS = FitSettings(window=6, sinks=3, min_queries=9, block=16)


@pytest.fixture(scope="module", params=[1, 2, 4])
def directory(request, tmp_path_factory):
    """1, 2 and 4 key/value heads for 4 query heads."""
    fields = tiny.config(heads=request.param)
    return tiny.write(tmp_path_factory.mktemp("model") / f"heads{request.param}", fields, tiny.weights(fields))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    fields = tiny.config()
    return tiny.write(tmp_path_factory.mktemp("model") / "two", fields, tiny.weights(fields))


def text(count=11, length=LENGTH, seed=0):
    tokens = torch.randint(3, 90, (count, length), generator=torch.Generator().manual_seed(seed))
    return Sequences(tokens, "random", "0" * 16)


def same(a, b):
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("arrival", "late", "bias", "quantiles")) and a.meta == b.meta


@torch.no_grad()
def dense(directory, tokens, *, window, sinks, queries, ridge, look_ahead, target):
    """The same fit by whole T x T matrices of transformers, in fp64: per layer (weights [F, H], scores, R2)."""
    length = tokens.shape[1]
    if target != "later":
        tokens, queries = torch.cat([tokens, tokens], 1), 1
    llama = LlamaForCausalLM.from_pretrained(directory, attn_implementation="eager", dtype=torch.float64).eval()
    seen = llama(tokens, output_hidden_states=True, output_attentions=True, use_cache=False)
    heads, found = llama.config.num_key_value_heads, []
    for index, layer in enumerate(llama.model.layers):
        h = layer.input_layernorm(seen.hidden_states[index])[:, :length]
        features = [h, torch.ones(*h.shape[:2], 1, dtype=h.dtype)]
        if look_ahead:
            later = torch.zeros_like(h)
            later[:, : length - window] = h[:, window:]
            features.insert(1, later)
        x = torch.cat(features, -1)
        asking, place = torch.arange(length if target == "repeat" else 0, tokens.shape[1]), torch.arange(length)
        far = seen.attentions[index][:, :, asking, :length] * (asking[:, None] - place > window)
        y = torch.log(far.amax(2) + FLOOR).unflatten(1, (heads, -1)).amax(2).transpose(1, 2)  # [N, T, H]

        def solve(rows, x=x, y=y):
            a, b = (z[rows, sinks : length - window - queries].flatten(0, 1) for z in (x, y))
            penalty = ridge * a[:, :-1].square().sum(0).mean() * torch.eye(a.shape[1], dtype=a.dtype)
            penalty[-1, -1] = 0
            return torch.linalg.solve(a.T @ a + penalty, a.T @ b)

        held = torch.arange(len(tokens)) % 8 == 7
        a, b = (z[held, sinks : length - window - queries].flatten(0, 1) for z in (x, y))
        r2 = 1 - (b - a @ solve(~held)).square().sum(0) / (b - b.mean(0)).square().sum(0)
        weights = solve(torch.ones_like(held))
        found.append((weights, (x @ weights)[:, sinks : length - window - 1], r2.mean()))
    return found


@pytest.fixture
def of_the_full_model(monkeypatch):
    """Leaves the quantiles as they are without eviction."""
    monkeypatch.setattr(module, "with_eviction", lambda found, measured: found)


@pytest.mark.parametrize("look_ahead, target", [(True, "later"), (False, "later"), (True, "repeat"), (True, "both")])
def test_the_fit_is_that_of_dense_matrices(directory, of_the_full_model, look_ahead, target):
    settings = FitSettings(window=6, sinks=3, min_queries=9, block=16, ridge=0.01, look_ahead=look_ahead, target=target)
    fitted = fit_decisions(directory, text(), settings)
    expected = dense(  # the second copy begins within a block
        directory, text().tokens, window=6, sinks=3, queries=9, ridge=0.01, look_ahead=look_ahead, target=target
    )
    assert ("second copy" in fitted.meta["target"]) == (target != "later")
    parts = [fitted.arrival, fitted.late, fitted.bias[..., None]] if look_ahead else [fitted.arrival, fitted.bias[..., None]]
    got = torch.cat(parts, -1).double()
    for layer, (weights, _, r2) in enumerate(expected):
        torch.testing.assert_close(got[layer], weights.T, rtol=1e-3, atol=2e-4)
        assert fitted.meta["r2"][layer] == pytest.approx(float(r2), abs=1e-3)
    scores = torch.cat([scores.flatten() for _, scores, _ in expected])
    expected_quantiles = torch.quantile(scores, levels(QUANTILES))
    torch.testing.assert_close(fitted.quantiles.double(), expected_quantiles, rtol=1e-3, atol=1e-3)
    assert fitted.looks_ahead == look_ahead and (fitted.window, fitted.sinks) == (6, 3)


@pytest.mark.parametrize("window, block", [(0, 5), (6, 1), (6, 7), (6, 1000), (40, 16)])
def test_largest_attention_in_blocks(window, block):
    """Of every token, from queries more than ``window`` later; and the attention's output."""
    query, key, value = torch.randn(2, 3, 50, 8), torch.randn(2, 50, 8), torch.randn(2, 50, 8)
    target = module.LargestAttention(query, window)
    out = attend_in_blocks(query, key, value, block=block, see=target.add)
    place = torch.arange(50)
    scores = (query @ key[:, None].mT / math.sqrt(8)).masked_fill(place[:, None] < place, -math.inf).softmax(-1)
    torch.testing.assert_close(out, scores @ value[:, None])
    far = (scores * (place[:, None] - place > window)).amax((1, 2))
    torch.testing.assert_close(target.result(), torch.log(far + FLOOR))


def test_nothing_is_far_in_the_first_block():
    assert mask_near(torch.rand(2, 3, 5, 5), 0, 10).shape == (2, 3, 5, 0)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        sizes = [part.numel() for part in tree_leaves(out) if isinstance(part, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


def test_attention_memory_is_linear_in_the_length():
    query, key = torch.randn(1, 2, 256, 4), torch.randn(1, 256, 4)
    largest = {}
    for tokens in (64, 128, 256):
        target = module.LargestAttention(query[:, :, :tokens], 5)
        with Largest() as seen:
            attend_in_blocks(query[:, :, :tokens], key[:, :tokens], key[:, :tokens], block=8, see=target.add)
        largest[tokens] = seen.elements
    assert largest == {tokens: 2 * 8 * tokens for tokens in (64, 128, 256)}


def test_block_size_does_not_change_the_result(model):
    found = [fit_decisions(model, text(), FitSettings(window=6, sinks=3, min_queries=9, block=b)) for b in (7, 16, 64)]
    for other in found[1:]:
        torch.testing.assert_close(other.arrival, found[0].arrival, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(other.quantiles, found[0].quantiles, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype, off", [(torch.float32, 1e-6), (torch.bfloat16, 0.15)])
def test_scores_of_the_fit_are_those_of_its_file(model, of_the_full_model, dtype, off):
    """The quantiles belong to `FittedDecisions.scores`; a model in bf16 gives about the same heads."""
    exact = fit_decisions(model, text(), SETTINGS)
    fitted = fit_decisions(model, text(), SETTINGS, dtype=dtype)
    assert (fitted.quantiles - exact.quantiles).abs().mean() < off
    llama = LlamaForCausalLM.from_pretrained(model, attn_implementation="eager").eval()
    with torch.no_grad():
        hidden = llama(text().tokens, output_hidden_states=True, use_cache=False).hidden_states
        scores = torch.stack(
            [
                fitted.scores(layer, block.input_layernorm(x))
                for layer, block in enumerate(llama.model.layers)
                for x in hidden[layer]
            ]
        )
    scores = scores[scores.isfinite()]
    assert len(scores) == 2 * 2 * 11 * (LENGTH - 6 - 1 - 3)
    torch.testing.assert_close(quantiles(scores), fitted.quantiles, rtol=0, atol=max(1e-4, 3 * off))


def test_ridge_keeps_the_constant_free_and_r2_is_the_explained_share():
    draw = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(500, 4, generator=draw, dtype=torch.float64), torch.ones(500, 1, dtype=torch.float64)], 1)
    y = x[:, :1] * 2 + 7 + 0.5 * torch.randn(500, 1, generator=draw, dtype=torch.float64)
    moments = Moments.of(x[:200], y[:200]) + Moments.of(x[200:], y[200:])
    exact = torch.linalg.lstsq(x, y).solution
    torch.testing.assert_close(moments.ridge(1e-12), exact)
    strong = moments.ridge(1e6)
    assert strong[:-1].abs().max() < 1e-4 and strong[-1, 0] == pytest.approx(float(y.mean()), abs=1e-3)
    r2 = 1 - (y - x @ exact).square().sum() / (y - y.mean()).square().sum()
    assert moments.r2(exact)[0] == pytest.approx(float(r2))
    assert moments.r2(strong)[0] == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("block", [3, 16, 100])
@pytest.mark.parametrize("window", [0, 6])
def test_attention_with_evicted_tokens(block, window):
    query, key, value = torch.randn(2, 3, 50, 8), torch.randn(2, 50, 8), torch.randn(2, 50, 8)
    gone = torch.rand(2, 50) < 0.7
    shown = []
    out = attend_in_blocks(query, key, value, block=block, gone=gone, window=window, see=lambda a, _: shown.append(a))
    plain = []
    attend_in_blocks(query, key, value, block=block, see=lambda a, _: plain.append(a))
    assert all(torch.equal(a, b) for a, b in zip(shown, plain, strict=True))
    place = torch.arange(50)
    behind = place[:, None] - place
    hidden = (behind < 0) | (gone[:, None, None] & (behind > window))
    scores = (query @ key[:, None].mT / math.sqrt(8)).masked_fill(hidden, -math.inf)
    torch.testing.assert_close(out, scores.softmax(-1) @ value[:, None])


def test_a_threshold_drops_the_share_that_it_promises(model):
    """On the fit's own sequences, with eviction on; the full model's quantiles are off."""
    words = text(count=4)
    fitted = fit_decisions(model, words, SETTINGS)
    llama, free = Decoder.load(model, dtype=torch.float32), LENGTH - 6 - 1 - 3
    for cr in (1.3, 2.0, 3.0):
        wanted = LENGTH * (1 - 1 / cr) / free
        share = dropped_share(llama, fitted, words.tokens, fitted.threshold(cr, LENGTH), block=16)
        assert share == pytest.approx(wanted, abs=0.02)
    assert [level for level, _ in fitted.meta["dropped_with_eviction"]] == list(LEVELS)
    assert max(abs(level - share) for level, share in fitted.meta["dropped_with_eviction"]) > 0.01


def test_quantiles_of_measured_shares():
    scores = torch.linspace(0, 1, 1001)
    full = torch.quantile(scores.double(), levels(QUANTILES)).float()
    torch.testing.assert_close(with_eviction(full, list(LEVELS)), full, rtol=0, atol=1e-6)
    fewer = with_eviction(full, [level / 2 for level in LEVELS])
    for level in LEVELS:
        at = int((levels(QUANTILES) - level / 2).abs().argmin())
        assert fewer[at] == pytest.approx(level, abs=2e-3)
    none = with_eviction(full, [0.0] * len(LEVELS))
    assert none.isfinite().all() and (none.diff() >= 0).all() and none[-1] == 1 and none[5] >= LEVELS[-1]


def test_quantiles_are_those_of_torch():
    scores = torch.randn(777)
    torch.testing.assert_close(quantiles(scores), torch.quantile(scores.double(), levels(QUANTILES)).float())
    assert (quantiles(torch.tensor([3.0])) == 3).all()


# ------------------------------------------------------------------------------------------- resume


class Crash(Exception):
    pass


@pytest.mark.parametrize("after", [0, 5, 11, 15, 22, 24, 29])
def test_a_resumed_fit_is_the_same_bit_for_bit(model, tmp_path, monkeypatch, capsys, after):
    """Crash after so many of the 22 blocks and sequences (11 of each layer), 7 thresholds, and when the file is written."""
    whole = fit_decisions(model, text(), SETTINGS, tmp_path / "whole")
    calls, limit = {"block": 0, "threshold": 0}, after

    def counted(name, function):
        def call(*arguments, **settings):
            if sum(calls.values()) == limit:
                raise Crash
            calls[name] += 1
            return function(*arguments, **settings)

        return call

    out = tmp_path / "d.safetensors"
    monkeypatch.setattr(module, "_observe", counted("block", module._observe))
    monkeypatch.setattr(module, "dropped_share", counted("threshold", module.dropped_share))
    with monkeypatch.context() as patch:
        patch.setattr(FittedDecisions, "save", counted("block", None))
        with pytest.raises(Crash):
            fit_decisions(model, text(), SETTINGS, out)
    assert not out.exists()
    calls, limit = {"block": 0, "threshold": 0}, 100
    resumed = fit_decisions(model, text(), SETTINGS, out)
    assert calls == {"block": 22 - min(after, 22) // 11 * 11, "threshold": 7 - max(0, after - 22)}
    assert ("continuing an interrupted run" in capsys.readouterr().err) == (after >= 11)
    assert same(resumed, whole) and same(FittedDecisions.load(out), whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.safetensors", "whole"]


def test_a_state_of_another_fit_is_not_used(model, tmp_path, monkeypatch, capsys):
    out = tmp_path / "d"
    with monkeypatch.context() as patch:
        patch.setattr(FittedDecisions, "save", lambda *_: exec("raise KeyboardInterrupt"))
        with pytest.raises(KeyboardInterrupt):
            fit_decisions(model, text(seed=1), SETTINGS, out)
    state = tmp_path / ".d.state"
    assert state.exists()
    fitted = fit_decisions(model, text(), SETTINGS, out)
    assert "is of another model, text or settings: starting from the first layer" in capsys.readouterr().err
    assert same(fitted, fit_decisions(model, text(), SETTINGS)) and not state.exists()
    state.write_bytes(b"broken")
    assert same(fit_decisions(model, text(), SETTINGS, out), fitted)
    assert "is damaged" in capsys.readouterr().err and not state.exists()


# ------------------------------------------------------------------------------------------- bad input


def test_sequences_that_do_not_fit(model):
    with pytest.raises(ValueError, match="18 tokens are too short for window 6, 3 sinks and 9 later queries.* at least 19"):
        fit_decisions(model, text(length=18), SETTINGS)
    assert fit_decisions(model, text(length=19), SETTINGS)
    twice = replace(SETTINGS, target="repeat")
    with pytest.raises(ValueError, match="10 tokens are too short for window 6, 3 sinks and 1 later queries.* at least 11"):
        fit_decisions(model, text(length=10), twice)
    assert fit_decisions(model, text(length=11), twice)
    with pytest.raises(ValueError, match="300 tokens are longer than the model's 256 positions"):
        fit_decisions(model, text(length=300), SETTINGS)


@pytest.mark.parametrize("method", ["neuron", "head"])
def test_a_retrofitted_model(tmp_path, method):
    fields = tiny.config(method)
    tiny.write(tmp_path, fields, tiny.weights(fields))
    with pytest.raises(ValueError, match="holds a retrofitted model, which has its own decisions"):
        fit_decisions(tmp_path, text(), SETTINGS)


@pytest.mark.parametrize("name", ["layers.1.mlp.down_proj", "layers.0.self_attn.k_proj", "embed_tokens"])
def test_nan_in_a_forward_pass(tmp_path, name):
    fields, out = tiny.config(), tmp_path / "out" / "d"
    out.parent.mkdir()
    tensors = tiny.weights(fields)
    tensors[f"model.{name}.weight"][5, 5] = math.nan
    tiny.write(tmp_path / "model", fields, tensors)
    draw = text().tokens
    draw[:, 20] = 5
    with pytest.raises(ValueError, match=rf"layer {int('1.mlp' in name)} of the model gives NaN or infinity on the text"):
        fit_decisions(tmp_path / "model", Sequences(draw, "t", "0"), SETTINGS, out)
    assert not list(out.parent.iterdir())


@pytest.mark.parametrize(
    "setting", [{"window": -1}, {"sinks": -1}, {"min_queries": 0}, {"block": 0}, {"ridge": 0.0}, {"ridge": math.nan}]
)
def test_settings_out_of_range(setting):
    with pytest.raises(ValueError, match=f"{next(iter(setting))} must be"):
        FitSettings(**setting)


# ------------------------------------------------------------------------------------------- the command


def test_the_command(model, tmp_path, capsys):
    file, out = tmp_path / "text.txt", tmp_path / "d.safetensors"
    draw = torch.Generator().manual_seed(0)
    file.write_text("".join(chr(97 + int(i)) for i in torch.randint(0, 26, (3000,), generator=draw)))
    command = ["calibrate", str(model), "--decisions", "--text", str(file), "--out", str(out), "--device", "cpu"]
    assert cli.main([*command, "--context", "100", "--window", "8", "--sinks", "2", "--sequences", "9"]) == 0
    said = capsys.readouterr().out
    assert "every CR up to 9.1 at 100 tokens, fitted on 900 tokens" in said and "layer   R2" in said
    fitted = FittedDecisions.load(out)
    fitted.check(fitted.model, 2, 2, 32, 8)
    assert fitted.sinks == 2 and fitted.looks_ahead and fitted.meta["text"] == "text.txt" and fitted.meta["tokens"] == 900
    assert cli.main([*command, "--context", "100", "--window", "8", "--arrival-only", "--ridge", "0.1"]) == 0
    fitted = FittedDecisions.load(out)
    assert not fitted.looks_ahead and fitted.meta["tokens"] == 3000 and fitted.meta["ridge"] == 0.1


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--context", "100"], "sequences of 100 tokens are too short for window 64, 4 sinks"),
        (["--window", "300"], "text.txt gives 0 sequences of 1024 tokens, and 1 is needed"),
        (["--context", "200", "--sequences", "99"], "text.txt gives 5 sequences of 200 tokens, and 99 are needed"),
        (["--sequences", "0"], "number of sequences must be at least 1"),
        (["--window", "-1"], "window must be at least 0"),
        (["--ridge", "-1"], "ridge must be a positive number"),
        (["--target", "sum"], "target 'sum' must be one of later, repeat, both"),
        (["--context", "200", "--window", "9", "--target", "both"], "200 tokens read twice are longer than the model's 256"),
        (["--budget", "0.1"], "--budget does nothing with --decisions"),
        (["--windows", "3"], "--windows does nothing with --decisions"),
        (["--context", "300", "--window", "9"], "300 tokens are longer than the model's 256 positions"),
    ],
)
def test_bad_arguments_end_with_one_sentence(model, tmp_path, capsys, arguments, said):
    file, out = tmp_path / "text.txt", tmp_path / "out"
    file.write_text("abc " * 250)
    out.mkdir()
    command = ["calibrate", str(model), "--text", str(file), "--out", str(out / "d"), "--device", "cpu"]
    assert cli.main([*command, "--decisions", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error and "\n" not in error
    assert not list(out.iterdir())


@pytest.mark.parametrize("mode", [["--decisions"], []])
def test_a_file_among_the_weights(model, capsys, mode):
    """It would change the model's fingerprint."""
    before = sorted(model.iterdir())
    assert cli.main(["calibrate", str(model), "--text", "x", "--out", str(model / "d.safetensors"), *mode]) == 2
    assert "would count as weights of the model in that folder: name another folder" in capsys.readouterr().err
    assert sorted(model.iterdir()) == before


@pytest.mark.parametrize(
    "flag",
    [["--window", "3"], ["--sinks", "1"], ["--arrival-only"], ["--ridge", "1"], ["--sequences", "1"], ["--target", "both"]],
)
def test_flags_of_decisions_without_it(model, tmp_path, capsys, flag):
    assert cli.main(["calibrate", str(model), "--text", "x", "--out", str(tmp_path / "d"), *flag]) == 2
    assert f"{flag[0]} does nothing without --decisions" in capsys.readouterr().err
