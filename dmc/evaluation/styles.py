"""One colour and one marker for each method, in every figure: they belong to a method's name, not to its place in a list."""

from __future__ import annotations

import zlib

STYLES = {  # method: colour, marker
    "every token, codes alone": ("#7f7f7f", "o"),
    "H2O": ("#1f77b4", "^"),
    "TOVA": ("#17becf", "D"),
    "StreamingLLM": ("#8c564b", "s"),
    "DMS": ("#2ca02c", "P"),
    "DMC, merging at once": ("#ff7f0e", "v"),
    "fitted decisions, nothing trained": ("#9467bd", "X"),
    "late eviction": ("#e377c2", "p"),
    "DMC, late merging": ("#d62728", "*"),
    "SnapKV": ("#0b5394", "h"),
    "PyramidKV": ("#6fa8dc", "H"),
    "AdaKV": ("#38761d", "<"),
    "Expected Attention": ("#bf9000", ">"),
    "merging on eviction": ("#a64d79", "d"),
    "KNorm": ("#999900", "8"),
    "random": ("#000000", "x"),
    "KVzap": ("#674ea7", "p"),
}
POLICIES = {
    "full": "every token, codes alone",
    "h2o": "H2O",
    "tova": "TOVA",
    "streaming": "StreamingLLM",
    "dms": "DMS",
    "gate": "fitted decisions, nothing trained",
    "snapkv": "SnapKV",
    "pyramidkv": "PyramidKV",
    "adakv": "AdaKV",
    "expected": "Expected Attention",
    "merged": "merging on eviction",
    "knorm": "KNorm",
    "random": "random",
    "kvzap": "KVzap",
}
_COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#da8bc3", "#8c8c8c", "#ccb974", "#64b5cd")
_MARKERS = "ov^<>sPXDd"


def method(row: dict) -> str | None:
    """The method of a row of `dmc frontier`: a name of `STYLES`, else that of its policy. None: a policy that needs no retrofit,
    on a model that was changed in another way."""
    policy, made = row["policy"].split(":")[0], row["result"]["settings"]["policy"]
    if policy == "dms" and made.get("sinks"):  # a model that decides late keeps its first token
        return "late eviction"
    if policy == "dmc":
        return "DMC, merging at once" if made.get("window") is None else "DMC, late merging"
    if policy not in ("dmc", "dms") and row["result"]["model"] != row["result"]["base"]:
        return None
    return POLICIES.get(policy, policy)


def style(name: str) -> tuple[str, str]:
    """(colour, marker) of a method; one that is not in `STYLES` has those that a checksum of its name picks."""
    if name in STYLES:
        return STYLES[name]
    number = zlib.crc32(name.encode())
    return _COLOURS[number % len(_COLOURS)], _MARKERS[number // len(_COLOURS) % len(_MARKERS)]
