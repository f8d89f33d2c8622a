"""Paired differences between caches that were measured on the same samples: reports of `dmc eval`, rows of `dmc frontier`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dmc.evaluation.paired import difference, mean, segment_mean, settled

_LONG = ("same_tokens", "equal", "agreement")
SCHEMA = 1  # of reports of suites


@dataclass(frozen=True)
class Series:
    """One measure on a list of samples.

    Attributes:
        name: such as "retrieval found".
        origin: what the samples follow from, by what it is called in errors. Equal origins mean equal samples.
        samples: (group, identity, value) of each sample. Groups are reported separately, and all together if there are several.
    """

    name: str
    origin: dict[str, object]
    samples: list[tuple[str, tuple, float]]


@dataclass(frozen=True)
class Entry:
    """One cache.

    Attributes:
        label: of it, unique among entries.
        model, model_hash: that it was measured with.
        series: of what was measured.
    """

    label: str
    model: str
    model_hash: str
    series: dict[str, Series]


@dataclass(frozen=True)
class Difference:
    """One cache minus the one that it is compared with, over n pairs of samples; ``stderr`` is None for one pair."""

    label: str
    measure: str
    group: str
    value: float
    other: float
    difference: float
    stderr: float | None
    n: int


def read_entries(paths: Sequence[str | Path]) -> list[Entry]:
    """Entries of files: a report of ``dmc eval --json``, a folder or results.jsonl of ``dmc frontier``, or lines of reports.

    Labels are the names of reports without .json, and "policy x codec" of rows; where labels are equal, the file or model is put
    before them.

    Raises:
        ValueError: if a file cannot be read, holds something else, or nothing with samples.
    """
    found: list[tuple[Path, dict, str]] = []
    for path in map(Path, paths):
        for row in _read(path):
            name = row.get("row") or f"{row['policy']} x {row['codec']}"
            found.append((path, row, path.stem if path.suffix == ".json" else name))
    labels = [label for _, _, label in found]
    for index, (path, row, label) in enumerate(found):
        if labels.count(label) > 1:
            found[index] = path, row, f"{path.with_suffix('')}" if path.suffix == ".json" else f"{row['model']}, {label}"
    labels = [label for _, _, label in found]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice} is there twice: name each file once")
    entries = [_entry(path, row, label) for path, row, label in found]
    empty = next((path for (path, _, _), entry in zip(found, entries, strict=True) if not entry.series), None)
    if empty is not None:
        raise ValueError(
            f"{empty} has no samples to compare: measure --text with a base, --needle, or --suite quick, retrieval or long"
        )
    return entries


def compare(entries: Sequence[Entry], to: str | None = None, *, across_models: bool = False) -> list[Difference]:
    """Differences of each entry to one of them, for every measure that this one has.

    Args:
        entries: at least two.
        to: label of the one; None: the first.
        across_models: whether models may differ. The samples must still be equal.

    Raises:
        ValueError: if there are fewer than two entries, no such label, or samples that are not the same.
    """
    if len(entries) < 2:
        raise ValueError("one cache alone has nothing to be compared with: give at least two reports or rows")
    labels = [entry.label for entry in entries]
    if to is not None and to not in labels:
        raise ValueError(f"no report or row is called {to!r}; there are: {', '.join(labels)}")
    first = entries[0 if to is None else labels.index(to)]
    differences = []
    for entry in entries:
        if entry is not first:
            if not across_models and entry.model_hash != first.model_hash:
                raise ValueError(
                    f"{entry.label} was measured with the model {entry.model} (hash {entry.model_hash}) and {first.label} with "
                    f"{first.model} ({first.model_hash}): --across-models compares them, if their samples are the same"
                )
            differences += _compared(entry, first)
    return differences


def as_text(differences: Sequence[Difference], to: str) -> str:
    """A table; a difference of more than two standard errors has a star."""
    rows = [("cache", "measure", "samples", "n", to, "this", "difference")]
    for one in differences:
        star = " *" if settled(one.difference, one.stderr) else ""
        by = f"{one.difference:+.4f}" + ("" if one.stderr is None else f" ± {one.stderr:.4f}") + star
        rows.append((one.label, one.measure, one.group, str(one.n), f"{one.other:.4f}", f"{one.value:.4f}", by))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, "±: standard error over pairs of equal samples; *: more than two of them"])


def as_rows(differences: Sequence[Difference]) -> list[dict]:
    """Ready for JSON."""
    return [asdict(one) for one in differences]


def _compared(entry: Entry, first: Entry) -> list[Difference]:
    missing = [name for name in first.series if name not in entry.series]
    if missing:
        raise ValueError(f"{first.label} has {missing[0]} and {entry.label} does not: measure the same with both")
    differences = []
    for name, wanted in first.series.items():
        found = entry.series[name]
        _check_same(entry.label, found, first.label, wanted)
        groups = dict.fromkeys(group for group, _, _ in wanted.samples)
        for group in [*groups, *(["all"] if len(groups) > 1 else [])]:
            values, others = ([value for own, _, value in one.samples if group in (own, "all")] for one in (found, wanted))
            by, error = difference(values, others)
            differences.append(Difference(entry.label, name, group, mean(values)[0], mean(others)[0], by, error, len(values)))
    return differences


def _check_same(label: str, found: Series, other: str, wanted: Series) -> None:
    start = f"the samples of {wanted.name} are not the same"
    for what, value in wanted.origin.items():
        own = found.origin.get(what)
        if own != value and None not in (own, value):  # older reports lack some
            raise ValueError(f"{start}: {what} is {own} in {label} and {value} in {other}")
    for (group, one, _), (wanted_group, two, _) in zip(found.samples, wanted.samples, strict=False):
        if group != wanted_group or not all(a == b or None in (a, b) for a, b in zip(one, two, strict=True)):
            raise ValueError(f"{start}: {label} has {group} {one}, {other} has {wanted_group} {two}")
    if len(found.samples) != len(wanted.samples):
        raise ValueError(f"{start}: {label} has {len(found.samples)}, {other} {len(wanted.samples)}")


def _read(path: Path) -> list[dict]:
    path = path / "results.jsonl" if path.is_dir() else path
    try:
        text = path.read_text(encoding="utf-8")
        rows = [json.loads(text)] if path.suffix == ".json" else [json.loads(line) for line in text.splitlines() if line.strip()]
        rows = [row for row in rows if "error" not in row]
        if not all({"model", "policy", "codec"} <= set(row) for row in rows):
            raise KeyError("model")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a report of dmc eval --json, nor results.jsonl of dmc frontier") from error
    if not rows:
        raise ValueError(f"{path} holds no row that was measured")
    return rows


def _entry(path: Path, row: dict, label: str) -> Entry:
    try:
        found = [one for one in _series(row) if one.samples]
        series = {one.name: one for one in found}
        if len(series) < len(found):  # texts of equal names, in different folders
            raise ValueError(f"{path} has two texts of one name: rename one, and measure again")
        return Entry(label, row["model"], row.get("result", row)["model_hash"], series)
    except (KeyError, TypeError, AttributeError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else f"has fields of other kinds ({error})"
        raise ValueError(f"{path} {what}: it is of another version or was changed; measure again") from error


def _series(row: dict) -> list[Series]:
    texts = [row["result"]] if "result" in row else row.get("text", [])
    series = [_text(measured) for measured in texts if measured["kl_windows"] is not None]
    for name, read in (("retrieval", _retrieval), ("needle", _needle), ("long", _long)):
        if name in row:
            if (schema := row[name].get("schema", SCHEMA)) > SCHEMA:
                raise TypeError(f"schema {schema} of {name}, this version reads up to {SCHEMA}")
            series += read(row[name])
    return series


def _text(measured: dict) -> Series:
    origin = {"the hash of the windows": measured["windows_hash"], "the uncompressed model's hash": measured["base_hash"]}
    samples = [("windows", (number,), kl) for number, kl in enumerate(measured["kl_windows"])]
    return Series(f"KL {measured['text']}", origin, samples)


def _retrieval(figures: dict) -> list[Series]:
    samples = [
        (f"{one['kind']} {one['length']}", (tuple(one["answers"]), one.get("sample")), one["found"]) for one in figures["samples"]
    ]
    return [Series("retrieval found", _origin(figures, "lengths", "kinds", "trials", "seed", "seeds"), samples)]


def _needle(figures: dict) -> list[Series]:
    return [
        Series(
            f"needle {name}",
            _origin(figures, "lengths", "depths", "kinds", "trials", "choices", "seed"),
            [
                (f"{one['kind']} {one['length']}", (one["depth"], one["needle_at"], one["answer"]), float(one[name]))
                for one in figures["trials"]
            ],
        )
        for name in ("exact", "choice", "margin")
    ]


def _long(figures: dict) -> list[Series]:
    origin = _origin(figures, "lengths", "trials", "new_tokens", "seed", "seeds") | {
        "the uncompressed model's hash": figures["base_hash"],
        "the hash of its texts": figures["samples_hash"],
    }

    def series(name: str, value: Callable[[dict], float]) -> Series:
        samples = [(f"prompt {one['length']}", (one.get("seed"), one["number"]), float(value(one))) for one in figures["samples"]]
        return Series(f"long {name}", origin, samples)

    return [
        series("kl", lambda one: segment_mean(one["kl"], figures["segments"])),
        *(series(name, lambda one, name=name: one[name]) for name in _LONG),
    ]


def _origin(figures: dict, *settings: str) -> dict[str, object]:
    given = figures["settings"]
    return {"the haystack's hash": figures["haystack_hash"]} | {f"setting {name}": given.get(name) for name in settings}
