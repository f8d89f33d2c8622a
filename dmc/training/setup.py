"""What a rank needs before its first step: process groups, model, gradients, optimizer, teacher."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from megatron.core import parallel_state as mpu
from megatron.core import tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from dmc.families import ModelShape
from dmc.fitted import FittedDecisions
from dmc.kernels import backend
from dmc.training import backends, cpu, decoder, lora
from dmc.training import optimizer as optimizer_module
from dmc.training.config import Config
from dmc.training.stage import Stage
from dmc.training.state import DecisionCounts, LayerState, Settings

# (names of a rank's parameters, its first layer, its tensor rank and size) → (name, its part of the tensor), one by one.
WeightLoader = Callable[[list[str], int, int, int], Iterable[tuple[str, Tensor]]]


@dataclass
class Student:
    """The model in training with all that belongs to it; a chunk an item (one, unless the pipeline is interleaved)."""

    chunks: list[Stage]
    ddp: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    state: LayerState


def init_distributed(config: Config) -> None:
    """Join torchrun's process group (or a group of one) and lay megatron's groups over it.

    Raises:
        ValueError: if the layout does not divide the number of processes.
    """
    for name, value in (
        ("RANK", "0"),
        ("WORLD_SIZE", "1"),
        ("LOCAL_RANK", "0"),
        ("LOCAL_WORLD_SIZE", "1"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", "0"),
    ):
        os.environ.setdefault(name, value)
    world = int(os.environ["WORLD_SIZE"])
    check_world(config, world)
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    torch.set_num_threads(config.run.threads or max(1, len(os.sched_getaffinity(0)) // local))
    torch.set_flush_denormal(True)
    backend.set_default(config.run.kernels)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(cpu.backend())
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=config.parallel.tensor,
        pipeline_model_parallel_size=config.parallel.pipeline,
        virtual_pipeline_model_parallel_size=config.parallel.virtual if config.parallel.virtual > 1 else None,
        context_parallel_size=config.parallel.context,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(config.run.seed)


def check_world(config: Config, world: int) -> None:
    """Refuse a layout that the number of processes does not carry.

    Raises:
        ValueError: naming the numbers.
    """
    p = config.parallel
    layout = p.tensor * p.pipeline * p.context
    if world % layout:
        raise ValueError(
            f"parallel.tensor {p.tensor} x parallel.pipeline {p.pipeline} x parallel.context {p.context} does not divide "
            f"the {world} processes"
        )
    ranks, micro = world // layout, config.optim.micro_batch
    if config.optim.global_batch % (micro * ranks):
        raise ValueError(
            f"optim.global_batch {config.optim.global_batch} is not a multiple of optim.micro_batch {micro} x {ranks} "
            "data-parallel ranks: change one of them"
        )
    batches = config.optim.global_batch // (micro * ranks)
    if p.virtual > 1 and batches % p.pipeline:
        raise ValueError(
            f"parallel.virtual {p.virtual} interleaves the micro-batches of a step in groups of parallel.pipeline "
            f"{p.pipeline}, and a rank has {batches} of them: make optim.global_batch a multiple of {micro * ranks * p.pipeline}"
        )
    evaluated = config.log.eval_sequences // ranks
    if p.virtual > 1 and (config.log.eval_sequences % ranks or evaluated // math.gcd(evaluated, micro) % p.pipeline):
        raise ValueError(
            f"log.eval_sequences {config.log.eval_sequences} does not make a multiple of parallel.pipeline {p.pipeline} "
            f"micro-batches on each of {ranks} data-parallel ranks: use a multiple of {micro * ranks * p.pipeline}"
        )


def dtype_of(config: Config) -> torch.dtype:
    """The dtype of the weights in the forward pass."""
    return torch.bfloat16 if config.run.precision == "bf16" else torch.float32


def layer_settings(config: Config) -> Settings:
    """What the layers of a run's model need of its configuration."""
    dmc = config.dmc
    return Settings(
        dmc.decision if dmc.compresses else "neuron",
        dmc.gain,
        dmc.offset,
        dmc.temperature,
        config.run.seed,
        dmc.method,
        dmc.recent,
        dmc.looks_ahead and dmc.compresses,
        dmc.rule(config.data.sequence_length),
    )


