"""Decode over compressed pages: bandwidth of the attention kernel, and steps of a model at the largest batch that fits.

    python scripts/bench_decode.py                       # on a GPU, shapes of Llama 2 7B, context 4,096
    python scripts/bench_decode.py --only kernel         # or grow, or model
    python scripts/bench_decode.py --device cpu --small  # a trial of the script itself: the numbers mean nothing

kernel: bytes of keys, values and tables that must be read, over the time, next to the copy bandwidth of the same run (on CUDA
replayed as a graph: launches from Python take longer than the kernels);
CR 1 dense, then CR 4 with dense, int8, fp8, TCQ and GEAR pages whose rows differ in length as those of a retrofit do. "gear"
is its published recipe in 4 bits (keys by channel, values by token, 2 % outliers, rank 4), "tcq-4bit" the preset of that name.
grow: what a step does to one layer's cache before it attends, at CR 4: a token appended to every row (a quarter of them close
their accumulating entry) and full pages encoded (one row of PAGE closes an entry that fills one); next to the attention of the
same cache, as tokens/s of both together.
model: one decode step (all matmuls and attention of every layer, random weights, on CUDA replayed as a graph; no
sampling, no scheduler) at the largest batch whose pages fit next to the weights. Entries are random, pages scattered.
Writes decode.json, decode.md and decode.png to --out.
"""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from bench_common import ROOT, environment, roofline, times, write
from torch import Tensor

sys.path.insert(0, str(ROOT))

from dmc.cache import KVCache, Shape, codec, policy  # noqa: E402
from dmc.cache.reading import growing  # noqa: E402
from dmc.cache.reading.onpages import OnPages  # noqa: E402
from dmc.cache.storage.pages import Layout  # noqa: E402
from dmc.kernels.append.append import append_tokens  # noqa: E402
from dmc.kernels.backend import choose  # noqa: E402
from dmc.kernels.decode.decode import decode_attention  # noqa: E402
from dmc.kernels.encode.encode import encode_pages  # noqa: E402
from dmc.kernels.pages.format import PageFormat  # noqa: E402
from dmc.kernels.pages.paged import Paged  # noqa: E402

COLUMNS = ["section", "what", "batch", "ms", "put back ms", "append ms", "encode ms", "GB/s", "of copy", "tokens/s", "of CR 1"]
CASES = (("dense", 1), ("dense", 4), ("int8", 4), ("fp8", 4), ("tcq-4bit", 4), ("gear", 4))
GROWING = (("dense", 4), ("int8", 4), ("fp8", 4), ("tcq-4bit", 4), ("tcq-2bit", 4))
PER_FULL = 16  # full-precision entries per page


