"""What the layers of a rank share during a step: the mode they run in, and what they decided."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dmc.training.rules import Rule


@dataclass
class Settings:
    """The part of a retrofit's configuration that the layers need; constant over a run."""

    decision: str = "head"  # "neuron", "head", or the name of `rule`
    gain: float = 1.0
    offset: float = 5.0
    temperature: float = 0.1
    seed: int = 0
    method: str = "dmc"  # "dmc" or "dms"
    window: int | None = None  # newest tokens kept as they are; None: "dmc" merges at once
    looks_ahead: bool = False  # decisions read the hidden state `window` tokens later as well
    rule: Rule | None = None  # decides in place of the model

    @property
    def logits_per_head(self) -> int:
        """Rows of the decision head for each key/value head: alpha at arrival; omega ("dmc"); alpha's late part."""
        return 1 + (self.method == "dmc") + self.looks_ahead


@dataclass
class LayerState:
    """Set by the trainer before each step, read by every attention layer of the model it belongs to.

    ``mode``: ``plain`` (no compression), ``repurpose`` (q[0], k[0] scaled by ``neuron_scale``), ``soft``
    (relaxed decisions with noise, for training) or ``hard`` (the decisions of inference).
    """

    settings: Settings = field(default_factory=Settings)
    mode: str = "plain"
    step: int = 0
    target_cr: float = 1.0  # in force; what a rule's decisions follow from
    neuron_scale: float = 1.0
    adapted: bool = True  # whether low-rank updates are added (`dmc.training.lora`); False: the original model
    # d(loss)/d(alpha) of the compression loss, constant in eq. 10 while the hinge is open: added in backward.
    alpha_gradient: float = 0.0
    decisions: DecisionCounts | None = None


class DecisionCounts:
    """Entries kept per layer and key/value head, summed over the sequences of a step.

    Holds ``[2, L, H]`` fp64, where the decisions are: soft sums of ``1 - alpha`` and counts of hard appends. Each rank fills
    its own layers, heads and sequences; `total` adds all ranks up with one all-reduce. Until then nothing waits for the device.
    """

    def __init__(self, layers: int, heads: int) -> None:
        self.sums = torch.zeros(2, layers, heads, dtype=torch.float64)

    def add(self, layer: int, first_head: int, soft_keep: Tensor, hard_keep: Tensor) -> None:
        """Add ``[H_local]`` sums of one layer; the first of them belongs to global head ``first_head``."""
        if self.sums.device != soft_keep.device:
            self.sums = self.sums.to(soft_keep.device)
        self.sums[:, layer, first_head : first_head + len(soft_keep)] += torch.stack([soft_keep, hard_keep]).detach().double()

    def total(self) -> Tensor:
        """``[2, L, H]`` sums over every rank; empties the counts."""
        device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
        sums = self.sums.to(device, copy=True)
        torch.distributed.all_reduce(sums)
        self.sums.zero_()
        return sums.cpu()


class AttachGradient(torch.autograd.Function):
    """`AddGradient` where alpha itself goes no further: it hangs on ``x``, which passes unchanged."""

    @staticmethod
    def forward(ctx, x: Tensor, alpha: Tensor, constant: float) -> Tensor:  # noqa: D102
        ctx.constant, ctx.shape = constant, alpha.shape
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # noqa: D102
        return grad, torch.full(ctx.shape, ctx.constant, device=grad.device), None


class AddGradient(torch.autograd.Function):
    """Identity whose backward adds a constant: how the compression loss reaches alpha without passing
    through the pipeline's own loss. Exact, since eq. 10 is linear in alpha while its hinge is open."""

    @staticmethod
    def forward(ctx, alpha: Tensor, constant: float) -> Tensor:  # noqa: D102
        ctx.constant = constant
        return alpha.view_as(alpha)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # noqa: D102
        return grad + ctx.constant, None
