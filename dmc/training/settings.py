"""The settings of a run: a dataclass with defaults for each section of the configuration.

The comment next to a field is its help text and its line in docs/reference/configuration.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from dmc.training.rules import RULES, Rule

DMS_WINDOW = 64
"""Default of dmc.window with dmc.method=dms; the paper uses 256, for longer texts."""


@dataclass
class DataConfig:
    """What to train on."""

    text: str | list = "stdlib"  # "stdlib", "stdlib-plain", prepared corpus, files, or blend "0.7:A,0.3:B" (docs/data.md)
    held_out: str | list = ""  # the same for evaluation; "" holds out a share of `text` (docs/data.md)
    bos: bool | str = "auto"  # documents begin with a BOS token: true, false, or auto (follows the tokenizer, as prompts do)
    chat: bool = False  # files hold conversations (`messages`), rendered by the tokenizer's chat template (docs/chat.md)
    loss_on: str = "everything"  # of conversations: "everything", or "assistant": their assistant turns alone
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

    model: str = "checkpoints/base"  # HF directory; with init=random only its config and tokenizer are read
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
