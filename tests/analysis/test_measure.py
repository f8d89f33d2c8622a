"""What is measured of a model agrees with its engine, and with each window measured alone."""

import pytest
import torch

from dmc import LLM
from dmc.analysis.attention import attend as attended
from dmc.analysis.attention import states, weights
from dmc.analysis.decisions import decisions
from dmc.analysis.measure import KINDS, _late, measure
from dmc.analysis.windows import cut
from dmc.cache import policy
from dmc.engine import inspect
from dmc.functional import attention
from tests.model import tiny


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    fields = tiny.config("head")
    return LLM(tiny.write(tmp_path_factory.mktemp("model"), fields, tiny.weights(fields)), device="cpu")


@pytest.fixture(scope="module")
def windows():
    return torch.randint(3, tiny.VOCAB, (3, 90), generator=torch.Generator().manual_seed(0)).tolist()


def test_compression_is_the_engines(llm, windows):
    measures, merges = measure(llm.model, llm.cache.policy, windows)
    report = inspect.report(llm, windows)
    torch.testing.assert_close(measures.cr, torch.tensor(report["cr_per_head"], dtype=torch.float64), rtol=1e-6, atol=0)
    assert torch.equal(merges.float(), decisions(llm.model, torch.tensor(windows[0])))
    assert report["pages"] * report["page_bytes"] == report["held"]["pages"] + report["held"]["exact"]


@pytest.mark.parametrize(("window", "ahead", "most"), [(20, True, None), (7, False, None), (7, True, 12), (0, False, None)])
def test_late_merging_is_the_engines(windows, tmp_path, window, ahead, most):
    """Entries per head with the ring counted, and the hidden states that later layers are measured on."""
    dmc = {"method": "dmc", "window": window, "decision": "head", "offset": tiny.OFFSET} | ({"decide": "late"} if ahead else {})
    fields = tiny.config("head", dmc=dmc)
    late = LLM(tiny.write(tmp_path / "late", fields, tiny.weights(fields)), device="cpu", max_entries=most)
    measures, merges = measure(late.model, late.cache.policy, windows)
    report = inspect.report(late, windows)
    torch.testing.assert_close(measures.cr, torch.tensor(report["cr_per_head"], dtype=torch.float64), rtol=1e-6, atol=0)
    assert report["cr"] > 1.1 and not merges[..., 90 - window :].any()
    rope, x = late.model.rope(torch.arange(90)), []

    def attend(_, query, key, value, logits, omega, *ahead):
        alpha, omega = _late(late.cache.policy, logits, omega, *(ahead or [None]))
        parts = (part.transpose(0, 1)[None] for part in (query, key, value))
        out = attention(*parts, alpha.T[None], omega.T[None], window=window, rope=rope)[0].transpose(0, 1)
        layer = states(query, key, value, alpha, omega, rope, window)
        torch.testing.assert_close(attended(layer, 10).out, out, rtol=1e-4, atol=1e-5)
        sees = [(weight > 0).sum(-1)[:, 0] for _, weight in weights(layer)]
        assert torch.equal(torch.cat(sees, -1), layer.visible)
        x.append(out)
        return out

    with torch.no_grad():
        late.model.hidden(torch.tensor(windows[0]), attend)
    assert len(x) == tiny.LAYERS


def test_profile_sums_to_the_entries(llm, windows):
    measures, merges = measure(llm.model, llm.cache.policy, windows[:1])
    assert measures.bins.sum() == 90 and measures.entries.shape == (tiny.LAYERS, 2, len(measures.bins))
    opened = (~merges).long()
    assert torch.equal(measures.entries.sum(-1).long(), opened.sum(-1))
    ends = measures.bins.cumsum(0).tolist()
    for place, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        assert torch.equal(measures.entries[..., place].long(), opened[..., start:end].sum(-1))


def test_averages_over_windows(llm, windows):
    both, _ = measure(llm.model, llm.cache.policy, windows)
    alone = [measure(llm.model, llm.cache.policy, [window])[0] for window in windows]
    for kind in KINDS:
        for name in ("rank", "stable", "spectrum"):
            mean = torch.stack([getattr(one, name)[kind] for one in alone]).mean(0)
            torch.testing.assert_close(getattr(both, name)[kind], mean)
    torch.testing.assert_close(both.entropy, torch.stack([one.entropy for one in alone]).mean(0))


def test_ranks_are_those_of_entries_that_the_cache_holds(llm, windows):
    tokens = windows[0]
    measures, _ = measure(llm.model, llm.cache.policy, [tokens])
    prompt = llm.cache.prompt()
    none = torch.tensor([], dtype=torch.int64)
    step = llm.cache.step(none, none, [(prompt, 90)], llm.model.rope)
    with torch.no_grad():
        llm.model.hidden(torch.tensor(tokens), step)
    rope = llm.model.rope(torch.tensor([89]))
    for number in range(tiny.LAYERS):
        layer, counts = prompt.final(number)
        for head, count in enumerate(counts.tolist()):
            own = (layer.numerators[head] / layer.z[head]).chunk(2)
            key = own[0] * rope[0][0] + torch.cat([-own[0][4:], own[0][:4]]) * rope[1][0]
            for kind, closed, tail in (("keys", layer.keys, key), ("values", layer.values, own[1])):
                expected = torch.linalg.svdvals(torch.cat([closed[head, :count], tail[None]]).double())
                torch.testing.assert_close(measures.spectrum[kind][number, head], expected, rtol=1e-4, atol=1e-4)


def test_policy_full_does_not_merge(llm, windows):
    measures, merges = measure(llm.model, policy("full"), windows[:1])
    assert not merges.any() and (measures.cr == 1).all()


def test_precision_and_leading_tokens(llm, windows):
    exact, _ = measure(llm.model, llm.cache.policy, windows[:1], leading=20)
    rough, _ = measure(llm.model, llm.cache.policy, windows[:1], leading=20, precision="fp32")
    assert exact.spectrum["attention"].shape[-1] == 20
    torch.testing.assert_close(exact.spectrum["keys"], rough.spectrum["keys"], rtol=1e-4, atol=1e-4)
    for settings, said in (({"precision": "fp16"}, "fp32, fp64"), ({"leading": 1}, "at least 2 tokens")):
        with pytest.raises(ValueError, match=said):
            measure(llm.model, llm.cache.policy, windows, **settings)
    with pytest.raises(ValueError, match="one length"):
        measure(llm.model, llm.cache.policy, [windows[0], windows[1][:50]])


def test_windows_are_even_and_apart():
    texts = [list(range(100)), list(range(200, 235))]
    chosen, others = cut(texts, 11, 4, prefix=[7])
    assert [window[:2] for window in chosen] == [[7, 0], [7, 30], [7, 60], [7, 90]]
    assert len(others) == 9 and all(len(window) == 11 and window[0] == 7 for window in chosen + others)
    everything = sorted(token for window in chosen + others for token in window[1:])
    assert everything == [*range(100), *range(200, 230)]
    assert cut(texts, 11, 99, prefix=[7])[1] == []
    for arguments, said in (
        ((texts, 101, 1), "the longest has 100"),
        ((texts, 1, 1), "too short"),
        ((texts, 10, 0), "at least 1"),
    ):
        with pytest.raises(ValueError, match=said):
            cut(*arguments)
