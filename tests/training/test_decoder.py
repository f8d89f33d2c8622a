"""The Llama built on megatron-core against transformers' own, and compressed against the whole model in fp64."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from checkpoints import convert
from checkpoints.export_hf import export
from checkpoints.hf_model.modeling_dmc_llama import DmcLlamaForCausalLM
from dmc import LLM, functional
from dmc.families import shape_of
from dmc.kernels.decisions import noise
from dmc.training import decoder
from dmc.training.config import ParallelConfig
from tests.checkpoints.tiny import GAIN, LAYERS, OFFSET, SIZE, VOCAB, reference, tiny
from tests.training.helpers import TOKENIZER
from tests.training.models import hf_config, logits, megatron, weights

SHAPES = [
    dict(heads=2),
    dict(heads=4),
    dict(heads=1, tied=True),
    dict(heads=2, rope="llama3"),
    dict(heads=4, tied=True, rope="linear"),
    dict(heads=2, rope="yarn"),
]
DECISIONS = ["neuron", "head"]
BORDERS = [(0, 9, 10, 31), (0, 40)]  # first tokens of the documents of each row

pytestmark = pytest.mark.usefixtures("process_group")


def tokens(batch=2, length=48, seed=1):
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def packed(ids):
    starts = torch.zeros_like(ids, dtype=torch.bool)
    for row, borders in enumerate(BORDERS):
        starts[row, list(borders)] = True
    return starts


def by_document(run, ids):
    """``run`` of every document on its own, put together as `packed` rows."""
    rows = []
    for row, borders in zip(ids, BORDERS, strict=True):
        edges = [*borders, len(row)]
        parts = [run(row[a:b][None]) for a, b in zip(edges[:-1], edges[1:], strict=True)]
        rows.append(torch.cat(parts, 1))
    return torch.cat(rows)


def transformers_model(model, state=None):
    whole = LlamaForCausalLM(LlamaConfig(**model.config)).eval()
    state = {k: v for k, v in (state or model.state).items() if "decision" not in k}
    lacking, unknown = whole.load_state_dict(state, strict=False)
    assert not unknown and set(lacking) <= ({"lm_head.weight"} if hf_config(model).tie_word_embeddings else set())
    return lambda ids: whole(ids).logits


def assert_close(got, wanted, tolerance=1e-4):
    assert got.shape == wanted.shape
    assert (got - wanted).abs().max() < tolerance


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


# ------------------------------------------------------------------------------------------- plain


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("decision", DECISIONS)
def test_plain_logits_are_those_of_transformers(shape, decision):
    model, ids = tiny(decision, **shape), tokens()
    assert_close(logits(megatron(model, "plain"), ids), transformers_model(model)(ids))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_plain_documents_do_not_see_each_other(shape):
    model, ids = tiny("neuron", **shape), tokens()
    got = logits(megatron(model, "plain"), ids, starts=packed(ids))
    assert_close(got, by_document(transformers_model(model), ids))
    assert (got - logits(megatron(model, "plain"), ids)).abs().max() > 0.01


def test_the_head_size_by_default_is_hidden_over_heads():
    config = dict(vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    torch.manual_seed(0)
    whole = LlamaForCausalLM(LlamaConfig(**config, num_key_value_heads=2, initializer_range=0.2)).eval()
    model = tiny("neuron", heads=2)
    model.state, model.config = whole.state_dict(), whole.config.to_dict()
    ids = tokens() % 50
    assert_close(logits(megatron(model, "plain"), ids), whole(ids).logits)


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0])
def test_repurposing_scales_neuron_0_of_queries_and_keys(scale):
    model, ids = tiny("neuron", heads=2), tokens()
    state = {name: tensor.clone() for name, tensor in model.state.items()}
    for name, tensor in state.items():
        if "q_proj" in name or "k_proj" in name:
            tensor[::SIZE] *= scale
    built = megatron(model, "repurpose")
    built.config.dmc_state.neuron_scale = scale
    assert_close(logits(built, ids), transformers_model(model, state)(ids))


# ------------------------------------------------------------------------------------------- compressed


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("decision", DECISIONS)
def test_hard_logits_and_entries_are_those_of_the_reference(shape, decision):
    model, ids = tiny(decision, **shape), tokens()
    built = megatron(model, "hard", counts=True).eval()
    got = logits(built, ids)
    wanted, alphas = reference(model, ids)
    assert_close(got, wanted)
    kept = (1 - torch.stack(alphas)).sum((1, 3))
    assert torch.equal(built.config.dmc_state.decisions.total(), kept.expand(2, -1, -1))
    assert 0.2 < kept.sum() / (ids.numel() * kept.numel()) < 0.9  # the model does merge
    assert (got - transformers_model(model)(ids)).abs().max() > 0.01


@pytest.mark.parametrize("decision", DECISIONS)
def test_hard_documents_do_not_merge_with_each_other(decision):
    model, ids = tiny(decision, heads=2), tokens()
    got = logits(megatron(model, "hard"), ids, starts=packed(ids))
    assert_close(got, by_document(lambda part: reference(model, part)[0], ids))


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], SHAPES[3]], ids=str)
@pytest.mark.parametrize("decision", DECISIONS)
def test_hard_logits_are_those_of_the_exported_model(tmp_path, shape, decision):
    """The weights come back from megatron's names, and the gain is folded into them."""
    model, ids = tiny(decision, **shape), tokens()
    built = megatron(model, "hard")
    state = convert.to_hf(hf_config(model), weights(built))
    out = export(
        state,
        model.config,
        out=tmp_path / "exported",
        decision=decision,
        offset=OFFSET,
        gain=GAIN,
        target_cr=2.0,
        measured_cr=1.9,
        tokenizer_dir=TOKENIZER,
        card="a card",
        dtype=torch.float32,
    )
    assert_close(logits(built, ids), DmcLlamaForCausalLM.from_pretrained(out)(ids, use_cache=False).logits)


