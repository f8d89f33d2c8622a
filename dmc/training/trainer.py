"""The training loop: retrofit, continued pretraining, evaluation, checkpoints, resume."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from megatron.core import parallel_state as mpu
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor
from transformers import LlamaConfig

from dmc.training import cpu, setup
from dmc.training.attention import row_info
from dmc.training.config import Config
from dmc.training.losses import language_and_distillation
from dmc.training.metrics import Meter, Reporter
from dmc.training.schedule import Schedule, StepPlan

# What a resumed run must share with the checkpoint's; layout, schedule lengths and reports may change.
SAME_RUN = (
    "data.sequence_length", "dmc.method", "dmc.decision", "dmc.gain", "dmc.offset", "dmc.temperature", "optim.name",
    "optim.global_batch", "run.seed",
)


class Batches(Protocol):
    """What the trainer needs of data: micro-batches of a step and a fixed evaluation set (`data.batches`)."""

    def micro_batches(self, step: int, *, rank: int, ranks: int) -> Iterator: ...  # noqa: D102

    def evaluation(self, *, rank: int, ranks: int) -> list: ...  # noqa: D102


class Store(Protocol):
    """Where checkpoints go (`checkpoints.store`)."""

    def save(self, name: str, state: dict, meta: dict, *, background: bool) -> None: ...  # noqa: D102

    def poll(self) -> None: ...  # noqa: D102

    def wait(self) -> None: ...  # noqa: D102

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
        self, config: Config, hf: LlamaConfig, *, batches: Batches, store: Store, reporter: Reporter, meta: dict,
        loader: setup.WeightLoader | None, teacher_loader: setup.WeightLoader | None,
    ) -> None:
        self.config, self.hf, self.batches, self.store, self.reporter = config, hf, batches, store, reporter
        self.schedule = Schedule(config)
        self.student = setup.build_student(config, hf, loader)
        self.teacher = None if teacher_loader is None else setup.build_teacher(config, hf, teacher_loader)
        self.meta = meta
        self.step = 0
        self.kept = 1.0  # measured share of kept entries in the last step: what ends the one-sided loss
        self._forward_backward = get_forward_backward_func()
        self._per_step = hf.num_hidden_layers * hf.num_key_value_heads * self._tokens_per_step

    # ------------------------------------------------------------------------------------------ the run

    def train(self) -> None:
        """From the current step to the end, with reports, evaluations and checkpoints on the way."""
        if self.step == 0 and self.schedule(0).phase != "plain":
            self._report_evaluation("base", self.evaluate("plain"))
        meter = Meter(self.config, self.hf, steps=self.schedule.steps, world=torch.distributed.get_world_size())
        while self.step < self.schedule.steps:
            plan = self.schedule(self.step)
            begun = time.perf_counter()
            metrics = self.train_step(plan)
            seconds = time.perf_counter() - begun
            self.step += 1
            metrics |= meter(self.step, seconds)
            self.reporter.step(metrics, shown=self.step % self.config.log.every == 0 or self.step == self.schedule.steps)
            self._after_step(plan)
        self.store.wait()
        self.reporter.close()

    def train_step(self, plan: StepPlan) -> dict:
        """One optimizer step; returns its metrics (the same on every rank)."""
        state, dmc = self.student.state, self.config.dmc
        compressing = plan.phase in ("ramp", "hold")
        if compressing and self.step == self.schedule.ramp_start and dmc.decision == "neuron":
            setup.zero_neurons(self.student)
        state.mode = "soft" if compressing else ("repurpose" if plan.phase == "repurpose" else "plain")
        state.step, state.neuron_scale = self.step, plan.neuron_scale
        open_hinge = compressing and self.kept > 1 / plan.target_cr
        # Loss sums are divided by the global number of tokens, and so is this: mean over layers and heads.
        state.alpha_gradient = -dmc.cr_weight * open_hinge / (self.hf.num_hidden_layers * self.hf.num_key_value_heads)
        for group in self.student.optimizer.param_groups:
            group["lr"] = plan.lr
        self.student.ddp.train()
        self.student.ddp.zero_grad_buffer()
        self.student.optimizer.zero_grad()
        losses = self._run(self._training_data(), self._loss, forward_only=False)
        applied, grad_norm, _ = self.student.optimizer.step()
        metrics = {"step": self.step + 1, "phase": plan.phase, "lr": plan.lr, "grad_norm": float(grad_norm or 0.0)}
        metrics |= self._mean_losses(losses)
        if not applied or not math.isfinite(metrics["loss"]):
            raise FloatingPointError(
                f"step {self.step}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}: training diverged; "
                "lower optim.lr or look at the data of this step"
            )
        if compressing:
            sums = self.student.state.decisions.total()
            soft, hard = (sums.sum((1, 2)) / self._per_step).tolist()
            self.kept = hard if dmc.cr_loss == "hard" else soft
            metrics |= {
                "target_cr": plan.target_cr, "measured_cr": 1 / hard, "soft_cr": 1 / soft,
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
        self.student.ddp.eval()
        state.decisions.total()  # drop what is left of training
        batches = self.batches.evaluation(rank=mpu.get_data_parallel_rank(), ranks=mpu.get_data_parallel_world_size())
        with torch.no_grad():
            losses = self._run([b.to(cpu.device()) for b in batches], self._evaluation_loss, forward_only=True)
        totals = self._sum_losses(losses)
        tokens = totals[2].item()
        kept = state.decisions.total()[1] / tokens
        if mode != "hard":
            kept = torch.ones_like(kept)
        return Evaluation(math.exp(totals[0].item() / tokens), 1 / kept.mean().item(), (1 / kept).tolist())

    # ------------------------------------------------------------------------------------------ checkpoints

    def save(self, name: str, evaluation: Evaluation) -> None:
        """A complete checkpoint: weights, optimizer, position, and the numbers measured at it."""
        meta = self.meta | {
            "step": self.step, "kept": self.kept, "target_cr": self.schedule.target_cr(self.step - 1),
            "measured_cr": evaluation.cr, "perplexity": evaluation.perplexity, "heads": evaluation.heads,
            "compressed": self.schedule.phase(self.step - 1) in ("ramp", "hold"),
        }
        self.store.save(name, self._sharded_state(loading=False), meta, background=self.config.run.async_save)

    def resume(self, path: str) -> None:
        """Continue exactly where the checkpoint was written.

        Raises:
            ValueError: if it is incomplete or belongs to another model, text or configuration.
        """
        state, meta = self.store.load(path, lambda: self._sharded_state(loading=True))
        for key, what in (("model_hash", "model"), ("corpus_hash", "text"), ("tokenizer_hash", "tokenizer")):
            if meta.get(key) != self.meta[key]:
                raise ValueError(
                    f"checkpoint {path} was trained from another {what} ({meta.get(key)}, here {self.meta[key]}): "
                    "resume with the settings of its run"
                )
        for name in SAME_RUN:
            section, key = name.split(".")
            then, now = meta["config"][section].get(key), self.meta["config"][section][key]
            if then != now:
                raise ValueError(f"checkpoint {path} was trained with {name}={then}, here it is {now}: a resumed run keeps it")
        self.student.model.load_state_dict(state["model"])
        self.student.optimizer.load_state_dict(state["optimizer"])
        self.step, self.kept = meta["step"], meta["kept"]
        self.reporter.resumed(self.step)

    def _sharded_state(self, *, loading: bool) -> dict:
        model = self.student.model.sharded_state_dict()
        return {
            "model": model,
            "optimizer": self.student.optimizer.sharded_state_dict(model, is_loading=loading),
        }

    # ------------------------------------------------------------------------------------------ one pass

    @property
    def _tokens_per_step(self) -> int:
        return self.config.optim.global_batch * self.config.data.sequence_length

    @property
    def _lm_weight(self) -> float:
        """Training without a teacher, as in pretraining and a control, is language modelling alone."""
        alone = self.config.dmc.method == "none" and self.teacher is None
        return 1.0 if alone else self.config.distill.lm_weight

    def _training_data(self) -> list:
        data = self.batches.micro_batches(
            self.step, rank=mpu.get_data_parallel_rank(), ranks=mpu.get_data_parallel_world_size()
        )
        return [batch.to(cpu.device()) for batch in data]

    def _run(self, batches: list, loss: Callable, *, forward_only: bool) -> list[dict]:
        return self._forward_backward(
            forward_step_func=lambda iterator, model: self._forward(next(iterator), model, loss),
            data_iterator=iter(batches), model=[self.student.ddp], num_microbatches=len(batches),
            seq_length=self.config.data.sequence_length, micro_batch_size=len(batches[0].tokens),
            forward_only=forward_only,
        )

    def _forward(self, batch, model, loss: Callable) -> tuple[Tensor, Callable]:  # noqa: ANN001
        rows = row_info(batch.samples, batch.starts)
        positions = torch.arange(batch.tokens.shape[1], device=batch.tokens.device).expand_as(batch.tokens)
        teacher = None
        if self.teacher is not None and model.training:
            with torch.no_grad():
                teacher = self.teacher(batch.tokens, positions, rows)
        output = model(batch.tokens, positions, rows)
        return output, lambda logits: loss(logits, batch, teacher)

    def _loss(self, logits: Tensor, batch, teacher: Tensor | None) -> tuple[Tensor, Tensor, dict]:  # noqa: ANN001
        loss, language, divergence = language_and_distillation(
            logits, batch.labels, teacher, lm_weight=self._lm_weight,
            kl_weight=self.config.distill.weight, group=mpu.get_tensor_model_parallel_group(),
        )
        tokens = torch.tensor(batch.labels.numel(), dtype=torch.int, device=logits.device)
        return loss, tokens, {"sums": torch.stack([language, divergence, tokens.float()])}

    def _evaluation_loss(self, logits: Tensor, batch, _: None) -> tuple[Tensor, Tensor, dict]:  # noqa: ANN001
        return self._loss(logits, batch, None)

    def _sum_losses(self, losses: list[dict]) -> Tensor:
        """``[cross entropy, KL, tokens]`` sums over every rank; only last stages and one tensor rank have them."""
        mine = mpu.is_pipeline_last_stage() and mpu.get_tensor_model_parallel_rank() == 0
        total = torch.zeros(3, dtype=torch.float64, device=cpu.device())
        if mine:
            total += torch.stack([item["sums"] for item in losses]).double().sum(0)
        torch.distributed.all_reduce(total)
        return total

    def _mean_losses(self, losses: list[dict]) -> dict:
        language, divergence, tokens = self._sum_losses(losses).tolist()
        language, divergence = language / tokens, divergence / tokens
        if self.teacher is None:
            return {"loss": self._lm_weight * language, "lm_loss": language}
        loss = self._lm_weight * language + self.config.distill.weight * divergence
        return {"loss": loss, "lm_loss": language, "distill_loss": divergence}

    # ------------------------------------------------------------------------------------------ reports

    def _after_step(self, plan: StepPlan) -> None:
        self.store.poll()
        every = self.config.log.eval_every
        due = bool(every) and self.step % every == 0
        if plan.phase == "repurpose" and self.step == self.schedule.ramp_start:
            due = True  # what the neuron cost, before any compression
        if not (due or plan.saves):
            return
        evaluation = self.evaluate()
        self._report_evaluation("+".join(plan.saves) or plan.phase, evaluation)
        for name in plan.saves:
            self.save(name, evaluation)

    def _report_evaluation(self, name: str, evaluation: Evaluation) -> None:
        self.reporter.evaluation({
            "step": self.step, "name": name, "eval_perplexity": evaluation.perplexity, "eval_cr": evaluation.cr,
            "eval_heads": evaluation.heads,
        })
