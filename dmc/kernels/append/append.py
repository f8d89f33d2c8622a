"""Adds a generated token to the cache: merges it into its row's accumulating entry, or makes that entry final and starts one.

`append_reference` is the reference implementation, `dmc.kernels.append.gpu` has the kernel, and `append_tokens` chooses.
`dmc.cache.storage.rows` describes a row; the kernels use views of it (`dmc.kernels.pages.paged.Growing`), and the stack of
free pages is on the device. `dmc.kernels.encode.encode` then encodes rows whose full-precision entries fill a page.
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
    """Adds one token to each of some rows of a layer: eq. 9 on the accumulating entries. Without a merge the entry becomes final.

    A final entry is rotated to the position of its newest token, which is the one before this token's. With Triton nothing
    waits for the device and the launch depends on shapes alone, so it can be captured in a CUDA graph.

    Args:
        state: changed in place.
        index: int64 ``[R]``, distinct rows; -1: none, an unused element of the batch.
        key, value: ``[R, D]``, any float dtype; keys not rotated.
        alpha: ``[R]``, 1 merges the token into the accumulating entry, 0 makes that entry final and starts another; a row
            without one starts one in both cases.
        omega: ``[R]``, the token's weight.
        positions: int32 or int64 ``[S]``, of the sequences' tokens; R is S times their heads, sequence after sequence.
        rope: (cos, sin), each ``[positions, D]`` in the half-split layout, for every position below.
        backend: see `dmc.kernels.backend`; every other name runs the reference implementation.

    Returns:
        ``(keys, values)``, each ``[R, D]`` in the dtype of the numerators: the accumulating entries as this token's
        query sees them, keys rotated to its position; 0 where there is no row.

    Raises:
        ValueError: if R is not a multiple of S.
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
    """The reference implementation; it waits for the device."""
    own = state.numerators.new_zeros(2, *key.shape)
    used = (index >= 0).nonzero().flatten()
    rows, size = index[used], key.shape[-1]
    numerators, z = state.numerators[rows], state.z[rows]
    alpha, omega = alpha[used].to(z.dtype), omega[used].to(z.dtype)
    now = positions.long().repeat_interleave(len(index) // len(positions))[used]

    ending = (alpha == 0) & (z > 0)
    failed = _take_pages(state, rows, ending)
    done = ending & ~failed
    mean = numerators[done] / z[done, None]
    _write(state, rows[done], _turn(mean[:, :size], now[done] - 1, rope), mean[:, size:])

    token = torch.cat([key[used], value[used]], dim=-1).to(z.dtype)
    numerators = alpha[:, None] * numerators + omega[:, None] * token
    z = alpha * z + omega
    state.numerators[rows[~failed]], state.z[rows[~failed]] = numerators[~failed], z[~failed]
    mean = numerators / z[:, None]
    own[:, used] = torch.stack([_turn(mean[:, :size], now, rope), mean[:, size:]])
    return own[0], own[1]


def _take_pages(state: Growing, rows: Tensor, ending: Tensor) -> Tensor:
    """Gives each row the page that its next full-precision entry needs → bool ``[n]``, rows without such a page."""
    count = state.full_count[rows]
    filled = ending & (count >= state.most)
    if filled.any():
        state.failed.bitwise_or_(NOT_ENCODED)
    wanting = ending & ~filled & (count % state.per_full_page == 0)
    pages, given = take(state, wanting)
    state.memory[pages] = 0  # the bytes of a former encoded page could read as NaN
    state.full_table[rows[given], count[given] // state.per_full_page] = pages.int()
    return filled | (wanting & ~given)


def _write(state: Growing, rows: Tensor, keys: Tensor, values: Tensor) -> None:
    count = state.full_count[rows]
    pages, offsets = state.full_table[rows, count // state.per_full_page].long(), count % state.per_full_page
    for part, x in (("k", keys), ("v", values)):
        state.full_precision[part][pages, offsets] = x.to(state.full_precision[part].dtype)
    state.full_count[rows] = count + 1


def _turn(x: Tensor, positions: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """`dmc.functional.rotate` of ``[n, D]``, each to its position."""
    cos, sin = (table[positions].to(x.dtype) for table in rope)
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[:, half:], x[:, :half]], dim=-1) * sin
