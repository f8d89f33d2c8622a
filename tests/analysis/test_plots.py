import json

import pytest
from PIL import Image

from dmc.analysis.plots import plot_heads, plot_training


def _write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def _drawn(path):
    """Size of the PNG, after a check that it holds more than one colour."""
    with Image.open(path) as image:
        assert image.format == "PNG" and len(image.convert("RGB").getcolors(2**24)) > 10
        return image.size


def _lines(run=True):
    lines = []
    for s in range(20):
        ratios = {"target_cr": 1 + s / 10, "measured_cr": 1 + s / 11, "phase": "ramp" if s < 9 else "hold"}
        lines.append({"step": s, "loss": 3.0 - s / 20, "lm_loss": 3.1, **(ratios if run else {})})
    return lines


def test_training_with_and_without_control(tmp_path):
    run, control = _write(tmp_path / "run.jsonl", _lines()), _write(tmp_path / "control.jsonl", _lines(run=False))
    plot_training(run, tmp_path / "alone.png")
    plot_training(run, tmp_path / "both.png", control_jsonl=control)
    assert _drawn(tmp_path / "alone.png") == _drawn(tmp_path / "both.png")
    assert (tmp_path / "alone.png").read_bytes() != (tmp_path / "both.png").read_bytes()


def test_lines_that_lack_keys_are_skipped(tmp_path):
    lines = [{"note": "start"}, {"step": 1}, {"step": 2, "loss": 2.0, "measured_cr": None}, {"step": 3, "loss": 1.9}]
    plot_training(_write(tmp_path / "run.jsonl", lines), tmp_path / "loss.png")
    _drawn(tmp_path / "loss.png")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no line with a step and a loss"),
        ('{"step": 1}\n', "no line with a step and a loss"),
        ('{"step": 1, "loss": 2}\n{"step"', "line 2, is not JSON"),
        ("[1]\n", "line 1, is not a JSON object"),
    ],
)
def test_bad_metrics_are_refused(tmp_path, text, words):
    (tmp_path / "run.jsonl").write_text(text)
    with pytest.raises(ValueError, match=words):
        plot_training(tmp_path / "run.jsonl", tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_heads_grow_with_the_model(tmp_path):
    plot_heads([[1.0, 3.5], [200.0, 12.3]], tmp_path / "small.png")
    plot_heads([[1.0] * 8] * 12, tmp_path / "large.png")
    small, large = _drawn(tmp_path / "small.png"), _drawn(tmp_path / "large.png")
    assert large[0] > small[0] and large[1] > small[1]


@pytest.mark.parametrize(
    ("cr", "words"),
    [
        ([], "at least one"),
        ([[]], "at least one"),
        ([[1.0], [1.0, 2.0]], "same number"),
        ([[0.5]], "at least 1"),
        ([[float("inf")]], "finite"),
        ([[float("nan")]], "finite"),
    ],
)
def test_bad_ratios_are_refused(tmp_path, cr, words):
    with pytest.raises(ValueError, match=words):
        plot_heads(cr, tmp_path / "heads.png")
