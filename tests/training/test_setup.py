"""What a rank needs before its first step; and that megatron-core finds the CPU where it asks for CUDA."""

import dataclasses

import pytest
import torch

from checkpoints import convert
from dmc.training import cpu, setup
from dmc.training.config import load
from tests.checkpoints.tiny import LAYERS, SIZE, tiny
from tests.training.models import hf_config, weights

no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="unmodified torch where there is CUDA")


def student(model, *overrides):
    config = load(overrides=["data.sequence_length=64", f"dmc.decision={model.decision}", *overrides])
    return setup.build_student(config, hf_config(model), convert.loader(hf_config(model), model.state.__getitem__))


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_end_of_repurposing_zeroes_the_neurons_rows_and_nothing_else(process_group, name, precision):
    """Also in the optimizer's own fp32 copies: the next step must not bring the old rows back."""
    model = tiny("neuron", heads=2)
    trained = student(model, f"optim.name={name}", f"run.precision={precision}")
    before = convert.to_hf(hf_config(model), weights(trained.chunks[0]))
    setup.zero_neurons(trained)
    for group in trained.optimizer.param_groups:
        group["lr"] = 0.0
    for parameter in trained.chunks[0].parameters():
        parameter.main_grad.zero_()
    assert trained.optimizer.step()[0]
    after = convert.to_hf(hf_config(model), weights(trained.chunks[0]))
    for name, tensor in before.items():
        if "q_proj" in name or "k_proj" in name:
            assert tensor[::SIZE].abs().max() > 0
            tensor[::SIZE] = 0
        assert torch.equal(after[name], tensor), name


def test_a_new_decision_head_is_zero_and_in_training(process_group):
    trained = student(tiny("head", heads=2))
    heads = [p for name, p in trained.chunks[0].named_parameters() if name.endswith("decision.weight")]
    assert len(heads) == LAYERS and all(p.requires_grad and p.abs().max() == 0 and p.shape == (4, 48) for p in heads)


def test_random_weights_are_a_function_of_the_seed(process_group):
    def built(seed):
        config = load(overrides=["dmc.method=none", "run.init=random", "data.sequence_length=64", f"run.seed={seed}"])
        model = setup.build_student(config, hf_config(tiny("neuron", heads=2)), None).chunks[0]
        return torch.cat([p.flatten() for p in weights(model).values()])

    first = built(1)
    assert torch.equal(first, built(1)) and not torch.equal(first, built(2))


def test_the_teacher_is_frozen_and_in_evaluation_mode(process_group):
    model = tiny("neuron", heads=2)
    config = load(overrides=["data.sequence_length=64"])
    trained = setup.build_student(config, hf_config(model), None)
    setup.attach_teacher(config, hf_config(model), trained, convert.loader(hf_config(model), model.state.__getitem__))
    (teacher,) = trained.chunks[0]._teacher
    assert teacher is not trained.chunks[0] and "teacher" not in " ".join(trained.chunks[0].state_dict())
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())


def test_a_teacher_of_other_heads_serves_and_one_of_another_vocabulary_is_refused(process_group):
    """As a model with fewer key/value heads learns from the one that it was made from."""
    model, other = tiny("neuron", heads=2), tiny("neuron", heads=4)
    config = load(overrides=["data.sequence_length=64"])
    trained = setup.build_student(config, hf_config(model), None)
    setup.attach_teacher(config, hf_config(other), trained, convert.loader(hf_config(other), other.state.__getitem__))
    assert trained.chunks[0]._teacher[0].config.num_query_groups == 4
    strange = dataclasses.replace(hf_config(model), vocab_size=hf_config(model).vocab_size + 2)
    with pytest.raises(ValueError, match=f"vocabulary of {strange.vocab_size} tokens, the model one of {strange.vocab_size - 2}"):
        setup.attach_teacher(config, strange, trained, convert.loader(strange, model.state.__getitem__))


@pytest.mark.parametrize(
    ("overrides", "world", "words"),
    [
        (
            ["parallel.tensor=2"],
            1,
            "parallel.tensor 2 x parallel.pipeline 1 x parallel.context 1 does not divide the 1 processes",
        ),
        (["parallel.tensor=2", "parallel.pipeline=2", "distill.weight=0", "distill.lm_weight=1"], 6, "does not divide the 6"),
        (["optim.global_batch=6", "optim.micro_batch=2"], 2, "optim.global_batch 6 is not a multiple of optim.micro_batch 2 x 2"),
    ],
)
def test_layouts_that_the_processes_do_not_carry_are_refused(overrides, world, words):
    with pytest.raises(ValueError, match=words):
        setup.check_world(load(overrides=overrides), world)


@pytest.mark.parametrize(
    ("overrides", "world"),
    [([], 1), (["parallel.tensor=2"], 2), (["parallel.tensor=2", "optim.global_batch=12", "optim.micro_batch=2"], 6)],
)
def test_layouts_that_they_carry(overrides, world):
    setup.check_world(load(overrides=overrides), world)


@no_cuda
def test_cuda_devices_in_calls_are_the_cpu():
    x = torch.arange(3.0)
    assert x.cuda() is x
    for got in (
        x.to("cuda"),
        x.to(torch.device("cuda", 0)),
        x.to(device="cuda:0"),
        x.to("cuda", torch.float64),
        torch.zeros(3, device="cuda"),
        torch.empty(2, device=torch.device("cuda")),
        torch.ones(1, pin_memory=True),
    ):
        assert got.device.type == "cpu"
    assert x.to("cuda", torch.float64).dtype == torch.float64
    assert x.type() == "torch.cuda.FloatTensor" and x.type(torch.float64).dtype == torch.float64
    assert torch.cuda.current_device() == cpu.device() == torch.device("cpu") and cpu.backend() == "gloo"


@no_cuda
def test_streams_have_nothing_to_wait_for():
    with torch.cuda.stream(torch.cuda.Stream()), torch.cuda.Stream() as stream:
        stream.wait_stream(torch.cuda.current_stream())
        stream.record_event().synchronize()
    torch.cuda.synchronize()


@no_cuda
def test_the_generator_of_cuda_is_the_cpus():
    torch.cuda.manual_seed(5)
    state, first = torch.cuda.get_rng_state(), torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)


@no_cuda
def test_installing_twice_does_nothing():
    installed = cpu._installed
    cpu.install()
    assert cpu._installed is installed is not None
