"""The file of fitted decisions: its scores, thresholds, and what is rejected."""

import dataclasses
import json
import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from dmc.fitted import FORMAT, QUANTILES, FittedDecisions, levels


def made(layers=2, heads=3, hidden=5, window=4, sinks=2, scores=None, count=QUANTILES, **changes):
    draw = torch.Generator().manual_seed(0)
    scores = torch.randn(4001, generator=draw, dtype=torch.float64) if scores is None else scores
    parts = dict(
        arrival=torch.randn(layers, heads, hidden, generator=draw),
        late=torch.randn(layers, heads, hidden, generator=draw),
        bias=torch.randn(layers, heads, generator=draw),
        window=window,
        sinks=sinks,
        quantiles=torch.quantile(scores, levels(count)).float(),
        model="0123456789abcdef",
        meta={"text": "a.txt", "tokens": 4001, "r2": [0.5, 0.25]},
    )
    return FittedDecisions(**parts | changes)


def same(a, b):
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("arrival", "late", "bias", "quantiles")) and all(
        getattr(a, n) == getattr(b, n) for n in ("window", "sinks", "model", "meta")
    )


# ------------------------------------------------------------------------------------------- scores


def test_scores_are_the_formula_token_by_token():
    fitted, tokens = made(), 12
    hidden = torch.randn(tokens, 5, dtype=torch.float64)
    got = fitted.scores(1, hidden)
    for t in range(tokens):
        for head in range(3):
            if t < 2 or t >= tokens - 5:
                assert got[t, head] == math.inf
                continue
            expected = sum(float(fitted.arrival[1, head, i]) * float(hidden[t, i]) for i in range(5))
            expected += sum(float(fitted.late[1, head, i]) * float(hidden[t + 4, i]) for i in range(5))
            assert abs(got[t, head] - expected - float(fitted.bias[1, head])) < 1e-12
    assert got[2:7].isfinite().all()


@pytest.mark.parametrize("tokens", [0, 1, 6, 7])
def test_short_document_is_kept_whole(tokens):
    assert (made().scores(0, torch.randn(tokens, 5)) == math.inf).all()


def test_window_0():
    fitted = made(window=0, sinks=0)
    hidden = torch.randn(4, 5)
    got = fitted.scores(0, hidden)
    torch.testing.assert_close(got[:3], hidden[:3] @ (fitted.arrival[0] + fitted.late[0]).T + fitted.bias[0])
    assert (got[3] == math.inf).all()


def test_looks_ahead():
    assert made().looks_ahead
    assert not made(late=torch.zeros(2, 3, 5)).looks_ahead


# ------------------------------------------------------------------------------------------- threshold


def test_levels_are_dense_at_both_ends():
    at = levels(QUANTILES)
    assert at[0] == 0 and at[-1] == 1 and (at.diff() > 0).all()
    torch.testing.assert_close(at, 1 - at.flip(0), rtol=0, atol=1e-15)
    assert at[1] < 1e-6 and at.diff().max() < 1e-3


@settings(deadline=None, max_examples=200)
@given(
    cr=st.floats(1, 200),
    length=st.integers(1, 200_000),
    window=st.integers(0, 300),
    sinks=st.integers(0, 10),
    seed=st.integers(0, 9),
)
def test_threshold_keeps_what_the_ratio_allows(cr, length, window, sinks, seed):
    """The tokens that a document of the calibration's own scores keeps: length / CR, to the resolution of the quantiles."""
    scores = torch.randn(20_000, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).pow(3)
    fitted = made(scores=scores, window=window, sinks=sinks)
    always = min(length, window + 1 + sinks)
    if length / cr < always:
        with pytest.raises(ValueError, match=f"largest CR at this length is {length / always:.2f}"):
            fitted.threshold(cr, length)
        return
    share = (scores >= fitted.threshold(cr, length)).double().mean().item()
    kept = always + share * (length - always)
    assert kept == pytest.approx(length / cr, abs=2e-3 * (length - always) / 4 + 1e-6)


@settings(deadline=None, max_examples=50)
@given(a=st.floats(1, 50), b=st.floats(1, 50), length=st.integers(2000, 10_000))
def test_threshold_never_falls_with_the_ratio(a, b, length):
    fitted = made()
    assert (a <= b) == (fitted.threshold(a, length) <= fitted.threshold(b, length)) or a == b or math.isclose(a, b)


def test_threshold_at_the_ends():
    fitted = made()  # always kept: 4 + 1 + 2
    assert fitted.threshold(1, 70) == -math.inf
    assert fitted.threshold(10, 70) == math.inf
    assert math.isfinite(fitted.threshold(9.99, 70))
    with pytest.raises(ValueError, match=r"keep 70 / 10\.1 = 6\.9 tokens.*newest 4 \+ 1 and the first 2.*largest CR.*10\.00"):
        fitted.threshold(10.1, 70)
    assert fitted.threshold(1, 3) == -math.inf
    with pytest.raises(ValueError, match=r"largest CR at this length is 1\.00"):
        fitted.threshold(1.5, 3)


@pytest.mark.parametrize("cr", [0.99, 0, -3, math.nan, math.inf])
def test_ratio_that_is_none(cr):
    with pytest.raises(ValueError, match="target CR must be a finite number of at least 1"):
        made().threshold(cr, 100)


