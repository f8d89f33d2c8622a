"""A generated token enters the cache: merged into its row's open entry, or opening a new one while the old becomes final.

`append_reference` is the naive twin, `dmc.kernels.append.gpu` the kernel; `append_tokens` chooses. What a row holds is
told in `dmc.cache.storage.rows`; here it is seen through views (`dmc.kernels.pages.paged.Growing`), and the stack of
free pages is on the device. Rows whose exact entries then fill a page are encoded by `dmc.kernels.encode.encode`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmc.kernels.backend import choose
from dmc.kernels.pages.paged import NOT_ENCODED, Growing, take


def append_tokens(
    state: Growing, index: Tensor, key: Tensor, value: Tensor, alpha: Tensor, omega: Tensor, positions: Tensor,
    rope: tuple[Tensor, Tensor], *, backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One token for each of some rows of a layer: eq. 9 on their open entries; those that it does not join become final.

    A final entry is rotated to the position of its newest token, which is the one before this token's. With Triton nothing
    waits for the device and the launch depends on shapes alone, so it can be captured in a CUDA graph.

    Args:
        state: changed in place.
        index: int64 ``[R]``, distinct rows; -1: none, a place of the batch that is not in use.
        key, value: ``[R, D]``, any float dtype; keys not rotated.
        alpha: ``[R]``, 1 merges the token into the open entry, 0 closes that and opens another; a row without an open
            entry opens one either way.
        omega: ``[R]``, the token's weight.
        positions: int32 or int64 ``[S]``, of the sequences' tokens; R is S times their heads, sequence after sequence.
        rope: (cos, sin), each ``[positions, D]`` in the half-split layout, for every position below.
        backend: see `dmc.kernels.backend`; what is not "triton" is the twin.

    Returns:
        ``(keys, values)``, each ``[R, D]`` in the dtype of the numerators: the open entries as this token's query sees
        them, keys rotated to its position; 0 where there is no row.

    Raises:
        ValueError: if R is no multiple of S.
    """
    if not len(positions) or len(index) % len(positions):
        raise ValueError(f"{len(index)} rows for {len(positions)} positions: every sequence has the same number of heads")
    if choose(key, backend) == "triton":
        from dmc.kernels.append.gpu import append

        return append(state, index, key, value, alpha, omega, positions, rope)
    return append_reference(state, index, key, value, alpha, omega, positions, rope)


def append_reference(
    state: Growing, index: Tensor, key: Tensor, value: Tensor, alpha: Tensor, omega: Tensor, positions: Tensor,
    rope: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """The naive twin; it waits for the device."""
    own = state.numerators.new_zeros(2, *key.shape)
    used = (index >= 0).nonzero().flatten()
    rows, size = index[used], key.shape[-1]
    numerators, z = state.numerators[rows], state.z[rows]
    alpha, omega = alpha[used].to(z.dtype), omega[used].to(z.dtype)
    now = positions.long().repeat_interleave(len(index) // len(positions))[used]

    closing = (alpha == 0) & (z > 0)
    refused = _refuse(state, rows, closing)
    done = closing & ~refused
    mean = numerators[done] / z[done, None]
    _write(state, rows[done], _turn(mean[:, :size], now[done] - 1, rope), mean[:, size:])

    token = torch.cat([key[used], value[used]], dim=-1).to(z.dtype)
    numerators = alpha[:, None] * numerators + omega[:, None] * token
    z = alpha * z + omega
    state.numerators[rows[~refused]], state.z[rows[~refused]] = numerators[~refused], z[~refused]
    mean = numerators / z[:, None]
    own[:, used] = torch.stack([_turn(mean[:, :size], now, rope), mean[:, size:]])
    return own[0], own[1]


def _refuse(state: Growing, rows: Tensor, closing: Tensor) -> Tensor:
    """Gives each closing row the page that its next exact entry needs → bool ``[n]``, those that cannot have it."""
    count = state.full_count[rows]
    full = closing & (count >= state.most)
    if full.any():
        state.failed.bitwise_or_(NOT_ENCODED)
    wanting = closing & ~full & (count % state.per_full_page == 0)
    pages, given = take(state, wanting)
    state.memory[pages] = 0  # what an encoded page left there could read as NaN
    state.full_table[rows[given], count[given] // state.per_full_page] = pages.int()
    return full | (wanting & ~given)


def _write(state: Growing, rows: Tensor, keys: Tensor, values: Tensor) -> None:
    count = state.full_count[rows]
    pages, offsets = state.full_table[rows, count // state.per_full_page].long(), count % state.per_full_page
    for part, x in (("k", keys), ("v", values)):
        state.full_precision[part][pages, offsets] = x.to(state.full_precision[part].dtype)
    state.full_count[rows] = count + 1


def _turn(x: Tensor, positions: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """`dmc.functional.rotate` of ``[n, D]`` to a position each."""
    cos, sin = (table[positions].to(x.dtype) for table in rope)
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[:, half:], x[:, :half]], dim=-1) * sin
