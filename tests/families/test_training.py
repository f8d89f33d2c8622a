"""Every family on megatron-core, and the way from there to the export and the engine."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from checkpoints import convert
from checkpoints.export_hf import export, export_plain
from dmc import LLM
from dmc.families import read_shape
from dmc.training import decoder, planning, setup
from dmc.training.config import ParallelConfig, load
from dmc.training.planning import Layout
from dmc.training.state import LayerState, Settings
from dmc.weights import Weights
from tests.families.models import FAMILIES, directory
from tests.training.helpers import TOKENIZER, assert_same_run, small_run, tiny_text, weights
from tests.training.models import logits
from tests.training.models import weights as parameters
from tests.training.plans import held

TOKENS = torch.randint(3, 2048, (1, 40), generator=torch.Generator().manual_seed(0))
GAIN, OFFSET = 3.0, 0.5


def built(path, mode, settings):
    shape = read_shape(path)
    state = LayerState(settings, mode=mode)
    model = decoder.build(shape, ParallelConfig(), state, sequence_length=64, dtype=torch.float32)[0].eval()
    setup.load_weights(model, convert.loader(shape, Weights(path)))
    return shape, model


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_logits_and_the_way_back(process_group, family, tmp_path):
    """Logits of transformers' own class; every tensor comes back as it was, bit for bit, also through an export."""
    path = directory(tmp_path / "in", family)
    shape, model = built(path, "plain", Settings("neuron"))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(TOKENS).logits
        assert (logits(model, TOKENS) - expected).abs().max() < 1e-4
    back, read = convert.to_hf(shape, parameters(model)), Weights(path)
    assert set(read) == set(back)
    export_plain(back, shape.fields, out=tmp_path / "out", tokenizer_dir=TOKENIZER, card="", dtype=torch.float32)
    again = Weights(tmp_path / "out")
    assert all(torch.equal(back[name], read(name)) and torch.equal(again(name), read(name)) for name in read)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert type(whole).__name__ == f"{shape.family.title}ForCausalLM"
    with torch.no_grad():
        assert torch.equal(whole(TOKENS).logits, expected)


