"""How a request wants its tokens chosen, and when it ends."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class SamplingParams:
    """Settings of one request.

    Applied in this order: bias and penalties, temperature, top_k, top_p, min_p.

    Attributes:
        max_tokens: generated at most.
        temperature: divides the logits; 0 always takes the most likely token (greedy).
        top_p: keeps the most likely tokens until their probability reaches this; 1 keeps all.
        top_k: keeps this number of the most likely tokens, before top_p; 0 keeps all.
        min_p: keeps tokens at least this share as likely as the most likely one; 0 keeps all.
        repetition_penalty: divides positive logits of tokens of the prompt or the output by this, and multiplies
            negative ones; 1 changes nothing (CTRL, arXiv 1909.05858).
        presence_penalty: subtracted from the logits of tokens of the output, -2 to 2.
        frequency_penalty: the same, as often as they occur.
        logit_bias: token id → added to its logit, -100 to 100.
        n: completions of the prompt; each draws for itself.
        stop: a text or several: generation ends when one appears, and the output is cut before it.
        stop_token_ids: tokens that end generation as the model's own end tokens do, with `ignore_eos` too.
        seed: of this request's draws; the result does not depend on the batch. None: a random one.
        logprobs: None, or the number of most likely tokens reported with each generated one (0: only itself).
        ignore_eos: go on after the model's end token.

    Raises:
        ValueError: if a value is out of range; the sentence names it.
    """

    max_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    n: int = 1
    stop: str | tuple[str, ...] | list[str] = ()
    stop_token_ids: tuple[int, ...] | list[int] = ()
    seed: int | None = None
    logprobs: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        """Checks the ranges and brings the stops into one form."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        bias = self.logit_bias.items()
        for name, fine, allowed in (
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < math.inf, "a finite number of at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "at least 0 (0 keeps all tokens)"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "a finite number above 0"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "from -2 to 2"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "from -2 to 2"),
            (
                "logit_bias",
                all(isinstance(token, int) and token >= 0 and -100 <= value <= 100 for token, value in bias),
                "token ids with values from -100 to 100",
            ),
            ("n", 1 <= self.n <= 128, "from 1 to 128"),
            ("stop", all(isinstance(text, str) and text for text in stop), "texts that are not empty"),
            ("stop_token_ids", all(isinstance(token, int) and token >= 0 for token in self.stop_token_ids), "token ids"),
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "from 0 to 2**63 - 1"),
            ("logprobs", self.logprobs is None or self.logprobs >= 0, "at least 0"),
        ):
            if not fine:
                raise ValueError(f"{name} must be {allowed}, got {getattr(self, name)!r}")
