"""How the pages of some rows are encoded: what `dmc.kernels.encode` takes beside the rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from dmc.kernels.pages.paged import Trellis

KINDS = {
    # kind of encoded page: its fields
    "dense": ("k", "v"),
    "int8": ("k_codes", "k_scale", "v_codes", "v_scale"),
    "fp8": ("k_numbers", "k_scale", "v_numbers", "v_scale"),
    "trellis": ("k_codes", "k_scale", "k_top", "v_codes", "v_scale", "v_top"),  # and mean, unit
}


@dataclass(frozen=True)
class Encoding:
    """How pages of some rows are encoded.

    Attributes:
        kind: a name of `KINDS`.
        fields: of encoded pages, views of the pool with a leading page dimension, as in `dmc.kernels.pages.paged.Paged`.
        codec: exact keys and values ``[n, P, D]`` → the fields of n pages: what the twin calls and the kernels equal (of trellis
            pages the error, not each code: see `dmc.kernels.formats.trellis.encode`).
        trellis: layout of pages of kind "trellis", None for others.
    """

    kind: str
    fields: dict[str, Tensor]
    codec: Callable[[Tensor, Tensor], dict[str, Tensor]]
    trellis: Trellis | None = None

    def __post_init__(self) -> None:  # noqa: D105
        if self.kind not in KINDS:
            raise ValueError(f"no kernel encodes pages of kind {self.kind!r}; known: {', '.join(KINDS)}")
        if (self.trellis is None) == (self.kind == "trellis"):
            raise ValueError(f"{self.kind} pages and trellis={self.trellis}: a layout goes with pages of kind trellis alone")
        missing = [name for name in KINDS[self.kind] if name not in self.fields]
        if missing:
            raise ValueError(f"{self.kind} pages have the fields {', '.join(KINDS[self.kind])}; missing: {', '.join(missing)}")
