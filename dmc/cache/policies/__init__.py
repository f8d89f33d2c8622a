"""Which entries exist. `policy` makes one by name; a new policy is a file here and a line in `POLICIES`."""

from __future__ import annotations

from dmc.cache.policies.base import Policy
from dmc.cache.policies.dmc import DmcPolicy
from dmc.cache.policies.full import FullPolicy

POLICIES: dict[str, type[Policy]] = {policy.name: policy for policy in (FullPolicy, DmcPolicy)}

__all__ = ["POLICIES", "Policy", "policy"]


def policy(name: str) -> Policy:
    """A policy by its name.

    Raises:
        ValueError: if the name is unknown; the known ones are listed.
    """
    if name not in POLICIES:
        raise ValueError(f"unknown policy {name!r}; known: {', '.join(POLICIES)}")
    return POLICIES[name]()
