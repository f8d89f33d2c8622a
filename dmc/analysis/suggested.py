"""The part of a report on settings for each layer: what they rest on, what they are, what they are worth."""

from __future__ import annotations

import json
from pathlib import Path

from dmc.analysis.figures import Curves, draw
from dmc.analysis.markup import figure, table

FILE = "layers.json"  # for the codecs


def divided(recommendation: dict, directory: Path) -> dict:
    """Writes the file for the codecs and a figure; returns what the report's template says of them."""
    (directory / FILE).write_text(json.dumps(recommendation["layers"], indent=1) + "\n", encoding="utf-8")
    layers, measured = recommendation["layers"]["layers"], recommendation["measured"]
    curves = [
        Curves(f"one layer encoded: {setting}", found["values"], found["kl"], setting, "KL, nats/token", log=True)
        for setting, found in measured.items()
    ]
    svg = draw(curves, "sensitivity", directory / "sensitivity.png")
    columns = ["layer", *measured]
    columns += [f"KL at {setting} {value:g}" for setting, found in measured.items() for value in found["values"]]
    rows = []
    for number, own in enumerate(layers):
        losses = [f"{kl:.2e}" for found in measured.values() for kl in found["kl"][number]]
        rows.append((f"layer {number}", [*(f"{own[setting]:g}" for setting in measured), *losses]))
    return {
        "codec": recommendation["codec"],
        "base": _settings(recommendation["base"]),
        "bits": recommendation["bits_per_element"],
        "verdict": verdict(recommendation),
        "file": FILE,
        "compared_columns": _COMPARED,
        "compared": _compared(recommendation),
        "figure": figure(
            svg, "KL with one layer encoded", table("Settings and KL of each layer", "Settings and KL", columns, rows)
        ),
    }


def verdict(recommendation: dict) -> str:
    """Whether the division is better than one setting for all where it was not chosen, in a sentence."""
    held_out = recommendation["held_out"]
    if held_out is None:
        return "No text was left over to check them on: give a longer one, or fewer windows."
    uniform, ours = held_out["uniform"], held_out["recommended"]
    better = sum(
        mine < theirs for mine, theirs in zip(held_out["recommended_by_window"], held_out["uniform_by_window"], strict=True)
    )
    how = "better than" if ours < uniform else "no better than"
    return (
        f"On {held_out['windows']} other windows they are {how} one setting for all at the same bytes: KL {ours:.5f} against "
        f"{uniform:.5f}, better in {better} of {held_out['windows']}."
    )


_COMPARED = ["windows", "scored tokens", "one setting", "divided", "divided / one"]


def _compared(recommendation: dict) -> list[tuple[str, list[object]]]:
    rows = []
    for name, found in (("those measured on", recommendation["chosen_on"]), ("others", recommendation["held_out"])):
        if found is not None:
            ratio = f"{found['recommended'] / found['uniform']:.2f}" if found["uniform"] else "–"
            rows.append((name, [found["tokens"], f"{found['uniform']:.5f}", f"{found['recommended']:.5f}", ratio]))
    return rows


def _settings(settings: dict) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in settings.items())
