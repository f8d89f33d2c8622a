"""Eigen Attention: the codec against its definition in fp64, calibration, and the files that are refused."""

import json

import pytest
import torch

from dmc import LLM, SamplingParams, cli
from dmc.cache import KVCache, Shape, codec, policy
from dmc.cache.codecs.eigenfile import read
from dmc.cache.codecs.layers import read_layers
from dmc.evaluation.calibrate import calibrate, directions, gather
from dmc.evaluation.windows import Windows
from dmc.model import Decoder
from dmc.model.fingerprint import model_hash
from tests.cache.stored import eigen_file
from tests.cache.test_rows import HEADS, LAYERS, SIZE, feed, tokens
from tests.model import tiny
from tests.model.ropes import SCALED

TEXT = "abcdefghijklmnopqrstuvwxyz0123456789" * 20


def turned(x, place, theta, back=False):
    """RoPE of one vector in fp64, as multiplication of complex numbers."""
    half = len(x) // 2
    angle = place * theta ** -(torch.arange(half, dtype=torch.float64) / half)
    z = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(angle), -angle if back else angle)
    return torch.cat([z.real, z.imag])


@pytest.mark.parametrize("size, scaling", [(8, 1.0), (64, 1.0), (80, 1.0), (64, 1.5)])
@pytest.mark.parametrize("kind, off", [("bf16", 0.006), ("int8", 0.02)])
def test_keys_are_projected_before_rope_and_rotated_at_their_own_place(tmp_path, size, scaling, kind, off):
    """With an attention factor as well, by which a rotated key is longer than it was."""
    file = eigen_file(tmp_path / "e", layers=2, heads=3, size=size, ranks=[(5, 4), (7, 3)], scaling=scaling)
    made = codec("eigen", file=file, coefficients=kind).of_layer(1, 2, 3, size)
    bases = read(tmp_path / "e").layers[1]
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 4, 6, size, generator=generator)
    heads, places = torch.tensor([0, 2, 1, 2]), torch.randint(0, 500, (4, 6), generator=generator).int()
    blocks = made.encode_at(keys, values, heads, places)
    got_keys, got_values = made.decode(blocks)
    for n in range(4):
        basis, other = bases.keys[heads[n]].double(), bases.values[heads[n]].double()
        for i in range(6):
            # The projection is linear, so the factor that is divided out and comes back changes nothing.
            plain = turned(keys[n, i].double(), int(places[n, i]), 100.0, back=True)
            want = turned(basis @ (basis.T @ plain), int(places[n, i]), 100.0)
            assert (got_keys[n, i] - want).norm() < off * want.norm()
            want = other @ (other.T @ values[n, i].double())
            assert (got_values[n, i] - want).norm() < off * want.norm()
    query, weights = torch.randn(4, 2, size), torch.rand(4, 2, 6)
    torch.testing.assert_close(made.scores(blocks, query), query @ got_keys.mT, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made.combine(blocks, weights), weights @ got_values, rtol=1e-4, atol=1e-4)
    scales = 4 if kind == "int8" else 0
    assert made.nbytes(blocks) == 4 * (6 * ((7 + 3) * (1 if scales else 2) + 4 + scales) + 1)


def test_coefficients_are_of_keys_without_the_attention_factor(tmp_path):
    keys, values = torch.randn(2, 3, 16, 8, generator=torch.Generator().manual_seed(1))
    heads, places, stored = torch.zeros(3).long(), torch.arange(48).view(3, 16), []
    for scaling in (1.0, 1.5):
        file = eigen_file(tmp_path / "e", layers=1, heads=1, size=8, ranks=[(5, 5)], scaling=scaling)
        assert read(tmp_path / "e").scaling == scaling
        blocks = codec("eigen", file=file).of_layer(0, 1, 1, 8).encode_at(keys * scaling, values, heads, places)
        stored.append(blocks.tensors["k_coefficients"])
    torch.testing.assert_close(*stored, rtol=0.01, atol=0.01)


def test_error_falls_with_rank(tmp_path):
    keys, values = torch.randn(2, 3, 16, 8, generator=torch.Generator().manual_seed(1))
    before = (torch.inf, torch.inf)
    for rank in (1, 3, 5, 8):
        file = eigen_file(tmp_path / "e", layers=1, heads=1, size=8, ranks=[(rank, rank)])
        made = codec("eigen", file=file).of_layer(0, 1, 1, 8)
        got = made.decode(made.encode_at(keys, values, torch.zeros(3).long(), torch.arange(48).view(3, 16)))
        now = tuple(float((a - b).norm() / b.norm()) for a, b in zip(got, (keys, values), strict=True))
        assert now[0] < before[0] and now[1] < before[1]
        before = now
    assert max(before) < 0.01


