"""`Policy`: the interface that decides which entries exist."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from dmc.cache.policies.entries import Entries, PromptEntries


class Policy(ABC):
    """Decides, from what the model proposes, which entries each key/value head holds.

    Merging policies override `decide` alone. An evicting policy sets `evicts` and selects in `keep` the entries that stay;
    the cache calls it at the end of a prompt and after every generated token, drops the others and frees their pages.
    A policy that also looks at keys, values or queries of a prompt overrides `keep_prompt`, which is called at its end
    instead of `keep`. With `prompt_only` nothing is evicted after that. A policy declares what needs memory or time
    (`statistics`, `last_queries`, `query_moments`, `arrival`, `arrival_hidden`); nothing else is computed.

    Attributes:
        name: under which `dmc.cache.policy` finds it.
        merges: whether `decide` can give an alpha other than 0 or an omega other than 1. If it cannot, the
            cache knows before a step that every accumulating entry becomes final in it.
        evicts: whether entries can be dropped before their sequence ends. Their positions are then stored, 4 bytes per entry.
        statistics: attention statistics of each entry, 4 bytes per entry: None; "sum", the sum of the softmax weights that
            the entry got from all queries so far, over a head's group; "last", from the newest query alone.
        prompt_only: whether entries are evicted only at the end of a prompt, by `keep_prompt`; all generated tokens stay.
        last_queries: largest number of a prompt's last queries that `PromptEntries` holds.
        query_moments: whether `PromptEntries` holds mean and covariance of the prompt's queries.
        ring: number of newest tokens of a row that stay as they are. A token that leaves them is merged, or dropped by a policy
            that does not merge, if the model's logit is above 0 (`dmc.cache.reading.late`). None: tokens are merged at once.
        max_entries: with a ring, largest number of entries of a row behind it. Once there are so many, each token that leaves the
            ring is merged, or dropped by a policy that does not merge, whatever the model decides. None: no bound.
        sinks: with a ring, first tokens of a sequence that are never dropped or merged; if tokens merge, the token after
            them also starts a new entry.
        likely_cr: tokens / entries to expect of a sequence until it is measured; None: what the checkpoint reports.
        made_for: `dmc.model.fingerprint.model_hash` of the only model that the policy was made for; None: any model.
        by_head: whether decisions about a head's entries depend on that head alone, so that heads can be on different ranks
            (tensor parallelism).
        across_heads: why not, if ``by_head`` is False: the predicate of a sentence about the policy.
    """

    name: ClassVar[str]
    merges: ClassVar[bool] = True
    evicts: ClassVar[bool] = False
    statistics: ClassVar[str | None] = None
    prompt_only: ClassVar[bool] = False
    last_queries: int = 0
    query_moments: bool = False
    ring: int | None = None
    max_entries: int | None = None
    sinks: int = 0
    likely_cr: float | None = None
    made_for: str | None = None
    by_head: ClassVar[bool] = False
    across_heads: ClassVar[str] = "decides over all heads of a layer together"

    def __init_subclass__(cls, **kwargs: object) -> None:
        """Rejects a policy that sets `evicts` without `keep` when the class is defined, not at the first step."""
        super().__init_subclass__(**kwargs)
        if cls.evicts and cls.prompt_only:
            if cls.keep_prompt is Policy.keep_prompt:
                raise TypeError(f"policy {cls.__name__} sets prompt_only and does not define keep_prompt")
            if cls.visible is not Policy.visible:
                raise TypeError(f"policy {cls.__name__} sets prompt_only and defines visible: its prompts are seen as a whole")
        elif cls.evicts and cls.keep is Policy.keep:
            raise TypeError(f"policy {cls.__name__} sets evicts and does not define keep")
        arrivals = [name for name in ("arrival", "arrival_hidden") if getattr(cls, name) is not getattr(Policy, name)]
        if arrivals and (cls.merges or cls.statistics is not None):
            raise TypeError(f"policy {cls.__name__} defines {arrivals[0]}, so it must set merges to False and statistics to None")
        if len(arrivals) > 1:
            raise TypeError(f"policy {cls.__name__} defines arrival and arrival_hidden: an entry has one score, so define one")

    @classmethod
    def settings(cls) -> list[str]:
        """Names of the settings that the policy is made with."""
        own = cls.__init__ is not object.__init__
        return [name for name in inspect.signature(cls.__init__).parameters if name != "self"] if own else []

    @property
    def scored(self) -> bool:
        """True if entries carry a score."""
        return self.statistics is not None or type(self).arrival is not Policy.arrival or self.reads_hidden

    @property
    def reads_hidden(self) -> bool:
        """True if the model hands hidden states to the cache for this policy: it defines `arrival_hidden`."""
        return type(self).arrival_hidden is not Policy.arrival_hidden

    @property
    def evicts_later(self) -> bool:
        """True if entries can be dropped while tokens are generated. Their positions are then stored."""
        return self.evicts and not self.prompt_only

    @abstractmethod
    def decide(self, alpha: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
        """The merging decisions of this policy.

        Args:
            alpha: fp32 of any shape, 1 where the model would merge the token into the accumulating entry, else 0. For a model
                that decides when tokens leave a window: its logit, which a policy with a `ring` returns unchanged.
            omega: the same shape, weight of the token in its entry.

        Returns:
            (alpha, omega) of the same shapes; alpha exactly 0 or 1, omega positive.
        """

    def weigh(self, logits: Tensor, omega: Tensor) -> Tensor:
        """Weights of tokens that leave the ring and merge, of any shape.

        Args:
            logits: complete ones, the look-ahead included.
            omega: weights at arrival, the same shape.

        Returns:
            The same shape, positive.
        """
        return omega

    def visible(self, positions: Tensor, queries: Tensor) -> Tensor | None:
        """The earlier entries that the queries of a prompt see, by position alone.

        Args:
            positions: int32 ``[..., N]`` as in `Entries`.
            queries: int64 ``[..., T]``, positions.

        Returns:
            bool ``[..., T, N]``, or None: all of them. An entry that one query does not see must be invisible to later
            queries too: the cache drops it during the prompt.
        """
        return None

    def keep(self, entries: Entries) -> Tensor:
        """The entries that stay, bool ``[R, N]``; only if `evicts`. Called after each step, before the next query."""
        raise NotImplementedError

    def arrival(self, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        """Scores of tokens at arrival, for a policy that overrides this; `Entries.scores` then holds them.

        Args:
            keys: ``[..., H, D]``, before RoPE.
            values: ``[..., H, D]``.
            positions: int64 ``[...]``.

        Returns:
            fp32 ``[..., H]``.
        """
        raise NotImplementedError

    def arrival_hidden(self, layer: int, hidden: Tensor) -> Tensor:
        """Like `arrival`, from hidden states: scores of tokens at arrival, for a policy that overrides this instead.

        Args:
            layer: its number.
            hidden: ``[T, hidden]`` of T tokens of any sequences in the model's dtype: the input of the layer's attention
                projections (after the input norm).

        Returns:
            fp32 ``[T, H]``.
        """
        raise NotImplementedError

    def check_model(self, layers: int, heads: int, hidden: int) -> None:  # noqa: B027 (most policies fit every model)
        """Raises ValueError if the policy cannot serve a model with so many layers, key/value heads per layer and hidden
        dimensions; called when the model is loaded. A policy that was made for one model overrides this."""

    def keep_prompt(self, prompt: PromptEntries) -> Tensor:
        """The entries of one sequence's prompt that stay, bool ``[H, N]``; only if `evicts`. Called once, at its end."""
        return self.keep(prompt)

    def rewrite(self, prompt: PromptEntries, kept: Tensor) -> tuple[Tensor, Tensor] | None:
        """Keys (rotated) and values ``[H, N, D]`` of a prompt after `keep_prompt`, for example with dropped entries merged into
        kept ones; None: unchanged."""
        return None

    def most_entries(self, tokens: int) -> int:
        """Largest number of entries, the accumulating one included, of a row of so many tokens between two steps."""
        return tokens if self.max_entries is None else min(tokens, self.ring + self.max_entries)
