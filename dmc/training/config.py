"""The configuration of a run: dataclasses with defaults, YAML, dotted overrides, checks.

``load(path, overrides)`` reads a YAML file, applies ``section.key=value`` strings and checks the result. An unknown key is
rejected with a list of the known keys.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from dmc.kernels.backend import BACKENDS, FORMER
from dmc.training.rules import RULES, Rule

DMS_WINDOW = 64
"""Default of dmc.window with dmc.method=dms; the paper uses 256, for longer texts."""


@dataclass
class DataConfig:
    """What to train on."""

    text: str | list = "stdlib"  # "stdlib", "stdlib-plain", prepared corpus, files, or blend "0.7:A,0.3:B" (docs/data.md)
    held_out: str | list = ""  # the same for evaluation; "" holds out a share of `text` (docs/data.md)
    bos: bool | str = "auto"  # documents begin with a BOS token: true, false, or auto (follows the tokenizer, as prompts do)
    sequence_length: int = 1024  # tokens per sequence
    cache: str = "runs/data"  # directory of tokenised corpora


@dataclass
class DmcConfig:
    """The retrofit; defaults chosen by experiment (docs/results/merge-at-once.md)."""

    method: str = "dmc"  # "dmc", "dms" (docs/methods/dms.md), or "none": plain (continued) pretraining, also a control
    target_cr: float = 4.0  # tokens per cache entry at the end of the ramp
    decision: str = "head"  # "neuron": k[0] and q[0]; "head": added projection; "all", "periodic", "random": rules, as baselines
    sinks: int = 4  # first tokens of a document that a rule always keeps
    gain: float = 10.0  # the logit is gain * k[0] - offset; folded into the weights at export
    offset: float = 2.5  # c (the paper's is 5): alpha = sigmoid((logit - c + noise) / temperature), omega = sigmoid(logit + c)
    temperature: float = 0.1  # temperature of the relaxed decisions
    cr_loss: str = "soft"  # which measured ratio ends the hinge: "soft" alphas (eq. 10) or "hard" decisions
    cr_weight: float = 3.0  # weight of the compression loss (the paper's is 1)
    train: str = "all"  # "all" weights; with a frozen base model: "decision", the added heads alone, or "lora" (docs/training.md)
    lora_rank: int = 16  # of the low-rank updates of q, k, v and o, with train=lora
    lora_alpha: float = 32.0  # the updates are scaled by lora_alpha / lora_rank
    lora_mlp: bool = False  # updates of the MLP too
    repurpose_steps: int = 40  # only for decision=neuron
    ramp_steps_per_unit: float = 80.0  # steps in which the target rises by 1
    hold_steps: int = 160  # steps at the final target
    integer_hold_steps: int = 40  # steps at each integer CR below it, with their own decay, before crN is saved; 0: none
    window: int | None = None  # newest tokens kept unmerged; null: dmc merges at once (the paper's), dms evicts after 64
    init: str = ""  # file of fitted decisions (dmc calibrate --decisions) that the added head starts from; "": from zero
    init_scale: float = 3.0  # slope from a fitted score, relative to the threshold of target_cr, to a logit
    decide: str = "auto"  # "arrival": from a token's own state; "late": also from that `window` tokens later (decision=head)

    @property
    def compresses(self) -> bool:
        """True if the run is a retrofit."""
        return self.method != "none"

    @property
    def frozen(self) -> bool:
        """True if the weights of the base model stay as they are."""
        return self.train != "all"

    @property
    def ruled(self) -> bool:
        """True if decisions follow from positions alone (`dmc.training.rules`)."""
        return self.compresses and self.decision in RULES

    def rule(self, length: int) -> Rule | None:
        """The rule that makes the decisions, for sequences of ``length`` tokens; None if the model makes them."""
        return Rule(self.decision, self.method == "dms", self.recent, self.sinks, length) if self.ruled else None

    @property
    def recent(self) -> int | None:
        """The effective window: number of tokens before a query that it sees unmerged; None if merging is immediate, or if
        the window follows from the target CR (decision=all)."""
        if self.ruled and self.decision == "all":
            return self.window
        if self.method == "dms":
            return DMS_WINDOW if self.window is None else self.window
        return self.window if self.method == "dmc" else None

    @property
    def looks_ahead(self) -> bool:
        """True if decisions are made late."""
        return self.decided == "late"

    @property
    def decided(self) -> str:
        """When decisions are made, "late" or "arrival"; "auto" is late for late merging by a decision head."""
        if self.decide != "auto":
            return self.decide
        return "late" if self.recent and self.decision == "head" and self.method == "dmc" else "arrival"


@dataclass
class DistillConfig:
    """The loss: ``lm_weight`` * language modelling + ``weight`` * KL(original model || model)."""

    weight: float = 1.0  # weight of KL(teacher || model)
    lm_weight: float = 0.0  # weight of the language-modelling loss
    teacher: str = ""  # HF directory of the teacher; "" takes the original model


@dataclass
class OptimConfig:
    """AdamW, or Muon for the hidden matrices (`dmc.training.optimizer`)."""

    name: str = "adamw"  # "adamw" or "muon"
    lr: float = 1e-3
    min_lr: float = 0.0  # learning rate at the end of the decay
    warmup_steps: int = 10  # linear, from the first step
    decay_steps: int = 120  # number of last steps that decay linearly to min_lr; 0: constant learning rate
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95  # also Muon's momentum
    clip: float = 1.0  # global gradient norm
    micro_batch: int = 2  # sequences per forward pass of one data-parallel rank
    global_batch: int = 2  # sequences per step, over all ranks


@dataclass
class ParallelConfig:
    """The layout over ranks; the remaining factor is data parallelism."""

    tensor: int = 1  # ranks that share each layer
    pipeline: int = 1  # stages of layers
    virtual: int = 1  # chunks of layers per stage; above 1 the schedule is interleaved
    context: int = 1  # ranks that share each sequence
    sequence: bool = False  # sequence parallelism, with tensor > 1
    distributed_optimizer: bool = False  # optimizer state and fp32 weights sharded over the data-parallel ranks
    overlap: bool = False  # reduce gradients (and gather weights, with distributed_optimizer) while computing
    recompute: str = "none"  # "none", "selective" (attention) or "full"


@dataclass
class RunConfig:
    """The run itself."""

    model: str = "checkpoints/base"  # HF Llama directory; with init=random only its config and tokenizer are read
    init: str = "pretrained"  # "pretrained" or "random" (pretraining from scratch)
    output: str = "runs/retrofit"  # directory of the run
    resume: str = ""  # "auto" continues the newest complete checkpoint of `output`; or a checkpoint directory
    overwrite: bool = False  # start again in an output directory that holds a run
    dry_run: bool = False  # print the plan (`plan.`), try one step of a shrunken model, and write nothing
    steps: int = 100  # with method=none; a retrofit's steps follow from its phases
    save_every: int = 0  # steps between checkpoints; 0: only at each integer CR and at the end
    keep_last: int = 3  # number of step checkpoints kept; those of a CR and the final one are always kept. 0: all
    async_save: bool = False  # write checkpoints while training continues
    peer_timeout: float = 120.0  # seconds without a heartbeat after which all ranks stop; 0: only collective timeouts
    seed: int = 0  # seed of the data order, the noise and random weights
    precision: str = "fp32"  # "fp32" or "bf16"
    kernels: str = "auto"  # attention kernels: "auto" (Triton on CUDA, else PyTorch), "triton", "torch", "reference"
    transformer_engine: str = "never"  # use transformer-engine's linear layers: "never", "always", or "auto" (if available)
    threads: int = 0  # CPU threads per process; 0: all cores divided among the processes of the machine


@dataclass
class GuardConfig:
    """Numerics guard: skip or stop on NaN/Inf or outlier gradients; the bad step is never applied (docs/checkpoints.md)."""

    action: str = "stop"  # "stop" the run or "skip" the step, with a report in run.output/guard
    max_norm_ratio: float = 0.0  # gradient norms above this multiple of the running median are outliers; 0: only NaN and Inf
    window: int = 50  # accepted steps in the median; the check starts after this number of steps
    max_skips: int = 5  # consecutive skipped steps after which the run stops


@dataclass
class LogConfig:
    """Logging and evaluation."""

    every: int = 10  # steps between progress lines
    eval_every: int = 0  # steps between evaluations; 0: only where a checkpoint is saved by the schedule
    eval_sequences: int = 16  # held-out sequences
    tensorboard: bool = False  # event files in the run's directory
    wandb: str = ""  # project name; "" for none. WANDB_MODE=offline works
    peak_tflops: float = 0.0  # peak of one rank, for the MFU; 0: from the GPU's name in bf16, otherwise no MFU


@dataclass
class PlanConfig:
    """Assumptions of ``--dry-run`` about the machine; training ignores them."""

    world: int = 0  # ranks (GPUs); 0: torchrun's, else 1
    gpu: str = ""  # a name of dmc/training/flops.py, such as h100; "": this machine's
    utilisation: float = 0.35  # assumed share of the peak for the ETA, recomputation counted as work
    shape: str = ""  # directory of a config.json that replaces run.model if that is not on this machine


@dataclass
class Config:
    """A whole run."""

    data: DataConfig = field(default_factory=DataConfig)
    dmc: DmcConfig = field(default_factory=DmcConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    run: RunConfig = field(default_factory=RunConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    log: LogConfig = field(default_factory=LogConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)


def load(path: str | Path | None = None, overrides: list[str] | None = None) -> Config:
    """Defaults, then the YAML file, then ``section.key=value`` strings; checked.

    Raises:
        ValueError: one sentence naming the field, the value and the remedy.
    """
    config = Config()
    if path is not None:
        for section, values in _read_yaml(Path(path)).items():
            for key, value in _section_items(section, values):
                _assign(config, f"{section}.{key}", value)
    for override in overrides or []:
        name, sign, text = override.partition("=")
        if not sign:
            raise ValueError(f"{override!r} is not an override: write section.key=value, e.g. optim.lr=1e-4")
        try:
            _assign(config, name, yaml.safe_load(text) if text else "")
        except yaml.YAMLError:
            raise ValueError(f"the value of {override!r} is not readable: quote it as in YAML") from None
    check(config)
    return config


def to_dict(config: Config) -> dict:
    """Nested plain dictionary, as in the YAML files."""
    return dataclasses.asdict(config)


def describe() -> str:
    """Every field with its default and its comment in this file, for ``--help``."""
    lines = []
    for section, owner in _types(Config).items():
        lines.append(f"  {section}.   {inspect.getdoc(owner)}")
        for name, _, default, comment in keys(owner):
            lines.append(f"    {name:<22}{default:<20}{comment}".rstrip())
    return "\n".join(lines)


def keys(section: type) -> list[tuple[str, str, str, str]]:
    """(name, type, default, comment beside it in this file) of each field of a section's dataclass."""
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(section), flags=re.MULTILINE))
    return [
        (item.name, str(item.type), _shown(item.default), comments.get(item.name, "")) for item in dataclasses.fields(section)
    ]


