"""Calls of a policy's methods: their results are checked, and an exception says whose it is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dmc.cache.policies import Entries, Policy, PromptEntries


def ask(policy: Policy, method: str, *arguments: object) -> object:
    """Calls a method; an exception keeps its type and traceback and gets a note with the policy's name."""
    try:
        return getattr(policy, method)(*arguments)
    except Exception as error:
        made = type(policy)
        error.add_note(f"raised by {method} of the policy {policy.name} ({made.__module__}.{made.__qualname__})")
        raise


def decisions(policy: Policy, alpha: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
    """`Policy.decide`.

    Raises:
        ValueError: if it does not return two tensors of the shape of alpha.
    """
    made = ask(policy, "decide", alpha, omega)
    if not isinstance(made, tuple) or len(made) != 2:
        raise ValueError(f"decide of the policy {policy.name} must return (alpha, omega), not {_described(made)}")
    return tuple(_checked(policy, "decide", part, alpha.shape, "fp32") for part in made)


def numbers(policy: Policy, method: str, *arguments: object, shape: Sequence[int]) -> Tensor:
    """Scores or weights of a shape.

    Raises:
        ValueError: if the method returns something else.
    """
    return _checked(policy, method, ask(policy, method, *arguments), shape, "fp32")


def seen(policy: Policy, positions: Tensor, queries: Tensor) -> Tensor | None:
    """`Policy.visible`.

    Raises:
        ValueError: if it returns something else than None or bool ``[..., T, N]``.
    """
    made = ask(policy, "visible", positions, queries)
    return None if made is None else _checked(policy, "visible", made, (*queries.shape, positions.shape[-1]), "bool")


def kept(policy: Policy, method: str, there: Entries) -> Tensor:
    """`Policy.keep` or `Policy.keep_prompt`, without slots that hold no entry.

    Raises:
        ValueError: if it returns something else than bool ``[R, N]``, or more entries of a row stay than `Policy.most_entries`
            allows.
    """
    if method == "keep_prompt" and type(policy).keep_prompt is Policy.keep_prompt:
        method = "keep"  # which it calls
    held = there.positions >= 0
    stay = _checked(policy, method, ask(policy, method, there), held.shape, "bool") & held
    if type(policy).most_entries is not Policy.most_entries and stay.numel():
        most = stay.sum(-1).view(-1, there.heads).amax(-1).tolist()
        for count, tokens in zip(most, there.next.view(-1, there.heads)[:, 0].tolist(), strict=True):
            if count + 1 > (allowed := ask(policy, "most_entries", tokens)):
                raise ValueError(
                    f"{method} of the policy {policy.name} keeps {count + 1} entries of a head after {tokens} tokens, the newest "
                    f"included, and its most_entries allows {allowed}: keep fewer, or allow more"
                )
    return stay


def rewritten(policy: Policy, prompt: PromptEntries, stay: Tensor) -> tuple[Tensor, Tensor] | None:
    """`Policy.rewrite`.

    Raises:
        ValueError: if it returns something else than None or keys and values of the prompt's shape.
    """
    made = ask(policy, "rewrite", prompt, stay)
    if made is None:
        return None
    if not isinstance(made, tuple) or len(made) != 2:
        raise ValueError(f"rewrite of the policy {policy.name} must return (keys, values) or None, not {_described(made)}")
    return tuple(_checked(policy, "rewrite", part, prompt.keys.shape, "fp32") for part in made)


def _checked(policy: Policy, method: str, made: object, shape: Sequence[int], kind: str) -> Tensor:
    if isinstance(made, Tensor) and made.shape == torch.Size(shape):
        if made.dtype == torch.bool if kind == "bool" else made.is_floating_point():
            return made
    meaning = ", True for what stays or is seen: not positions, not indices" if kind == "bool" else ""
    raise ValueError(
        f"{method} of the policy {policy.name} must return {kind} {list(shape)}{meaning}; it returned {_described(made)}"
    )


def _described(made: object) -> str:
    return f"{str(made.dtype)[6:]} {list(made.shape)}" if isinstance(made, Tensor) else type(made).__name__