def build_student(config: Config, hf: ModelShape, loader: WeightLoader | None) -> Student:
    """The model of this rank, from ``loader`` or random (None), under megatron's DDP and the optimizer.

    Raises:
        ValueError: see `check_decisions` and `decoder.build`.
    """
    check_decisions(config, hf)
    dmc = config.dmc
    state = LayerState(layer_settings(config), decisions=DecisionCounts(hf.num_hidden_layers, hf.num_key_value_heads))
    torch.manual_seed(config.run.seed)
    chunks = _model(config, hf, state, loader)
    if dmc.frozen:
        for chunk in chunks:
            if dmc.train == "lora":
                lora.install(chunk, state, rank=dmc.lora_rank, alpha=dmc.lora_alpha, mlp=dmc.lora_mlp, seed=config.run.seed)
            freeze_base(chunk)
    ddp = [_data_parallel(config, chunk, first=i == 0) for i, chunk in enumerate(chunks)]
    optimizer = optimizer_module.build(config.optim, config.parallel, ddp)
    _connect(config, chunks[0].config, ddp, optimizer)
    return Student(chunks, ddp, optimizer, state)


def check_decisions(config: Config, hf: ModelShape) -> None:
    """Refuse decisions that the model has no neuron for.

    Raises:
        ValueError: for DMS that reads a neuron of a model which norms its queries: the norm's weights are those of all heads, and
            DMS takes the neuron of one head of a group.
    """
    dmc = config.dmc
    if hf.qk_norm and dmc.compresses and dmc.method == "dms" and dmc.decision == "neuron":
        raise ValueError(
            f"dmc.method=dms with dmc.decision=neuron cannot be trained on a {hf.family.title}, which norms its queries with the "
            "same weights in every head: set dmc.decision=head"
        )


def _data_parallel(config: Config, chunk: Stage, *, first: bool) -> DistributedDataParallel:
    p = config.parallel
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=p.distributed_optimizer,
        overlap_grad_reduce=p.overlap,
        overlap_param_gather=p.overlap and p.distributed_optimizer,
    )
    # Of an interleaved stage only the first chunk's gradients arrive last: the others are one bucket.
    return DistributedDataParallel(chunk.config, settings, chunk, disable_bucketing=not first)


def _connect(
    config: Config, transformer: TransformerConfig, ddp: list[DistributedDataParallel], optimizer: MegatronOptimizer
) -> None:
    """What megatron's pipeline schedule calls on the way: one function, or one a chunk."""

    def each(functions: list[Callable]) -> Callable | list[Callable]:
        return functions[0] if len(functions) == 1 else functions

    transformer.finalize_model_grads_func = finalize_model_grads
    transformer.grad_scale_func = optimizer.scale_loss
    if config.parallel.overlap:  # gradients are reduced in the backward of the last micro-batch, not in every one's
        transformer.no_sync_func = each([part.no_sync for part in ddp])
        if len(ddp) > 1:
            transformer.grad_sync_func = each([part.start_grad_sync for part in ddp])
            if config.parallel.distributed_optimizer:
                transformer.param_sync_func = each([part.start_param_sync for part in ddp])


def attach_teacher(config: Config, hf: ModelShape, student: Student, loader: WeightLoader | None) -> None:
    """Distil the student from a model in its layout: the loader's weights or, with None, the student's own frozen ones.

    Args:
        hf: shape of the teacher, which may be another than the student's (more key/value heads, more layers).

    Raises:
        ValueError: if the two do not share a vocabulary or, in a pipeline, a hidden size.
    """
    chunks = student.chunks
    if loader is not None:
        _check_teacher(hf, student.chunks[0])
        chunks = _model(config, hf, LayerState(Settings("neuron")), loader)
        for chunk in chunks:
            chunk.requires_grad_(False).eval()
    for own, teacher in zip(student.chunks, chunks, strict=True):
        own.attach_teacher(teacher)


def _check_teacher(hf: ModelShape, student: Stage) -> None:
    if hf.vocab_size != student.vocab_size:
        raise ValueError(
            f"distill.teacher has a vocabulary of {hf.vocab_size} tokens, the model one of {student.vocab_size}: its logits "
            "cannot be compared; take a teacher with the model's tokenizer"
        )
    width, stages = student.config.hidden_size, student.config.pipeline_model_parallel_size
    if stages > 1 and hf.hidden_size != width:
        raise ValueError(
            f"distill.teacher has hidden size {hf.hidden_size}, the model {width}: in a pipeline (parallel.pipeline={stages}) "
            "their hidden states travel together; use parallel.pipeline=1 or a teacher of that size"
        )


