"""Checks of a configuration that need no model and no data: fields alone, together, and with the layout."""

from __future__ import annotations

import math

from dmc.kernels.backend import BACKENDS, FORMER
from dmc.training.rules import RULES
from dmc.training.settings import Config


def check(config: Config) -> None:
    """Checks of fields alone and together that need no model and no data.

    Raises:
        ValueError: naming the field, the value and the remedy.
    """
    _check_fields(config)
    _check_together(config)
    _check_layout(config)


def _check_fields(config: Config) -> None:
    d, o, p, r = config.dmc, config.optim, config.parallel, config.run
    if config.data.bos not in ("auto", True, False):
        raise ValueError(f"data.bos is {config.data.bos!r}: it must be auto, true or false")
    _one_of("data.loss_on", config.data.loss_on, ("everything", "assistant"))
    if config.data.chat and config.data.bos != "auto":
        raise ValueError(
            f"data.bos is {str(config.data.bos).lower()}, and with data.chat=true the chat template writes the first tokens: set "
            "data.bos=auto"
        )
    _one_of("dmc.method", d.method, ("dmc", "dms", "none"))
    _one_of("dmc.decision", d.decision, ("neuron", "head", *RULES))
    _one_of("dmc.cr_loss", d.cr_loss, ("soft", "hard"))
    _one_of("dmc.train", d.train, ("all", "decision", "lora"))
    _one_of("dmc.decide", d.decide, ("auto", "arrival", "late"))
    _one_of("guard.action", config.guard.action, ("stop", "skip"))
    _one_of("optim.name", o.name, ("adamw", "muon"))
    _one_of("parallel.recompute", p.recompute, ("none", "selective", "full"))
    _one_of("run.precision", r.precision, ("fp32", "bf16"))
    _one_of("run.kernels", FORMER.get(r.kernels, r.kernels), BACKENDS)
    _one_of("run.transformer_engine", r.transformer_engine, ("never", "auto", "always"))
    _one_of("run.init", r.init, ("pretrained", "random"))
    if not (math.isfinite(d.target_cr) and d.target_cr >= 1):
        raise ValueError(f"dmc.target_cr is {d.target_cr}: it must be a finite number of at least 1 (tokens per entry)")
    _at_least(
        0,
        {
            "dmc.repurpose_steps": d.repurpose_steps,
            "dmc.ramp_steps_per_unit": d.ramp_steps_per_unit,
            "dmc.hold_steps": d.hold_steps,
            "dmc.integer_hold_steps": d.integer_hold_steps,
            "dmc.cr_weight": d.cr_weight,
            "distill.weight": config.distill.weight,
            "distill.lm_weight": config.distill.lm_weight,
            "optim.weight_decay": o.weight_decay,
            "run.seed": r.seed,
            "optim.min_lr": o.min_lr,
            "optim.decay_steps": o.decay_steps,
            "optim.warmup_steps": o.warmup_steps,
            "run.save_every": r.save_every,
            "run.keep_last": r.keep_last,
            "run.peer_timeout": r.peer_timeout,
            "guard.max_norm_ratio": config.guard.max_norm_ratio,
            "guard.max_skips": config.guard.max_skips,
            "run.threads": r.threads,
            "log.eval_every": config.log.eval_every,
            "log.peak_tflops": config.log.peak_tflops,
            "plan.world": config.plan.world,
        },
    )
    if d.window is not None:
        _at_least(1 if d.method == "dms" else 0, {"dmc.window": d.window})
    _at_least(
        1,
        {
            "dmc.sinks": d.sinks,
            "dmc.lora_rank": d.lora_rank,
            "data.sequence_length": config.data.sequence_length,
            "optim.micro_batch": o.micro_batch,
            "optim.global_batch": o.global_batch,
            "parallel.tensor": p.tensor,
            "parallel.pipeline": p.pipeline,
            "parallel.virtual": p.virtual,
            "parallel.context": p.context,
            "log.every": config.log.every,
            "guard.window": config.guard.window,
            "log.eval_sequences": config.log.eval_sequences,
            "run.steps": r.steps,
        },
    )
    for name, value in {
        "optim.lr": o.lr,
        "optim.clip": o.clip,
        "dmc.gain": d.gain,
        "dmc.temperature": d.temperature,
        "dmc.init_scale": d.init_scale,
        "dmc.lora_alpha": d.lora_alpha,
    }.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} is {value}: it must be a positive number")
    if 0 < config.guard.max_norm_ratio <= 1:
        raise ValueError(f"guard.max_norm_ratio is {config.guard.max_norm_ratio}: it must be above 1, or 0 for no outliers")
    if not math.isfinite(d.offset):
        raise ValueError(f"dmc.offset is {d.offset}: it must be a finite number")
    for name, value in {"optim.beta1": o.beta1, "optim.beta2": o.beta2}.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name} is {value}: it must be at least 0 and below 1")
    if not 0 < config.plan.utilisation <= 1:
        raise ValueError(f"plan.utilisation is {config.plan.utilisation}: it must be above 0 and at most 1")
    if r.seed >= 2**40:
        raise ValueError(f"run.seed is {r.seed}: it must be below 2^40")


