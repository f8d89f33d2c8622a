"""The exported model code with documents packed by position, prompts read in chunks, and caches used again."""

import pytest
import torch
from transformers import DataCollatorWithFlattening

from checkpoints.hf_model import eviction_dmc_llama, modeling_dmc_llama
from tests.checkpoints.test_hf_dms import made
from tests.checkpoints.test_hf_rope import models, text

METHODS = ["dmc", "dms"]
LENGTHS = (9, 1, 40, 2, 21)  # of the packed documents


VARIANTS = [("dmc", "head", 2), ("dmc", "neuron", 4), ("dms", "head", 2), ("dms", "neuron", 2)]


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda variant: "-".join(map(str, variant)))
def model(request):
    """A random model that decides to merge or evict about half of its tokens."""
    method, decision, heads = request.param
    return made(decision, heads, method=method, window=4 if method == "dms" else 0)


def documents():
    return [text(1, length, seed) for seed, length in enumerate(LENGTHS)]


def packed(parts):
    """(ids, position_ids) of documents one after the other."""
    return torch.cat(parts, 1), torch.cat([torch.arange(part.shape[1]) for part in parts])[None]


def alone(model, parts):
    return torch.cat([model(part).logits for part in parts], 1)


@torch.no_grad()
def test_packed_documents_are_what_each_is_alone(model, monkeypatch):
    ids, positions = packed(documents())
    expected = alone(model, documents())
    assert (model(ids).logits - expected).abs().max() > 0.1  # and it matters
    for use_cache in (True, False):
        for mask in (None, torch.ones_like(ids)):
            out = model(ids, position_ids=positions, attention_mask=mask, use_cache=use_cache)
            torch.testing.assert_close(out.logits, expected, rtol=0, atol=1e-5)
    monkeypatch.setattr(eviction_dmc_llama, "_QUERIES", 7)
    monkeypatch.setattr(modeling_dmc_llama, "_QUERIES", 7)
    torch.testing.assert_close(model(ids, position_ids=positions).logits, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_cache_holds_the_last_document(model):
    """Pieces that end inside a document, at its end and at its start; rows with other documents; then more tokens."""
    parts = documents()
    rows = [parts, [parts[2], parts[1], parts[0], parts[4], parts[3]]]
    ids, positions = (torch.cat(both) for both in zip(*(packed(row) for row in rows), strict=True))
    expected = torch.cat([alone(model, row) for row in rows])
    cache, logits = None, []
    for start, end in ((0, 9), (9, 10), (10, 30), (30, 31), (31, 73)):
        out = model(ids[:, start:end], position_ids=positions[:, start:end], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=0, atol=1e-5)
    for number, last in enumerate((parts[4], parts[3])):
        held = model(last).past_key_values
        assert torch.equal(cache.lengths()[:, number], held.lengths()[:, 0])
        assert cache.compression_ratio(sequence=number) == held.compression_ratio()
        whole = model(torch.cat([last, ids[:1, :5]], 1)).logits[0, -5:]
        cache_of_row = model(ids[number : number + 1], position_ids=positions[number : number + 1]).past_key_values
        torch.testing.assert_close(model(ids[:1, :5], past_key_values=cache_of_row).logits[0], whole, rtol=0, atol=1e-5)
    assert max(layer.keys.shape[2] for layer in cache.layers) <= cache.lengths().max()  # what went is not held
    assert cache.tokens.tolist() == [73, 73] and (cache.tokens - cache.document).tolist() == [21, 2]


@torch.no_grad()
def test_packed_documents_with_padding_between_and_around(model):
    parts = documents()[:3]
    pad = torch.zeros(1, 3, dtype=torch.long)
    pieces = [pad, parts[0], pad, parts[1], parts[2], pad]
    real = torch.cat([torch.full_like(piece, piece is not pad) for piece in pieces], 1).bool()
    ids, positions = packed(pieces)
    got = model(ids, position_ids=positions, attention_mask=real.long()).logits
    torch.testing.assert_close(got[real][None], alone(model, parts), rtol=0, atol=1e-5)
    assert got.isfinite().all()


def test_gradients_of_packed_documents_are_those_of_each(model):
    def gradients(losses):
        model.zero_grad()
        sum(losses).backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    parts = documents()
    batch = DataCollatorWithFlattening(return_tensors="pt")([{"input_ids": part[0].tolist()} for part in parts])
    count = int((batch["labels"][:, 1:] != -100).sum())
    together = model(**batch, use_cache=False)
    each = [model(part, labels=part, use_cache=False).loss * (part.shape[1] - 1) / count for part in parts if part.shape[1] > 1]
    torch.testing.assert_close(together.loss, sum(each), rtol=1e-5, atol=1e-5)
    for got, wanted in zip(gradients([together.loss]), gradients(each), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_llama_reads_the_same_documents(method):
    """Without decisions the packed logits are those of transformers' Llama, which splits where it makes no cache."""
    llama, ours = models(method, {})
    ids, positions = packed(documents())
    wanted = llama(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(ours(ids, position_ids=positions).logits, wanted, rtol=0, atol=1e-4)


@torch.no_grad()
def test_positions_that_leave_open_where_a_document_starts_are_refused(model):
    ids = text(1, 6)
    with pytest.raises(ValueError, match="position_ids jump forward inside a row"):
        model(ids, position_ids=torch.tensor([[0, 1, 2, 7, 8, 9]]))
    gap = model(ids, position_ids=torch.tensor([[0, 1, 2, 7, 8, 9]]), attention_mask=torch.ones_like(ids))
    assert gap.past_key_values.positions.tolist() == [9] and gap.past_key_values.document.tolist() == [0]
    for wrong in (torch.arange(5)[None], torch.arange(6), torch.arange(6).expand(2, 6)):
        with pytest.raises(ValueError, match=r"position_ids must be \[batch or 1, new tokens\] = \(1, 6\)"):
            model(ids, position_ids=wrong)
    for name in ("cu_seq_lens_q", "seq_idx"):
        with pytest.raises(ValueError, match=f"{name} is not read here: pass position_ids that restart"):
            model(ids, **{name: torch.tensor([0, 3, 6])})
    batch = DataCollatorWithFlattening(return_tensors="pt", return_flash_attn_kwargs=True, return_seq_idx=True)(
        [{"input_ids": part[0].tolist()} for part in documents()]
    )
    torch.testing.assert_close(model(**batch).logits, alone(model, documents()), rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------- prompts in chunks


def generate(model, ids=None, *, tokens=12, **options):
    given = ids if ids is not None else options["inputs_embeds"]
    options.setdefault("attention_mask", torch.ones(given.shape[:2], dtype=torch.long))
    return model.generate(
        ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, return_dict_in_generate=True, **options
    )


@pytest.mark.parametrize("chunk", [1, 5, 23, 100])
def test_a_prompt_in_chunks_generates_the_same(model, chunk):
    prompts = [text(1, 5, 1), text(1, 23, 2), text(1, 12, 3)]
    ids = torch.cat([torch.nn.functional.pad(prompt, (23 - prompt.shape[1], 0)) for prompt in prompts])
    mask = (ids != 0).long()
    whole = generate(model, ids, attention_mask=mask)
    chunked = generate(model, ids, attention_mask=mask, prefill_chunk_size=chunk)
    assert torch.equal(chunked.sequences, whole.sequences)
    assert torch.equal(chunked.past_key_values.lengths(), whole.past_key_values.lengths())
    beams = generate(model, ids, attention_mask=mask, prefill_chunk_size=chunk, num_beams=3).sequences
    assert torch.equal(beams, generate(model, ids, attention_mask=mask, num_beams=3).sequences)


@pytest.mark.parametrize("method", METHODS)
def test_chunks_generate_what_a_llama_does(method):
    llama, ours = models(method, {})
    ids = text(2, 30)
    wanted = generate(llama, ids, prefill_chunk_size=7).sequences
    assert torch.equal(generate(ours, ids, prefill_chunk_size=7).sequences, wanted)


def test_another_kind_of_cache_is_refused(model):
    for kind in ("static", "quantized", "offloaded"):
        with pytest.raises(ValueError, match=f"cache_implementation '{kind}' cannot hold merged entries"):
            generate(model, text(1, 5), cache_implementation=kind)
    assert generate(model, text(1, 5), cache_implementation="dynamic").sequences.shape == (1, 17)


# ------------------------------------------------------------------------------------------- the same cache again


def turn(model, ids, mask, cache, **options):
    return generate(model, ids, attention_mask=mask, past_key_values=cache, tokens=6, **options)


def test_turns_over_one_cache_are_one_conversation(model):
    """Prompts of different length, padded left, and padded again in the second turn."""
    first, second = [text(1, 7, 1), text(1, 19, 2)], [text(1, 3, 3), text(1, 8, 4)]
    ids = torch.cat([torch.nn.functional.pad(prompt, (19 - prompt.shape[1], 0)) for prompt in first])
    mask = (ids != 0).long()
    one = turn(model, ids, mask, None)
    new = torch.cat([torch.nn.functional.pad(prompt, (8 - prompt.shape[1], 0)) for prompt in second])
    both = torch.cat([one.sequences, new], 1)
    mask = torch.cat([mask, torch.ones(2, 6, dtype=torch.long), (new != 0).long()], 1)
    for chunk in (None, 3):
        cache = turn(model, ids, mask[:, :19], None).past_key_values
        two = turn(model, both, mask, cache, prefill_chunk_size=chunk)
        for row in range(2):
            said = torch.cat([first[row][0], one.sequences[row, 19:], second[row][0]])[None]
            assert torch.equal(two.sequences[row, -6:], turn(model, said, torch.ones_like(said), None).sequences[0, -6:])


@torch.no_grad()
def test_a_mask_that_takes_tokens_out_of_the_cache_is_refused(model):
    """A row that ended early was fed padding by `generate`; Llama can hide it afterwards, merged entries cannot."""
    ids = text(2, 10)
    cache = model(ids).past_key_values
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, 7:10] = 0
    with pytest.raises(ValueError, match="attention_mask changes tokens that are in past_key_values already"):
        model(ids[:, :2], attention_mask=mask, past_key_values=cache)
    padded = model(ids, attention_mask=mask[:, :10]).past_key_values
    got = model(ids[:, :2], attention_mask=mask, past_key_values=padded).logits[0]
    said = torch.cat([ids[:1, :7], ids[:1, :2]], 1)
    torch.testing.assert_close(got, model(said).logits[0, -2:], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="attention_mask changes tokens"):
        model(ids[:, :1], attention_mask=torch.ones(2, 13), past_key_values=padded)


def test_embeddings_are_read_like_tokens(model):
    ids = text(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    embeds = model.get_input_embeddings()(ids)
    whole = generate(model, ids, attention_mask=mask)
    got = generate(model, inputs_embeds=embeds, attention_mask=mask)
    assert torch.equal(got.sequences[:, -12:], whole.sequences[:, 20:])
    with pytest.raises(ValueError, match="prefill_chunk_size cuts input_ids into chunks, not inputs_embeds"):
        generate(model, inputs_embeds=embeds, attention_mask=mask, prefill_chunk_size=7)
    packed_ids, positions = packed(documents())
    with torch.no_grad():
        out = model(inputs_embeds=model.get_input_embeddings()(packed_ids), position_ids=positions).logits
        torch.testing.assert_close(out, alone(model, documents()), rtol=0, atol=1e-5)
