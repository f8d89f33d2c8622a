"""What a compressed cache holds of some texts: the figures of `dmc inspect`."""

from __future__ import annotations

import json

from dmc.engine.llm import LLM, total_stats
from dmc.engine.params import SamplingParams
from dmc.engine.stats import HELD


def report(llm: LLM, prompts: list[str] | list[list[int]], *, max_tokens: int = 1) -> dict:
    """Feeds texts and measures the cache when each is done.

    Args:
        llm: with an empty cache.
        prompts: texts, or lists of token ids.
        max_tokens: generated greedily after each.

    Returns:
        Tokens, bytes and ratios of all texts together: ``cr`` counts tokens / entries, ``byte_ratio`` bytes of dense
        bf16 / bytes held, ``pages`` those of the pool that the texts held when they were done, shared ones for each,
        ``page_size`` entries of an encoded page, a list where layers differ.

    Raises:
        ValueError: if a text cannot be fed; see `LLM.generate`. Or if the pool is too small for it.
    """
    outputs = llm.generate(prompts, SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True))
    if any(output.finish_reason == "memory" for output in outputs):
        raise ValueError("kv_memory is too small for these texts; give it more")
    stats, cache = total_stats(outputs, 0.0), llm.cache
    return {
        "policy": cache.policy.name,
        "codec": cache.codec_name,
        "page_size": cache.page_size,
        "page_bytes": cache.page_bytes,
        "sink_tokens": cache.sink_tokens,
        "window": cache.window,
        "tokens": stats.cached_tokens,
        "entries": int(stats.entries.sum()),
        "cr": stats.cr,
        "pages": (stats.held["pages"] + stats.held["exact"]) // cache.page_bytes,
        "held": stats.held,
        "held_bytes": stats.held_bytes,
        "shared_bytes": stats.shared_bytes,
        "dense_bytes": stats.dense_bytes,
        "byte_ratio": stats.ratio,
        "codec_error": dict(zip(("keys", "values"), stats.codec_error, strict=True)),
        "cr_per_layer": stats.cr_per_layer,
        "cr_per_head": stats.cr_per_head,
    }


def as_json(figures: dict) -> str:
    """A `report` as JSON."""
    return json.dumps(figures, indent=1)


def as_text(figures: dict) -> str:
    """A `report` as text with a table of layers and heads."""
    sizes = figures["page_size"]
    sizes = f"{min(sizes)} to {max(sizes)}" if isinstance(sizes, list) else sizes
    held = ", ".join(f"{HELD[kind]} {size:,}" for kind, size in figures["held"].items())
    error = figures["codec_error"]
    lines = [
        f"{figures['policy']} x {figures['codec']}: pages of {sizes} entries, "
        f"{figures['sink_tokens']} sinks, window {figures['window']}",
        f"{figures['tokens']:,} tokens in {figures['entries']:,} entries of all layers and heads: CR {figures['cr']:.2f}",
        f"pool: {figures['pages']:,} pages of {figures['page_bytes']:,} bytes",
        f"held {figures['held_bytes']:,} bytes ({held}); dense bf16 {figures['dense_bytes']:,} bytes: "
        f"{figures['byte_ratio']:.2f} x",
        f"codec error (relative, sampled): keys {error['keys']:.4f}, values {error['values']:.4f}",
        "",
        "CR per layer and key/value head (tokens / entries)",
        "layer    all " + "".join(f"{f'head {head}':>9}" for head in range(len(figures["cr_per_head"][0]))),
    ]
    for layer, (mean, heads) in enumerate(zip(figures["cr_per_layer"], figures["cr_per_head"], strict=True)):
        lines.append(f"{layer:5} {mean:6.2f} " + "".join(f"{ratio:9.2f}" for ratio in heads))
    return "\n".join(lines)
