"""Settings for each layer: the division against brute force, encoding against the cache itself, KL against transformers."""

import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmc import LLM, cli
from dmc.analysis.allocate import allocate
from dmc.analysis.recommend import choices, passes, recommend
from dmc.analysis.sensitivity import Probe, through
from dmc.analysis.suggested import verdict
from dmc.cache import codec
from dmc.cache.codecs.layers import read_layers
from tests.model import tiny

CONVEX = st.lists(st.floats(0.01, 1.0), min_size=1, max_size=3).map(
    lambda drops: [(float(cost), sum(sorted(drops)[: len(drops) - cost])) for cost in range(len(drops) + 1)]
)


@settings(max_examples=60, deadline=None)
@given(st.lists(CONVEX, min_size=1, max_size=4), st.integers(0, 12))
def test_division_is_the_best_there_is(items, budget):
    taken = allocate(items, float(budget))

    def cost(picked):
        return sum(choices[choice][0] for choices, choice in zip(items, picked, strict=True))

    def loss(picked):
        return sum(choices[choice][1] for choices, choice in zip(items, picked, strict=True))

    possible = [picked for picked in itertools.product(*(range(len(choices)) for choices in items)) if cost(picked) <= budget]
    assert cost(taken) <= budget
    assert loss(taken) == pytest.approx(min(map(loss, possible)))


def test_division_passes_over_what_is_off_the_hull_and_too_dear():
    items = [[(0.0, 9.0), (1.0, 8.9), (2.0, 1.0)], [(0.0, 5.0), (4.0, 0.0)]]
    assert allocate(items, 2.0) == [2, 0] and allocate(items, 5.0) == [2, 0] and allocate(items, 6.0) == [2, 1]
    assert allocate([[(0.0, 1.0), (1.0, 0.5), (2.0, 0.0)]], 1.0) == [1]
    assert allocate([[(3.0, 1.0), (1.0, 1.0), (2.0, 7.0)]], 9.0) == [1]
    with pytest.raises(ValueError, match="over the budget"):
        allocate(items, -1.0)


def test_entries_come_back_as_from_pages():
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 3, 40, 8, generator=generator)
    made, counts = codec("tcq", bits=2), torch.tensor([40, 3, 21])
    new = through(made, keys, values, counts, 8, 4)
    for part, (exact, got) in enumerate(zip((keys, values), new, strict=True)):

        def page(head, start, end, exact=exact, part=part):
            return made.decode(made.encode(keys[head : head + 1, start:end], values[head : head + 1, start:end]))[part][0]

        expected = exact.clone()
        expected[0, 32:40] = page(0, 32, 40)
        for start in (4, 12, 20, 28):
            expected[0, start : start + 8] = page(0, start, start + 8)
        expected[2, 13:21] = page(2, 13, 21)
        for start in (4, 12):
            expected[2, start : start + 8] = page(2, start, start + 8)
        torch.testing.assert_close(got, expected)
    assert torch.equal(new[0][1], keys[1])  # three entries, all of them sinks


@pytest.fixture(scope="module")
def llms(tmp_path_factory):
    made = {}
    for decision in (None, "head"):
        fields = tiny.config(decision)
        directory = tiny.write(tmp_path_factory.mktemp("model"), fields, tiny.weights(fields))
        made[decision] = LLM(directory, codec="tcq", page_size=8, device="cpu")
    return made


@pytest.fixture(scope="module")
def windows():
    return torch.randint(3, tiny.VOCAB, (4, 60), generator=torch.Generator().manual_seed(0)).tolist()


def test_kl_is_that_of_transformers(llms, windows):
    from transformers import DynamicCache, LlamaForCausalLM

    llm, made = llms[None], codec("tcq", bits=2)
    model = LlamaForCausalLM.from_pretrained(llm.path, dtype=torch.float32)
    probe = Probe(llm.model, llm.cache, windows[:2], scored=15, sinks=4)
    assert probe.entries == [2 * 2 * (44 - 4)] * tiny.LAYERS  # the newest entry of the prompt is open
    for layer, part in ((0, "both"), (1, "key"), (1, "value")):
        found = probe.kl({layer: probe.encoded(layer, made, 8)}, part)
        for window, kl in zip(windows[:2], found, strict=True):
            prompt, rest = torch.tensor([window[:45]]), torch.tensor([window[45:]])
            predicted = []
            for changed in (False, True):
                cache = DynamicCache()
                with torch.no_grad():
                    model.model(prompt, past_key_values=cache)
                    own = cache.layers[layer]
                    back = through(made, own.keys[0], own.values[0], torch.tensor([44, 44]), 8, 4)
                    if changed and part != "value":
                        own.keys[0] = back[0]
                    if changed and part != "key":
                        own.values[0] = back[1]
                    predicted.append(model(rest, past_key_values=cache).logits[0].log_softmax(-1))
            expected = (predicted[0].exp() * (predicted[0] - predicted[1])).sum(-1).mean()
            assert float(kl) == pytest.approx(float(expected), rel=2e-3, abs=1e-6) and kl > 1e-4


