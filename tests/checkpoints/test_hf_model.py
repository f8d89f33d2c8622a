"""The exported model against the whole model over `dmc.functional`, cached and uncached."""

import pytest
import torch
from transformers import DynamicCache

from checkpoints.hf_model.modeling_dmc_llama import DmcLlamaForCausalLM
from tests.checkpoints.tiny import VOCAB, reference, tiny, write

VARIANTS = {
    "neuron-gqa": dict(decision="neuron", heads=2),
    "neuron-mha-tied-llama3": dict(decision="neuron", heads=4, tied=True, rope="llama3"),
    "head-gqa-tied-linear": dict(decision="head", heads=2, tied=True, rope="linear"),
    "head-mqa-llama3": dict(decision="head", heads=1, rope="llama3"),
    "neuron-gqa-yarn": dict(decision="neuron", heads=2, rope="yarn"),
}


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS)
def pair(request, tmp_path_factory):
    """(the unfolded tiny model, the exported one loaded)."""
    model = tiny(**request.param)
    return model, _load(model, tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return _load(tiny("neuron", heads=2), tmp_path_factory.mktemp("export"))


def _load(model, directory):
    return DmcLlamaForCausalLM.from_pretrained(write(model, directory)).eval()


def _ids(batch, tokens, seed=0):
    return torch.randint(3, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def _generate(model, ids, mask=None, tokens=12, **options):
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        max_new_tokens=tokens,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
        **{"do_sample": False, **options},
    )


@pytest.mark.parametrize("tokens", [1, 7, 33, 90])
@torch.no_grad()
def test_logits_are_those_of_functional(pair, tokens):
    model, hf = pair
    ids = _ids(2, tokens)
    expected, alphas = reference(model, ids)
    if tokens == 90:
        assert all(0.1 < alpha.mean() < 0.6 for alpha in alphas)
    assert (hf(ids, use_cache=False).logits - expected).abs().max() < 1e-4


@torch.no_grad()
def test_generate_equals_functional_and_counts_its_entries(pair):
    model, hf = pair
    out = _generate(hf, _ids(2, 70), tokens=40)
    expected, alphas = reference(model, out.sequences[:, :-1])
    assert (torch.stack(out.logits, 1) - expected[:, 69:]).abs().max() < 1e-4
    cache = out.past_key_values
    kept = torch.stack([(1 - alpha).sum(-1).long() for alpha in alphas])
    assert torch.equal(cache.lengths(), kept)
    assert cache.tokens.tolist() == [109, 109]
    assert cache.compression_ratio() == pytest.approx(109 * kept.numel() / kept.sum().item())
    assert cache.compression_ratio(layer=1, head=0, sequence=1) == pytest.approx(109 / kept[1, 1, 0].item())
    assert torch.allclose(cache.compression_ratios(), 218 / kept.sum(1))
    assert cache.layers[0].keys.shape[2] == cache.layers[0].lengths.max()


@torch.no_grad()
def test_chunks_equal_one_pass(pair):
    _, hf = pair
    ids = _ids(3, 80)
    whole, cache, parts = hf(ids), None, []
    for piece in ids.split([37, 1, 1, 40, 1], 1):
        out = hf(piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    assert (torch.cat(parts, 1) - whole.logits).abs().max() < 1e-4
    assert torch.equal(cache.lengths(), whole.past_key_values.lengths())


@torch.no_grad()
def test_padded_batch_equals_each_prompt_alone(pair):
    _, hf = pair
    prompts = [_ids(1, n, seed=n) for n in (5, 41, 23)]
    ids = torch.cat([torch.nn.functional.pad(p, (41 - p.shape[1], 0)) for p in prompts])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(p), (41 - p.shape[1], 0)) for p in prompts])
    batch = _generate(hf, ids, mask)
    for row, prompt in enumerate(prompts):
        alone = _generate(hf, prompt)
        assert torch.equal(batch.sequences[row, 41:], alone.sequences[0, prompt.shape[1] :])
        difference = torch.stack(batch.logits, 1)[row] - torch.stack(alone.logits, 1)[0]
        assert difference.abs().max() < 1e-4
        assert torch.equal(batch.past_key_values.lengths()[:, row], alone.past_key_values.lengths()[:, 0])
        assert batch.past_key_values.compression_ratio(sequence=row) == alone.past_key_values.compression_ratio()


@pytest.mark.parametrize("explicit", [False, True], ids=["counted", "position_ids"])
@torch.no_grad()
def test_padding_anywhere_is_skipped(loaded, explicit):
    """Padding left, inside and right, split over two passes: real tokens get the logits they get alone."""
    real = torch.tensor([[0, 0, 1, 1, 1, 0, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1, 0, 0, 0, 0], [0] * 9 + [1]])
    ids = _ids(3, 10)
    positions = (real.cumsum(1) - 1).clamp(min=0)
    cache, parts = None, []
    for end, start in ((6, 0), (10, 6)):
        out = loaded(
            ids[:, start:end],
            attention_mask=real[:, :end],
            past_key_values=cache,
            use_cache=True,
            position_ids=positions[:, start:end] if explicit else None,
        )
        cache = out.past_key_values
        parts.append(out.logits)
    logits = torch.cat(parts, 1)
    assert logits.isfinite().all()
    for row in range(3):
        alone = loaded(ids[row : row + 1, real[row].bool()])
        assert (logits[row, real[row].bool()] - alone.logits[0]).abs().max() < 1e-4
        assert torch.equal(cache.lengths()[:, row], alone.past_key_values.lengths()[:, 0])
    assert cache.tokens.tolist() == real.sum(1).tolist()


