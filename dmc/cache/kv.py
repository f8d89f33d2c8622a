"""The KV cache of an engine: policy x codec over one page pool, for sequences that come and go.

The entries that a query sees follow from positions alone. A prompt's queries see the prompt's entries as the model
computed them. A generated token's query sees the row as `dmc.cache.storage.rows` lays it out: full pages encoded, sinks
and window in full precision, and the accumulating entry, which already contains the token itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dmc.cache.codecs import Codec
from dmc.cache.codecs.layers import per_layer
from dmc.cache.codecs.without_bias import without_key_bias
from dmc.cache.policies import Policy
from dmc.cache.reading import growing
from dmc.cache.reading.choose import choose_readers
from dmc.cache.reading.late_prompt import LatePrompt
from dmc.cache.reading.prompt import Layer, Prompt
from dmc.cache.reading.step import Rope, Step
from dmc.cache.storage import evict, swap
from dmc.cache.storage.check import check
from dmc.cache.storage.full import dtype_named
from dmc.cache.storage.packing import Storage
from dmc.cache.storage.pages import PoolExhausted
from dmc.cache.storage.rows import Rows, Shape
from dmc.kernels.pages.key_bias import KeyBias
from dmc.plugins import check_names

_SINK_TOKENS = 4


class KVCache:
    """The cache; see the head of this file.

    Args:
        shape: sizes and dtype of the model.
        policy: which entries exist.
        codec: how a full page of entries is stored; one codec for all layers, or one per layer.
        slots: largest number of sequences at a time.
        memory: bytes of the page pool; None: the pool grows.
        page_size: entries of an encoded page; None: the codec's own. If the codecs of layers differ: of the average
            layer, see `dmc.cache.storage.packing`.
        sink_tokens: first entries of each row that stay in full precision; None: 4 for lossy codecs, 0 for lossless ones.
        window: newest final entries of each row that always stay in full precision, in addition to the page that is
            filling; None: the codec's own.
        exact_dtype: "fp32", "bf16", "fp16" or "int8", of full-precision entries except the accumulating one; int8: codes with a
            scale for each key and each value (`dmc.cache.storage.full`), for lossy codecs. None: the dtype of the dense codec, or
            of the model. With a lossy codec and an fp32 model None is bf16, unless keys have a bias: the rounding of bf16 (2^-9)
            is far below the codec's error.
        key_bias: of the model's keys, if they have one: lossy codecs then get keys without it.
        device: of everything.

    Attributes:
        shape, policy, codec, key_bias: as given.
        model_shape: of all heads of the model; ``shape`` itself unless a rank has only some of them
            (`dmc.engine.sharded_cache`).
        backend: the backend of this cache (`dmc.kernels.backend`), chosen when the cache is made.
        readers: how new tokens attend in each layer (`dmc.cache.reading.reader`), chosen when it is made.
        rows: tables, counts and pages. No module outside of `dmc.cache` accesses them (tests/test_house.py).

    Raises:
        ValueError: if a size is out of range, ``exact_dtype`` is unknown or not for these codecs, there are not as many codecs as
            layers, the memory is less than one page, or the policy bounds the entries of a row by less than ``sink_tokens`` + 1.
    """

    def __init__(
        self,
        shape: Shape,
        policy: Policy,
        codec: Codec | Sequence[Codec],
        *,
        slots: int,
        memory: int | None = None,
        page_size: int | None = None,
        sink_tokens: int | None = None,
        window: int | None = None,
        exact_dtype: str | None = None,
        key_bias: KeyBias | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        codecs = without_key_bias(per_layer(codec, shape.layers, shape.heads, shape.head_size), key_bias)
        check_names(policy, *codecs)
        lossy = any(one.lossy for one in codecs)
        sink_tokens = _SINK_TOKENS * lossy if sink_tokens is None else sink_tokens
        window = max(one.window for one in codecs) if window is None else window
        for name, value, least in (
            ("page_size", page_size, 1),
            ("sink_tokens", sink_tokens, 0),
            ("window", window, 0),
            ("slots", slots, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if policy.max_entries is not None and policy.max_entries <= sink_tokens:
            raise ValueError(
                f"max_entries={policy.max_entries} holds nothing but the {sink_tokens} sinks (sink_tokens): give at least "
                f"{sink_tokens + 1}, or fewer sinks"
            )
        dtype = dtype_named(exact_dtype, codecs, shape.dtype, biased=key_bias is not None)
        with_positions = policy.evicts_later or any(one.needs_positions for one in codecs)
        storage = Storage(
            sink_tokens,
            window,
            dtype,
            with_positions,
            policy.evicts_later and policy.scored,
            policy.evicts_later,
            policy.ring,
            1 + policy.merges,
            policy.max_entries,
        )
        self.shape, self.policy, self.codec, self.key_bias = shape, policy, codec, key_bias
        self.model_shape = shape
        self.rows = Rows(shape, storage, codecs, page_size=page_size, slots=slots, memory=memory, device=device)
        if self.rows.pool.capacity < 1:
            raise ValueError(f"kv memory of {memory} bytes holds no page of {self.rows.pool.page_bytes} bytes; give it more")
        self.backend, self.readers = choose_readers(self.rows, policy.statistics)
        self._slots = list(range(slots - 1, -1, -1))  # free ones, the next one last

    def bound(self, memory: int, *, tokens: int) -> None:
        """Sets the final size of the pool of an empty cache that may grow.

        Args:
            memory: largest number of bytes. The pool gets no more than ``slots`` sequences of so many tokens can fill.
            tokens: of the longest sequence.

        Raises:
            ValueError: if it holds no page, or the memory cannot be allocated.
        """
        pool, rows = self.rows.pool, self.shape.layers * self.shape.heads
        useful = self.rows.slots * (self.worst_pages(tokens) + rows)  # while a page is encoded a row has one more
        limit = min(memory // pool.page_bytes, useful)
        if limit < 1:
            raise ValueError(f"kv memory of {memory} bytes holds no page of {pool.page_bytes} bytes; give it more")
        pool.bound(limit)

    def place(self, memory: Tensor) -> None:
        """Puts the pool of an empty cache into memory of the caller, which becomes its final size.

        Args:
            memory: uint8, contiguous, on the cache's device; its bytes are used in whole pages, the first one as null page.

        Raises:
            ValueError: if it holds no page but the null page.
        """
        size = self.page_bytes
        pages = memory.numel() // size - 1
        if pages < 1:
            raise ValueError(f"kv memory of {memory.numel()} bytes holds no page of {size} bytes; give it more")
        self.rows.pool.bound(pages, memory.flatten()[: (pages + 1) * size].view(-1, size))

    # ------------------------------------------------------------------------------------ sequences

    @property
    def codec_name(self) -> str:
        """Name of the codec, or the names of the layers' codecs joined by " + "."""
        return " + ".join(dict.fromkeys(packing.codec.name for packing in self.rows.packings))

    @property
    def page_size(self) -> int | list[int]:
        """Entries of an encoded page, of each layer if they differ."""
        sizes = [packing.page_size for packing in self.rows.packings]
        return sizes[0] if len(set(sizes)) == 1 else sizes

    @property
    def sink_tokens(self) -> int:
        """First entries of each row that stay in full precision."""
        return self.rows.storage.sink_tokens

    @property
    def window(self) -> int:
        """Newest entries of each row that always stay in full precision."""
        return self.rows.storage.window

    @property
    def exact_dtype(self) -> torch.dtype:
        """Dtype of full-precision entries."""
        return self.rows.storage.exact_dtype

    @property
    def free_slots(self) -> int:
        """Number of sequences that can still be added."""
        return len(self._slots)

    def prompt(self) -> Prompt | LatePrompt:
        """A new prompt, which goes through `step` in chunks and then into the pool by `load`."""
        if self.policy.ring is not None:
            return LatePrompt(self.shape.layers, self.policy)
        return Prompt(self.shape.layers, self.policy, self.backend)

    def step(
        self,
        slots: Tensor,
        positions: Tensor,
        chunks: Sequence[tuple[Prompt | LatePrompt, int]],
        rope: Rope,
        *,
        merges: bool = True,
        trace: bool = False,
        closed: Tensor | None = None,
    ) -> Step:
        """A step over new tokens of sequences and chunks of prompts; see `Step`."""
        return Step(
            self.rows, self.policy, self.readers, slots, positions, chunks, rope, merges=merges, trace=trace, closed=closed
        )

    def load(self, prompt: Prompt | LatePrompt, *, donor: int | None = None, common: int = 0) -> int:
        """Makes a sequence of a finished prompt and encodes its pages; returns its slot. A slot must be free.

        Args:
            prompt: to load; it can be dropped afterwards.
            donor: slot of a sequence whose text begins with the same tokens: encoded pages that depend on
                these tokens alone are shared with it.
            common: number of these tokens.

        Raises:
            PoolExhausted: if there are not enough pages; nothing is changed then.
        """
        layers = [prompt.final(number) for number in range(self.shape.layers)]
        slot, needed, shared = self._slots[-1], 0, []
        for number, (layer, counts) in enumerate(layers):
            shared.append(self._shared(number, layer, counts, donor, common))
            needed += int(self.rows.pages_of(counts, self.rows.packings[number].page_size).sum() - shared[-1].sum())
        self._check_free(needed)
        try:
            self._fill(prompt, slot, layers, donor, shared)
        except BaseException:  # of a codec, which can be a user's
            self.rows.release(self.rows.all_layers(slot))
            raise
        return self._slots.pop()

    def _fill(
        self, prompt: Prompt | LatePrompt, slot: int, layers: list[tuple[Any, Tensor]], donor: int | None, shared: list[Tensor]
    ) -> None:
        """Writes a prompt's layers (each with its entries per head) into a slot, whose pages are known to be free."""
        for number, (layer, counts) in enumerate(layers):
            index = self._index(number, slot)
            metadata = {"position": layer.positions, "score": layer.scores}
            self.rows.load(
                index,
                layer.keys,
                layer.values,
                counts,
                {name: metadata[name] for name in self.rows.storage.metadata},
                donors=None if donor is None else self._index(number, donor),
                shared=shared[number],
            )
            self.rows.numerators[index], self.rows.z[index] = layer.numerators, layer.z
            if self.rows.storage.scored:
                self.rows.accumulating_score[index] = layer.accumulating_score
            if self.policy.ring is not None:
                self._load_ring(index, prompt, number, layer)

    def close(self, slot: int) -> None:
        """Ends a sequence. Its pages return to the pool, except those that other sequences share."""
        self.rows.release(self.rows.all_layers(slot))
        self._slots.append(slot)

    def fork(self, slot: int) -> int:
        """Makes a second sequence that continues the same text; returns its slot. A slot must be free.

        Encoded pages are shared, unless the policy evicts from them. Everything that can still change is copied.

        Raises:
            PoolExhausted: if there are not enough pages; nothing is changed then.
        """
        rows, share = self.rows, not self.policy.evicts_later
        self._check_free(swap.fork_pages(rows, rows.all_layers(slot), share=share))
        swap.fork(rows, rows.all_layers(slot), rows.all_layers(self._slots[-1]), share=share)
        return self._slots.pop()

    def swap_out(self, slot: int) -> swap.Swapped:
        """Copies a sequence to host memory and ends it here."""
        swapped = swap.read(self.rows, self.rows.all_layers(slot))
        self.close(slot)
        return swapped

    def swap_in(self, swapped: swap.Swapped) -> int:
        """Restores a sequence bit for bit; returns its slot. A slot must be free. It no longer shares pages with others.

        Raises:
            PoolExhausted: if there are not enough pages; nothing is changed then.
        """
        self._check_free(len(swapped.pages))
        swap.write(self.rows, self.rows.all_layers(self._slots[-1]), swapped)
        return self._slots.pop()

    # ------------------------------------------------------------------------------------ accounting

    @property
    def page_bytes(self) -> int:
        """Bytes of a page; all pages have the same size."""
        return self.rows.pool.page_bytes

    @property
    def page_limit(self) -> int | None:
        """Largest number of pages of the pool; None: it grows as needed."""
        return self.rows.pool.limit

    @property
    def pages(self) -> int:
        """Pages of the pool now, free or not."""
        return self.rows.pool.capacity

    @property
    def used_pages(self) -> int:
        """Pages that sequences hold, shared ones counted once. Any thread may read it. Pages that kernels took in a
        step are counted when `free_pages` is read next."""
        return self.rows.pool.used

    @property
    def free_pages(self) -> int:
        """Pages that can be taken without growing the pool. The first read after a step waits for the device.

        Raises:
            RuntimeError: if the page reservation of a step was too small (an internal error); the KV cache is invalid.
        """
        return self.rows.pool.free

    @property
    def codec_error(self) -> tuple[float, float]:
        """Relative error of keys and of values: Frobenius norm of the error / of the entries, over a sample of encoded pages; 0
        before the first."""
        return self.rows.error.relative

    @property
    def codec_error_sums(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Sums of squared errors of keys and values, and of their squares, from which `codec_error` of several caches follows."""
        return self.rows.error.sums

    def worst_pages(self, tokens: int) -> int:
        """Largest number of pages of a sequence with ``tokens`` cached tokens, if nothing is merged except where a bound on
        entries forces it."""
        final = self.policy.most_entries(tokens)
        if self.policy.ring is None:
            final = max(0, final - 1)
        return self.rows.worst_pages(final, evicting=self.policy.evicts_later) * self.shape.heads

    def likely_pages(self, entries: Tensor) -> int:
        """Pages of a sequence whose heads hold so many entries, the accumulating one included: ``[L, H]``, may be fractional."""
        spare = self.policy.evicts_later * entries.numel()  # one more page in each row
        final = (entries.ceil().long() - int(self.policy.ring is None)).clamp(min=0)
        return int(self.rows.pages_of(final, self.rows.page_sizes.to(final.device)[:, None]).sum()) + spare

    def can_append(self, slots: Tensor) -> bool:
        """True if the free pages suffice for one more token of each of some sequences, merged or not."""
        most = 2 * self.shape.layers * self.shape.heads * len(slots)  # a row takes two at most
        return self._fits(most) or self._fits(self.append_pages(slots))

    def can_return(self, swapped: swap.Swapped, *, beside: bool) -> bool:
        """True if the free pages suffice for `swap_in`; with ``beside``, if others run, also for one more page per row."""
        return self._fits(len(swapped.pages) + self.shape.layers * self.shape.heads * beside)

    @property
    def full_precision_pages(self) -> int:
        """Largest number of full-precision pages of a row between two steps."""
        return max(self.rows.full_pages(self.rows.most_full(packing) - 1) for packing in self.rows.packings)

    def crowded(self, slots: Tensor, limits: Tensor) -> Tensor | None:
        """Rows that may not grow (argument ``closed`` of `step`) if sequences ``[S]`` may hold ``limits [S]`` pages each; see
        `dmc.cache.reading.growing.crowded`."""
        return growing.crowded(self.rows, self.rows.indices(slots), limits)

    def pages_of(self, counts: Tensor) -> int:
        """Pages of a sequence with so many final entries, those of ring and sinks included: int64 ``[L, H]``."""
        return int(self.rows.pages_of(counts, self.rows.page_sizes.to(counts.device)[:, None]).sum())

    def append_pages(self, slots: Tensor) -> int:
        """Largest number of pages that one more token of some sequences can take, if every accumulating entry becomes final."""
        return growing.needs(self.rows, self.rows.indices(slots))[0]

    def entries(self, slot: int) -> Tensor:
        """Cache lengths, int64 ``[L, H]``, accumulating entries included."""
        rows, index = self.rows, self.rows.all_layers(slot)
        count = rows.encoded_count[index].long() * rows.row_page_sizes(index) + rows.full_count[index]
        if self.policy.evicts_later:
            there = [evict.entries(rows, some, torch.zeros_like(some)) for some in index.split(self.shape.heads)]
            count = torch.cat([(layer.positions >= 0).sum(-1) for layer in there])
        if self.policy.ring is None:  # with a ring the accumulating entry is one of the full-precision entries
            count = count + (rows.z[index] > 0)
        return count.view(self.shape.layers, self.shape.heads)

    def held(self, slot: int) -> dict[str, int]:
        """Bytes that a sequence holds now, by kind, measured on the tensors.

        "pages": encoded pages, shared ones included; "exact": full-precision pages, unused slots included; "tail":
        numerators and z of accumulating entries; "tables": block tables, unused columns included, and counts.
        """
        rows, index = self.rows, self.rows.all_layers(slot)
        encoded = int(rows.encoded_count[index].sum())
        full = int((rows.full_table[index] != 0).sum())
        tables = ("encoded_table", "full_table", "encoded_count", "full_count")
        return {
            "pages": encoded * rows.pool.page_bytes,
            "exact": full * rows.pool.page_bytes,
            "tail": sum(_bytes(getattr(rows, name)[index]) for name in rows.state if name not in tables),
            "tables": sum(_bytes(getattr(rows, name)[index]) for name in tables),
        }

    def shared_bytes(self, slot: int) -> int:
        """Bytes of a sequence's encoded pages that other sequences share."""
        table = self.rows.encoded_table[self.rows.all_layers(slot)]
        return int((self.rows.pool.owners[table.long()] > 1).sum()) * self.rows.pool.page_bytes

    def dense_bytes(self, tokens: int) -> int:
        """Bytes of an uncompressed bf16 cache of so many tokens, the baseline of every ratio."""
        return 2 * 2 * self.shape.layers * self.shape.heads * self.shape.head_size * tokens

    def check_integrity(self) -> None:
        """Checks that each page's owner count equals the number of table entries that name it, and that tables and counts agree.

        Raises:
            RuntimeError: with the fault; the cache is invalid after that.
        """
        check(self.rows, self._slots, evicting=self.policy.evicts_later)

    # ------------------------------------------------------------------------------------ inside

    def _index(self, layer: int, slot: int) -> Tensor:
        return self.rows.index(layer, torch.tensor([slot], device=self.rows.z.device))

    def _load_ring(self, index: Tensor, prompt: LatePrompt, number: int, layer: Layer) -> None:
        notes = prompt.notes(number)
        self.rows.notes[index, : notes.shape[1]] = notes
        if self.rows.newest.numel() and layer.positions.shape[1] > self.policy.ring:
            self.rows.newest[index] = layer.positions[:, self.policy.ring]

    def _fits(self, pages: int) -> bool:
        """True if so many pages can be taken: every decision about pages."""
        return self.page_limit is None or self._enough(self.free_pages - pages)

    def _enough(self, spare: int) -> bool:
        """True if ``spare`` is not negative; all ranks of an engine give one answer (`dmc.engine.sharded_cache`)."""
        return spare >= 0

    def _check_free(self, pages: int) -> None:
        if not self._fits(pages):
            pool = self.rows.pool
            raise PoolExhausted(f"{pages} pages are needed and {pool.free} of {pool.limit} are free")

    def _shared(self, number: int, layer: Layer, counts: Tensor, donor: int | None, common: int) -> Tensor:
        """Number of first pages of each head that depend on the ``common`` first tokens alone and that the donor holds too."""
        if donor is None or self.policy.evicts or not layer.positions.numel():
            return torch.zeros_like(counts)
        size = self.rows.packings[number].page_size
        encoded, _ = self.rows.split(counts, size)
        column = torch.arange(int(encoded.max()), device=counts.device)
        last = (self.rows.storage.first + (column + 1) * size - 1).clamp(max=layer.positions.shape[1] - 1)
        # An entry is final once the token after its newest one has started another entry.
        # With a window that token must have left it as well.
        settled = (layer.positions[:, last] < common - 1 - (self.policy.ring or 0)) & (column < encoded[:, None])
        return settled.sum(-1).minimum(self.rows.encoded_count[self._index(number, donor)].long())


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