def test_length_0():
    with pytest.raises(ValueError, match="at least 1 token"):
        made().threshold(2, 0)


# ------------------------------------------------------------------------------------------- another model


def test_check_names_everything_that_differs():
    fitted = made()
    fitted.check("0123456789abcdef", 2, 3, 5, 4)
    with pytest.raises(ValueError) as error:
        fitted.check("ffff", 30, 9, 576, 64)
    for part in (
        "fingerprint 0123456789abcdef, not ffff",
        "layers 2, not 30",
        "key/value heads 3, not 9",
        "hidden size 5, not 576",
        "window 4, not 64",
    ):
        assert part in str(error.value)
    with pytest.raises(ValueError) as error:
        fitted.check("0123456789abcdef", 2, 3, 5, 8)
    assert "window 4, not 8" in str(error.value) and "layers" not in str(error.value)


# ------------------------------------------------------------------------------------------- files


def test_file_round_trip(tmp_path):
    fitted = made()
    fitted.save(tmp_path / "d.safetensors")
    assert same(FittedDecisions.load(tmp_path / "d.safetensors"), fitted)
    assert [p.name for p in tmp_path.iterdir()] == ["d.safetensors"]


def test_half_precision_file(tmp_path):
    fitted = made(layers=20, hidden=64)
    fitted.save(tmp_path / "full")
    fitted.save(tmp_path / "half", dtype=torch.float16)
    got = FittedDecisions.load(tmp_path / "half")
    assert same(got, dataclasses.replace(fitted, arrival=fitted.arrival.half().float(), late=fitted.late.half().float()))
    assert os.path.getsize(tmp_path / "full") - os.path.getsize(tmp_path / "half") >= 2 * 2 * 20 * 3 * 64
    with pytest.raises(ValueError, match="arrival has weights too large for torch.float16"):
        dataclasses.replace(fitted, arrival=fitted.arrival * 1e6).save(tmp_path / "x", dtype=torch.float16)
    assert not (tmp_path / "x").exists()


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "d.safetensors"
    made().save(path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match="cannot be written: No space left"):
        made(window=9).save(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_folder_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="cannot be written: No such file"):
        made().save(tmp_path / "no" / "d.safetensors")


@pytest.mark.parametrize("meta", [{"a": {1, 2}}, {"r2": math.nan}])
def test_meta_that_is_not_json(tmp_path, meta):
    with pytest.raises(ValueError, match="meta cannot be written as JSON"):
        made(meta=meta).save(tmp_path / "d")
    assert not list(tmp_path.iterdir())


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match="is missing; `dmc calibrate MODEL --decisions"):
        FittedDecisions.load(tmp_path / "d")


def test_file_of_something_else(tmp_path):
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="damaged or not a safetensors file"):
        FittedDecisions.load(tmp_path / "text")
    save_file({"a": torch.zeros(2)}, str(tmp_path / "other"))
    with pytest.raises(ValueError, match="is not a decisions file, this program reads"):
        FittedDecisions.load(tmp_path / "other")


def test_file_of_another_version(tmp_path):
    path = tmp_path / "d"
    made().save(path)
    path.write_bytes(path.read_bytes().replace(FORMAT.encode(), FORMAT.replace("-1", "-7").encode()))
    with pytest.raises(ValueError, match=f"has version dmc-decisions-7, this program reads {FORMAT}"):
        FittedDecisions.load(path)


@settings(deadline=None, max_examples=60)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
def test_any_damaged_byte_is_noticed(tmp_path_factory, place, bit, cut):
    path = tmp_path_factory.mktemp("damaged") / "d"
    made(count=17).save(path)
    content = bytearray(path.read_bytes())
    at = int(place * len(content))
    if cut:
        content = content[:at]
    elif content[at] == 0x20 or content[at] ^ (1 << bit) == 0x20:
        return  # white space of the JSON header means nothing
    else:
        content[at] ^= 1 << bit
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged|version|not a decisions file"):
        FittedDecisions.load(path)


def test_file_with_nan(tmp_path):
    """Written by another program: `save` would not."""
    from dmc import fitted as module

    path = tmp_path / "d"
    good = made()
    good.save(path)
    tensors = load_file(path)
    tensors["late"][1, 1, 1] = math.nan
    notes = {"format": FORMAT, "model": good.model, "window": "4", "sinks": "2", "meta": json.dumps(good.meta)}
    save_file(tensors, str(path), notes | {"digest": module._digest(tensors, notes)})
    with pytest.raises(ValueError, match="late holds NaN or infinity"):
        FittedDecisions.load(path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"arrival": torch.full((2, 3, 5), math.inf)}, "arrival holds NaN or infinity"),
        ({"bias": torch.zeros(2, 4)}, r"\[layers, heads\]"),
        ({"late": torch.zeros(2, 3, 6)}, r"\[layers, heads, hidden\]"),
        ({"arrival": torch.zeros(2, 3, 5, dtype=torch.float64)}, "arrival is torch.float64"),
        ({"quantiles": torch.tensor([1.0, 0.0])}, "the quantiles fall"),
        ({"quantiles": torch.tensor([1.0])}, "Q at least 2"),
        ({"window": -1}, "window -1"),
        ({"sinks": -1}, "sinks -1"),
    ],
)
def test_wrong_values(changes, message):
    with pytest.raises(ValueError, match=message):
        made(**changes)