@torch.no_grad()
def test_sequence_of_padding_alone_has_no_entry(loaded):
    out = loaded(_ids(2, 4), attention_mask=torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1]]))
    assert out.past_key_values.lengths()[:, 0].eq(0).all()
    assert out.logits.isfinite().all()


def test_sampling_is_reproducible(loaded):
    torch.manual_seed(3)
    first = _generate(loaded, _ids(2, 9), do_sample=True, top_k=0).sequences
    other = _generate(loaded, _ids(2, 9), do_sample=True, top_k=0).sequences
    torch.manual_seed(3)
    assert torch.equal(first, _generate(loaded, _ids(2, 9), do_sample=True, top_k=0).sequences)
    assert not torch.equal(first, other)


def test_generation_continues_a_cache(loaded):
    whole = _generate(loaded, _ids(2, 30), tokens=20)
    start = _generate(loaded, _ids(2, 30), tokens=8)
    rest = _generate(loaded, start.sequences, past_key_values=start.past_key_values)
    assert torch.equal(rest.sequences, whole.sequences)
    assert torch.equal(rest.past_key_values.lengths(), whole.past_key_values.lengths())


def test_beam_search_reorders_the_cache(loaded):
    cached = _generate(loaded, _ids(2, 20), num_beams=3)
    assert torch.equal(cached.sequences, _generate(loaded, _ids(2, 20), num_beams=3, use_cache=False).sequences)


@torch.no_grad()
def test_batch_of_a_cache_is_selected_and_repeated(loaded):
    ids = _ids(3, 25)
    cache = loaded(ids[:, :24]).past_key_values
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    logits = loaded(ids[[2, 2, 0, 0], 24:], past_key_values=cache).logits[:, 0]
    assert (logits - loaded(ids[[2, 2, 0, 0]]).logits[:, -1]).abs().max() < 1e-4
    cache.reset()
    assert (loaded(ids, past_key_values=cache).logits - loaded(ids).logits).abs().max() < 1e-4


def test_loss_and_gradients(loaded):
    ids = _ids(2, 40)
    out = loaded(ids, labels=ids, use_cache=False)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert torch.allclose(out.loss, expected, atol=1e-5)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in loaded.parameters())
    loaded.zero_grad()


@torch.no_grad()
def test_long_prompts_attend_in_blocks(loaded, monkeypatch):
    ids = _ids(1, 50)
    whole = loaded(ids).logits
    monkeypatch.setattr("checkpoints.hf_model.modeling_dmc_llama._QUERIES", 16)
    assert (loaded(ids).logits - whole).abs().max() < 1e-5


@torch.no_grad()
def test_hidden_states_and_tuples(loaded):
    out = loaded(_ids(1, 5), output_hidden_states=True)
    assert len(out.hidden_states) == 4 and out.hidden_states[-1].shape == (1, 5, 48)
    assert torch.equal(loaded(_ids(1, 5), return_dict=False)[0], out.logits)
    assert torch.allclose(loaded(_ids(1, 5), logits_to_keep=1).logits, out.logits[:, -1:], atol=1e-5)


@torch.no_grad()
def test_bfloat16_merges_in_float32(tmp_path):
    hf = DmcLlamaForCausalLM.from_pretrained(write(tiny("head", heads=2), tmp_path, dtype=torch.bfloat16)).eval()
    out = hf(_ids(1, 200))
    assert out.logits.dtype == torch.bfloat16 and out.past_key_values.layers[0].tail.dtype == torch.float32
    exact = hf.float()(_ids(1, 200))
    overlap = torch.nn.functional.cosine_similarity(out.logits.float(), exact.logits, dim=-1)
    assert overlap.median() > 0.99
    assert out.past_key_values.compression_ratio() == pytest.approx(exact.past_key_values.compression_ratio(), rel=0.05)


def test_what_cannot_work_is_refused(loaded):
    ids = _ids(1, 6)
    with pytest.raises(ValueError, match="stateful"):
        _generate(loaded, ids, prompt_lookup_num_tokens=2)
    with pytest.raises(ValueError, match="output_attentions"):
        loaded(ids, output_attentions=True)
    with pytest.raises(ValueError, match="DmcCache"):
        loaded(ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="attention_mask"):
        loaded(ids, attention_mask=torch.ones(1, 5))
    with pytest.raises(ValueError, match="input_ids and inputs_embeds"):
        loaded()
    cache = loaded(ids).past_key_values
    with pytest.raises(ValueError, match="cropped"):
        cache.crop(1)
    cache.reset()
    with pytest.raises(ValueError, match="empty"):
        cache.lengths()
