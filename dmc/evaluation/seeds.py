"""Several seeds: of the samples, and of a policy that draws."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dmc.engine import LLM
from dmc.engine.core import Engine


@contextmanager
def policy_seed(llm: LLM, more: int) -> Iterator[None]:
    """Raises the policy's setting ``seed`` for a while, on all ranks; other policies are left as they are.

    Args:
        llm: with an empty cache.
        more: added to the seed.
    """
    seed = getattr(llm.cache.policy, "seed", None)
    if not more or "seed" not in llm.cache.policy.settings() or not isinstance(seed, int):
        yield
        return
    llm.everywhere(_set_seed, seed + more)
    try:
        yield
    finally:
        llm.everywhere(_set_seed, seed)


def _set_seed(engine: Engine, seed: int, own: None) -> None:
    policy: Any = engine.cache.policy  # one that has a seed
    policy.seed = seed
