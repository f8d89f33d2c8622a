"""The KV cache of an engine: policy x codec over one page pool, for sequences that come and go.

What a query sees follows from positions alone. A prompt's queries see the prompt's entries exactly, as the model
computed them. A generated token's query sees the row as `dmc.cache.rows` lays it out: its full pages encoded,
sinks and window exact, and the tail with the token itself already in it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dmc.cache.attention import compact, prompt_attention, row_attention
from dmc.cache.codecs import Codec
from dmc.cache.policies import Policy
from dmc.cache.rows import Rows, Shape, Storage
from dmc.functional import accumulate_numerators, rotate

Rope = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Positions, int64 of any shape → (cos, sin), each ``[..., D]`` fp32 or fp64, in the half-split layout."""

_SINK_TOKENS = 4
_EXACT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class KVCache:
    """The cache; see the head of this file.

    Args:
        shape: sizes and dtype of the model.
        policy, codec: which entries exist, and how a full page of them is stored.
        slots: sequences at most at a time.
        memory: bytes of the page pool; None lets it grow.
        page_size: entries of an encoded page; None: the codec's own.
        sink_tokens: first entries of each row that stay exact; None: 4 for lossy codecs, 0 for lossless ones.
        window: newest closed entries of each row that always stay exact, beside the page that is filling.
        exact_dtype: "fp32", "bf16" or "fp16", of everything outside encoded pages but the tail. None: that of the
            dense codec, or the model's; but with a lossy codec and an fp32 model bf16, whose rounding (2^-9) is far
            below what the codec loses.
        device: of everything.

    Raises:
        ValueError: if a size is out of range, or the memory is less than one page.
    """

    def __init__(
        self, shape: Shape, policy: Policy, codec: Codec, *, slots: int, memory: int | None = None,
        page_size: int | None = None, sink_tokens: int | None = None, window: int = 0, exact_dtype: str | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        page_size = codec.page_size if page_size is None else page_size
        sink_tokens = _SINK_TOKENS * codec.lossy if sink_tokens is None else sink_tokens
        for name, value, least in (
            ("page_size", page_size, 1), ("sink_tokens", sink_tokens, 0), ("window", window, 0), ("slots", slots, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        storage = Storage(codec, page_size, sink_tokens, window, _exact_dtype(exact_dtype, codec, shape.dtype))
        self.shape, self.policy = shape, policy
        self.rows = Rows(shape, storage, slots=slots, memory=memory, device=device)
        if self.rows.pool.capacity < 1:
            raise ValueError(
                f"kv memory of {memory} bytes holds no page of {self.rows.pool.page_bytes} bytes; give it more"
            )
        self._slots = list(range(slots - 1, -1, -1))  # free ones, the next one last

    # ------------------------------------------------------------------------------------ sequences

    @property
    def free_slots(self) -> int:
        """Sequences that can still be opened."""
        return len(self._slots)

    def open(self) -> int:
        """A slot for a new sequence; there must be a free one."""
        return self._slots.pop()

    def close(self, slot: int) -> None:
        """Ends a sequence: its pages return to the pool."""
        self.rows.release(self._rows_of(slot))
        self._slots.append(slot)

    def prefill(self, slots: Tensor, lengths: Tensor, rope: Rope) -> Prefill:
        """What the model attends through for whole prompts, right-padded; see `Prefill`."""
        return Prefill(self, slots, lengths, rope)

    def decode(self, slots: Tensor, positions: Tensor, rope: Rope) -> Decode:
        """What the model attends through for one new token of each sequence; see `Decode`."""
        return Decode(self, slots, positions, rope)

    def worst_pages(self, tokens: int) -> int:
        """Pages that a sequence of ``tokens`` cached tokens can come to need, if nothing is merged."""
        return self.rows.worst_pages(tokens) * self.shape.layers * self.shape.heads

    # ------------------------------------------------------------------------------------ accounting

    def entries(self, slot: int) -> Tensor:
        """Cache lengths: int64 ``[L, H]``, the tail counted."""
        rows, store = self.rows, self.rows.storage
        index = self._rows_of(slot)
        count = rows.closed[index].long() * store.page_size + rows.exact[index] + (rows.z[index] > 0)
        return count.view(self.shape.layers, self.shape.heads)

    def held(self, slot: int) -> dict[str, int]:
        """Bytes that a sequence holds now, by kind, taken from the tensors themselves.

        "pages": encoded pages; "exact": whole pages of sinks and window, their unused places included; "tail":
        numerators and z; "tables": block tables (as wide as they are) and counts.
        """
        rows, index = self.rows, self._rows_of(slot)
        closed = int(rows.closed[index].sum())
        opened = int((rows.open_table[index] != 0).sum())
        return {
            "pages": closed * rows.pool.page_bytes,
            "exact": opened * rows.pool.page_bytes,
            "tail": _bytes(rows.numerators[index]) + _bytes(rows.z[index]),
            "tables": sum(
                _bytes(table[index]) for table in (rows.closed_table, rows.open_table, rows.closed, rows.exact)
            ),
        }

    def dense_bytes(self, tokens: int) -> int:
        """Bytes of an uncompressed bf16 cache of so many tokens: the baseline of every ratio."""
        return 2 * 2 * self.shape.layers * self.shape.heads * self.shape.head_size * tokens

    def check_integrity(self) -> None:
        """Checks that every page is owned once or free, and that tables and counts agree.

        Raises:
            RuntimeError: naming what is wrong; the cache cannot be trusted after that.
        """
        rows, store, pool = self.rows, self.rows.storage, self.rows.pool
        closed = torch.arange(rows.closed_table.shape[1], device=rows.closed.device) < rows.closed[:, None]
        opened = -(-rows.exact // rows.per_open_page)
        opened = torch.arange(rows.open_table.shape[1], device=rows.exact.device) < opened[:, None]
        if ((rows.closed_table != 0) != closed).any() or ((rows.open_table != 0) != opened).any():
            raise RuntimeError("a block table names more or fewer pages than its row has")
        owned = torch.cat([rows.closed_table[closed].long(), rows.open_table[opened].long(), pool.free_pages()])
        if not torch.equal(owned.sort().values, torch.arange(1, pool.capacity + 1, device=owned.device)):
            raise RuntimeError("a page of the pool is owned twice, or lost, or free while owned")
        if pool.memory[0].any():
            raise RuntimeError("the null page was written to")
        waiting = rows.exact - store.sink_tokens - store.window
        if (waiting >= store.page_size).any() or ((rows.closed > 0) & (waiting < 0)).any():
            raise RuntimeError("a row has a page to encode, or encoded one too early")
        if ((rows.z == 0) & (rows.exact > 0)).any():
            raise RuntimeError("a row has entries but no tail")
        free = torch.tensor(self._slots, dtype=torch.int64, device=rows.z.device)
        for layer in range(self.shape.layers):
            if rows.z[rows.index(layer, free)].any():
                raise RuntimeError("a free slot holds a sequence")

    def _rows_of(self, slot: int) -> Tensor:
        """All rows of a slot, ``[L * H]``."""
        slots = torch.tensor([slot], device=self.rows.z.device)
        return torch.cat([self.rows.index(layer, slots) for layer in range(self.shape.layers)])


class Prefill:
    """Attention of whole prompts into empty slots; called once a layer by the model.

    No token loop: the intermediate states come from one scan, those that close are compacted, and each query
    attends to about T / CR of them.

    Args:
        cache: to fill.
        slots, lengths: ``[B]`` int64; a prompt's tokens beyond its length are padding.
        rope: see `Rope`.
    """

    def __init__(self, cache: KVCache, slots: Tensor, lengths: Tensor, rope: Rope) -> None:
        self.cache, self.slots, self.lengths = cache, slots, lengths
        self.rope = rope(torch.arange(int(lengths.max()), device=lengths.device))

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, alpha: Tensor, omega: Tensor,
    ) -> Tensor:
        """Query ``[B, Hq, T, D]``, key, value ``[B, H, T, D]``, not rotated; alpha, omega ``[B, H, T]`` → as query."""
        alpha, omega = self.cache.policy.decide(alpha, omega)
        size, tokens = key.shape[-1], key.shape[-2]
        numerators, z = accumulate_numerators(torch.cat([key, value], dim=-1), alpha, omega)
        states = numerators / z[..., None]
        own_keys, own_values = rotate(states[..., :size], self.rope).to(query.dtype), states[..., size:].to(query.dtype)

        inside = torch.arange(1, tokens + 1, device=alpha.device) < self.lengths[:, None]
        closes = torch.cat([alpha[..., 1:] == 0, inside.new_zeros(*alpha.shape[:2], 1)], dim=-1) & inside[:, None]
        places, counts = compact(closes)
        final = places.clamp(max=tokens - 1)[..., None].expand(-1, -1, -1, size)
        keys, values = own_keys.gather(2, final), own_values.gather(2, final)

        rows, index = self.cache.rows, self.cache.rows.index(layer, self.slots)
        rows.load(index, keys.flatten(0, 1), values.flatten(0, 1), counts.flatten())
        batch, last = torch.arange(len(self.slots), device=alpha.device), self.lengths - 1
        rows.numerators[index] = numerators[batch, :, last].flatten(0, 1)
        rows.z[index] = z[batch, :, last].flatten()
        query = rotate(query.to(states.dtype), self.rope).to(query.dtype)
        return prompt_attention(query, keys, values, own_keys, own_values, places)


class Decode:
    """Attention of one new token of each of several sequences; called once a layer by the model.

    Args:
        cache: to extend.
        slots: ``[S]`` int64.
        positions: ``[S]`` int64 of the new tokens, at least 1: a prompt went before.
        rope: see `Rope`.
    """

    def __init__(self, cache: KVCache, slots: Tensor, positions: Tensor, rope: Rope) -> None:
        self.cache, self.slots = cache, slots
        heads = cache.shape.heads
        now, before = rope(positions), rope(positions - 1)
        self.now = tuple(table.repeat_interleave(heads, 0)[:, None] for table in now)  # [S * H, 1, D]
        self.before = tuple(table.repeat_interleave(heads, 0) for table in before)  # [S * H, D]

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, alpha: Tensor, omega: Tensor,
    ) -> Tensor:
        """As `Prefill` with T = 1."""
        rows, index = self.cache.rows, self.cache.rows.index(layer, self.slots)
        alpha, omega = self.cache.policy.decide(alpha, omega)
        alpha, omega = alpha.flatten().to(rows.z.dtype), omega.flatten().to(rows.z.dtype)
        size = key.shape[-1]
        numerators, z = rows.numerators[index], rows.z[index]

        closing = alpha == 0
        if closing.any():
            done = (numerators / z[:, None])[closing]
            rope = tuple(table[closing] for table in self.before)
            rows.append(index[closing], rotate(done[:, :size], rope), done[:, size:])
        token = torch.cat([key, value], dim=-1).view(-1, 2 * size).to(numerators.dtype)
        numerators = alpha[:, None] * numerators + omega[:, None] * token
        z = alpha * z + omega
        rows.numerators[index], rows.z[index] = numerators, z

        own = numerators / z[:, None]
        own_key = rotate(own[:, None, :size], self.now)[:, 0]
        queries = rotate(query.reshape(len(index), -1, size).to(own.dtype), self.now)  # [S * H, G, D]
        out = row_attention(rows, index, queries, own_key, own[:, size:])
        return out.view(query.shape).to(query.dtype)


def _exact_dtype(name: str | None, codec: Codec, model: torch.dtype) -> torch.dtype:
    if name is not None:
        if name not in _EXACT_DTYPES:
            raise ValueError(f"exact_dtype must be one of {', '.join(_EXACT_DTYPES)}, got {name!r}")
        return _EXACT_DTYPES[name]
    if codec.lossy:
        return torch.bfloat16 if model.itemsize > 2 else model
    return getattr(codec, "dtype", None) or model


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
