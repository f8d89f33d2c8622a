"""The training loop: retrofit, continued pretraining, evaluation, checkpoints, resume."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from megatron.core import parallel_state as mpu
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from dmc.families import ModelShape
from dmc.training import context, cpu, setup, sharded
from dmc.training.attention import row_info
from dmc.training.config import Config, recorded
from dmc.training.guard import Guard
from dmc.training.losses import language_and_distillation
from dmc.training.metrics import Meter, Reporter
from dmc.training.schedule import Schedule, StepPlan
from dmc.training.signals import Stopped, StopSignals

# What a resumed run must share with the checkpoint's; layout, the lengths of ramp and final hold, and reports may change.
SAME_RUN = (
    "data.sequence_length",
    "dmc.method",
    "dmc.window",
    "dmc.decide",
    "dmc.decision",
    "dmc.sinks",
    "dmc.gain",
    "dmc.offset",
    "dmc.temperature",
    "optim.name",
    "dmc.train",
    "dmc.lora_rank",
    "dmc.lora_alpha",
    "dmc.lora_mlp",
    "optim.global_batch",
    "parallel.distributed_optimizer",
    "run.seed",
    "dmc.integer_hold_steps",
)
# Settings that came later: what a checkpoint without them was trained with, where it is not today's default.
EARLIER = {"dmc.integer_hold_steps": 0}
_IN_FORCE = {"dmc.window": "recent", "dmc.decide": "decided"}  # settings whose defaults depend on others


class Batches(Protocol):
    """What the trainer needs of data: micro-batches of a step and a fixed evaluation set (`data.batches`)."""

    def micro_batches(self, step: int, *, rank: int, ranks: int) -> Iterator: ...  # noqa: D102

    def evaluation(self, *, rank: int, ranks: int) -> list: ...  # noqa: D102


class Store(Protocol):
    """Where checkpoints go (`checkpoints.store`)."""

    def save(self, name: str, state: dict, meta: dict, *, background: bool) -> None: ...  # noqa: D102

    def poll(self) -> None: ...  # noqa: D102

    def wait(self) -> None: ...  # noqa: D102

    def check(self, path: str) -> dict: ...  # noqa: D102

    def load(self, path: str, build: Callable[[], dict]) -> tuple[dict, dict]: ...  # noqa: D102


@dataclass(frozen=True)
class Evaluation:
    """Held-out numbers: ``perplexity``, measured ``cr`` and the CR of every layer and head ``[L][H]``."""

    perplexity: float
    cr: float
    heads: list[list[float]]


class Trainer:
    """Runs a configured training on this rank. Construct after `setup.init_distributed`."""

    def __init__(
        self,
        config: Config,
        hf: ModelShape,
        *,
        batches: Batches,
        store: Store,
        reporter: Reporter,
        meta: dict,
        loader: setup.WeightLoader | None,
        teacher_loader: setup.WeightLoader | None,
        teacher_hf: ModelShape | None = None,
    ) -> None:
        self.config, self.hf, self.batches, self.store, self.reporter = config, hf, batches, store, reporter
        self.schedule = Schedule(config)
        self.student = setup.build_student(config, hf, loader)
        self.distils = teacher_loader is not None
        if self.distils:
            # An adapter's frozen base model is the original one: no second copy is needed, unless another is asked for.
            own = config.dmc.frozen and not config.distill.teacher
            setup.attach_teacher(config, teacher_hf or hf, self.student, None if own else teacher_loader)
        self.guard = Guard(config.guard, Path(config.run.output) / "guard", self.student.optimizer, self.student.chunks)
        self.meta = meta
        self.step = 0
        self.kept = 1.0  # measured share of kept entries in the last step: what ends the one-sided loss
        self._forward_backward = get_forward_backward_func()
        self._per_step = hf.num_hidden_layers * hf.num_key_value_heads * self._tokens_per_step

    # ------------------------------------------------------------------------------------------ the run

    def train(self) -> None:
        """From the current step to the end, with reports, evaluations and checkpoints on the way.

        Raises:
            Stopped: after a signal that asks for it, with a complete checkpoint.
            FloatingPointError: if the numerics guard stops the run.
            OSError: if a checkpoint cannot be written.
        """
        signals = StopSignals()
        if self.step == 0 and self.schedule(0).phase != "plain":
            self._report_evaluation("base", self.evaluate("plain"))
        meter = Meter(self.config, self.hf, steps=self.schedule.steps, world=torch.distributed.get_world_size())
        while self.step < self.schedule.steps:
            plan = self.schedule(self.step)
            begun = time.perf_counter()
            try:
                metrics = self.train_step(plan)
            except FloatingPointError:
                self.store.wait()  # what is being written in the background is sound
                raise
            seconds = time.perf_counter() - begun
            self.step += 1
            metrics |= meter(self.step, seconds)
            self.reporter.step(metrics, shown=self.step % self.config.log.every == 0 or self.step == self.schedule.steps)
            signal = signals.agreed()
            self._after_step(plan, stopping=bool(signal))
            if signal and self.step < self.schedule.steps:
                self.store.wait()
                self.reporter.close()
                raise Stopped(signal, self.step)
        self.store.wait()
        self.reporter.close()

    def train_step(self, plan: StepPlan) -> dict:
        """One optimizer step; returns its metrics (the same on every rank)."""
        state, dmc = self.student.state, self.config.dmc
        compressing = plan.phase in ("ramp", "hold")
        if compressing and self.step == self.schedule.ramp_start and dmc.decision == "neuron":
            setup.gather_weights(self.config, self.student)
            setup.zero_neurons(self.student)
        state.mode = "soft" if compressing else ("repurpose" if plan.phase == "repurpose" else "plain")
        state.step, state.neuron_scale, state.target_cr = self.step, plan.neuron_scale, plan.target_cr
        open_hinge = compressing and self.kept > 1 / plan.target_cr
        data = self._training_data()
        # Loss sums are divided by the global number of scored tokens. This is the mean over layers, heads and all tokens.
        state.alpha_gradient = -dmc.cr_weight * open_hinge / (self.hf.num_hidden_layers * self.hf.num_key_value_heads)
        state.alpha_gradient *= self._scored_share(data)
        for group in self.student.optimizer.param_groups:
            group["lr"] = plan.lr
        for part in self.student.ddp:
            part.train()
            part.zero_grad_buffer()
        self.student.optimizer.zero_grad()
        losses = self._run(data, self._loss, forward_only=False)
        metrics = {"step": self.step + 1, "phase": plan.phase, "lr": plan.lr} | self._mean_losses(losses)
        applied = self.guard.step(metrics, torch.cat([batch.samples for batch in data]))
        sums = self.student.state.decisions.total() if compressing else None
        if not applied:
            metrics["skipped"] = True  # and the hinge stays as it was: the measured CR may be as wrong as the loss
        elif compressing:
            soft, hard = (sums.sum((1, 2)) / self._per_step).tolist()
            self.kept = hard if dmc.cr_loss == "hard" else soft
            metrics |= {
                "target_cr": plan.target_cr,
                "measured_cr": 1 / hard,
                "soft_cr": 1 / soft,
                "cr_loss": max(0.0, self.kept - 1 / plan.target_cr),
                "cr_layer": (self._per_step / self.hf.num_hidden_layers / sums[1].sum(1)).tolist(),
            }
        return metrics

    def evaluate(self, mode: str | None = None) -> Evaluation:
        """Perplexity on the held-out sequences, with the hard decisions of inference once there are any.

        Args:
            mode: ``plain``, ``repurpose`` or ``hard``; None takes what the last step's phase asks for.
        """
        state = self.student.state
        if mode is None:
            phase = self.schedule.phase(max(0, self.step - 1))
            mode = {"ramp": "hard", "hold": "hard"}.get(phase, phase)
        state.mode, state.alpha_gradient = mode, 0.0
        state.target_cr = self.schedule.target_cr(max(0, self.step - 1))
        for part in self.student.ddp:
            part.eval()
        state.decisions.total()  # drop what is left of training
        batches = self.batches.evaluation(rank=mpu.get_data_parallel_rank(), ranks=mpu.get_data_parallel_world_size())
        with torch.no_grad():
            losses = self._run([b.to(cpu.device()) for b in batches], self._evaluation_loss, forward_only=True)
        totals = self._sum_losses(losses)
        scored, tokens = totals[2].item(), totals[3].item()
        kept = state.decisions.total()[1] / tokens
        if mode != "hard":
            kept = torch.ones_like(kept)
        return Evaluation(math.exp(totals[0].item() / scored), 1 / kept.mean().item(), (1 / kept).tolist())

    # ------------------------------------------------------------------------------------------ checkpoints

    def save(self, name: str, evaluation: Evaluation) -> None:
        """A complete checkpoint: weights, optimizer, position, and the numbers measured at it."""
        meta = self.meta | {
            "step": self.step,
            "kept": self.kept,
            "target_cr": self.schedule.target_cr(self.step - 1),
            "measured_cr": evaluation.cr,
            "perplexity": evaluation.perplexity,
            "heads": evaluation.heads,
            "compressed": self.schedule.phase(self.step - 1) in ("ramp", "hold"),
            "guard": self.guard.state(),
        }
        self.store.save(name, self._sharded_state(loading=False), meta, background=self.config.run.async_save)

    def resume(self, path: str) -> None:
        """Continue exactly where the checkpoint was written.

        Raises:
            ValueError: if it is incomplete or belongs to another model, text or configuration.
        """
        meta = self.store.check(path)
        self._check_same_run(path, meta)
        state, _ = self.store.load(path, lambda: self._sharded_state(loading=True))
        for key, chunk in self._named_chunks().items():
            chunk.load_state_dict(state[key])
        self.student.optimizer.load_state_dict(state["optimizer"])
        self.step, self.kept = meta["step"], meta["kept"]
        self.guard.load_state(meta.get("guard", {"norms": [], "skipped": 0}))  # older checkpoints have none
        self.reporter.resumed(self.step)

    def _check_same_run(self, path: str, meta: dict) -> None:
        """Refuse another run's checkpoint by its own words, before its tensors are found not to fit."""
        _check_setting(path, meta, self.meta, "data.loss_on")  # which is part of the hash of a text
        for key, what in (("model_hash", "model"), ("tokenizer_hash", "tokenizer"), ("corpus_hash", "text")):
            then, here = (of.get("begin", []) for of in (meta, self.meta))  # checkpoints older than data.bos have none
            if what == "text" and then != here:  # which makes it another text
                raise ValueError(
                    f"checkpoint {path} was trained on documents that begin with the tokens {then}, here with {here}: set "
                    f"data.bos={'true' if then else 'false'}, which a resumed run keeps"
                )
            if meta.get(key) != self.meta[key]:
                raise ValueError(
                    f"checkpoint {path} was trained from another {what} ({meta.get(key)}, here {self.meta[key]}): "
                    "resume with the settings of its run"
                )
        for name in SAME_RUN:
            _check_setting(path, meta, self.meta, name)

    def _sharded_state(self, *, loading: bool) -> dict:
        setup.gather_weights(self.config, self.student)
        group = {"dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True)}
        model = {name: chunk.sharded_state_dict(metadata=dict(group)) for name, chunk in self._named_chunks().items()}
        # megatron looks for one chunk's parameters at the top level, for several chunks' below their names.
        parameters = model if len(model) > 1 else model["model"]
        optimizer = self.student.optimizer.sharded_state_dict(parameters, is_loading=loading, metadata=sharded.METADATA | group)
        return model | {"optimizer": optimizer}

    def _named_chunks(self) -> dict[str, setup.Stage]:
        chunks = self.student.chunks
        return {"model": chunks[0]} if len(chunks) == 1 else {f"model{i}": chunk for i, chunk in enumerate(chunks)}

    # ------------------------------------------------------------------------------------------ one pass

    @property
    def _tokens_per_step(self) -> int:
        return self.config.optim.global_batch * self.config.data.sequence_length

    @property
    def _lm_weight(self) -> float:
        """Training without a teacher, as in pretraining and a control, is language modelling alone."""
        alone = self.config.dmc.method == "none" and not self.distils
        return 1.0 if alone else self.config.distill.lm_weight

    def _training_data(self) -> list:
        data = self.batches.micro_batches(self.step, rank=mpu.get_data_parallel_rank(), ranks=mpu.get_data_parallel_world_size())
        return [batch.to(cpu.device()) for batch in data]

    def _scored_share(self, data: list) -> float:
        """Share of a step's labels that count in its losses, over all ranks."""
        if data[0].scored is None:
            return 1.0
        scored = torch.stack([batch.scored.sum() for batch in data]).sum()
        torch.distributed.all_reduce(scored, group=mpu.get_data_parallel_group())
        return scored.item() / self._tokens_per_step

    def _run(self, batches: list, loss: Callable, *, forward_only: bool) -> list[dict]:
        chunks = self.student.ddp
        iterators = [iter(batches) for _ in chunks]  # every chunk of an interleaved stage sees every micro-batch
        rows = len(batches[0].tokens)
        if mpu.get_pipeline_model_parallel_world_size() > 1 and chunks[0].module.distils:
            rows *= 2  # of the hidden states between stages: the teacher's travel with the student's
        return self._forward_backward(
            forward_step_func=lambda iterator, model: self._forward(next(iterator), model, loss),
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=chunks,
            num_microbatches=len(batches),
            seq_length=self.config.data.sequence_length,
            micro_batch_size=rows,
            forward_only=forward_only,
        )

    def _forward(self, batch, model, loss: Callable) -> tuple[Tensor, Callable]:  # noqa: ANN001
        rows = row_info(batch.samples, batch.starts)
        tokens, labels = context.my_part(batch.tokens, 1), context.my_part(batch.labels, 1)
        positions = context.my_part(torch.arange(batch.tokens.shape[1], device=tokens.device), 0).expand_as(tokens)
        scored = None if batch.scored is None else context.my_part(batch.scored, 1)
        teacher = model.module.run_teacher(tokens, positions, rows)
        output = model(tokens, positions, rows)
        if teacher is not None and not model.module.post_process:
            output = torch.cat([output, teacher], dim=1)
        return output, lambda logits: loss(logits, labels, teacher, scored)

    def _loss(self, logits: Tensor, labels: Tensor, teacher: Tensor | None, scored: Tensor | None) -> tuple[Tensor, Tensor, dict]:
        loss, language, divergence = language_and_distillation(
            logits,
            labels,
            teacher,
            lm_weight=self._lm_weight,
            kl_weight=self.config.distill.weight,
            group=mpu.get_tensor_model_parallel_group(),
            scored=scored,
        )
        tokens = torch.tensor(labels.numel(), dtype=torch.int, device=logits.device)
        counted = tokens if scored is None else scored.sum(dtype=torch.int)
        return loss, counted, {"sums": torch.stack([language, divergence, counted.float(), tokens.float()])}

    def _evaluation_loss(self, logits: Tensor, labels: Tensor, _: None, scored: Tensor | None) -> tuple[Tensor, Tensor, dict]:
        return self._loss(logits, labels, None, scored)

    def _sum_losses(self, losses: list[dict]) -> Tensor:
        """``[cross entropy, KL, scored tokens, tokens]`` sums over every rank; only last stages and one tensor rank have them."""
        mine = mpu.is_pipeline_last_stage() and mpu.get_tensor_model_parallel_rank() == 0
        total = torch.zeros(4, dtype=torch.float64, device=cpu.device())
        if mine:
            total += torch.stack([item["sums"] for item in losses]).double().sum(0)
        torch.distributed.all_reduce(total)
        return total

    def _mean_losses(self, losses: list[dict]) -> dict:
        language, divergence, scored, _ = self._sum_losses(losses).tolist()
        language, divergence = language / max(1, scored), divergence / max(1, scored)  # a step may have user turns alone
        if not self.distils:
            return {"loss": self._lm_weight * language, "lm_loss": language}
        loss = self._lm_weight * language + self.config.distill.weight * divergence
        return {"loss": loss, "lm_loss": language, "distill_loss": divergence}

    # ------------------------------------------------------------------------------------------ reports

    def _after_step(self, plan: StepPlan, *, stopping: bool) -> None:
        self.store.poll()
        every = self.config.log.eval_every
        due = bool(every) and self.step % every == 0
        if plan.phase == "repurpose" and self.step == self.schedule.ramp_start:
            due = True  # what the neuron cost, before any compression
        saves = plan.saves or ((f"step{self.step:06d}",) if stopping else ())
        if not (due or saves):
            return
        evaluation = self.evaluate()
        self._report_evaluation("+".join(saves) or plan.phase, evaluation)
        for name in saves:
            self.save(name, evaluation)

    def _report_evaluation(self, name: str, evaluation: Evaluation) -> None:
        self.reporter.evaluation(
            {
                "step": self.step,
                "name": name,
                "eval_perplexity": evaluation.perplexity,
                "eval_cr": evaluation.cr,
                "eval_heads": evaluation.heads,
            }
        )


def _check_setting(path: str, then: dict, now: dict, name: str) -> None:
    """Refuse a checkpoint of a run with another value of a setting, by what the two runs record."""
    section, key = name.split(".")
    if key == "integer_hold_steps" and now["config"]["dmc"]["method"] == "none":
        return  # it has no effect there
    default = EARLIER.get(name, getattr(getattr(Config(), section), key))
    before, here = then["config"][section].get(key, default), now["config"][section][key]
    if name in _IN_FORCE:
        before, here = (getattr(recorded(found["config"]["dmc"]), _IN_FORCE[name]) for found in (then, now))
    if before != here:
        raise ValueError(f"checkpoint {path} was trained with {name}={before}, here it is {here}: a resumed run keeps it")
