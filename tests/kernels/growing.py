"""What the tests of append and encode share: caches that hold a prompt, and their rows as the kernels see them."""

import dataclasses

import torch

from dmc.cache import KVCache, Shape, codec, policy
from dmc.cache.reading.onpages import OnPages
from dmc.cache.storage.rows import ragged
from dmc.functional import rotate
from dmc.kernels.append.append import append_tokens
from dmc.kernels.backend import Backend
from dmc.rope import Rope
from tests.cache.stored import frequencies
from tests.kernels.conftest import DEVICE

LAYERS, HEADS = 2, 3
NOBODY = torch.empty(0, dtype=torch.int64)
CLOSE = {torch.bfloat16: {"rtol": 1e-2, "atol": 1e-3}, torch.float16: {"rtol": 2e-3, "atol": 1e-4}}  # one rounding


def rope(size):
    return Rope(frequencies(size, 100.0), device=DEVICE)


def cache(name, *, size=8, slots=3, pages=400, columns=16, **settings):
    """A cache with a pool of so many pages, whose tables need not grow; ``settings`` of KVCache, ``codec`` of the codec."""
    sizes = {"page_size": 4, "sink_tokens": 2, "window": 1} | settings
    changes = sizes.pop("codec", {})
    probe = KVCache(Shape(LAYERS, HEADS, size, torch.float32), policy("dmc"), codec(name, **changes), slots=1, **sizes)
    made = KVCache(
        Shape(LAYERS, HEADS, size, torch.float32),
        policy("dmc"),
        codec(name, **changes),
        slots=slots,
        memory=pages * probe.rows.pool.page_bytes,
        device=DEVICE,
        **sizes,
    )
    made.rows.widen(columns)
    return made


def tokens(count, size, seed, *, merging=0.5):
    """(key, value ``[count, H, D]``, alpha, omega ``[count, H]``) for each layer."""
    g = torch.Generator().manual_seed(seed)
    scale = torch.rand(size, generator=g) * 4 + 0.1
    return [
        [
            x.to(DEVICE)
            for x in (
                torch.randn(count, HEADS, size, generator=g) * scale,
                torch.randn(count, HEADS, size, generator=g),
                (torch.rand(count, HEADS, generator=g) < merging).float(),
                torch.randn(count, HEADS, generator=g).sigmoid(),
            )
        ]
        for _ in range(LAYERS)
    ]


def step(held, slots, places, parts, turn):
    """What the cache itself does with one more token of each slot."""
    attend = held.step(torch.tensor(slots, device=DEVICE), torch.tensor(places, device=DEVICE), [], turn)
    for layer, (key, value, alpha, omega) in enumerate(parts):
        attend(layer, torch.zeros_like(key), key, value, alpha, omega)


def load(held, layers, length, turn):
    """A sequence whose prompt is the first ``length`` tokens → its slot."""
    made = held.prompt()
    attend = held.step(NOBODY.to(DEVICE), NOBODY.to(DEVICE), [(made, length)], turn)
    for number, parts in enumerate(layers):
        key, value, alpha, omega = (part[:length] for part in parts)
        attend(number, torch.zeros_like(key), key, value, alpha, omega)
    return held.load(made)


def growing(held):
    """The rows of a cache, one layout for all layers, as the kernels see them.

    The codec runs on the CPU: on CUDA PyTorch divides by a number through its reciprocal, which is less exact.
    """
    packing = held.rows.packings[0]

    def encode(keys, values):
        return {name: x.to(DEVICE) for name, x in packing.codec.encode(keys.cpu(), values.cpu()).tensors.items()}

    state = OnPages(packing, Backend.TRITON, writes=True).growing(held.rows)
    return dataclasses.replace(state, format=dataclasses.replace(state.format, encode=encode))


def back(held):
    """The cache takes over what the kernels did, and checks itself."""
    held.check_integrity()


def append(state, held, layer, slots, places, part, turn, *, table=128, **options):
    """One token of each slot into one layer: key, value ``[S, H, D]``, alpha, omega ``[S, H]``."""
    held.rows.pool.lend()
    index = held.rows.index(layer, torch.tensor(slots, device=DEVICE))
    key, value, alpha, omega = (x.flatten(0, 1) for x in part)
    tables = turn(torch.arange(table, device=DEVICE))
    return append_tokens(state, index, key, value, alpha, omega, torch.tensor(places, device=DEVICE), tables, **options)


def content(held):
    """Everything that rows hold but the names of their pages: counts, accumulating and full-precision entries, encoded pages."""
    rows = held.rows
    every = torch.arange(len(rows.z), device=DEVICE)
    keys, values, valid = rows.full_entries(every)
    found = {"exact": rows.full_count, "closed": rows.encoded_count, "z": rows.z, "numerators": rows.numerators}
    found |= {"keys": keys.where(valid[..., None], 0), "values": values.where(valid[..., None], 0)}
    pages, _ = rows.encoded_pages(every)
    return {k: x.clone() for k, x in found.items()}, rows.blocks(pages, rows.packings[0])


def same(ours, theirs, *, bits=False):
    """Two `content`s without their pages: equal up to the rounding of full-precision entries, or altogether."""
    for name, x in ours.items():
        close = {"rtol": 0.0, "atol": 0.0}
        if not bits and x.is_floating_point():
            close = CLOSE.get(x.dtype, {"rtol": 1e-5, "atol": 1e-5})
        torch.testing.assert_close(x, theirs[name], **close, msg=lambda text, name=name: f"{name}: {text}")


def own_states(held, layer, slots, places, turn):
    """The accumulating entries of a layer after a step, keys rotated to their positions: what `append_tokens` returns."""
    rows, index = held.rows, held.rows.index(layer, torch.tensor(slots, device=DEVICE))
    mean = (rows.numerators[index] / rows.z[index, None]).view(len(slots), HEADS, -1)
    keys, values = mean.chunk(2, dim=-1)
    table = turn(torch.tensor(places, device=DEVICE))
    return rotate(keys.transpose(0, 1), table).transpose(0, 1).flatten(0, 1), values.flatten(0, 1)


def fill(held, counts, keys, values):
    """Gives the first rows so many full-precision entries, out of ``[rows, N, D]``; all slots are then taken."""
    rows, every = held.rows, torch.arange(len(counts), device=DEVICE)
    counts = torch.tensor(counts, device=DEVICE)
    rows._new_full_pages(*ragged(rows.full_pages(counts)))
    owner, offset = ragged(counts)
    rows.write_full(owner, offset, keys.to(DEVICE)[owner, offset], values.to(DEVICE)[owner, offset], {})
    rows.full_count[every] = counts.int()
    rows.z[every], rows.numerators[every] = 1.0, 1.0
    held._slots.clear()
