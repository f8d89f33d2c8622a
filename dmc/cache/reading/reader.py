"""`Reader`: attention of a step over the rows of some layers, chosen once when the cache is made (`dmc.cache.reading.choose`)."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from dmc.cache.reading.plan import Plan
from dmc.cache.storage.rows import Rows


class Reader(ABC):
    """Attention of new tokens over rows of layers with equal storage. It holds no rows: each call gets them.

    Attributes:
        on_pages: True if kernels read pages in place.
        writes: True if kernels append tokens and encode pages as well (`dmc.cache.reading.onpages.OnPages`).
        plans: True if `attend` uses plans (`dmc.cache.reading.plan.plans`), which layers of equal counts can share.
    """

    on_pages = writes = plans = False

    @abstractmethod
    def attend(
        self, rows: Rows, index: Tensor, query: Tensor, own_key: Tensor, own_value: Tensor, plan: Plan | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """One query of each head over what a row holds: encoded pages, full-precision entries, and its own state.

        In every reader the cost of a row depends on its own length. If the policy asks for attention statistics, they
        are added to the scores of entries, or replace them.

        Args:
            rows: the cache.
            index: ``[R]``, rows of the queries.
            query: ``[R, G, D]``, rotated, fp32 or fp64.
            own_key, own_value: ``[R, D]``, the accumulating entry as it is now, rotated.
            plan: of these rows, if there is one already.

        Returns:
            ``(out [R, G, D], own [R])``: own is the own state's weight, summed over G; None without attention statistics.
        """
