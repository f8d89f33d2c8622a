"""The rows of a frontier as Markdown: who leads at which size, in a table and in words that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from dmc.evaluation.paired import difference, settled
from dmc.evaluation.pareto import between, front, leader

SHARES = (1 / 2, 1 / 4, 1 / 8, 1 / 16)
LEARNT = ("dmc", "dms")
PRESETS = ("gear-4bit", "gear-2bit", "tcq-4bit", "tcq-3bit", "tcq-2bit")
_BETWEEN = (
    "KL at exactly that size, on straight lines (in logarithms) between the neighbours on each policy's own front: most budgets "
    "between two measured ones can be had."
)


def point(row: dict) -> tuple[float, float]:
    """(held bytes / dense bf16 bytes of the base model, KL) of a row that has a result."""
    return row["result"]["share"], row["result"]["kl"]


def family(row: dict, base_hash: str) -> str:
    """What a row competes as: its policy; another plain model than the base competes under its own name, whatever the policy."""
    name = row["result"]["policy"]
    plain = name not in LEARNT and row["result"]["model_hash"] != base_hash
    return row["model"] if plain else name


def frontier(rows: Sequence[dict]) -> list[dict]:
    """The rows with a result that no other beats in bytes and KL at once, by rising bytes."""
    done = measured(rows)
    return [done[index] for index in front([point(row) for row in done])]


def measured(rows: Sequence[dict]) -> list[dict]:
    """Rows with a result."""
    return [row for row in rows if "result" in row]


def ahead(row: dict, other: dict) -> tuple[float, float | None] | None:
    """How much less KL a row has than another, paired over their windows, and the standard error; None: other windows."""
    if row["result"]["windows_hash"] != other["result"]["windows_hash"]:
        return None
    return difference(other["result"]["kl_windows"], row["result"]["kl_windows"])


def report(rows: Sequence[dict], *, command: str, plot: str) -> str:
    """All of it.

    Args:
        rows: of `dmc.evaluation.frontier.run`, at least one with a result.
        command: that made them, or the last of them.
        plot: address of the figure, as the Markdown names it.

    Raises:
        ValueError: if no row has a result.
    """
    done = measured(rows)
    if not done:
        raise ValueError("no cell could be measured, so there is nothing to report; see results.jsonl for the reasons")
    first = done[0]["result"]
    parts = [
        f"# Quality for bytes: {first['base']} on {first['text']}",
        _setup(done),
        f"```bash\n{command}\n```",
        "## Who leads",
        leaders(done),
        _BETWEEN,
        sizes(done),
        words(done),
        f"![KL against bytes held]({plot})",
        "## The frontier",
        table(frontier(done)),
        "## All rows",
        table(sorted(done, key=point, reverse=True)),
    ]
    failed = [row for row in rows if "error" in row]
    if failed:
        parts += ["## Cells that failed", "\n".join(f"- {_name(row)}: {row['error']}" for row in failed)]
    return "\n\n".join(parts) + "\n"


def leaders(rows: Sequence[dict]) -> str:
    """A Markdown table: for each size and family, the lowest KL among its rows that hold no more."""
    base = rows[0]["result"]["base_hash"]
    families = list(dict.fromkeys(family(row, base) for row in rows))
    lines = ["| held, at most | " + " | ".join(families) + " |", "|---" * (1 + len(families)) + "|"]
    for share in SHARES:
        best = {name: _best(rows, share, base, name) for name in families}
        lead = _best(rows, share, base)
        cells = []
        for name in families:
            row = best[name]
            text = "–" if row is None else f"{_figure(row['result']['kl'])}: {_name(row)}"
            cells.append(f"**{text}**" if row is not None and row is lead else text)
        lines.append(f"| {Fraction(share)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def sizes(rows: Sequence[dict]) -> str:
    """A Markdown table: for each size and family, the KL that its front has there, interpolated."""
    found = _interpolated(rows)
    families = list(found[SHARES[0]])
    lines = ["| held | " + " | ".join(families) + " |", "|---" * (1 + len(families)) + "|"]
    for share, values in found.items():
        least = min((value for value in values.values() if value is not None), default=None)
        cells = ["–" if v is None else f"**{_figure(v)}**" if v == least else _figure(v) for v in values.values()]
        lines.append(f"| {Fraction(share)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _interpolated(rows: Sequence[dict]) -> dict[float, dict[str, float | None]]:
    """Size → family → KL."""
    base = rows[0]["result"]["base_hash"]
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        points.setdefault(family(row, base), []).append(point(row))
    return {share: {name: between(own, share) for name, own in points.items()} for share in SHARES}


def words(rows: Sequence[dict]) -> str:
    """What `leaders` shows, in sentences; each number in them is computed from the rows."""
    base = rows[0]["result"]["base_hash"]
    lines = []
    for share in SHARES:
        lead = _best(rows, share, base)
        if lead is None:
            lines.append(f"- At {Fraction(share)} of dense bf16: no row is that small.")
            continue
        own = family(lead, base)
        others = [row for row in rows if family(row, base) != own]
        other = leader(others, [point(row) for row in others], share)
        lines.append(
            f"- At {Fraction(share)} of dense bf16: {_name(lead)} leads with a KL of {_figure(lead['result']['kl'])}"
            + (f"; {_compared(lead, other)}." if other else "; no other family is that small.")
        )
    return "\n".join([*lines, *_retrofits(rows, base), *_presets(rows, base)])


def table(rows: Sequence[dict]) -> str:
    """A Markdown table, one line per row."""
    lines = [
        "| model | policy | codec | held / dense | dense / held | CR | KL | ± | n | perplexity | same token |",
        "|---" * 11 + "|",
    ]
    for row in rows:
        r = row["result"]
        error = "" if r["kl_stderr"] is None else _figure(r["kl_stderr"])
        lines.append(
            f"| {row['model']} | `{row['policy']}` | `{row['codec']}` | {r['share']:.4f} | {1 / r['share']:.2f} | "
            f"{r['cr']:.2f} | {_figure(r['kl'])} | {error} | {r['windows']} | {r['perplexity']:.4f} | "
            f"{100 * r['agreement']:.1f} % |"
        )
    return "\n".join(lines)


def _setup(rows: Sequence[dict]) -> str:
    r = rows[0]["result"]
    commits = sorted({row["result"]["commit"] for row in rows})
    versions = sorted({", ".join(f"{name} {version}" for name, version in row["result"]["versions"].items()) for row in rows})
    machines = sorted({row.get("hardware", "unknown hardware") for row in rows})  # older rows do not say
    return (
        f"{r['windows']} windows of the text (hash `{r['text_hash']}`), each a prompt of {r['prompt_tokens']} tokens and "
        f"{r['scored_tokens']} tokens fed one by one through the compressed cache. KL: of the uncompressed {r['base']} (hash "
        f"`{r['base_hash']}`, perplexity {r['base_perplexity']:.4f} on the same tokens) to the row, nats/token, mean over all "
        f"{r['windows'] * r['scored_tokens']} scored tokens; ±: its standard error over the n windows. Held: all bytes of the "
        "cache (encoded pages, whole pages of full-precision entries, accumulating entries, tables), mean "
        "over all scored tokens, over those of a dense "
        f"bf16 cache of the base model. CR: tokens / entries at the end. {' and '.join(machines)}; {r['dtype']} on "
        f"{r['device']}; commit {', '.join(commits)}; {' and '.join(versions)}; {sum(row['seconds'] for row in rows):.0f} s."
    )


def _best(rows: Sequence[dict], share: float, base: str, name: str | None = None) -> dict | None:
    able = [row for row in rows if name is None or family(row, base) == name]
    return leader(able, [point(row) for row in able], share)


def _compared(lead: dict, other: dict) -> str:
    """The lead over another row, with its error if both have the same windows."""
    by, error = ahead(lead, other) or (0.0, None)
    text = f"the best other is {_name(other)} with {_figure(other['result']['kl'])}"
    if lead["result"]["kl"] > 0:
        times = other["result"]["kl"] / lead["result"]["kl"]
        text += f", {times:.{0 if times >= 10 else 1}f} times as much"
    if error is not None:
        text += f" (difference {_figure(by)} ± {_figure(error)} over the {lead['result']['windows']} windows"
        text += ")" if settled(by, error) else ", so not settled)"
    return text


def _retrofits(rows: Sequence[dict], base: str) -> list[str]:
    """Where retrofitted models lead: among the rows that are there, and at exactly equal bytes."""
    lines, exact = [], _interpolated(rows)
    for name in (name for name in LEARNT if any(row["result"]["policy"] == name for row in rows)):
        leads = {share: _best(rows, share, base) for share in SHARES}
        won = [share for share, row in leads.items() if row and row["result"]["policy"] == name]
        equal = [
            share
            for share, values in exact.items()
            if values[name] is not None and values[name] <= min(value for value in values.values() if value is not None)
        ]
        lines.append(
            f"- **{name.upper()} x its best codec has the lowest KL of all rows {_where(won)}; interpolated to exactly "
            f"equal bytes, {_where(equal)}.**"
        )
    return lines


def _where(won: Sequence[float]) -> str:
    lost = [str(Fraction(share)) for share in SHARES if share not in won]
    if not won:
        return "at none of these sizes"
    return f"at {_listed([str(Fraction(share)) for share in won])}" + (f", not at {_listed(lost)}" if lost else "")


def _presets(rows: Sequence[dict], base: str) -> list[str]:
    """Whether the presets of GEAR and TCQ are on the frontier of the codecs alone: base model, every token kept."""
    alone = [row for row in rows if row["result"]["model_hash"] == base and row["result"]["policy"] == "full"]
    best = [alone[index] for index in front([point(row) for row in alone])]
    lines = []
    for name in dict.fromkeys(row["result"]["codec"] for row in alone):
        own = [row for row in alone if row["result"]["codec"] == name]
        if name not in PRESETS:
            continue
        there = [row for row in own if row in best]
        if there:
            lines.append(f"- Among codecs alone (policy full), {name} is on the frontier: {'; '.join(map(_name, there))}.")
            continue
        row = min(own, key=lambda each: each["result"]["kl"])
        better = next(each for each in best if point(each)[0] <= point(row)[0] and point(each)[1] <= point(row)[1])
        ours, theirs = (f"{share:.4f} of dense at a KL of {_figure(kl)}" for share, kl in (point(row), point(better)))
        lines.append(
            f"- Among codecs alone (policy full), {name} is not on the frontier: it holds {ours}, and {_name(better)} {theirs}."
        )
    return lines


def _name(row: dict) -> str:
    return f"{row['model']}, {row['policy']} x {row['codec']}"


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def _figure(value: float) -> str:
    return f"{value:.2g}" if abs(value) < 0.01 else f"{value:.4f}"
