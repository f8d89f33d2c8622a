"""The sizing table of docs/serve-on-a-gpu.md: its formula against the bytes that the engine measures."""

import pytest

from dmc import LLM, SamplingParams
from dmc.cache import codec, policy
from scripts import reference_sizing
from tests.docs.blocks import ROOT


def test_the_page_has_the_table_of_today():
    text = reference_sizing.PAGE.read_text()
    assert reference_sizing.filled(text) == text, "run python scripts/make_reference.py"
    first = reference_sizing.rows()[0]
    assert first[3] == "1,024" and first[4] == "1.0"  # 8,192 tokens x 32 layers x 8 heads x 512 bytes


def test_a_page_without_marks_is_an_error():
    with pytest.raises(ValueError, match="lacks the marks"):
        reference_sizing.filled("# Serve")


@pytest.mark.parametrize("name, settings", [("dense", {}), ("tcq", {"bits": 4}), ("int8", {})])
def test_the_formula_is_what_the_engine_holds(name, settings):
    llm = LLM(ROOT / "checkpoints" / "base", policy="full", codec=name, codec_settings=settings, device="cpu", max_batch=1)
    (output,) = llm.generate([list(range(3, 303))], SamplingParams(max_tokens=4, temperature=0, ignore_eos=True))
    shape = llm.cache.shape
    wanted = reference_sizing.held(codec(name, **settings), policy("full"), shape, output.stats.cached_tokens, 1)
    measured = output.stats.held_bytes - output.stats.held["tables"]
    assert measured == pytest.approx(wanted, rel=0.01)
