"""Configuration of a Llama, or of a model built like one, whose key/value cache compresses itself (DMC or DMS)."""

import math

from transformers import LlamaConfig

METHODS = ("dmc", "dms")
DECISIONS = ("neuron", "head")


class DmcFields:
    """What a configuration says in addition to its family's own fields: under `dmc`, what decisions need.

    Args:
        dmc: a dict with
            `method`: "dmc": tokens that the model chooses are merged into the newest entry; "dms": they are evicted
                after a while (default "dmc");
            `window`: of "dms": how many tokens later, at least 1; of "dmc": how many of the newest tokens before a query
                stay as they are before they are merged, at least 0 (None: tokens are merged at once);
            `decide`: "arrival", or "late": decisions also read the hidden state `window` tokens later (default "arrival");
            `decision`: "neuron" reads the decision from neuron 0 of the keys and the importance from neuron 0
                of the queries, both before RoPE (of "dms": from neuron 0 of the first query head of each group), after the
                norms of queries and keys where the family has them; "head" reads them from a small linear layer next to k_proj;
            `offset`: a token is merged or marked where its decision logit exceeds it (default 5.0);
            `target_cr`, `measured_cr`: compression ratios (tokens per cache entry) aimed at and reached when
                the model was trained; information only.
        kwargs: everything that the family's configuration takes.

    Raises:
        ValueError: if `method` or `decision` is unknown, `offset` is not a finite number or `window` none that counts.
    """

    qk_norm = False  # whether queries and keys are normed before they are rotated

    def __init__(self, dmc: dict | None = None, **kwargs) -> None:
        """See the class."""
        self.dmc = {"method": "dmc", "decision": "neuron", "offset": 5.0, **(dmc or {})}
        method, decision, offset = self.dmc["method"], self.dmc["decision"], self.dmc["offset"]
        if method not in METHODS:
            raise ValueError(f"dmc.method must be one of {', '.join(METHODS)}, got {method!r}")
        window, decide = self.dmc.get("window"), self.dmc.get("decide", "arrival")
        least = int(method == "dms")
        if (window is not None or least) and (isinstance(window, bool) or not isinstance(window, int) or window < least):
            raise ValueError(f"dmc.window must be a whole number of at least {least} with dmc.method {method}, got {window!r}")
        if decide not in ("arrival", "late") or (decide == "late" and not (window and decision == "head")):
            raise ValueError(
                f"dmc.decide must be arrival, or late with dmc.decision head and a dmc.window of at least 1, got {decide!r}"
            )
        if decision not in DECISIONS:
            raise ValueError(f"dmc.decision must be one of {', '.join(DECISIONS)}, got {decision!r}")
        if isinstance(offset, bool) or not isinstance(offset, int | float) or not math.isfinite(offset):
            raise ValueError(f"dmc.offset must be a finite number, got {offset!r}")
        super().__init__(**kwargs)

    @property
    def qkv_bias(self) -> bool:
        """Whether the projections of queries, keys and values have biases."""
        return self.attention_bias

    @property
    def output_bias(self) -> bool:
        """Whether the output projection of attention has a bias."""
        return self.attention_bias


class DmcLlamaConfig(DmcFields, LlamaConfig):
    """Llama's configuration and, under `dmc`, what its decisions need: see `DmcFields`."""

    model_type = "dmc_llama"

    def __init__(self, dmc: dict | None = None, **kwargs) -> None:
        """See the class."""
        super().__init__(dmc, **kwargs)
