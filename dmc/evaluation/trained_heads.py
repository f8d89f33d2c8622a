"""Decision heads that were trained while the rest of the model was frozen, as a decisions file for the base model.

A retrofit with `dmc.method=dms dmc.decision=head dmc.train=decision` changes nothing but its heads, so they are all that a user
needs in addition to the base model: a few hundred KB, and any compression ratio, since a file's threshold is chosen at serving
(`dmc calibrate --decisions --heads EXPORT`). The score of a token is minus its logit: the heads keep what they would not evict.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from dmc import __version__
from dmc.evaluation.fit_decisions import quantiles
from dmc.evaluation.fit_levels import LEVELS, MEASURED, dropped_share, with_eviction
from dmc.evaluation.sequences import Sequences
from dmc.fitted import FittedDecisions, interpolate
from dmc.model import Decoder, read_config
from dmc.model.fingerprint import model_hash
from dmc.weights import Weights

_DECISION = ".self_attn.decision."
_BLOCK = 256  # queries whose attention is computed together


@torch.no_grad()
def trained_decisions(
    directory: str | Path,
    export: str | Path,
    text: Sequences,
    *,
    sinks: int = 4,
    out: Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    meta: dict | None = None,
) -> FittedDecisions:
    """Trained heads with the quantiles of their scores on a text.

    Args:
        directory: Hugging Face directory of the base model.
        export: of a retrofit of that model by DMS with a window and added heads; its other weights must be the base model's.
        text: sequences of tokens of its vocabulary, on which the scores are measured, with eviction on as in `fit_decisions`.
        sinks: first tokens of a document that are always kept.
        out: file to write.
        device, dtype: of the model.
        meta: added to the file's.

    Raises:
        ValueError: if the export is of another method or model, or its weights differ from the base model's beyond the heads; if
            the sequences are too short or too long, a forward pass gives NaN or infinity, or the file cannot be written.
    """
    config = read_config(directory)
    if config.decision is not None:
        raise ValueError(f"{directory} holds a retrofitted model, which has its own decisions: give the base model")
    arrival, late, bias, window = _heads(directory, export)
    length = text.tokens.shape[1]
    if length < window + 2 + sinks:
        raise ValueError(
            f"sequences of {length} tokens are too short: the newest {window} + 1 and the first {sinks} are always kept"
        )
    if length > config.positions:
        raise ValueError(f"sequences of {length} tokens are longer than the model's {config.positions} positions")
    model = Decoder.load(directory, dtype=dtype, device=device)
    about = {
        "text": text.name,
        "text_hash": text.text_hash,
        "tokens": text.tokens.numel(),
        "length": length,
        "target": "trained: minus the logit of eviction",
        "trained": True,
        "look_ahead": bool(late.any()),
        "version": __version__,
    }
    heads = FittedDecisions(arrival, late, bias, window, sinks, torch.zeros(2), model_hash(directory), about | (meta or {}))
    found: list[Tensor] = []
    measured = text.tokens[:: -(-len(text.tokens) // MEASURED)]
    with tqdm(total=len(text.tokens) + len(LEVELS) * len(measured), desc="decisions", unit="sequence") as bar:
        run = {"block": _BLOCK, "tick": bar.update}
        dropped_share(
            model, heads, text.tokens, -torch.inf, see=found.append, **run
        )  # nothing is dropped: scores of the full model
        heads = replace(heads, quantiles=quantiles(torch.cat(found)))
        dropped = [dropped_share(model, heads, measured, interpolate(level, heads.quantiles), **run) for level in LEVELS]
    pairs = [[level, round(share, 4)] for level, share in zip(LEVELS, dropped, strict=True)]
    heads = replace(heads, quantiles=with_eviction(heads.quantiles, dropped), meta=heads.meta | {"dropped_with_eviction": pairs})
    if out is not None:
        heads.save(out)
    return heads


def _heads(directory: str | Path, export: str | Path) -> tuple[Tensor, Tensor, Tensor, int]:
    """Arrival and late weights ``[L, H, hidden]``, bias ``[L, H]`` and the window of an export of the base model."""
    config = read_config(export)
    if config.method != "dms" or config.decision != "head":
        raise ValueError(
            f"{export}: decision heads for the base model come from a retrofit with dmc.method=dms, dmc.decision=head and "
            f"dmc.train=decision; this is an export of method {config.method}, decision {config.decision}"
        )
    base, trained = Weights(directory), Weights(export)
    names = {name for name in trained if _DECISION not in name}
    for name in sorted(names | set(base)):
        same = name in trained and name in base and trained.meta(name).shape == base.meta(name).shape
        if not same or not torch.equal(base(name).to((own := trained(name)).dtype), own):
            raise ValueError(
                f"{export}: {name} is not {directory}'s; only a retrofit with dmc.train=decision of this model leaves its weights"
            )
    parts = []
    for layer in range(config.num_hidden_layers):
        own = f"model.layers.{layer}{_DECISION}"
        weight = trained(f"{own}weight").float()
        shift = trained(f"{own}bias").float() if f"{own}bias" in trained else weight.new_zeros(len(weight))
        parts.append((weight.unflatten(0, (config.logits_per_head, -1)), shift.unflatten(0, (config.logits_per_head, -1))))
    weights, shifts = (torch.stack(found) for found in zip(*parts, strict=True))  # [L, logits, H, hidden] and [L, logits, H]
    late = weights[:, -1] if config.looks_ahead else torch.zeros_like(weights[:, 0])
    constant = shifts[:, 0] + shifts[:, -1] if config.looks_ahead else shifts[:, 0]
    return -weights[:, 0].contiguous(), -late.contiguous(), config.offset - constant, config.window
