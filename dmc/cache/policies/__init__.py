"""Policies: which entries exist. `policy` makes one by name; a new policy is a file here and a line in `POLICIES`."""

from __future__ import annotations

from dmc.cache.policies.adakv import AdaKVPolicy
from dmc.cache.policies.base import Policy
from dmc.cache.policies.dmc import DmcPolicy
from dmc.cache.policies.dms import DmsPolicy
from dmc.cache.policies.entries import Entries, PromptEntries
from dmc.cache.policies.expected import ExpectedAttentionPolicy
from dmc.cache.policies.full import FullPolicy
from dmc.cache.policies.gate import GatePolicy
from dmc.cache.policies.h2o import H2OPolicy
from dmc.cache.policies.kvzap import KVzapPolicy
from dmc.cache.policies.merged import MergedPolicy
from dmc.cache.policies.prompted import PromptPolicy
from dmc.cache.policies.pyramidkv import PyramidKVPolicy
from dmc.cache.policies.scored import KNormPolicy, RandomPolicy
from dmc.cache.policies.snapkv import SnapKVPolicy
from dmc.cache.policies.streaming import StreamingPolicy
from dmc.cache.policies.tova import TovaPolicy
from dmc.plugins import find

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy
    for policy in (
        FullPolicy,
        DmcPolicy,
        StreamingPolicy,
        H2OPolicy,
        TovaPolicy,
        DmsPolicy,
        GatePolicy,
        SnapKVPolicy,
        PyramidKVPolicy,
        AdaKVPolicy,
        ExpectedAttentionPolicy,
        KNormPolicy,
        RandomPolicy,
        KVzapPolicy,
        MergedPolicy,
    )
}

__all__ = ["POLICIES", "Entries", "Policy", "PromptEntries", "PromptPolicy", "policy", "policy_class"]


def policy_class(name: str) -> type[Policy]:
    """The class of a policy by its name, that of an installed package, or ``module:Class``; see `dmc.plugins.find`.

    Raises:
        ValueError: if there is none.
    """
    return find("policy", name, POLICIES, Policy)


def policy(name: str, **settings: object) -> Policy:
    """A policy by its name, for example ``policy("streaming", recent=508)``.

    Raises:
        ValueError: if the name or a setting is unknown (the known ones are listed) or a value is not allowed.
    """
    kind = policy_class(name)
    known = kind.settings()
    unknown = [setting for setting in settings if setting not in known]
    if unknown:
        raise ValueError(f"the {name} policy has no setting {', '.join(unknown)}; it has: {', '.join(known) or 'none at all'}")
    return kind(**settings)
