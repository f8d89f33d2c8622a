"""What each name of a codec stands for, what it holds, and what the names of version 0.1 come to."""

import json
import logging

import pytest
import torch

from dmc.cache import CODECS, KVCache, Shape, codec, policy
from dmc.cache.codecs import former, layers
from dmc.cache.codecs.backbones import BACKBONES
from dmc.cache.codecs.gear import GearCodec
from dmc.cache.codecs.outliers import outlier_count
from dmc.cache.codecs.tcq import TcqCodec
from dmc.rope import Rope
from tests.cache.stored import frequencies

PUBLISHED = dict(rank=4, outliers=0.02, page_size=64)
GEAR = {
    "gear": dict(bits=4, backbone="kcvt", **PUBLISHED),
    "gear-4bit": dict(bits=4, backbone="kcvt", **PUBLISHED),
    "gear-2bit": dict(bits=2, backbone="kivi", group=64, **PUBLISHED),
}
TCQ = {
    "tcq": dict(bits=4, key_bits=4.5, value_bits=3.5, page_size=32),
    "tcq-4bit": dict(bits=4, key_bits=4.5, value_bits=3.5, page_size=64),
    "tcq-3bit": dict(bits=3, key_bits=3.25, value_bits=2.5, page_size=64),
    "tcq-2bit": dict(bits=2, key_bits=2, value_bits=2, page_size=64),
}


@pytest.fixture(autouse=True)
def said(caplog):
    """Warnings of this test, of which each text is logged once in a process."""
    former.say.cache_clear()
    caplog.set_level(logging.WARNING, "dmc.cache")
    yield lambda: [record.getMessage() for record in caplog.records]
    former.say.cache_clear()


def taken(made, settings):
    return {name: getattr(made, name) for name in settings}


@pytest.mark.parametrize("name", GEAR)
def test_gear_is_the_published_recipe(name):
    made = codec(name)
    assert isinstance(made, GearCodec) and made.name == name and taken(made, GEAR[name]) == GEAR[name]


@pytest.mark.parametrize("name", TCQ)
def test_tcq_has_no_low_rank_and_no_outliers(name):
    made = codec(name)
    assert isinstance(made, TcqCodec) and made.name == name and taken(made, TCQ[name]) == TCQ[name]
    fields = {field[2:] for field in made.layout(32, 16, torch.bfloat16)}
    assert fields == {"codes", "scale", "top", "mean", "unit"}


def test_no_other_codec_has_these_names():
    assert [name for name in CODECS if name.startswith(("gear", "tcq"))] == [*GEAR, *TCQ]


@pytest.mark.parametrize("bits, backbone", [(2, "kivi"), (3, "kivi"), (4, "kcvt"), (8, "kcvt")])
def test_the_backbone_follows_the_bits(bits, backbone):
    assert codec("gear", bits=bits).backbone == backbone


@pytest.mark.parametrize("backbone", BACKBONES)
def test_gear_takes_any_backbone(backbone):
    """The same low rank and outliers over each; they bring keys and values closer than the backbone alone."""
    keys, values = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    keys[..., ::7] = keys[..., ::7] * 6 + 10
    values[..., ::5, ::11] *= 9
    made, bare = codec("gear", bits=2, backbone=backbone), codec("gear", bits=2, backbone=backbone, rank=0, outliers=0)
    assert (made.rank, made.outliers, made.backbone) == (4, 0.02, backbone)
    for before, ours, alone in zip(
        (keys, values), made.decode(made.encode(keys, values)), bare.decode(bare.encode(keys, values)), strict=True
    ):
        assert (before - ours).norm() < 0.95 * (before - alone).norm()


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("name", GEAR)
def test_a_codec_without_low_rank_and_outliers_is_not_named_gear(name, backbone):
    """GEAR-L, which has the low rank alone, is."""
    assert codec(name, backbone=backbone, rank=0, outliers=0).name == f"bare {backbone}"
    assert codec(name, backbone=backbone, outliers=0).name == codec(name, backbone=backbone).name == name


