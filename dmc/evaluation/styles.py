"""One colour and one marker for each method, in every figure: they belong to a method's name, not to its place in a list."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axis import Axis

STYLES = {  # method: colour, marker
    "every token, codes alone": ("#7f7f7f", "o"),
    "H2O": ("#1f77b4", "^"),
    "TOVA": ("#17becf", "D"),
    "StreamingLLM": ("#8c564b", "s"),
    "DMS": ("#2ca02c", "P"),
    "DMC, merging at once": ("#ff7f0e", "v"),
    "fitted decisions, nothing trained": ("#9467bd", "X"),
    "trained decision heads": ("#7700bb", "X"),
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
# of methods without a style: each is farther from every colour above, and from the others here, than 30 in CIE L*a*b*
_COLOURS = ("#0000ff", "#ff00ff", "#ff0077", "#00dd00", "#ff9977", "#00dd99", "#ff00bb", "#0077ff", "#bbbb77")
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
    if policy == "gate" and made.get("trained"):
        return "trained decision heads"
    return POLICIES.get(policy, policy)


def label_decades(axis: Axis) -> None:
    """Labels 1, 2 and 5 of each decade of a logarithmic axis, more of a part of a decade. Call it after everything is drawn: over
    more than three decades matplotlib's own labels stay."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    if high < 1000 * low:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def style(name: str) -> tuple[str, str]:
    """(colour, marker) of a method; one that is not in `STYLES` has those that a checksum of its name picks."""
    if name in STYLES:
        return STYLES[name]
    number = zlib.crc32(name.encode())
    return _COLOURS[number % len(_COLOURS)], _MARKERS[number // len(_COLOURS) % len(_MARKERS)]