def check(config: Config) -> None:
    """Checks of fields by themselves and together that need no model and no data.

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
    _at_least(0, {
        "dmc.repurpose_steps": d.repurpose_steps, "dmc.ramp_steps_per_unit": d.ramp_steps_per_unit,
        "dmc.hold_steps": d.hold_steps, "dmc.integer_hold_steps": d.integer_hold_steps, "dmc.cr_weight": d.cr_weight,
        "distill.weight": config.distill.weight,
        "distill.lm_weight": config.distill.lm_weight, "optim.weight_decay": o.weight_decay, "run.seed": r.seed,
        "optim.min_lr": o.min_lr, "optim.decay_steps": o.decay_steps, "optim.warmup_steps": o.warmup_steps,
        "run.save_every": r.save_every, "run.keep_last": r.keep_last, "run.peer_timeout": r.peer_timeout,
        "guard.max_norm_ratio": config.guard.max_norm_ratio, "guard.max_skips": config.guard.max_skips,
        "run.threads": r.threads,
        "log.eval_every": config.log.eval_every,
        "log.peak_tflops": config.log.peak_tflops, "plan.world": config.plan.world,
    })
    if d.window is not None:
        _at_least(1 if d.method == "dms" else 0, {"dmc.window": d.window})
    _at_least(1, {
        "dmc.sinks": d.sinks, "dmc.lora_rank": d.lora_rank, "data.sequence_length": config.data.sequence_length,
        "optim.micro_batch": o.micro_batch,
        "optim.global_batch": o.global_batch, "parallel.tensor": p.tensor, "parallel.pipeline": p.pipeline,
        "parallel.virtual": p.virtual, "parallel.context": p.context, "log.every": config.log.every,
        "guard.window": config.guard.window, "log.eval_sequences": config.log.eval_sequences, "run.steps": r.steps,
    })
    for name, value in {
        "optim.lr": o.lr, "optim.clip": o.clip, "dmc.gain": d.gain, "dmc.temperature": d.temperature,
        "dmc.init_scale": d.init_scale, "dmc.lora_alpha": d.lora_alpha,
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
            f"dmc.train={d.train} trains the added decision heads beside a frozen model, and dmc.method={d.method} with "
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


def recorded(settings: Mapping) -> DmcConfig:
    """The retrofit's settings from the ``dmc`` section that a checkpoint records, as they were in force.

    Checkpoints from before late merging record a window for every method, and only DMS used it.
    """
    known = {item.name for item in dataclasses.fields(DmcConfig)}
    found = DmcConfig(**{name: value for name, value in settings.items() if name in known})
    if "decide" not in settings:
        found.decide = "arrival"
        found.window = found.window if found.method == "dms" else None
    return found


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


def _read_yaml(path: Path) -> dict:
    if not path.is_file():
        raise ValueError(f"no config file at {path}: see configs/ for the ones that exist")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold sections such as `optim:`, found {type(values).__name__}")
    return values


def _section_items(section: str, values: object) -> list[tuple[str, object]]:
    if section not in _types(Config):
        raise ValueError(f"unknown config section {section!r}; known: {_names(Config)}")
    if not isinstance(values, dict):
        raise ValueError(f"section {section!r} must hold keys, found {values!r}; known sections: {_names(Config)}")
    return list(values.items())


def _assign(config: Config, name: str, value: object) -> None:
    section, _, key = name.partition(".")
    if section not in _types(Config):
        raise ValueError(f"unknown config section {section!r} in {name!r}; known: {_names(Config)}")
    owner = getattr(config, section)
    types = _types(type(owner))
    if key not in types:
        raise ValueError(f"unknown config key {name!r}; known in {section}: {_names(type(owner))}")
    setattr(owner, key, _cast(name, value, types[key]))


def _cast(name: str, value: object, kind: type) -> object:
    if isinstance(value, str) and kind in (int, float):
        try:
            value = float(value)  # YAML reads 1e-3 as a string
        except ValueError:
            raise ValueError(f"{name} is {value!r}: it must be a number") from None
    if kind == bool | str:
        value = {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value
        kind = bool if isinstance(value, bool) else str
    if kind == str | list:
        kind = list if isinstance(value, list) else str
    if kind == int | None:
        if value is None or value == "":
            return None
        kind = int
        if isinstance(value, str):
            value = _cast(name, value, float)
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is str and value is not None and not isinstance(value, str | bool | dict | list):
        value = str(value)
    if type(value) is not kind:
        raise ValueError(f"{name} is {value!r}: it must be of type {kind.__name__}")
    return value


def _types(owner: type) -> dict[str, type]:
    return typing.get_type_hints(owner)


def _names(owner: type) -> str:
    return ", ".join(_types(owner))


def _shown(default: object) -> str:
    return repr(default) if isinstance(default, str) else str(default)


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}: it must be one of {', '.join(known)}")


def _at_least(bound: int, values: dict[str, float]) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value >= bound):
            raise ValueError(f"{name} is {value}: it must be at least {bound}")
