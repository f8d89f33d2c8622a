"""H2O, TOVA and StreamingLLM through the engine against transformers, with the papers' masks built token by token."""

import pytest
import torch
from transformers import AttentionInterface, LlamaForCausalLM

from dmc import LLM
from dmc.engine.runner import Chunk
from tests.model import tiny

TOKENS = torch.randint(3, tiny.VOCAB, (48,), generator=torch.Generator().manual_seed(5)).tolist()
SETTINGS = {"h2o": {"heavy": 5, "recent": 7}, "tova": {"budget": 12}, "streaming": {"sinks": 3, "recent": 9}}
SHARES = {"h2o": {"heavy": 1, "recent": 2}, "tova": {}, "streaming": {"sinks": 3}}


def budget(query, share):
    """Tokens that the query at this position may see when the budget is a share of the text."""
    return max(16, -int(-share * (query + 1) // 1))


def h2o(weights, seen, query, group, *, heavy, recent, share=None):
    """Sets of the next query, one a query head: its newest tokens and the best older ones by accumulated attention."""
    if share is not None:
        whole = budget(query + 1, share)
        recent = max(2, whole * recent // (heavy + recent))
        heavy = whole - recent
    score = weights.sum(1).unflatten(0, (-1, group)).sum(1)
    sets = []
    for head in range(len(seen)):
        older = sorted(j for j in seen[head] if j <= query + 1 - recent)
        best = sorted(older, key=lambda j, h=head // group: -float(score[h, j]))[:heavy]
        sets.append({*best, *(j for j in seen[head] if j > query + 1 - recent), query + 1})
    return sets


def tova(weights, seen, query, group, *, budget, share=None):
    """The same for all heads: without the tokens that the last query attended to least."""
    whole = budget if share is None else globals()["budget"](query + 1, share)
    mean, left = weights[:, query].mean(0), set(seen[0])
    while len(left) + 1 > whole:
        left.remove(min(left - {query}, key=lambda j: float(mean[j])))
    return [left | {query + 1}] * len(seen)


def streaming(weights, seen, query, group, *, sinks, recent=None, share=None):
    recent = budget(query + 1, share) - sinks if share is not None else recent
    return [{j for j in range(query + 2) if j < sinks or j > query + 1 - recent}] * len(seen)


def dense(module, query, key, value, attention_mask, scaling, **_):
    """Attention of transformers with the boolean mask ``[Hq, T, T]`` of `dense.chosen`, row after row."""
    choose, settings, prompt = dense.chosen
    query, group = query[0], query.shape[1] // key.shape[1]
    key, value = (x[0].repeat_interleave(group, 0) for x in (key, value))
    heads, tokens = query.shape[:2]
    weights = torch.zeros(heads, tokens, tokens, dtype=query.dtype)
    seen = [{0}] * heads
    for i in range(tokens):
        mask = torch.zeros(heads, tokens, dtype=torch.bool)
        for head, own in enumerate(seen):
            mask[head, list(own)] = True
        logits = (query[:, i, None] * key).sum(-1) * scaling
        weights[:, i] = logits.masked_fill(~mask, -torch.inf).softmax(-1)
        if choose is streaming or i >= prompt - 1:
            seen = choose(weights, seen, i, group, **settings)
        else:
            seen = [set(range(i + 2))] * heads  # tokens of a prompt see all of it
        dense.sizes.append([len(own) for own in seen])
    return (weights @ value).transpose(0, 1)[None], weights[None]


AttentionInterface.register("dense-from-the-papers", dense)


@pytest.fixture(scope="module", params=[2, 4], ids=["gqa", "mha"])
def model(request, tmp_path_factory):
    fields = tiny.config(heads=request.param)
    directory = tiny.write(tmp_path_factory.mktemp("model"), fields, tiny.weights(fields))
    reference = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float64, attn_implementation="dense-from-the-papers")
    return directory, reference


def through_the_cache(llm, prompt):
    """Logits [T, V] after each token, and entries [L, H] after each generated one; integrity after each step."""
    reading = llm.cache.prompt()
    hidden, entries = [], []
    for start in range(0, prompt, llm.engine.prefill_tokens):
        part = TOKENS[start : min(start + llm.engine.prefill_tokens, prompt)]
        hidden.append(llm.engine.runner.step([], [], [], [Chunk(reading, part)])[1][0])
    slot = llm.cache.load(reading)
    for place in range(prompt, len(TOKENS)):
        llm.cache.check_integrity()
        entries.append(llm.cache.entries(slot))
        hidden.append(llm.engine.runner.step([slot], [TOKENS[place]], [place])[0])
    llm.cache.check_integrity()
    llm.cache.close(slot)
    assert llm.cache.rows.pool.used == 0
    return llm.engine.runner.logits(torch.cat(hidden)), entries


@pytest.mark.parametrize("prompt, chunk, share", [(1, 1, None), (37, 6, None), (20, 20, 0.4)])
@pytest.mark.parametrize("name", SETTINGS)
def test_logits_are_those_of_the_papers(model, name, prompt, chunk, share):
    directory, reference = model
    settings = SETTINGS[name] if share is None else SHARES[name] | {"share": share}
    llm = LLM(directory, policy=name, policy_settings=settings, page_size=4, dtype="fp32", device="cpu", prefill_tokens=chunk)
    logits, entries = through_the_cache(llm, prompt)
    papers = ({"budget": None} if name == "tova" else {}) | settings
    dense.chosen, dense.sizes = ({"h2o": h2o, "tova": tova, "streaming": streaming}[name], papers, prompt), []
    with torch.no_grad():
        expected = reference(torch.tensor([TOKENS])).logits[0]
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=1e-4)
    # What a query sees never exceeds the budget; between two steps a row holds that but the query itself.
    for place, held in enumerate(entries, prompt):
        allowed = 12 if share is None else budget(place, share)
        assert held.max() + 1 <= allowed and held.min() + 1 == min(allowed, place + 1)
    assert max(dense.sizes[-2]) < len(TOKENS) / 2


@pytest.mark.parametrize("name", SETTINGS)
def test_the_budget_binds(model, name):
    """The reference without the mask is another one: the test above could fail."""
    directory, reference = model
    kept, _ = through_the_cache(LLM(directory, policy=name, policy_settings=SETTINGS[name], device="cpu", dtype="fp32"), 20)
    full, _ = through_the_cache(LLM(directory, policy="full", device="cpu", dtype="fp32"), 20)
    assert (kept[:12] - full[:12]).abs().max() < 1e-4 and (kept[20:] - full[20:]).abs().max() > 1e-2
