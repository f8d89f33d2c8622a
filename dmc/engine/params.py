"""How a request wants its tokens chosen, and when it ends."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SamplingParams:
    """Settings of one request.

    Attributes:
        max_tokens: generated at most.
        temperature: divides the logits; 0 takes the likeliest token always (greedy).
        top_p: keeps the likeliest tokens until their probability reaches this; 1 keeps all.
        top_k: keeps so many of the likeliest tokens, before top_p; 0 keeps all.
        stop: a text or several: generation ends when one appears, and the output is cut before it.
        seed: of this request's draws, whatever it is batched with; None draws one.
        logprobs: None, or how many of the likeliest tokens are reported with each generated one (0: only itself).
        ignore_eos: go on after the model's end token.

    Raises:
        ValueError: if a value is out of range; the sentence names it.
    """

    max_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: str | tuple[str, ...] | list[str] = ()
    seed: int | None = None
    logprobs: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        """Checks the ranges and brings `stop` into one form."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        for name, fine, allowed in (
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "a finite number of at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "at least 0 (0 keeps all tokens)"),
            ("stop", all(isinstance(text, str) and text for text in stop), "texts that are not empty"),
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "from 0 to 2**63 - 1"),
            ("logprobs", self.logprobs is None or self.logprobs >= 0, "at least 0"),
        ):
            if not fine:
                raise ValueError(f"{name} must be {allowed}, got {getattr(self, name)!r}")
