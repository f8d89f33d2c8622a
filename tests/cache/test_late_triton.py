"""Late merging, DMS and the gate on the Triton path (interpreter): outputs, what is held, and no wait for the device.

The expectation is dense: `dmc.functional.attention` with a window, or the mask of `dmc.functional_dms.attention`.
"""

import pytest
import torch

from dmc import LLM, SamplingParams
from dmc.cache.reading.gathered import Gathered
from dmc.cache.reading.pagewise import PageByPage
from dmc.kernels.backend import interpreted, using
from dmc.kernels.decode import gpu as decode_triton
from dmc.kernels.encode import gpu as encode_triton
from dmc.model.fingerprint import model_hash
from tests.cache.decisions import random_decisions
from tests.cache.test_growing import Waits
from tests.cache.test_late import LAYERS, ROPE, decode, expected, held, make, prefill, tokens
from tests.model import tiny

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not interpreted(), reason="needs Triton's interpreter")


def run(backend, name, codec, window, *, most=None, prompt=10, length=16, ahead=True, exact=None):
    """Two texts, one of them behind a full ring from the start → cache, slots, texts, outputs by text and layer."""
    with using(backend):
        sizes = {"sink_tokens": 1, "page_size": 16 if "tcq" in codec else 4, "exact_dtype": exact}
        cache = make(codec, name=name, window=window, most=most, **sizes)
        assert all(reader.on_pages == (backend == "triton") for reader in cache.readers)
        assert all(reader.writes == (backend == "triton" and exact is None) for reader in cache.readers)
        texts, outs = [tokens(length, seed, ahead) for seed in (3, 4)], [[[] for _ in range(LAYERS)] for _ in range(2)]
        slots = [cache.load(prefill(cache, text, prompt, 9, outs[n])) for n, text in enumerate(texts)]
        for position in range(prompt, length):
            for layer, out in enumerate(decode(cache, slots, texts, position)):
                for n in range(2):
                    outs[n][layer].append(out[n : n + 1])
        cache.check_integrity()
    return cache, slots, texts, [[torch.cat(out) for out in each] for each in outs]


@pytest.mark.parametrize(
    ("name", "window", "most", "ahead"),
    [
        ("dmc", 5, None, True),
        ("dms", 5, None, False),
        ("dmc", 3, 4, False),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("dms", 3, 4, True), ("dmc", 0, None, False), ("dms", 0, None, False), ("dmc", 20, None, True))
        ),
    ],
)
def test_decode_is_the_dense_definition(name, window, most, ahead):
    cache, slots, texts, outs = run("triton", name, "dense", window, most=most, ahead=ahead)
    for n, text in enumerate(texts):
        for layer, parts in enumerate(text):
            torch.testing.assert_close(outs[n][layer], expected(parts, window, name, most), rtol=1e-4, atol=1e-5)
            assert torch.equal(cache.entries(slots[n])[layer].float(), held(parts, window, name, most).float())


@pytest.mark.parametrize(
    ("name", "codec", "exact"),
    [
        ("dmc", "int8", None),
        ("dms", "int8", "int8"),
        pytest.param("dms", "int8", None, marks=pytest.mark.slow),
        pytest.param("dmc", "int8", "int8", marks=pytest.mark.slow),
        pytest.param("dmc", "tcq-4bit", None, marks=pytest.mark.slow),
    ],
)
def test_encoded_pages_are_those_of_pytorch(name, codec, exact):
    """Same outputs as by PyTorch, over pages that were encoded on the way."""
    length = 70 if "tcq" in codec else 20
    (ours, _, _, got), (theirs, _, _, wanted) = (run(b, name, codec, 4, length=length, exact=exact) for b in ("triton", "torch"))
    assert ours.rows.encoded_count.sum() == theirs.rows.encoded_count.sum() > 0
    for mine, other in zip(sum(got, []), sum(wanted, []), strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("name", ["dmc", "dms"])
@pytest.mark.parametrize("most", [None, pytest.param(6, marks=pytest.mark.slow)])
def test_a_layer_reads_the_ring_in_one_pass_and_waits_for_nothing(name, most, monkeypatch):
    """One decode launch per layer, no gather of the ring, append and encode by kernels, no wait; also with a codec per layer."""
    with using("triton"):
        cache, text, launched = make("int8", name=name, window=5, most=most, page_size=4, sink_tokens=1), tokens(31, 1), []
        slot = cache.load(prefill(cache, text, 30, 30, [[] for _ in text]))
        assert cache.rows.error.due()  # the first and every 97th layer waits, to compare a page
        cache.rows._alike = False  # as with a codec per layer: the packing is not looked up on the device
        attend = cache.step(torch.tensor([slot]), torch.tensor([30]), [], ROPE)

        class Silent:
            def __init__(self, name):
                self.name = name

            def __getitem__(self, grid):
                return lambda *a, **k: launched.append(self.name)

        from dmc.kernels.append import gpu as append_triton
        from dmc.kernels.formats.plain import decode as decode_plain
        from dmc.kernels.formats.plain import encode as encode_plain

        for module in (append_triton, encode_triton, encode_plain, decode_triton, decode_plain):
            for kernel in ("_append", "_take", "_plain", "_settle", "_together", "_pieces"):
                if hasattr(module, kernel):
                    monkeypatch.setattr(module, kernel, Silent(kernel))
        for reader in (Gathered, PageByPage):
            monkeypatch.setattr(reader, "attend", lambda *_, **__: pytest.fail("PyTorch gathers the row"))
        for way in ("tolist", "cpu", "numpy", "item"):
            monkeypatch.setattr(torch.Tensor, way, lambda x, *_, way=way: pytest.fail(f"a layer reads the device: {way}"))
        with Waits() as waits:
            for layer in range(LAYERS):
                attend(layer, *(part[30:31] for part in text[layer]))
        monkeypatch.undo()
    assert waits.seen == []
    # After the attention of all layers, which read what the step before left, one launch of each for all of them.
    reads, writes = launched[: -len(("_append", "_take", "_plain", "_settle"))], launched[-4:]
    assert writes == ["_append", "_take", "_plain", "_settle"]
    assert reads.count("_together") == LAYERS and not {"_append", "_take", "_settle"} & set(reads)


@pytest.mark.parametrize("kind", ["late", "dms", pytest.param("gate-merge", marks=pytest.mark.slow)])
def test_an_engine_gives_the_same_tokens(kind, tmp_path):
    """Greedy tokens and entries in fp32 equal those of the engine whose rows PyTorch reads."""
    window = 6
    made = {
        "late": {"method": "dmc", "window": window, "decide": "late", "decision": "head", "offset": tiny.OFFSET},
        "dms": {"method": "dms", "window": window, "decision": "head", "offset": 0.0},
    }.get(kind)
    fields = tiny.config("head", dmc=made) if made else tiny.config()
    directory = tiny.write(tmp_path / "model", fields, tiny.weights(fields))
    given = (
        {}
        if made
        else {
            "policy": "gate",
            "decisions": random_decisions(window=window, model=model_hash(directory)),
            "target_cr": 2,
            "policy_settings": {"merge": True, "length": 40},
        }
    )
    both, params = [], SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)
    for backend in ("triton", "torch"):
        with using(backend):
            llm = LLM(directory, codec="dense", page_size=4, dtype="fp32", device="cpu", **given)
            assert llm.cache.readers[0].writes == (backend == "triton")
            both.append(llm.generate([list(range(3, 20))], params))
    for ours, theirs in zip(*both, strict=True):
        assert ours.token_ids == theirs.token_ids and torch.equal(ours.stats.entries, theirs.stats.entries)
        assert ours.stats.cr > 1