def test_merged_keys_are_in_the_space_of_those_they_are_means_of(tmp_path):
    """DMC in the engine: with bases that hold the unrotated keys, every merged entry is held as well as with all directions."""
    layers, file = tokens(60, seed=3), eigen_file(tmp_path / "e", layers=2, heads=HEADS, size=SIZE, ranks=[(3, 4)] * 2)
    for bases, parts in zip(read(tmp_path / "e").layers, layers, strict=True):
        for h in range(HEADS):  # before RoPE
            parts[1][:, h] = parts[1][:, h] @ bases.keys[h] @ bases.keys[h].T
            parts[2][:, h] = parts[2][:, h] @ bases.values[h] @ bases.values[h].T
    shape, outs = Shape(LAYERS, HEADS, SIZE, torch.float32), {}
    for name, own in (("dense", {}), ("eigen", {"file": file})):
        cache = KVCache(shape, policy("dmc"), codec(name, **own), slots=1, page_size=4)
        slot, outs[name] = feed(cache, layers, prompt=30)
        if name == "eigen":
            assert (cache.rows.encoded_count > 1).all()
    for got, want in zip(outs["eigen"], outs["dense"], strict=True):
        assert (got - want).norm() < 0.01 * want.norm()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A model whose keys and queries have 3 dimensions before RoPE in layer 0, and all in layer 1."""
    fields = tiny.config("head")
    weights = tiny.weights(fields)
    thin = torch.linalg.qr(torch.randn(tiny.SIZE, 3, generator=torch.Generator().manual_seed(4)))[0]
    for part in ("q", "k"):
        name = f"model.layers.0.self_attn.{part}_proj.weight"
        weights[name] = (thin @ thin.T @ weights[name].unflatten(0, (-1, tiny.SIZE))).flatten(0, 1)
    return tiny.write(tmp_path_factory.mktemp("model"), fields, weights)


def test_calibration_finds_the_directions_and_keeps_the_budget(directory, tmp_path):
    windows = Windows(torch.randint(3, 90, (3, 40), generator=torch.Generator().manual_seed(0)), 38, "random", "0")
    found = {budget: calibrate(directory, windows, tmp_path / "e", budget=budget) for budget in (0.3, 0.01, 1e-4)}
    for budget, layers in found.items():
        assert all(layer.error <= budget for layer in layers)
    assert found[1e-4][0].key_rank == 3 and found[1e-4][1].key_rank > 5
    for loose, tight in ((0.3, 0.01), (0.01, 1e-4)):
        for a, b in zip(found[loose], found[tight], strict=True):
            assert a.key_rank <= b.key_rank and a.value_rank <= b.value_rank
    made = read(tmp_path / "e")
    assert made.model_hash == model_hash(directory) and made.notes["budget"] == "0.0001"
    for bases in made.layers:
        for basis in (bases.keys, bases.values):
            torch.testing.assert_close(basis.mT @ basis, torch.eye(basis.shape[-1]).expand(2, -1, -1), rtol=0, atol=1e-5)
    seen = gather(Decoder.load(directory, dtype=torch.float32), windows.tokens[-1:])[1]  # one window: all of it is kept
    query, key = (part.double() for part in seen.last[0][:2])
    both = torch.cat([key[0], query[:2].flatten(0, 1)])
    share = torch.linalg.svdvals(both).square().cumsum(0)
    torch.testing.assert_close(directions(seen.keys)[1][0], share / share[-1])


def test_a_model_that_evicts_is_calibrated_in_full(tmp_path):
    """Its marks are not merges: what is seen is what the same model without marks sees."""
    windows = torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(0))
    plain, marking = tiny.config(), tiny.config("head", dmc={"method": "dms", "window": 4, "decision": "head", "offset": 0.0})
    tensors = tiny.weights(marking)
    of_plain = {name: tensor for name, tensor in tensors.items() if "decision" not in name}
    seen = [
        gather(Decoder.load(tiny.write(tmp_path / name, fields, weights), dtype=torch.float32), windows)
        for name, fields, weights in (("plain", plain, of_plain), ("marking", marking, tensors))
    ]
    for one, other in zip(*seen, strict=True):
        torch.testing.assert_close(one.keys, other.keys)
        assert all((alpha == 0).all() and (omega == 1).all() for *_, alpha, omega in other.last)


def test_a_model_with_an_attention_factor_is_calibrated_and_served(tmp_path):
    fields = tiny.config("head", **SCALED["yarn"])
    directory = tiny.write(tmp_path / "model", fields, tiny.weights(fields))
    windows = Windows(torch.randint(3, 90, (3, 40), generator=torch.Generator().manual_seed(0)), 38, "random", "0")
    calibrate(directory, windows, tmp_path / "e", budget=1e-6)
    assert read(tmp_path / "e").scaling == Decoder.load(directory, dtype=torch.float32).rope.scaling > 1.1
    settings = {"eigen": {"codec_settings": {"file": str(tmp_path / "e")}}, "dense": {}}
    exact, stored = (
        LLM(directory, device="cpu", dtype="fp32", codec=name, page_size=4, **own)
        .score(windows.tokens[:1].tolist(), prompt_tokens=20)[0]
        .logprobs
        for name, own in reversed(settings.items())
    )
    assert (exact - stored).abs().max() < 0.1


def test_the_command_and_the_refusals(directory, tmp_path, capsys):
    text, out = tmp_path / "text.txt", tmp_path / "eigen.safetensors"
    text.write_text(TEXT)
    common = [str(directory), "--text", str(text), "--out", str(out), "--device", "cpu", "--dtype", "fp32"]
    assert cli.main(["calibrate", *common, "--budget", "0.05", "--windows", "2", "--context", "48"]) == 0
    assert "layer  keys  values" in capsys.readouterr().out
    small = {"device": "cpu", "codec": "eigen", "page_size": 4, "codec_settings": {"file": str(out)}}
    output = LLM(directory, **small).generate(TEXT[:40], SamplingParams(max_tokens=6, temperature=0, ignore_eos=True))[0]
    assert len(output.token_ids) == 6 and output.stats.held["pages"] > 0
    other = tiny.write(tmp_path / "other", fields := tiny.config("head"), tiny.weights(fields, seed=1))
    with pytest.raises(ValueError, match=r"calibrated on the model with hash .* run `dmc calibrate` on it"):
        LLM(other, **small)
    for arguments, said in (
        (["calibrate", *common, "--budget", "2", "--windows", "2", "--context", "48"], "budget must be above 0 and below 1"),
        (["calibrate", *common, "--windows", "9000"], "give a longer text"),
        (["calibrate", *common[:-6], "--out", str(tmp_path)], "name a file in a folder that can be"),
        (["generate", str(directory), "--prompt", "a", "--codec", "eigen"], "it needs file=FILE"),
        (["generate", str(directory), "--prompt", "a", "--codec", f"eigen:file={text}"], "not a safetensors file"),
        (["generate", str(directory), "--prompt", "a", "--codec", "eigen:file=nowhere"], "nowhere is missing"),
    ):
        assert cli.main(arguments) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(ValueError, match="is for 2 layers, 2 heads of size 8, and here are 3 layers"):
        codec("eigen", file=str(out)).of_layer(0, 3, 2, 8)


def test_settings_for_each_layer_from_a_file(directory, tmp_path, capsys):
    file = tmp_path / "layers.json"

    def write(**fields):
        file.write_text(json.dumps({"format": "dmc-layers-2", "codec": "tcq", "layers": [{"bits": 4}, {"bits": 2}]} | fields))

    write(_note="why")
    llm = LLM(directory, codec_layers=file, device="cpu", page_size=8)
    first, second = llm.cache.page_size
    assert first < second and llm.cache.codec_name == "tcq"
    outputs = llm.generate([TEXT[:50], "abc"], SamplingParams(max_tokens=8, temperature=0, ignore_eos=True))
    llm.cache.check_integrity()
    assert all(len(output.token_ids) == 8 for output in outputs)
    write(layers=[{"bits": 4}] * 2)
    assert len({id(one) for one in read_layers(file)}) == 1
    for change, said in (
        ({"format": "x"}, "not a file of layers"),
        ({"codec": 3}, "lacks a codec's name"),
        ({"layers": []}, "list of layers"),
        ({"more": 1}, "unknown key 'more'"),
        ({"layers": [{}, {"bits": 9}]}, "layer 1: tcq codec: bits must be"),
        ({"layers": [3]}, "layer 0: settings must be an object"),
        ({"layers": [{}]}, "1 codecs were given"),
    ):
        write(**change)
        assert cli.main(["generate", str(directory), "--prompt", "a", "--codec-layers", str(file), "--device", "cpu"]) == 2
        assert said in capsys.readouterr().err
    write()
    with pytest.raises(ValueError, match="leave codec and codec_settings out"):
        LLM(directory, codec="tcq", codec_layers=file)
