"""The window of recent tokens, and merging, appending or dropping the tokens that leave it.

Under a policy with a window w a row keeps its newest w tokens in a ring: full-precision entries 0 .. w - 1, keys rotated, the
token at position p in slot ``p % w``. Slot w holds the accumulating entry as attention sees it (its numerators and z are those of
any row), and after it come sinks, encoded pages and window as in `dmc.cache.storage.rows`. Every reader of pages therefore
reads the ring too, and nothing is evicted from a page.

The query at position p sees the ring (p - w .. p - 1), its own token and the entries. Then token p - w leaves. The model's
logit decides: above 0 the token is merged into the accumulating entry, or dropped by a policy that does not merge; else the
accumulating entry becomes final and the token starts the next one. A model that looks ahead adds to the logit of token p - w
what it reads at position p. The first tokens of a sequence, `Policy.sinks`, are appended for any logit. Once a row
has as many entries behind the ring as `Policy.max_entries` allows, a token is merged or dropped for any logit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dmc.cache.policies import Policy
from dmc.cache.reading import asking
from dmc.cache.reading.onpages import OnPages
from dmc.cache.storage.packing import Packing
from dmc.cache.storage.rows import Rows
from dmc.functional import rotate, unrotate


@dataclass(frozen=True)
class Leaving:
    """The tokens that leave the rings of S sequences in one step; the same for every layer (`repeat`).

    Attributes:
        there: bool ``[S]``, False for a sequence whose ring is not full yet.
        positions: int64 ``[S]``, 0 where no token leaves.
        slots: int64 ``[S]``, the newest token's slot in the ring.
        before, at: (cos, sin) each ``[S, D]``, of the position before the leaving token and of its own. If nothing merges the
            angle is 0, since keys then stay rotated.
        table, table_index: the same as one table ``[2 S, D]``, and the rows int64 ``[S]`` of `positions` in it.
    """

    there: Tensor
    positions: Tensor
    slots: Tensor
    before: tuple[Tensor, Tensor]
    at: tuple[Tensor, Tensor]
    table: tuple[Tensor, Tensor]
    table_index: Tensor

    def repeat(self, layers: int) -> Leaving:
        """Repeated for the rows of several layers, layer after layer."""
        if layers == 1:
            return self
        parts = self.there, self.positions, self.slots, self.table_index
        there, positions, slots, table_index = (x.repeat(layers) for x in parts)
        before, at = (tuple(x.repeat(layers, 1) for x in pair) for pair in (self.before, self.at))
        return Leaving(there, positions, slots, before, at, self.table, table_index)


def leaving(window: int, positions: Tensor, rope, *, merges: bool) -> Leaving:  # noqa: ANN001 - dmc.cache.reading.step.Rope
    """`Leaving` of sequences whose newest tokens are at ``positions`` [S]."""
    left = positions - window
    there, left = left >= 0, left.clamp(min=0)
    table = rope(torch.stack([(left - 1).clamp(min=0), left], dim=1).flatten())
    if not merges:
        table = torch.ones_like(table[0]), torch.zeros_like(table[1])
    before, at = (tuple(x[start::2] for x in table) for start in (0, 1))
    table_index = torch.arange(1, 2 * len(positions), 2, device=positions.device)
    return Leaving(there, left, positions % max(1, window), before, at, table, table_index)


def leave(
    rows: Rows,
    packing: Packing,
    policy: Policy,
    index: Tensor,
    gone: Leaving,
    key: Tensor,
    turned: Tensor,
    value: Tensor,
    logits: Tensor,
    omega: Tensor,
    late: Tensor | None,
    kernels: OnPages | None,
    closed: Tensor | None = None,
) -> Tensor:
    """Moves the oldest tokens out of their rings and the newest ones in, after attention, in layers with equal storage.

    Args:
        rows: of the cache.
        packing: of the layers.
        policy: with a window; its `merges` says whether tokens merge or are dropped.
        index: int64 ``[R]``, rows of S sequences, R = S * H; with several layers each sequence occurs once per layer.
        gone: of these sequences.
        key, turned, value: ``[R, D]`` of the newest tokens, the key before and after its rotation.
        logits, omega: ``[R]`` of them, in the dtype of `Rows.z`; a logit above 0 merges or drops.
        late: ``[R]``, added to the logits of the tokens that leave; None without look-ahead.
        kernels: reader of the layers, if it writes rows; None: PyTorch writes them.
        closed: bool ``[R]``, rows in which a token is merged or dropped for any logit; None: none.

    Returns:
        bool ``[R]``, True where a token that left was merged or dropped.
    """
    window, heads = policy.ring, rows.shape.heads
    there, slots = (x.repeat_interleave(heads) for x in (gone.there, gone.slots))
    if window:
        old_key, old_value, _ = rows.read_full(index, slots)
        noted = rows.notes[index, slots]
        _write(rows, index, slots, turned, value, gone.positions.repeat_interleave(heads) + window)
        rows.notes[index, slots] = torch.stack([logits, omega], dim=-1) if policy.merges else logits[:, None]
        old_key, old_value = old_key.to(rows.z.dtype), old_value.to(rows.z.dtype)
        logits, omega = noted[:, 0], noted[:, -1]
        if policy.merges:
            old_key = unrotate(old_key.unflatten(0, (-1, heads)), _each(gone.at)).flatten(0, 1)
    else:
        old_key, old_value = (key if policy.merges else turned).to(rows.z.dtype), value.to(rows.z.dtype)
    logits = logits if late is None else logits + late
    yes = (logits > 0) & (gone.positions >= policy.sinks + policy.merges).repeat_interleave(heads)
    if policy.max_entries is not None:
        yes = yes | (rows.behind_ring(rows.encoded_count[index], rows.full_count[index], packing.page_size) >= policy.max_entries)
    if closed is not None:
        yes = yes | closed
    yes = yes & there
    alpha = (yes & policy.merges).to(rows.z.dtype)
    entering = there if policy.merges else there & ~yes
    omega = asking.numbers(policy, "weigh", logits, omega, shape=logits.shape) if policy.merges else torch.ones_like(omega)
    if kernels is not None:
        _by_kernels(rows, index, gone, kernels, entering, old_key, old_value, alpha, omega)
    else:
        _by_torch(rows, index, gone, policy, entering, old_key, old_value, alpha, omega)
    return yes


def _by_torch(
    rows: Rows,
    index: Tensor,
    gone: Leaving,
    policy: Policy,
    entering: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor,
    omega: Tensor,
) -> None:
    heads, size = rows.shape.heads, key.shape[-1]
    numerators, z = rows.numerators[index], rows.z[index]
    positions = gone.positions.repeat_interleave(heads)
    ending = (entering & (alpha == 0) & (z > 0)).nonzero().flatten()
    if len(ending):
        mean = numerators[ending] / z[ending, None]
        table = tuple(x.repeat_interleave(heads, 0)[ending] for x in gone.before)
        metadata = {"position": rows.newest[index[ending]]} if rows.storage.with_positions else {}
        rows.append(index[ending], rotate(mean[:, :size], table), mean[:, size:], metadata)
    some = entering.nonzero().flatten()
    if len(some):
        token = torch.cat([key, value], dim=-1)[some]
        numerators = alpha[some, None] * numerators[some] + omega[some, None] * token
        z = alpha[some] * z[some] + omega[some]
        rows.numerators[index[some]], rows.z[index[some]] = numerators, z
        if rows.storage.with_positions:
            rows.newest[index[some]] = positions[some].int()
        mean = numerators / z[:, None]
        table = tuple(x.repeat_interleave(heads, 0)[some] for x in gone.at)
        slot = torch.full_like(some, policy.ring)
        _write(rows, index[some], slot, rotate(mean[:, :size], table), mean[:, size:], positions[some])
    _count(rows, index, gone, policy.ring)


def _by_kernels(
    rows: Rows,
    index: Tensor,
    gone: Leaving,
    kernels: OnPages,
    entering: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor,
    omega: Tensor,
) -> None:
    """`_by_torch` with the kernels of `dmc.cache.reading.onpages`, without waiting for the device."""
    window = rows.storage.ring
    mean: Any = kernels.append(rows, torch.where(entering, index, -1), key, value, alpha, omega, gone.table_index, gone.table)
    slot = torch.full_like(index, window)
    old = rows.read_full(index, slot)[:2]
    mean = [torch.where(entering[:, None], new.to(held.dtype), held) for new, held in zip(mean, old, strict=True)]
    _write(rows, index, slot, *mean, slot)
    _count(rows, index, gone, window)
    kernels.encode(rows, index)


def _write(rows: Rows, index: Tensor, slots: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> None:
    rows.write_full(index, slots, keys, values, {"position": positions} if rows.storage.with_positions else {})


def _count(rows: Rows, index: Tensor, gone: Leaving, window: int) -> None:
    """Updates the number of full-precision entries: the filled part of the ring, and the accumulating entry if there is one."""
    filled = (torch.where(gone.there, window, gone.slots + 1)).clamp(max=window).repeat_interleave(rows.shape.heads)
    full = torch.maximum(rows.full_count[index], filled.int())
    rows.full_count[index] = torch.where(rows.z[index] > 0, full.clamp(min=window + 1), full)


def _each(table: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """``[S, D]`` → ``[S, 1, D]``, for all heads."""
    return table[0][:, None], table[1][:, None]
