"""Tiny Llamas on megatron-core, in one process, with the weights of `tests.checkpoints.tiny`."""

from __future__ import annotations

import torch

from checkpoints import convert
from dmc.families import ModelShape, shape_of
from dmc.training import cpu, decoder, setup
from dmc.training.attention import row_info
from dmc.training.config import ParallelConfig
from dmc.training.state import DecisionCounts, LayerState, Settings
from tests.checkpoints.tiny import GAIN, LAYERS, OFFSET

LENGTH = 128  # of the rotary tables


def hf_config(tiny) -> ModelShape:
    return shape_of(tiny.config)


def megatron(tiny, mode: str, *, counts: bool = False, **settings):
    """`tiny` as the training side builds it, its decision head included; ``model.config.dmc_state`` is its state."""
    hf = hf_config(tiny)
    state = LayerState(Settings(tiny.decision, GAIN, OFFSET, **settings), mode=mode)
    if counts:
        state.decisions = DecisionCounts(LAYERS, hf.num_key_value_heads)
    model = decoder.build(hf, ParallelConfig(), state, sequence_length=LENGTH, dtype=torch.float32)[0]
    setup.load_weights(model, convert.loader(hf, tiny.state.__getitem__))
    if tiny.decision == "head":
        for i, layer in enumerate(model.decoder.layers):
            alpha, omega = tiny.state[f"model.layers.{i}.self_attn.decision.weight"].chunk(2)
            layer.self_attention.decision.weight.data.copy_(torch.stack([alpha, omega], 1).flatten(0, 1))
    return model


def weights(model) -> dict:
    """A copy of its parameters, on the CPU."""
    return {name: tensor.detach().cpu().clone() for name, tensor in model.named_parameters()}


def logits(model, ids, *, starts=None, samples=None):
    """``[B, T, V]`` of tokens ``[B, T]``, on the CPU wherever the model is."""
    if starts is None:
        starts = torch.zeros_like(ids, dtype=torch.bool)
        starts[:, 0] = True
    samples = torch.arange(len(ids)) if samples is None else samples
    inputs = ids, torch.arange(ids.shape[1]).expand_as(ids), row_info(samples, starts)
    return model(*(x.to(cpu.device()) for x in inputs)).cpu()
