"""What a rank needs before its first step: process groups, model, gradients, optimizer, teacher."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from megatron.core import parallel_state as mpu
from megatron.core import tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor
from transformers import LlamaConfig

from dmc.training import cpu, llama
from dmc.training import optimizer as optimizer_module
from dmc.training.config import Config
from dmc.training.state import DecisionCounts, LayerState, Settings

# (names of a rank's parameters, its first layer, its tensor rank and size) → (name, its part of the tensor), one by one.
WeightLoader = Callable[[list[str], int, int, int], Iterable[tuple[str, Tensor]]]


@dataclass
class Student:
    """The model in training with all that belongs to it."""

    model: GPTModel
    ddp: DistributedDataParallel
    optimizer: MegatronOptimizer
    state: LayerState


def init_distributed(config: Config) -> None:
    """Join torchrun's process group (or a group of one) and lay megatron's groups over it.

    Raises:
        ValueError: if the layout does not divide the number of processes.
    """
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1"),
                        ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "0")):
        os.environ.setdefault(name, value)
    world = int(os.environ["WORLD_SIZE"])
    check_world(config, world)
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    torch.set_num_threads(config.run.threads or max(1, len(os.sched_getaffinity(0)) // local))
    torch.set_flush_denormal(True)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(cpu.backend())
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=config.parallel.tensor, pipeline_model_parallel_size=config.parallel.pipeline
    )
    tensor_parallel.model_parallel_cuda_manual_seed(config.run.seed)


def check_world(config: Config, world: int) -> None:
    """Refuse a layout that the number of processes does not carry.

    Raises:
        ValueError: naming the numbers.
    """
    layout = config.parallel.tensor * config.parallel.pipeline
    if world % layout:
        raise ValueError(
            f"parallel.tensor {config.parallel.tensor} x parallel.pipeline {config.parallel.pipeline} does not divide "
            f"the {world} processes"
        )
    ranks, micro = world // layout, config.optim.micro_batch
    if config.optim.global_batch % (micro * ranks):
        raise ValueError(
            f"optim.global_batch {config.optim.global_batch} is not a multiple of optim.micro_batch {micro} x {ranks} "
            "data-parallel ranks: change one of them"
        )


def dtype_of(config: Config) -> torch.dtype:
    """The dtype of the weights in the forward pass."""
    return torch.bfloat16 if config.run.precision == "bf16" else torch.float32


def build_student(config: Config, hf: LlamaConfig, loader: WeightLoader | None) -> Student:
    """The model of this rank, from ``loader`` or random (None), under megatron's DDP and AdamW."""
    dmc = config.dmc
    state = LayerState(
        Settings(dmc.decision if dmc.method == "dmc" else "neuron", dmc.gain, dmc.offset, dmc.temperature, config.run.seed),
        decisions=DecisionCounts(hf.num_hidden_layers, hf.num_key_value_heads),
    )
    torch.manual_seed(config.run.seed)
    model = _model(config, hf, state, loader)
    transformer = model.config
    ddp = DistributedDataParallel(
        transformer, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model,
    )
    optimizer = optimizer_module.build(config.optim, ddp)
    transformer.finalize_model_grads_func = finalize_model_grads
    transformer.grad_scale_func = optimizer.scale_loss
    return Student(model, ddp, optimizer, state)


def build_teacher(config: Config, hf: LlamaConfig, loader: WeightLoader) -> GPTModel:
    """The frozen original model, in the layout of the student."""
    teacher = _model(config, hf, LayerState(Settings("neuron")), loader)
    return teacher.requires_grad_(False).eval()


def _model(config: Config, hf: LlamaConfig, state: LayerState, loader: WeightLoader | None) -> GPTModel:
    model = llama.build(
        hf, config.parallel, state, sequence_length=config.data.sequence_length, dtype=dtype_of(config),
        pre_process=mpu.is_pipeline_first_stage(), post_process=mpu.is_pipeline_last_stage(),
    )
    if loader is not None:
        load_weights(model, loader)
    return model


def load_weights(model: GPTModel, loader: WeightLoader) -> None:
    """Copy the loader's tensors into the model; its decision heads, which no Llama has, stay as they are."""
    own = dict(model.named_parameters())
    rank, size = mpu.get_tensor_model_parallel_rank(), mpu.get_tensor_model_parallel_world_size()
    for name, tensor in loader(list(own), get_transformer_layer_offset(model.config), rank, size):
        if own[name].shape != tensor.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} in the weights and {tuple(own[name].shape)} by config.json: "
                "they do not belong together"
            )
        own[name].data.copy_(tensor)


def zero_neurons(student: Student) -> None:
    """Set the projection rows of neuron 0 of every query and key head to 0 (the end of repurposing)."""
    for name, weight in student.model.named_parameters():
        if name.endswith("linear_qkv.weight"):
            config = student.model.config
            groups = config.num_query_groups // config.tensor_model_parallel_size
            rows = weight.data.view(groups, -1, config.kv_channels, weight.shape[-1])
            rows[:, :-1, 0] = 0.0  # all but the value head of each group
    student.optimizer.reload_model_params()  # the optimizer's own fp32 copies, where it keeps some
