"""What a policy is: which entries exist."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from dmc.cache.policies.entries import Entries, PromptEntries


class Policy(ABC):
    """Decides, from what the model proposes, which entries each key/value head holds.

    Merging policies override `decide` alone. An evicting policy sets `evicts` and says in `keep` which entries stay;
    the cache calls it at the end of a prompt and after every generated token, drops the others and frees their pages.
    A policy that also looks at keys, values or queries of a prompt overrides `keep_prompt`, which is called at its end in the
    place of `keep`. With `prompt_only` nothing is evicted after that. What needs memory or time is declared (`statistics`,
    `last_queries`, `query_moments`, `arrival`), and nothing of it is computed for a policy that does not declare it.

    Attributes:
        name: under which `dmc.cache.policy` finds it.
        merges: whether `decide` can give an alpha other than 0 or an omega other than 1. Where it cannot, the cache
            knows before a step that every open entry closes in it.
        evicts: whether entries can go before their sequence ends. Their places are then stored, 4 bytes an entry.
        statistics: what attention gathers for each entry, 4 bytes an entry: None; "sum", the softmax weights that it got
            from all queries so far, those of a head's group added up; "last", those of the newest query alone.
        prompt_only: whether entries are evicted at the end of a prompt alone, by `keep_prompt`; generated tokens all stay.
        last_queries: of a prompt that `PromptEntries` holds, as many as there are at most.
        query_moments: whether it also holds mean and covariance of the prompt's queries.
        ring: newest tokens of a row that stay as they are; one that leaves them is merged, or dropped by a policy that does
            not merge, where the model's logit says so (`dmc.cache.reading.late`). None: tokens are merged at once.
        max_entries: with a ring, entries of a row behind it at most: once there are so many, what leaves the ring is
            merged, or dropped by a policy that does not merge, whatever the model says. None: no bound.
        sinks: with a ring, first tokens of a sequence that are never dropped or merged; where tokens merge, the token after
            them opens an entry as well.
        likely_cr: tokens / entries to expect of a sequence until it is measured; None: what the checkpoint reports.
        by_head: whether what happens to a head's entries follows from that head alone, so that heads can be on
            different ranks (tensor parallelism).
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
    by_head: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: object) -> None:
        """A policy that says it evicts must do so: known when it is defined, not at the first step."""
        super().__init_subclass__(**kwargs)
        if cls.evicts and cls.prompt_only:
            if cls.keep_prompt is Policy.keep_prompt:
                raise TypeError(f"policy {cls.__name__} sets prompt_only and does not define keep_prompt")
            if cls.visible is not Policy.visible:
                raise TypeError(f"policy {cls.__name__} sets prompt_only and defines visible: its prompts are seen as a whole")
        elif cls.evicts and cls.keep is Policy.keep:
            raise TypeError(f"policy {cls.__name__} sets evicts and does not define keep")
        if cls.arrival is not Policy.arrival and (cls.merges or cls.statistics is not None):
            raise TypeError(f"policy {cls.__name__} defines arrival, so it must set merges to False and statistics to None")

    @classmethod
    def settings(cls) -> list[str]:
        """Names of the settings that the policy is made with."""
        own = cls.__init__ is not object.__init__
        return [name for name in inspect.signature(cls.__init__).parameters if name != "self"] if own else []

    @property
    def scored(self) -> bool:
        """Whether entries carry a score."""
        return self.statistics is not None or type(self).arrival is not Policy.arrival

    @property
    def evicts_later(self) -> bool:
        """Whether entries can go while tokens are generated. Their places are then stored."""
        return self.evicts and not self.prompt_only

    @abstractmethod
    def decide(self, alpha: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
        """The merging decisions that are carried out.

        Args:
            alpha: fp32 of any shape, 1 where the model would merge the token into the open entry, else 0. With a model that
                decides when tokens leave a window: its logit, which a policy with a `ring` passes on.
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
        """Which earlier entries the queries of a prompt see, by position alone.

        Args:
            positions: int32 ``[..., N]`` as in `Entries`.
            queries: int64 ``[..., T]``, positions.

        Returns:
            bool ``[..., T, N]``, or None: all of them. An entry out of sight must stay so for later queries: the
            cache forgets it during the prompt.
        """
        return None

    def keep(self, entries: Entries) -> Tensor:
        """Which entries stay, if `evicts`: bool ``[R, N]``; asked after each step, before the next query."""
        raise NotImplementedError

    def arrival(self, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        """Scores of tokens as they come, for a policy that overrides this; `Entries.scores` then holds them.

        Args:
            keys: ``[..., H, D]``, before RoPE.
            values: ``[..., H, D]``.
            positions: int64 ``[...]``.

        Returns:
            fp32 ``[..., H]``.
        """
        raise NotImplementedError

    def keep_prompt(self, prompt: PromptEntries) -> Tensor:
        """Which entries of one sequence's prompt stay, if `evicts`: bool ``[H, N]``; asked once, at its end."""
        return self.keep(prompt)

    def rewrite(self, prompt: PromptEntries, kept: Tensor) -> tuple[Tensor, Tensor] | None:
        """Keys (rotated) and values ``[H, N, D]`` of a prompt after `keep_prompt`, such as with what was dropped merged into what
        stays; None: as they are."""
        return None

    def most_entries(self, tokens: int) -> int:
        """Entries, the tail counted, that a row of so many tokens can hold between two steps."""
        return tokens if self.max_entries is None else min(tokens, self.ring + self.max_entries)