def test_exact_entries_lose_nothing(llms, windows):
    llm = llms["head"]
    probe = Probe(llm.model, llm.cache, windows[:2], scored=15, sinks=4)
    unchanged = probe.kl({layer: probe.encoded(layer, codec("dense", dtype="fp32"), 8) for layer in range(tiny.LAYERS)})
    assert unchanged.max() < 1e-6
    again = probe.kl({0: probe.encoded(0, codec("tcq", bits=2), 8)})
    assert torch.equal(again, probe.kl({0: probe.encoded(0, codec("tcq", bits=2), 8)})) and again.min() > 1e-5


@pytest.mark.parametrize("decision", [None, "head"], ids=["plain", "dmc"])
def test_recommendation(llms, windows, decision, tmp_path):
    llm, told = llms[decision], []
    found = recommend(llm.model, llm.cache, "tcq", {"bits": 3}, windows[:2], windows[2:], progress=told.append)
    assert sum(told) == passes(tiny.LAYERS, choices("tcq", {"bits": 3}, None), True)
    file = json.loads(json.dumps(found["layers"]))
    assert file["format"] == "dmc-layers-2" and file["codec"] == "tcq" and len(file["layers"]) == tiny.LAYERS
    for own in file["layers"]:
        assert 2.25 <= own["key_bits"] <= 4.25 and 1.5 <= own["value_bits"] <= 3.5
        codec("tcq", **own)
    (tmp_path / "layers.json").write_text(json.dumps(file))
    read = read_layers(tmp_path / "layers.json")
    assert [(one.key_bits, one.value_bits) for one in read] == [(own["key_bits"], own["value_bits"]) for own in file["layers"]]
    assert found["bits_per_element"]["recommended"] <= found["bits_per_element"]["uniform"] + 1e-9
    assert found["predicted_kl"]["recommended"] <= found["predicted_kl"]["uniform"]
    for setting in ("key_bits", "value_bits"):
        assert all(low > high > 0 for low, high in found["measured"][setting]["kl"])  # fewer bits lose more
    for name in ("chosen_on", "held_out"):
        assert found[name]["tokens"] == 30 and found[name]["uniform"] > 0 and found[name]["recommended"] > 0
    assert ("better than" in verdict(found)) and ("no better" in verdict(found)) == (
        found["held_out"]["recommended"] >= found["held_out"]["uniform"]
    )
    assert "No text was left" in verdict(found | {"held_out": None})


def test_layers_that_matter_get_the_bits(llms, windows):
    """A layer whose output is multiplied by zero loses nothing by few bits."""
    llm = llms[None]
    output = llm.model.layers[1].output
    kept, llm.model.layers[1].output = output, lambda x: 0 * output(x)
    try:
        found = recommend(llm.model, llm.cache, "tcq", {"bits": 3}, windows[:2], [])
    finally:
        llm.model.layers[1].output = kept
    first, second = found["layers"]["layers"]
    assert first["key_bits"] + first["value_bits"] > 6 and (second["key_bits"], second["value_bits"]) == (2.25, 1.5)
    assert found["held_out"] is None


def test_what_is_varied():
    assert choices("tcq", {"bits": 4}, None) == {"key_bits": [3.5, 5.5], "value_bits": [2.5, 4.5]}
    assert choices("gear", {"bits": 2, "backbone": "kivi"}, None) == {"key_bits": [1, 3], "value_bits": [1, 3]}
    assert choices("gear", {"backbone": "kivi"}, {"rank": [4, 1]}) == {"rank": [1, 4]}
    for name, own, vary, said in (
        ("dense", {}, None, "loses nothing"),
        ("int8", {}, None, "choose another --codec"),
        ("tcq", {}, {"colour": [1]}, "no setting colour"),
        ("tcq", {}, {"key_bits": [2.1]}, "quarters of a bit"),
    ):
        with pytest.raises(ValueError, match=said):
            choices(name, own, vary)


def run(capsys, *arguments):
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_command(capsys, llms, tmp_path):
    common = (
        "inspect",
        llms["head"].path,
        "--prompt",
        "Pack-my-box-with-five-dozen-liquor-jugs." * 5,
        "--device",
        "cpu",
        "--codec",
        "tcq",
        "--bits",
        2,
        "--page-size",
        8,
        "--windows",
        1,
        "--window-tokens",
        60,
        "--attention-tokens",
        20,
    )
    out = tmp_path / "report"
    code, printed, err = run(capsys, *common, "--out", out, "--recommend", "--vary", "key_bits=2,3.5")
    assert (code, err) == (0, "") and "On 1 other windows they are" in printed
    file, numbers = (json.loads((out / name).read_text()) for name in ("layers.json", "inspect.json"))
    assert file == numbers["recommendation"]["layers"] and [set(own) for own in file["layers"]] == [{"bits", "key_bits"}] * 2
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Settings for each layer" in page and (out / "sensitivity.png").stat().st_size > 5000
    for arguments, said in (
        (("--recommend",), "give --out REPORT"),
        (("--out", tmp_path / "new", "--vary", "key_bits=2"), "--vary is for --recommend"),
        (("--out", tmp_path / "new", "--recommend", "--vary", "key_bits"), "write SETTING=NUMBER"),
        (("--out", tmp_path / "new", "--recommend", "--vary", "key_bits=a"), "write SETTING=NUMBER"),
        (("--out", tmp_path / "new", "--recommend", "--codec", "fp8", "--bits", 8), "no setting bits"),
    ):
        code, printed, err = run(capsys, *common, *arguments)
        assert code == 2 and printed == "" and said in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["report"]
