"""Turns the validator's errors into one sentence that names the field as the client wrote it."""

from __future__ import annotations

from collections.abc import Sequence

from dmc.server.schema import FORMS, NOT_SERVED

Path = tuple[str | int, ...]


def explain(errors: Sequence[dict], body: object) -> tuple[str, str | None]:
    """Explains why a request is rejected.

    Where a field has several types, the validator reports an error for each of them. The one that is explained belongs to
    the type that the value came closest to: the error deepest inside the value, and rather a wrong value than a wrong type.

    Args:
        errors: pydantic's, at least one; each "loc" begins with "body".
        body: the request, parsed.

    Returns:
        The sentence, and the name of the field for OpenAI's "param", such as ``messages[0].content``; None for the body.
    """
    located = [(_path(error, body), error) for error in errors]
    field = located[0][0][:1]
    ranked = [(len(path), not error["type"].endswith("_type"), path, error) for path, error in located if path[:1] == field]
    best = max(rank[:2] for rank in ranked)
    closest = [(path, error) for depth, wrong_value, path, error in ranked if (depth, wrong_value) == best]
    path, error = closest[0]
    for end, key in enumerate(path, 1):
        if key in NOT_SERVED:
            name = _name(path[:end])
            return f"{name} is not served here: leave it out", name
    if error["type"] == "extra_forbidden":
        name = _name(path)
        return f"unknown parameter {name!r}: it is rejected, not ignored", name
    if len(closest) > 1 and not best[1]:  # no type fits
        known = next((path[:end] for end in range(len(path), 0, -1) if path[end - 1] in FORMS), None)
        if known is not None:
            return f"{_name(known)}: must be {FORMS[str(known[-1])]}", _name(known)
    if error["type"].startswith("union_tag"):  # a message's role, or a part's type
        name, known = _name((*path, error["ctx"]["discriminator"].strip("'"))), error["ctx"].get("expected_tags")
        return f"{name}: must be one of {known}" if known else f"{name}: Field required", name
    name = _name(path)
    return f"{name or 'the body'}: {error['msg']}", name or None


def _path(error: dict, body: object) -> Path:
    """Keys and indices of the value that an error is about.

    The validator's "loc" also has labels of its own, such as ``list[str]`` or a message's role. They lead nowhere in the body.
    """
    path, value = [], body
    for part in error["loc"][1:]:
        if isinstance(value, dict) and part in value or (isinstance(value, list) and isinstance(part, int) and part < len(value)):
            path.append(part)
            value = value[part]
    if error["type"] == "missing" and path[-1:] != [error["loc"][-1]] and len(error["loc"]) > 1:  # or it is there as null
        path.append(error["loc"][-1])
    return tuple(path)


def _name(path: Path) -> str:
    """("messages", 0, "role") → ``messages[0].role``."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")
