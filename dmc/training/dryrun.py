"""``train.py --dry-run``: the plan of a run on the terminal, and one step of a shrunken model in its layout."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import torch

from dmc.families import ModelShape
from dmc.training import decoder, flops, planning, pretend, setup
from dmc.training.config import Config
from dmc.training.metrics import clock
from dmc.training.planning import GIB, Layout
from dmc.training.schedule import Schedule


def run(config: Config, hf: ModelShape, *, batch: Callable) -> Iterator[str]:
    """The lines of the report, as they come.

    Args:
        config: of the run; the ranks are ``plan.world``, else torchrun's.
        hf: of the model.
        batch: see `pretend.one_step`.

    Raises:
        ValueError: if the layout divides the model or the ranks not, the memory of the GPU (where it is known) does
            not hold the run, or a checkpoint would never be written.
    """
    world = config.plan.world or int(os.environ.get("WORLD_SIZE", "1"))
    layout = Layout.of(config, world)
    decoder.check_layout(hf, config.parallel)
    setup.check_decisions(config, hf)
    yield _layout_line(config, layout)
    yield from _memory_lines(config, hf, layout)
    yield from _cost_lines(config, hf, layout)
    yield from _step_lines(config, hf, layout, batch)


def _layout_line(config: Config, layout: Layout) -> str:
    o = config.optim
    extras = [name for name, on in (("sequence", layout.sequence), ("distributed optimizer", layout.sharded)) if on]
    if layout.virtual > 1:
        extras.append(f"{layout.virtual} chunks a stage")
    return (
        f"layout     {layout.world} ranks = tensor {layout.tensor} x pipeline {layout.pipeline} x context {layout.context} x "
        f"data {layout.data}{''.join(', ' + x for x in extras)}; {o.global_batch} sequences of "
        f"{config.data.sequence_length} a step = {layout.data} ranks x {layout.micro_batches} micro-batches of {o.micro_batch}"
    )


def _memory_lines(config: Config, hf: ModelShape, layout: Layout) -> Iterator[str]:
    gpu = flops.find_gpu(_gpu_name(config))
    on_gpu = gpu is not None or torch.cuda.is_available()
    worst = 0
    for stage in sorted({0, layout.pipeline - 1}):
        memory = planning.memory(config, hf, layout, stage, on_gpu=on_gpu)
        worst = max(worst, memory.total)
        where = f" of stage {stage}" if layout.pipeline > 1 else ""
        parts = ", ".join(
            f"{name} {getattr(memory, name) / GIB:.2f}"
            for name in ("weights", "gradients", "optimizer", "teacher", "activations", "logits", "reserve")
        )
        yield f"memory     GiB per rank{where}: {parts}; total {memory.total / GIB:.2f}"
    yield (
        f"           activations with parallel.recompute={config.parallel.recompute}, the loss's temporaries in logits"
        + (", reserve (CUDA context, NCCL, fragmentation) assumed" if on_gpu else "")
    )
    if gpu is None:
        yield "           of a GPU that is not known: plan.gpu names one of " + ", ".join(flops.GPUS)
        return
    yield f"           of {gpu.memory_gib:g} GiB of the GPU ({_gpu_name(config)}): {worst / GIB / gpu.memory_gib:.0%}"
    if worst > gpu.memory_gib * GIB:
        raise ValueError(
            f"the run needs about {worst / GIB:.1f} GiB per rank and the GPU has {gpu.memory_gib:g}: raise parallel.tensor or "
            "parallel.pipeline, set parallel.recompute=full or parallel.distributed_optimizer=true, or lower optim.micro_batch"
        )


def _cost_lines(config: Config, hf: ModelShape, layout: Layout) -> Iterator[str]:
    schedule, peak = Schedule(config), flops.peak_tflops(config, _gpu_name(config))
    cost = planning.cost(config, hf, layout, peak_tflops=peak)
    phases = ", ".join(f"{name} {count}" for name, count in cost.steps.items())
    saves = [name for step in range(schedule.steps) for name in schedule(step).saves if not name.startswith("step")]
    yield (
        f"schedule   {schedule.steps} steps ({phases}) x {_count(cost.tokens // schedule.steps)} tokens = "
        f"{_count(cost.tokens)} tokens; checkpoints {' '.join(saves)}"
    )
    if cost.seconds is None:
        yield f"time       {cost.flops:.2e} FLOP; no estimate: the speed of a rank is not known (set plan.gpu or log.peak_tflops)"
        return
    yield (
        f"time       {cost.flops:.2e} FLOP at an assumed {config.plan.utilisation:.0%} (plan.utilisation) of {peak:g} TFLOP/s a "
        f"rank: {cost.seconds / schedule.steps:.3g} s a step, {clock(cost.seconds)} in all, "
        f"{cost.seconds * layout.world / 3600:.3g} GPU hours"
    )


def _step_lines(config: Config, hf: ModelShape, layout: Layout, batch: Callable) -> Iterator[str]:
    # the first rank of a stage: the last stage has the loss, the first the embedding
    for stage in sorted({0, layout.pipeline - 1}):
        rank = stage * (layout.world // layout.pipeline)
        done = pretend.one_step(config, hf, layout.world, rank, batch=batch)
        yield f"one step   of {', '.join(done)} as rank {rank} of {layout.world}, on a shrunken model: runs"


def _gpu_name(config: Config) -> str:
    if config.plan.gpu:
        if flops.find_gpu(config.plan.gpu) is None:
            raise ValueError(f"plan.gpu is {config.plan.gpu!r}: it must be one of {', '.join(flops.GPUS)}")
        return config.plan.gpu
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def _count(number: float) -> str:
    """``2.05k``, ``4.19M``, ``84.9B``."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