@pytest.mark.parametrize("entries, size", [(100, 50), (64, 64), (64, 128)])
@pytest.mark.parametrize("name, bits", [("gear-4bit", 4), ("gear-2bit", 2)])
def test_bytes_of_the_published_recipe(name, bits, entries, size):
    """Per element b + 32/g + 16 r (1/D + 1/N) + s (16 + index bits); g is the vector, or at most 64 of it under KIVI."""
    made = codec(name)
    expected = 0.0
    for length in (entries, size):  # of a key's channel, of a value
        groups = 1 if name == "gear-4bit" else -(-length // 64)
        share = outlier_count(0.02, length) / length
        expected += bits + 32 * groups / length + 16 * 4 * (1 / size + 1 / entries) + share * (16 + 8)
        if (entries, size) == (100, 50):
            assert share == 0.02
    blocks = made.encode(*torch.randn(2, 3, entries, size))
    assert made.nbytes(blocks) / 3 == pytest.approx(entries * size * expected / 8, abs=1e-6)
    assert made.nbytes(blocks) == sum(tensor.untyped_storage().nbytes() for tensor in blocks.tensors.values())


def test_held_bytes_of_the_published_recipe():
    """A cache of 4 sinks, two pages and a buffer that fills: pages as the formula says, everything else in bf16."""
    layers_, heads, size, tokens = 2, 2, 64, 4 + 2 * 64 + 40
    cache = KVCache(Shape(layers_, heads, size, torch.bfloat16), policy("full"), codec("gear-4bit"), slots=1)
    rope = Rope(frequencies(size, 1e4))
    prompt, nobody = cache.prompt(), torch.empty(0, dtype=torch.int64)
    attend = cache.step(nobody, nobody, [(prompt, tokens)], rope)
    for layer in range(layers_):
        query, key, value = torch.randn(3, tokens, heads, size).bfloat16()
        attend(layer, query, key, value, torch.zeros(tokens, heads), torch.ones(tokens, heads))
    held, pool = cache.held(cache.load(prompt)), cache.rows.pool
    bits = 4 + 32 / 64 + 16 * 4 * (1 / 64 + 1 / 64) + 24 / 64
    page = 2 * 64 * size * bits / 8
    assert held["pages"] == layers_ * heads * 2 * page and pool.page_bytes == page  # a multiple of 8: no slack
    exact = 4 + 39  # sinks, and the buffer but for the newest token, which accumulates
    per_page = page // (2 * size * 2)
    assert held["exact"] == layers_ * heads * -(-exact // per_page) * page


OLD = [
    # what version 0.1 was given, and what that is now
    ("gear", {}, "tcq", {}, 32),
    ("gear", {"bits": 3}, "tcq", {"bits": 3}, 32),
    ("gear-4bit", {}, "tcq-4bit", {}, 64),
    ("gear-2bit", {"value_bits": 3}, "tcq-2bit", {"value_bits": 3}, 64),
    ("gear-3bit", {"group": 32, "rank": 0, "rounds": 2}, "tcq-3bit", {}, 64),
    ("gear", {"key_bits": 2.5, "value_bits": 1.5}, "tcq", {"key_bits": 2.5, "value_bits": 1.5}, 32),
    ("gear", {"backbone": "rotated", "bits": 2}, "tcq", {"bits": 2}, 32),
    ("gear-2bit", {"outliers": 0.02}, "gear", {"bits": 2, "outliers": 0.02, "backbone": "trellis", "rank": 0}, 64),
    ("gear", {"rank": 2}, "gear", {"rank": 2, "backbone": "trellis", "outliers": 0.0}, 32),
    ("gear", {"bits": 2, "backbone": "kivi"}, "gear", {"bits": 2, "backbone": "kivi", "rank": 1, "outliers": 0.02}, 32),
    ("gear-3bit", {"backbone": "kcvt", "group": 9}, "gear", {"bits": 3, "backbone": "kcvt", "rank": 1, "outliers": 0.02}, 64),
    ("kivi", {"bits": 4}, "kivi", {"bits": 4}, 32),
]


@pytest.mark.parametrize("name, settings, new, expected, page", OLD)
def test_what_version_0_1_meant(name, settings, new, expected, page, tmp_path, said):
    now = former.former(name, settings)
    assert now[:2] == (new, expected)
    file = tmp_path / "layers.json"
    file.write_text(json.dumps({"format": "dmc-layers-1", "codec": name, "layers": [settings] * 2}))
    one, other = layers.read_layers(file)
    assert one is other and one.name == new and one.page_size == page and taken(one, expected) == expected
    assert len(said()) == (new != name) and all(f"is now called {new}" in text for text in said())


def test_a_file_of_today_is_read_with_the_names_of_today(tmp_path, said):
    file = tmp_path / "layers.json"
    file.write_text(json.dumps({"format": "dmc-layers-2", "codec": "tcq", "layers": [{"bits": 4}, {"bits": 3}]}))
    assert [one.key_bits for one in layers.read_layers(file)] == [4.5, 3.25] and not said()


@pytest.mark.parametrize(
    "name, settings, new, expected",
    [
        ("gear-3bit", {}, "tcq-3bit", {"key_bits": 3.25}),
        ("gear-3bit", {"rank": 2}, "gear", {"rank": 2, "backbone": "trellis", "bits": 3}),
        ("gear", {"backbone": "rotated", "bits": 2}, "tcq", {"bits": 2}),
        ("gear-4bit", {"backbone": "rotated"}, "tcq-4bit", {"bits": 4}),
        ("gear", {"key_bits": 3.75, "value_bits": 3}, "tcq", {"key_bits": 3.75, "value_bits": 3}),
    ],
)
def test_names_and_settings_that_are_gone_keep_their_meaning(name, settings, new, expected, said):
    for _ in range(3):
        made = codec(name, **settings)
        assert made.name == new and taken(made, expected) == expected
    (text,) = said()
    assert text.startswith(f"dmc: the codec {name}") and f"is now called {new}" in text


@pytest.mark.parametrize(
    "name, settings, words",
    [
        ("gear", {}, "now called tcq"),
        ("gear", {"bits": 2}, "now called tcq"),
        ("gear-4bit", {}, "now called tcq-4bit"),
        ("gear-2bit", {"rank": 2}, "now called tcq-2bit"),
        ("gear", {"backbone": "kivi"}, "over kivi has rank 4, as published"),
    ],
)
def test_names_that_mean_something_else_now_say_so_once(name, settings, words, said):
    for _ in range(3):
        assert isinstance(codec(name, **settings), GearCodec)
    (text,) = said()
    assert text.startswith(f"dmc: the codec {name} ") and words in text


@pytest.mark.parametrize(
    "name, settings",
    [("gear", {"backbone": "trellis"}), ("gear", {"bits": 2, "backbone": "kivi", "rank": 4}), ("tcq-4bit", {}), ("kivi", {})],
)
def test_what_was_never_another_thing_says_nothing(name, settings, said):
    assert codec(name, **settings).name == name and not said()


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"group": 32}, "group=32 is a setting of the backbones kivi, token: leave it out with kcvt"),
        ({"backbone": "trellis", "scale_dtype": "fp32"}, "scale_dtype=fp32 is a setting of the backbones kcvt, kivi, token"),
        ({"backbone": "lloyd", "bits": 8}, "bits must be whole bits from 1 to 6 with the backbone lloyd, got 8"),
        ({"backbone": "kivi", "key_bits": 2.5}, "key_bits must be whole bits from 1 to 8 with the backbone kivi, got 2.5"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        codec("gear", **settings)
