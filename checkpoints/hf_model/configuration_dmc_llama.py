"""Configuration of a Llama whose key/value cache compresses itself (Dynamic Memory Compression)."""

import math

from transformers import LlamaConfig

DECISIONS = ("neuron", "head")


class DmcLlamaConfig(LlamaConfig):
    """Llama's configuration and, under `dmc`, what the merge decisions need.

    Args:
        dmc: a dict with
            `decision`: "neuron" reads the decision from neuron 0 of the keys and the importance from neuron 0
                of the queries, both before RoPE; "head" reads both from a small linear layer beside k_proj;
            `offset`: a token merges where its decision logit exceeds it (default 5.0);
            `target_cr`, `measured_cr`: compression ratios (tokens per cache entry) aimed at and reached when
                the model was trained; information only.
        kwargs: everything that `LlamaConfig` takes.

    Raises:
        ValueError: if `decision` is unknown or `offset` is no finite number.
    """

    model_type = "dmc_llama"

    def __init__(self, dmc: dict | None = None, **kwargs) -> None:
        """See the class."""
        self.dmc = {"decision": "neuron", "offset": 5.0, **(dmc or {})}
        decision, offset = self.dmc["decision"], self.dmc["offset"]
        if decision not in DECISIONS:
            raise ValueError(f"dmc.decision must be one of {', '.join(DECISIONS)}, got {decision!r}")
        if isinstance(offset, bool) or not isinstance(offset, int | float) or not math.isfinite(offset):
            raise ValueError(f"dmc.offset must be a finite number, got {offset!r}")
        super().__init__(**kwargs)
