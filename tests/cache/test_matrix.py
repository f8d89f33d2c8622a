"""Every policy with every codec: they run, their pages are whole, and the page of the docs says so."""

import re
from pathlib import Path

import pytest
import torch

from dmc.cache import CODECS, POLICIES
from tests.cache.decisions import random_decisions, random_heads
from tests.cache.test_rows import HEADS, LAYERS, SIZE, decode, make, prefill, tokens

SETTINGS = {
    "streaming": {"sinks": 2, "recent": 12},
    "h2o": {"heavy": 6, "recent": 6},
    "tova": {"budget": 12},
    "dms": {"window": 4},
    "gate": {"decisions": random_decisions(window=4), "target_cr": 2},
}
PAGE = Path(__file__).parents[2] / "docs" / "methods" / "matrix.md"


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("policy", POLICIES)
def test_every_pair_runs(policy, codec, tmp_path):
    """A prompt, generated tokens, a layered window; bytes are those of whole pages; everything is given back."""
    layers = tokens(34, seed=9)
    settings = SETTINGS.get(policy)
    if policy == "kvzap":
        settings = {"file": random_heads(tmp_path / "heads", LAYERS, HEADS, HEADS * SIZE), "budget": 12, "window": 4}
    cache = make(codec, policy_name=policy, policy_settings=settings, window=3)
    slot = cache.load(prefill(cache, layers, 24))
    for place in range(24, 34):
        outs = decode(cache, slot, layers, place)
    cache.check_integrity()
    assert all(torch.isfinite(out).all() for out in outs)
    rows, held = cache.rows, cache.held(slot)
    assert held["pages"] + held["exact"] == rows.pool.used * rows.pool.page_bytes > 0
    entries = cache.entries(slot)
    assert entries.shape == (LAYERS, HEADS) and entries.max() <= cache.policy.most_entries(34)
    if not cache.policy.evicts:
        full = rows.full_count[rows.all_layers(slot)]
        assert rows.encoded_count.max() > 0 and (full >= (entries.flatten() - 1).clamp(max=2 + 3)).all()
    cache.close(slot)
    assert rows.pool.used == 0


def test_the_page_says_what_is_registered():
    lines = [line.split("|")[1:-1] for line in PAGE.read_text().splitlines() if line.startswith("|")]
    names = [re.findall(r"`([^`]+)`", cell) for cell in lines[0][1:]]
    assert [name for cell in names for name in cell] == list(CODECS)
    rows = {re.search(r"`([^`]+)`", line[0])[1]: [cell.strip() for cell in line[1:]] for line in lines[2:]}
    assert list(rows) == list(POLICIES)
    assert all(cell == "runs" for cells in rows.values() for cell in cells)
