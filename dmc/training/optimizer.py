"""The optimizers: megatron-core's AdamW, and torch's Muon for the matrices where steps are few.

Muon (Jordan et al. 2024; `torch.optim.Muon`) orthogonalises the momentum of each hidden matrix. On the small
base model it needs less than half of AdamW's tokens for the same loss (docs/results/base.md). It needs whole
matrices, so it is rejected with tensor parallelism; embeddings, norms and decision heads stay with AdamW.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state as mpu
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer

from dmc.training import sharded
from dmc.training.config import OptimConfig, ParallelConfig


def build(config: OptimConfig, parallel: ParallelConfig, ddp: list[DistributedDataParallel]) -> MegatronOptimizer:
    """The configured optimizer over the parameters of ``ddp``; clips the global gradient norm."""
    transformer = ddp[0].module.config
    settings = OptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        clip_grad=config.clip,
        bf16=transformer.bf16,
        params_dtype=transformer.params_dtype,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_param_gather=parallel.overlap and parallel.distributed_optimizer,
    )
    if config.name == "muon":
        return _muon(config, settings, ddp)
    with sharded.installed():
        return get_megatron_optimizer(settings, ddp)


def _muon(config: OptimConfig, settings: OptimizerConfig, ddp: list[DistributedDataParallel]) -> MegatronOptimizer:
    matrices, vectors, embeddings = [], [], []
    for name, weight in ((n, w) for part in ddp for n, w in part.module.named_parameters() if w.requires_grad):
        hidden = name.startswith("decoder.layers.") and not any(part in name for part in (".decision.", ".lora_"))
        target = vectors if weight.dim() < 2 else matrices if hidden else embeddings
        target.append(weight)
    # match_rms_adamw: updates of AdamW's size, so that one learning rate serves both
    muon = torch.optim.Muon(
        [_group(matrices)], lr=config.lr, weight_decay=config.weight_decay, momentum=config.beta2, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(
        [_group(embeddings), _group(vectors, wd_mult=0.0) | {"weight_decay": 0.0}],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
    )
    pairs = ((muon, _init_muon), (adamw, _init_adamw))
    if settings.bf16:  # fp32 main weights next to the bf16 ones
        parts = [Float16OptimizerWithFloat16Params(inner, settings, None, init) for inner, init in pairs]
    else:
        parts = [FP32Optimizer(inner, settings, init) for inner, init in pairs]
    for part in parts:
        part.grad_stats_parallel_group = part.model_parallel_group = mpu.get_model_parallel_group()
        part.tp_group = mpu.get_tensor_model_parallel_group()
    return ChainedOptimizer(parts)


def _group(weights: list[torch.nn.Parameter], wd_mult: float = 1.0) -> dict:
    """A parameter group with the keys by which megatron tells groups apart in checkpoints."""
    return {"params": weights, "wd_mult": wd_mult, "lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False}


def _init_muon(optimizer: torch.optim.Optimizer, _: OptimizerConfig | None = None) -> None:
    """State as after the first step, for megatron to load a checkpoint into."""
    for group in optimizer.param_groups:
        for weight in group["params"]:
            optimizer.state[weight].setdefault("momentum_buffer", torch.zeros_like(weight.data))


def _init_adamw(optimizer: torch.optim.Optimizer, _: OptimizerConfig | None = None) -> None:
    for group in optimizer.param_groups:
        for weight in group["params"]:
            for key in ("exp_avg", "exp_avg_sq"):
                optimizer.state[weight].setdefault(key, torch.zeros_like(weight.data))
