"""Late eviction, or late merging, by fitted decisions (`dmc.fitted`): for models that were never retrofitted."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from dmc.cache.policies import budget
from dmc.cache.policies.base import Policy
from dmc.fitted import FittedDecisions

_LENGTH = 1024  # tokens that a target CR refers to, if neither the user nor the file gives a length
_LARGEST = 30.0  # of the logarithm of a weight, so that sums of weights stay finite and above 0 in fp32
_FLAGS = {True: True, False: False, "true": True, "false": False}


class GatePolicy(Policy):
    """A token whose score is below a threshold is dropped, or merged, when it leaves the window.

    The newest `window` tokens stay in a ring (`dmc.cache.reading.late`). The model computes the scores with the heads of
    `fitted` (`dmc.model.fitted_heads`). Window and sinks are those of the heads.

    With ``merge`` a token is weighted with exp(power · (score - threshold)), from its complete score, the look-ahead
    included. The threshold changes no mean, since it is the same for all tokens; it keeps the weights near 1. At the largest
    possible CR there is no threshold, and all weights are equal. The first token after the sinks starts a new entry, so
    that nothing merges into a sink.

    Args:
        decisions: file of `dmc calibrate --decisions`, or its content.
        target_cr: tokens / entries that a text of ``length`` tokens reaches, the window included, if it resembles the text that
            the heads were fitted on. Longer texts reach a higher CR, shorter ones a lower CR.
        length: tokens of that text. None: of the sequences that the heads were fitted on, or 1024 if the file gives none.
        merge: True merges into the previous entry, False evicts. "true" and "false" are accepted as well.
        power: exponent of the weights, only with ``merge``. None: 1.
        max_entries: largest number of entries of each head behind the window, more than the sinks. Once there are so many,
            every token that leaves the window is merged, or dropped without ``merge``. None sets no bound.

    Raises:
        ValueError: if ``decisions`` or ``target_cr`` is missing, the file cannot be used, the target CR is impossible at this
            length, or a setting is out of range.
    """

    name = "gate"
    by_head = True

    def __init__(
        self,
        *,
        decisions: str | Path | FittedDecisions | None = None,
        target_cr: float | None = None,
        length: int | None = None,
        merge: bool | str = False,
        power: float | None = None,
        max_entries: int | None = None,
    ) -> None:
        if decisions is None:
            raise ValueError("policy gate needs decisions: give a file that `dmc calibrate MODEL --decisions` has made")
        if target_cr is None:
            raise ValueError("policy gate needs target_cr, a ratio of tokens to entries: give one, such as 3")
        if isinstance(merge, str):
            merge = merge.lower()
        if merge not in _FLAGS or isinstance(merge, int | float) and not isinstance(merge, bool):
            raise ValueError(f"gate policy: merge={merge} must be true or false")
        if power is not None and not _FLAGS[merge]:
            raise ValueError(f"gate policy: power={power} weights merged tokens: give merge=true with it, or leave it out")
        if power is not None and not (_number(power) and 0 <= power < math.inf):
            raise ValueError(f"gate policy: power={power} must be a finite number of at least 0")
        if not _number(target_cr):
            raise ValueError(f"gate policy: target_cr={target_cr} must be a number")
        self.fitted = decisions if isinstance(decisions, FittedDecisions) else FittedDecisions.load(str(decisions))
        own = self.fitted.meta.get("length")
        length = (own if isinstance(own, int) else _LENGTH) if length is None else length
        if isinstance(length, bool) or not isinstance(length, int):
            raise ValueError(f"gate policy: length={length} must be a whole number of tokens")
        self.threshold = self.fitted.threshold(target_cr, length)
        self.decisions = None if isinstance(decisions, FittedDecisions) else str(decisions)
        self.target_cr, self.length, self.merge, self.power = target_cr, length, _FLAGS[merge], power
        self.ring, self.sinks, self.likely_cr = self.fitted.window, self.fitted.sinks, float(target_cr)
        self.merges = self.merge
        self.trained = self.fitted.meta.get("trained") is True  # for reports: these heads are not fitted alone
        self.max_entries = budget.check_entries(self.name, max_entries, self.sinks)

    def decide(self, alpha: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
        """See `Policy.decide`: threshold - score, which `dmc.cache.reading.late` reads when a token leaves the ring."""
        return alpha, omega

    def weigh(self, logits: Tensor, omega: Tensor) -> Tensor:
        """See `Policy.weigh`: the logit is threshold - score."""
        power = 1.0 if self.power is None else self.power
        return torch.exp((-power * logits.clamp(-1e6, 1e6)).clamp(-_LARGEST, _LARGEST))


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