DECIDING = {
    "neuron": dict(decision="neuron"),
    "head": dict(decision="head"),
    "late": dict(decision="head", window=6, looks_ahead=True),
    "dms": dict(decision="head", method="dms", window=6),
    "dms-neuron": dict(decision="neuron", method="dms", window=6),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", DECIDING)
def test_training_export_and_engine_are_one_model(process_group, family, way, tmp_path):
    """Hard decisions on megatron-core, in the exported code run by transformers, and in the engine over its pages."""
    settings = Settings(gain=GAIN, offset=OFFSET, **DECIDING[way])
    if family == "qwen3" and way == "dms-neuron":
        config = load(overrides=["dmc.method=dms", "dmc.decision=neuron", "dmc.window=6"])
        with pytest.raises(ValueError, match="norms its queries with the same weights in every head: set dmc.decision=head"):
            setup.check_decisions(config, read_shape(directory(tmp_path / "in", family)))
        return
    shape, model = built(directory(tmp_path / "in", family), "hard", settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".decision." in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 32**-0.5)
            elif shape.qk_norm and name.endswith(("q_layernorm.weight", "k_layernorm.weight")):
                weight[0] *= 0.5  # of what decisions are read from, after the norm
            elif not shape.qk_norm and name.endswith(("linear_qkv.weight", "linear_qkv.bias")):
                weight.view(2, 4, shape.head_dim, -1)[:, :, 0] *= 0.5
        wanted = logits(model, TOKENS)[0]
    fields = dict(decision=settings.decision, method=settings.method, window=settings.window, looks_ahead=settings.looks_ahead)
    out = export(
        convert.to_hf(shape, parameters(model)),
        shape.fields,
        out=tmp_path / "out",
        gain=GAIN,
        offset=OFFSET,
        target_cr=2,
        measured_cr=2,
        tokenizer_dir=TOKENIZER,
        card={},
        dtype=torch.float32,
        **fields,
    )
    exported = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32).eval()
    assert type(exported).__name__ == f"Dmc{shape.family.title}ForCausalLM"
    with torch.no_grad():
        done = exported(TOKENS)
    assert (done.logits[0] - wanted).abs().max() < 1e-4
    assert done.past_key_values.compression_ratio() > 1
    expected = wanted.log_softmax(-1)[:-1].gather(1, TOKENS[0, 1:, None])[:, 0]
    for prompt in (1, 25):
        score = LLM(out, device="cpu", dtype="fp32", page_size=4).score(TOKENS.tolist(), prompt_tokens=prompt)[0]
        torch.testing.assert_close(score.logprobs, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_repurposing_ends_where_decisions_begin(process_group, family, tmp_path):
    """With the neuron's share at 0 the model is the same before and after what it is made of is set to 0."""
    path = directory(tmp_path, family)
    config = load(overrides=["dmc.decision=neuron", "data.sequence_length=64"])
    student = setup.build_student(config, read_shape(path), convert.loader(read_shape(path), Weights(path)))
    model, state = student.chunks[0], student.state
    state.mode, state.neuron_scale = "repurpose", 0.0
    model.eval()
    with torch.no_grad():
        before = logits(model, TOKENS)
        setup.zero_neurons(student)
        assert torch.equal(logits(model, TOKENS), before)
        state.neuron_scale = 1.0
        assert (logits(model, TOKENS) - before).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_the_plan_counts_biases_and_norms(process_group, family, tmp_path):
    shape = read_shape(directory(tmp_path, family))
    config = load(overrides=["data.sequence_length=64", "run.precision=bf16"])
    plan = planning.memory(config, shape, Layout.of(config, 1), 0, on_gpu=False)
    assert [plan.weights, plan.gradients, plan.optimizer] == held(setup.build_student(config, shape, None))


# ------------------------------------------------------------------------------------------- layouts


@pytest.fixture(scope="module", params=["qwen2", "qwen3"])
def reference(request, tmp_path_factory):
    tmp = tmp_path_factory.mktemp(request.param)
    directory(tmp / "model", request.param)
    tiny_text(tmp / "text.jsonl", words=40)
    tiny_text(tmp / "held.jsonl", documents=4)
    return tmp, small_run(tmp, "one", *STEPS, f"data.held_out={tmp / 'held.jsonl'}")


STEPS = ("dmc.hold_steps=6", "optim.lr=3e-4", "dmc.window=8", "dmc.decide=late")


@pytest.mark.parametrize(
    "layout",
    [
        ("parallel.tensor=2", "parallel.sequence=true"),
        *(
            pytest.param(one, marks=pytest.mark.slow)
            for one in [
                ("parallel.tensor=2",),
                ("parallel.pipeline=2",),
                ("parallel.context=2",),
                ("parallel.distributed_optimizer=true", "parallel.overlap=true"),
            ]
        ),
    ],
    ids=lambda layout: "-".join(part.split(".")[1] for part in layout),
)
def test_layouts_are_the_run_of_one_process(reference, layout):
    tmp, one = reference
    output = small_run(tmp, "-".join(layout), *STEPS, f"data.held_out={tmp / 'held.jsonl'}", *layout, processes=2)
    assert_same_run(output, one, tolerance=2e-4, absolute=1e-5)
    ours, theirs = weights(output), weights(one)
    assert ours.keys() == theirs.keys() and any("norm.weight" in name or name.endswith(".bias") for name in ours)
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-3, atol=2e-4, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_neuron_is_repurposed_and_retrofitted(family, tmp_path):
    """A whole run with the decision neuron: the losses are numbers and the target is pursued."""
    directory(tmp_path / "model", family)
    tiny_text(tmp_path / "text.jsonl")
    output = small_run(tmp_path, "run", "dmc.decision=neuron", "dmc.repurpose_steps=2")
    assert all(bool(tensor.isfinite().all()) for tensor in weights(output).values())