def _check_together(config: Config) -> None:
    d, o, r = config.dmc, config.optim, config.run
    ramp = d.ramp_steps_per_unit * (d.target_cr - 1)
    if d.compresses and not (d.hold_steps or ramp or (d.decision == "neuron" and d.repurpose_steps)):
        raise ValueError("dmc.hold_steps is 0 and the ramp has no steps: nothing to train; set one of them")
    if o.global_batch % o.micro_batch:
        raise ValueError(
            f"optim.global_batch {o.global_batch} is not a multiple of optim.micro_batch {o.micro_batch}: change one"
        )
    distils = d.compresses and config.distill.weight > 0 or config.distill.teacher != ""
    if config.distill.weight == 0 and config.distill.lm_weight == 0 and (d.compresses or distils):
        raise ValueError("distill.weight and distill.lm_weight are both 0: nothing to learn from; set one of them")
    if d.frozen and not (d.compresses and d.decision == "head"):
        raise ValueError(
            f"dmc.train={d.train} trains the added decision heads of a frozen model, and dmc.method={d.method} with "
            f"dmc.decision={d.decision} has none: set dmc.method=dmc (or dms) and dmc.decision=head, or dmc.train=all"
        )
    if r.init == "random" and d.compresses:
        raise ValueError(
            f"run.init=random with dmc.method={d.method}: {d.method.upper()} retrofits a pretrained model; pretrain with "
            "dmc.method=none"
        )
    if d.decide == "late" and not (d.recent and d.decision == "head"):
        raise ValueError(
            f"dmc.decide=late reads the hidden state dmc.window tokens later with an added head, and dmc.method={d.method}, "
            f"dmc.window={'null' if d.recent is None else d.recent}, dmc.decision={d.decision} has none to read: set dmc.window "
            "to at least 1 and dmc.decision=head, or dmc.decide=arrival"
        )
    if d.ruled:
        _check_rule(config)
        return
    if d.init and not d.looks_ahead:
        raise ValueError(
            f"dmc.init={d.init} starts the head of decisions that are made late, and dmc.method={d.method}, dmc.window="
            f"{'null' if d.recent is None else d.recent}, dmc.decision={d.decision}, dmc.decide={d.decide} have none: set "
            "dmc.window to that of the file, dmc.decision=head and dmc.decide=late, or leave dmc.init out"
        )
    _check_reach(config)


def _check_rule(config: Config) -> None:
    """What a rule needs, and a target CR that it cannot reach."""
    d = config.dmc
    if d.init:
        raise ValueError(f"dmc.init={d.init} starts decision heads, and dmc.decision={d.decision} has none: leave dmc.init out")
    if d.decision == "all" and d.method != "dms":
        raise ValueError("dmc.decision=all leaves nothing behind the window to merge into: set dmc.method=dms, which evicts")
    if d.decision == "all" and d.window is not None:
        raise ValueError(
            f"dmc.window is {d.window}, and with dmc.decision=all the window follows from dmc.target_cr: set dmc.window=null"
        )
    if d.decision != "all" and d.recent is None:
        raise ValueError(f"dmc.decision={d.decision} merges tokens that leave a window: set dmc.window, such as dmc.window=64")
    d.rule(config.data.sequence_length).check(d.target_cr)


def _check_reach(config: Config) -> None:
    """A window that leaves too few tokens for the target CR."""
    d, length = config.dmc, config.data.sequence_length
    if d.recent is None or d.target_cr == 1:
        return
    more = 0 if d.method == "dms" else 2  # late merging holds the w + 1 newest tokens and one entry at least
    held = d.recent + more
    if d.target_cr * held < length:
        return
    most = math.ceil(length / d.target_cr) - 1 - more
    remedy = "lower dmc.target_cr or raise data.sequence_length"
    if most >= (d.method == "dms"):
        remedy = f"set dmc.window to at most {most}"
    raise ValueError(
        f"dmc.window {d.recent} keeps at least {held} of data.sequence_length {length} tokens, so the largest possible CR is "
        f"{length} / {held} = {length / held:.3g} and dmc.target_cr {d.target_cr:g} is out of reach: {remedy}"
    )


def _check_layout(config: Config) -> None:
    p, length = config.parallel, config.data.sequence_length
    if config.optim.name == "muon" and (p.tensor > 1 or p.distributed_optimizer):
        raise ValueError(
            f"optim.name=muon works on whole matrices: it needs parallel.tensor=1 and parallel.distributed_optimizer=false, "
            f"not {p.tensor} and {str(p.distributed_optimizer).lower()}"
        )
    if p.sequence and p.tensor == 1:
        raise ValueError("parallel.sequence needs parallel.tensor of at least 2: set both or neither")
    if p.virtual > 1 and p.pipeline == 1:
        raise ValueError(f"parallel.virtual is {p.virtual}: it divides pipeline stages and needs parallel.pipeline above 1")
    share = (2 * p.context if p.context > 1 else 1) * (p.tensor if p.sequence else 1)
    if length % share:
        raise ValueError(
            f"data.sequence_length {length} is not a multiple of {share}: with parallel.context={p.context} it is cut into "
            "2 x context chunks, with parallel.sequence=true again by parallel.tensor"
        )


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}: it must be one of {', '.join(known)}")


def _at_least(bound: int, values: dict[str, float]) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value >= bound):
            raise ValueError(f"{name} is {value}: it must be at least {bound}")