def freeze_base(chunk: Stage) -> None:
    """Leave only the decision heads and low-rank updates trainable."""
    for name, weight in chunk.named_parameters():
        weight.requires_grad_(".decision." in name or ".lora_" in name)
    if chunk.pre_process:
        # Activation recomputation follows gradients from its inputs, and frozen embeddings would bring none.
        chunk.embedding.register_forward_hook(lambda _, __, out: out.requires_grad_() if torch.is_grad_enabled() else out)


def _model(config: Config, hf: ModelShape, state: LayerState, loader: WeightLoader | None) -> list[Stage]:
    chunks = decoder.build(
        hf,
        config.parallel,
        state,
        sequence_length=config.data.sequence_length,
        dtype=dtype_of(config),
        layers=backends.layers(config.run.transformer_engine),
    )
    if loader is not None:
        for chunk in chunks:
            load_weights(chunk, loader)
    return chunks


def load_weights(model: Stage, loader: WeightLoader) -> None:
    """Copy the loader's tensors into the model; its decision heads, which no pretrained model has, stay as they are."""
    own = dict(model.named_parameters())
    rank, size = mpu.get_tensor_model_parallel_rank(), mpu.get_tensor_model_parallel_world_size()
    for name, tensor in loader(list(own), get_transformer_layer_offset(model.config, model.vp_stage), rank, size):
        if own[name].shape != tensor.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} in the weights and {tuple(own[name].shape)} by config.json: "
                "they do not belong together"
            )
        own[name].data.copy_(tensor)


def start_from(config: Config, student: Student, fitted: FittedDecisions) -> None:
    """Let the added heads decide as fitted ones do: the logit is ``init_scale * (threshold - score) + offset``.

    The threshold is that of ``dmc.target_cr`` at ``data.sequence_length``. Logits of omega stay 0.

    Args:
        fitted: checked against the model.

    Raises:
        ValueError: if its window makes the target CR impossible at that length.
    """
    dmc, settings = config.dmc, student.state.settings
    threshold, steep = fitted.threshold(dmc.target_cr, config.data.sequence_length), dmc.init_scale / dmc.gain
    if not math.isfinite(threshold):
        raise ValueError(
            f"dmc.init: at dmc.target_cr {dmc.target_cr:g} and data.sequence_length {config.data.sequence_length} all or none of "
            "the tokens that leave the window stay: set another target, or leave dmc.init out"
        )
    for chunk in student.chunks:
        offset = get_transformer_layer_offset(chunk.config, chunk.vp_stage)
        for name, weight in chunk.named_parameters():
            if ".decision." not in name:
                continue
            layer = int(name.split(".")[2]) + offset
            rows = weight.data.unflatten(0, (-1, settings.logits_per_head))  # [heads of this rank, logits, ...]
            first = len(rows) * mpu.get_tensor_model_parallel_rank()
            heads = slice(first, first + len(rows))
            if name.endswith("weight"):
                rows[:, 0] = -steep * fitted.arrival[layer, heads].to(rows)
                rows[:, -1] = -steep * fitted.late[layer, heads].to(rows)
            else:
                rows[:, 0] = steep * (threshold - fitted.bias[layer, heads]).to(rows) + dmc.offset / dmc.gain
    student.optimizer.reload_model_params()  # the optimizer's own fp32 copies, where it keeps some


def gather_weights(config: Config, student: Student) -> None:
    """Wait until every rank holds the weights of the last step, where their gathering is left to the next forward."""
    if config.parallel.overlap and config.parallel.distributed_optimizer:
        for part in student.ddp:
            part.start_param_sync(force_sync=True)


def zero_neurons(student: Student) -> None:
    """Set what the neurons that decisions are read from are made of to 0 (the end of repurposing): the projection rows and
    biases of neuron 0 of every query and key head, or with DMS of the first query head of each group. Where queries and keys are
    normed it is the norms' first weight: rows of 0 would change the norm of the other neurons."""
    read = slice(0, 1) if student.state.settings.method == "dms" else slice(None, -1)  # never the value head
    for chunk in student.chunks:
        config = chunk.config
        groups = config.num_query_groups // config.tensor_model_parallel_size
        for name, weight in chunk.named_parameters():
            if config.qk_layernorm and name.endswith(("q_layernorm.weight", "k_layernorm.weight")):
                weight.data[0] = 0.0
            elif not config.qk_layernorm and name.endswith(("linear_qkv.weight", "linear_qkv.bias")):
                rows = weight.data.view(groups, -1, config.kv_channels, *weight.shape[1:])
                rows[:, read, 0] = 0.0
    student.optimizer.reload_model_params()  # the optimizer's own fp32 copies, where it keeps some