@pytest.mark.parametrize("decision", DECISIONS)
def test_a_yarn_model_is_served_as_it_was_trained(tmp_path, decision):
    model, ids = tiny(decision, heads=2, rope="yarn"), tokens()
    built = megatron(model, "hard")
    out = export(
        convert.to_hf(hf_config(model), weights(built)),
        model.config,
        out=tmp_path / "exported",
        decision=decision,
        offset=OFFSET,
        gain=GAIN,
        target_cr=2.0,
        measured_cr=1.9,
        tokenizer_dir=TOKENIZER,
        card="a card",
        dtype=torch.float32,
    )
    wanted = logits(built, ids)[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    scores = LLM(out, device="cpu", dtype="fp32").score(ids.tolist(), prompt_tokens=20)
    assert_close(torch.stack([score.logprobs for score in scores]), wanted)


@pytest.mark.parametrize("decision", DECISIONS)
def test_soft_logits_are_those_of_the_reference_with_the_same_noise(monkeypatch, decision):
    model, ids, samples = tiny(decision, heads=2), tokens(), torch.tensor([11, 4])
    built = megatron(model, "soft", counts=True, seed=3, temperature=0.5)
    built.config.dmc_state.step = 17
    got = logits(built, ids, samples=samples)
    layers = iter(range(LAYERS))

    def soft(merge, *, offset):
        drawn = noise.logistic(3, 17, next(layers), samples=samples, heads=torch.arange(2), tokens=torch.arange(ids.shape[1]))
        return torch.sigmoid((merge - offset + drawn.double()) / 0.5)

    with monkeypatch.context() as patch:
        patch.setattr(functional, "round_alpha", soft)
        wanted, alphas = reference(model, ids)
    assert_close(got, wanted)
    alphas = torch.stack(alphas)
    assert ((alphas > 0.1) & (alphas < 0.9)).float().mean() > 0.05
    # No gradients and training mode is the first pass of a recomputed layer: nothing is counted.
    assert built.config.dmc_state.decisions.total().sum() == 0
    logits(built.eval(), ids, samples=samples)
    assert_close(built.config.dmc_state.decisions.total()[0], (1 - alphas).sum((1, 3)), 1e-3)


def test_soft_rows_do_not_depend_on_their_batch():
    built, ids = megatron(tiny("head", heads=2), "soft", temperature=0.5), tokens(4)
    whole = logits(built, ids, samples=torch.tensor([5, 6, 7, 8]))
    assert_close(logits(built, ids[[2, 0]], samples=torch.tensor([7, 5])), whole[[2, 0]], 1e-5)
    assert (logits(built, ids[:2], samples=torch.tensor([6, 5])) - whole[:2]).abs().max() > 0.01
    built.config.dmc_state.step = 1
    assert (logits(built, ids, samples=torch.tensor([5, 6, 7, 8])) - whole).abs().max() > 0.01


def test_a_new_decision_head_decides_nothing():
    """Zero weights: alpha is sigmoid(-offset), so the hard model merges nothing and its logits are the plain ones."""
    model, ids = tiny("head", heads=2), tokens()
    for name in model.state:
        if "decision" in name:
            model.state[name] = torch.zeros_like(model.state[name])
    assert_close(logits(megatron(model, "hard"), ids), transformers_model(model)(ids))


# ------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize(
    ("model", "parallel", "words"),
    [
        (dict(num_key_value_heads=2), dict(tensor=4), ["parallel.tensor 4", "num_key_value_heads 2"]),
        (dict(num_attention_heads=6, num_key_value_heads=6), dict(tensor=4), ["parallel.tensor 4", "num_key_value_heads 6"]),
        (dict(intermediate_size=65), dict(tensor=2), ["parallel.tensor 2", "intermediate_size 65"]),
        (dict(vocab_size=61), dict(tensor=2), ["parallel.tensor 2", "vocab_size 61"]),
        (dict(num_hidden_layers=3), dict(pipeline=2), ["parallel.pipeline 2", "3 layers"]),
        (dict(num_key_value_heads=3), {}, ["num_attention_heads 4", "num_key_value_heads 3"]),
        (dict(num_key_value_heads=0), {}, ["num_attention_heads 4", "num_key_value_heads 0"]),
        (dict(attention_bias=True), {}, ["attention_bias"]),
        (dict(mlp_bias=True), {}, ["mlp_bias"]),
        (dict(hidden_act="gelu"), {}, ["hidden_act", "'gelu'", "silu"]),
    ],
)
def test_what_cannot_be_built_is_refused(model, parallel, words):
    base = dict(
        model_type="llama",
        vocab_size=64,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
    )
    decoder.check_layout(shape_of(base), ParallelConfig(tensor=4, pipeline=2))
    with pytest.raises(ValueError) as caught:
        decoder.check_layout(shape_of(base | model), ParallelConfig(**parallel))
    assert all(word in str(caught.value) for word in words)