def main() -> None:
    """Wires only."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.add_argument("--context", type=int, default=4096, help="tokens of each sequence (default 4096)")
    parser.add_argument("--batch", type=int, default=16, help="sequences, of the kernel section (default 16)")
    parser.add_argument("--layers", type=int, default=32, help="default 32")
    parser.add_argument("--hidden", type=int, default=4096, help="default 4096")
    parser.add_argument("--inner", type=int, default=11008, help="of the MLP (default 11008)")
    parser.add_argument("--heads", type=int, default=32, help="query heads (default 32)")
    parser.add_argument("--kv-heads", type=int, default=32, help="key/value heads (default 32)")
    parser.add_argument("--page-size", type=int, default=32, help="entries of an encoded page (default 32)")
    parser.add_argument(
        "--memory", type=float, default=None, help="GB for the pages of the model section (default: what is free, less 2)"
    )
    parser.add_argument("--only", choices=("kernel", "grow", "model"), help="one section; default all")
    parser.add_argument("--repeats", type=int, default=30, help="timed calls at most (default 30)")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to try the script")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="directory of the results (default runs/bench)")
    args = parser.parse_args()
    if args.small:
        for name, value in dict(
            context=128, batch=2, layers=2, hidden=64, inner=128, heads=4, kv_heads=2, page_size=16, memory=2e-4, repeats=3
        ).items():
            setattr(args, name, value)
    device = torch.device(args.device)
    limits, rows = roofline(device, small=args.small), []
    for section, run, cases in (("kernel", kernel, CASES), ("grow", grow, GROWING), ("model", model, CASES)):
        if args.only not in (None, section):
            continue
        for kind, cr in cases:
            row = {"section": section, "what": f"CR {cr} {kind}", **run(args, device, limits, kind, cr)}
            base = next((r for r in rows if r["section"] == section), row)
            rows.append({**row, "of CR 1": row["tokens/s"] / base["tokens/s"]})
    write(
        args.out,
        "decode",
        {"environment": environment(device), "roofline": limits, "rows": rows},
        COLUMNS,
        value="tokens/s",
        label="what",
    )


def kernel(args: argparse.Namespace, device: torch.device, limits: dict, kind: str, cr: int) -> dict:
    """The attention of one layer."""
    work = _dtype(device)
    cache, nbytes = pages(args, device, kind, cr, args.batch, layers=1)
    rows, groups, size = args.batch * args.kv_heads, args.heads // args.kv_heads, args.hidden // args.heads
    query, own = torch.randn(rows, groups, size, device=device, dtype=work), torch.randn(rows, size, device=device, dtype=work)
    index = torch.arange(rows, device=device)
    run = _graphed(lambda: decode_attention(query, own, own, index, cache), device)
    found = times(run, device, repeats=args.repeats)
    rate = nbytes / found["ms"] * 1e3
    # A copy moves each byte twice, attention reads it once: both are bytes that cross the memory bus in a second.
    return {
        "batch": args.batch,
        **found,
        "GB/s": rate / 1e9,
        "of copy": rate / limits["copy_bytes_per_s"],
        "tokens/s": args.batch / found["ms"] * 1e3,
        "bytes": nbytes,
    }


def grow(args: argparse.Namespace, device: torch.device, limits: dict, kind: str, cr: int) -> dict:
    """Append, encode and attention of one layer. Each call begins with putting the cache back, which tokens/s leave out."""
    work, size, count = _dtype(device), args.hidden // args.heads, args.batch * args.kv_heads
    cache = KVCache(
        Shape(1, args.kv_heads, size, work),
        policy("dmc"),
        codec(kind),
        slots=args.batch,
        device=device,
        page_size=args.page_size if args.small else None,
    )
    rows, index = cache.rows, torch.arange(count, device=device)
    packing, store = rows.packings[0], rows.storage
    page, least = packing.page_size, store.sink_tokens + store.window
    g = torch.Generator().manual_seed(0)
    spread = torch.arange(count)[torch.randperm(count, generator=g)] % page  # one row of a page is one entry short of full
    lengths = (least + (args.context // cr // page) * page + spread).to(device)
    for some in index.split(256):  # encoding takes memory
        entries = torch.randn(2, len(some), int(lengths.max()), size, device=device, dtype=work)
        rows.load(some, *entries, lengths[some], {})
    rows.z.fill_(1.0)
    alpha = torch.where((spread == page - 1) | (torch.rand(count, generator=g) < 1 / cr), 0.0, 1.0).to(device)
    growing.make_room(rows, index[None])
    kernels = OnPages(packing, cache.backend, writes=True)
    state = kernels.growing(rows)
    query = torch.randn(count, args.heads // args.kv_heads, size, device=device, dtype=work)
    places, table = torch.ones(args.batch, dtype=torch.int64, device=device), torch.randn(2, 2, size, device=device)
    key, value = torch.randn(2, count, size, device=device, dtype=work)
    changed = [
        getattr(state, name)
        for name in ("numerators", "z", "full_count", "encoded_count", "full_table", "encoded_table", "stack", "free", "owners")
    ]
    kept = [x.clone() for x in changed]

    def back() -> None:
        for x, before in zip(changed, kept, strict=True):
            x.copy_(before)

    def appended() -> tuple[Tensor, Tensor]:
        back()
        return append_tokens(state, index, key, value, alpha, 1 - alpha / 2, places, tuple(table))

    def encoded() -> tuple[Tensor, Tensor]:
        own = appended()
        encode_pages(state, index)
        return own

    def attended() -> Tensor:
        return kernels.attend(rows, index, query, *encoded())[0]

    runs = (back, appended, encoded, attended)
    found = [times(_graphed(run, device), device, repeats=args.repeats) for run in runs]
    if int(state.failed) or int((state.encoded_count[:count] > kept[3][:count]).sum()) < count // page:
        raise SystemExit("error: the cache did not grow as it was meant to; its numbers would mean nothing")
    before, append, encode, last = (one["ms"] for one in found)
    return {
        "batch": args.batch,
        **found[3],
        "put back ms": before,
        "append ms": append - before,
        "encode ms": encode - append,
        "tokens/s": args.batch / (last - before) * 1e3,
    }


def model(args: argparse.Namespace, device: torch.device, limits: dict, kind: str, cr: int) -> dict:
    """A decode step of the whole model at the largest batch that fits."""
    if device.type == "cuda":  # what the last case held
        gc.collect()
        torch.cuda.empty_cache()
    work, size = _dtype(device), args.hidden // args.heads
    shapes = (
        ((args.heads + 2 * args.kv_heads) * size, args.hidden),
        (args.hidden, args.hidden),
        (2 * args.inner, args.hidden),
        (args.hidden, args.inner),
    )
    weights = [[torch.randn(s, device=device, dtype=work) * 0.01 for s in shapes] for _ in range(args.layers)]
    free = torch.cuda.mem_get_info(device)[0] - 2e9 if device.type == "cuda" else 0.0
    budget = free if args.memory is None else args.memory * 1e9
    _, one = pages(args, device, kind, cr, 1, layers=1)
    batch = int(budget // (one * 1.05 * args.layers))
    if batch < 1:
        raise SystemExit(f"error: --memory {args.memory} holds no sequence of {args.context} tokens; give it more")
    cache, nbytes = pages(args, device, kind, cr, batch, layers=args.layers)
    x = torch.randn(batch, args.hidden, device=device, dtype=work)
    index = torch.arange(batch * args.kv_heads, device=device)
    norm = torch.ones(args.hidden, device=device, dtype=work)

    def step() -> Tensor:
        hidden = x
        for layer, (qkv, out, gate_up, down) in enumerate(weights):
            query, key, value = F.linear(F.rms_norm(hidden, norm.shape, norm), qkv).split(
                [n * size for n in (args.heads, args.kv_heads, args.kv_heads)], dim=-1
            )
            rows = batch * args.kv_heads
            mixed = decode_attention(
                query.reshape(rows, -1, size), key.reshape(rows, size), value.reshape(rows, size), index + layer * rows, cache
            )
            hidden = hidden + F.linear(mixed.reshape(batch, -1), out)
            gate, up = F.linear(F.rms_norm(hidden, norm.shape, norm), gate_up).chunk(2, dim=-1)
            hidden = hidden + F.linear(F.silu(gate) * up, down)
        return hidden

    with torch.no_grad():
        found = times(_graphed(step, device), device, repeats=args.repeats)
    return {"batch": batch, **found, "tokens/s": batch / found["ms"] * 1e3, "bytes": nbytes}


def pages(args: argparse.Namespace, device: torch.device, kind: str, cr: int, batch: int, *, layers: int) -> tuple[Paged, int]:
    """Random pages for ``layers * batch * kv_heads`` rows, and the bytes that one pass over them must read.

    At CR 1 every row holds the context; else rows hold between a fifth and twice the mean, as heads of retrofits do.
    """
    work, size, page = _dtype(device), args.hidden // args.heads, args.page_size
    stored = codec("gear", backbone="kivi") if kind == "gear" else codec(kind)
    page = max(stored.page_size, page) if device.type == "cuda" else page
    rows, mean = layers * batch * args.kv_heads, args.context / cr
    g = torch.Generator().manual_seed(0)
    entries = torch.full((rows,), mean)
    if cr > 1:
        entries = mean * (0.2 + 1.8 * torch.rand(rows, generator=g) ** 1.25)
        entries *= mean / entries.mean()
    entries = entries.long().clamp(1, args.context)
    counts, exact = (entries // page).int(), (entries % page).int()
    tables = []
    for count, per in ((counts, 1), (exact, PER_FULL)):
        need = -(-count // per)
        table = torch.zeros(rows, max(1, int(need.max())), dtype=torch.int32)
        held = torch.arange(table.shape[1]) < need[:, None]
        table[held] = (torch.randperm(int(held.sum()), generator=g) + 1).int()
        tables.append(table.to(device))
    number = [int((table > 0).sum()) + 1 for table in tables]
    opened = {part: torch.zeros(number[1], PER_FULL, size, device=device, dtype=work) for part in "kv"}
    made = stored.page_format(page, size, work, device)
    encoded = random_fields(number[0], made, device)
    per_entry = sum(x[0].numel() * x.element_size() for x in encoded.values()) / page
    nbytes = int(counts.sum()) * page * per_entry + int(exact.sum()) * 2 * size * work.itemsize
    nbytes += 4 * sum(int((table > 0).sum()) for table in tables)
    return Paged(made, encoded, opened, *tables, counts.to(device), exact.to(device)), int(nbytes)


def random_fields(count: int, made: PageFormat, device: torch.device) -> dict[str, Tensor]:
    """Random pages of a format, laid out as the cache does: codes and entries; scales and factors are 0.01."""
    layout = Layout(dict(made.fields))
    fields = layout.views(torch.empty(count, layout.nbytes, dtype=torch.uint8, device=device).random_(0, 256))
    for name, field in fields.items():
        if name in ("k", "v"):
            field.normal_()
        elif field.dtype == torch.bfloat16:
            field.fill_(0.01)
        elif name.endswith(("scale", "numbers")):
            field.random_(0, 64)
        elif name.endswith("indices"):
            field.random_(0, 16)
    return fields


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _graphed(step, device: torch.device):  # noqa: ANN001, ANN202
    """The step as a CUDA graph, where kernels without host syncs run it."""
    if device.type != "cuda" or choose(torch.empty(1, 128, device=device, dtype=torch.bfloat16)) != "triton":
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # what the step reads is being made there
    with torch.cuda.stream(stream):
        step()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


if __name__ == "__main__":
    main()
