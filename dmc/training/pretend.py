"""One step of a shrunken model as any rank of a layout, in one process: what finds wiring errors before a cluster does.

The process takes the place of one rank of ``world``; torch's *fake* process group answers its collectives at once
and leaves their tensors as they are. So every shape, group and buffer of the layout is real, and the numbers of the
step mean nothing.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from megatron.core import parallel_state as mpu
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from dmc.families import ModelShape, shape_of
from dmc.training import flops, setup
from dmc.training.config import Config
from dmc.training.metrics import Reporter
from dmc.training.trainer import Trainer


@contextlib.contextmanager
def world(config: Config, size: int, rank: int) -> Iterator[None]:
    """This process as rank ``rank`` of ``size``, with megatron's groups of the configuration's layout.

    Raises:
        RuntimeError: if a process group exists already.
        ValueError: if the layout does not divide ``size``.
    """
    if torch.distributed.is_initialized():
        raise RuntimeError("a process group exists: a pretended world needs a process of its own")
    names = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    real = torch.distributed.new_group
    with (
        mock.patch.dict(os.environ, {name: str(value) for name, value in names.items()}),
        # megatron asks for gloo groups next to the others
        mock.patch("torch.distributed.new_group", lambda *a, **k: real(*a, **(k | {"backend": "fake"}))),
        _Zeroed(),
    ):
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
        try:
            setup.init_distributed(config)
            yield
        finally:
            mpu.destroy_model_parallel()
            torch.distributed.destroy_process_group()


def one_step(config: Config, hf: ModelShape, size: int, rank: int, *, batch: Callable) -> dict[str, dict]:
    """A training step of every phase of the schedule as that rank; the metrics by phase (their values mean nothing).

    Args:
        config: of the real run; its layout, losses, decisions, optimizer and precision are kept.
        hf: the real model, of which `shrunken` is run with random weights.
        size, rank: of the pretended world.
        batch: makes a batch of (tokens, labels, starts, samples), as `data.batches.Batch`.
    """
    config, hf = shrunken(config, hf, size)
    done = {}
    with world(config, size, rank):
        random = lambda *_: {}  # noqa: E731 - loads nothing: the teacher keeps its random weights
        trainer = _Pretender(
            config,
            hf,
            batches=Noise(config, hf.vocab_size, batch),
            store=None,
            meta={},
            loader=None,
            reporter=Reporter(config.log, Path(), {}, rank=1, steps=1),
            teacher_loader=random if flops.distils(config) else None,
        )
        for step in range(trainer.schedule.steps):
            phase = trainer.schedule.phase(step)
            if phase not in done:
                trainer.step = step
                done[phase] = trainer.train_step(trainer.schedule(step))
    return done


def shrunken(config: Config, hf: ModelShape, size: int) -> tuple[Config, ModelShape]:
    """A run of the same layout that takes a second: a layer a chunk, narrow heads, two micro-batches or the pipeline's need.

    Kept: the family with its biases and norms, query heads per key/value head, tied embeddings, rope scaling, norm epsilon.
    """
    small, p = copy.deepcopy(config), config.parallel
    heads = p.tensor * max(1, 2 // p.tensor)
    groups, depth = hf.num_attention_heads // hf.num_key_value_heads, 16
    fields = copy.deepcopy({name: value for name, value in hf.fields.items() if name != "layer_types"})
    for name in ("short_factor", "long_factor"):  # of longrope: one for each frequency
        if given := fields["rope_parameters"].get(name):
            fields["rope_parameters"][name] = [given[i * len(given) // (depth // 2)] for i in range(depth // 2)]
    queries = heads * groups
    shape = shape_of(
        fields
        | {
            "num_hidden_layers": p.pipeline * p.virtual,
            "num_key_value_heads": heads,
            "num_attention_heads": queries,
            "head_dim": depth,
            "hidden_size": -(-32 * p.tensor // queries) * queries,  # a multiple, as transformers wants it
            "intermediate_size": 64 * p.tensor,
            "vocab_size": 64 * p.tensor,
        }
    )
    small.data.sequence_length = 8 * p.tensor * p.context
    data = size // (p.tensor * p.pipeline * p.context)
    small.optim.global_batch = small.optim.micro_batch * data * (2 if p.pipeline == 1 else p.pipeline)
    small.dmc.repurpose_steps = min(2, config.dmc.repurpose_steps)
    small.dmc.ramp_steps_per_unit = min(1.0, config.dmc.ramp_steps_per_unit)
    if config.dmc.recent is not None:
        small.dmc.window = min(3, config.dmc.recent)  # so that some tokens leave it
    small.dmc.sinks = 1
    small.dmc.hold_steps, small.run.steps = min(1, config.dmc.hold_steps), 1
    small.dmc.integer_hold_steps = min(1, config.dmc.integer_hold_steps)
    small.log.eval_sequences = small.optim.global_batch
    small.run.threads = small.run.threads or 1
    return small, shape


class _Pretender(Trainer):
    """On stages that have no loss, the reported one would come from others."""

    def _mean_losses(self, losses: list[dict]) -> dict:
        return super()._mean_losses(losses) if losses else {"loss": 0.0, "lm_loss": 0.0}


class Noise:
    """Batches of random tokens, a document a sequence (`dmc.training.trainer.Batches`).

    ``batch`` makes one of (tokens, labels, starts, samples), as `data.batches.Batch` does.
    """

    def __init__(self, config: Config, vocabulary: int, batch: Callable) -> None:
        self._config, self._vocabulary, self._batch = config, vocabulary, batch

    def micro_batches(self, step: int, *, rank: int, ranks: int) -> Iterator:
        """Those of a step and rank."""
        rows, length = self._config.optim.micro_batch, self._config.data.sequence_length
        starts = torch.zeros(rows, length, dtype=torch.bool)
        starts[:, 0] = True
        for _ in range(self._config.optim.global_batch // rows // ranks):
            tokens = torch.randint(self._vocabulary, (rows, length))
            yield self._batch(tokens, tokens, starts, torch.arange(rows))

    def evaluation(self, *, rank: int, ranks: int) -> list:
        """None."""
        return []


class _Zeroed(TorchFunctionMode):
    """What a collective or a neighbour would have filled holds zeros, and not what memory held before."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            func = torch.zeros
            kwargs.pop("memory_format", None)
        elif func is torch.empty_like:
            func = torch.zeros_like
        return func(*args, **kwargs)
