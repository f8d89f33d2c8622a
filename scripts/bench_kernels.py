"""Times of the kernels next to their bounds and their baselines, in one run.

    python scripts/bench_kernels.py                     # on a GPU, shapes of Llama 2 7B; about 5 minutes
    python scripts/bench_kernels.py --tokens 32768 --only attention
    python scripts/bench_kernels.py --device cpu --small   # a trial of the script itself: the numbers mean nothing

Sections: scan (eq. 9 with rotation, against its reference and a copy of the same bytes), attention (merging at once and late,
each with Triton and with sdpa, and PyTorch's plain causal attention, forward and backward) and prefill (closed entries at CR 4
against flash attention over all keys). Writes kernels.json, kernels.md and kernels.png to --out.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from bench_common import ROOT, environment, roofline, times, write

sys.path.insert(0, str(ROOT))

from dmc import functional as fn  # noqa: E402
from dmc.kernels.attention.attend import dmc_attention, late_attention  # noqa: E402
from dmc.kernels.backend import choose  # noqa: E402
from dmc.kernels.prefill.prefill import prefill_attention  # noqa: E402
from dmc.kernels.scan.merge import merge, merge_reference  # noqa: E402
from dmc.rope import Rope  # noqa: E402

SECTIONS = ("scan", "attention", "prefill")
COLUMNS = ["section", "what", "pass", "ms", "of bound", "of plain"]


def main() -> None:
    """Wires only."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.add_argument("--tokens", type=int, default=4096, help="length of the sequence (default 4096)")
    parser.add_argument("--heads", type=int, default=32, help="query heads (default 32)")
    parser.add_argument("--kv-heads", type=int, default=32, help="key/value heads (default 32)")
    parser.add_argument("--head-size", type=int, default=128, help="default 128")
    parser.add_argument("--window", type=int, default=64, help="recent tokens of late merging (default 64)")
    parser.add_argument("--only", choices=SECTIONS, help="one section; default all")
    parser.add_argument("--repeats", type=int, default=30, help="timed calls at most (default 30)")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to try the script")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="directory of the results (default runs/bench)")
    args = parser.parse_args()
    if args.small:
        args.tokens, args.heads, args.kv_heads, args.head_size, args.repeats = 256, 4, 2, 16, 3
    if args.heads % args.kv_heads:
        parser.error(f"--heads {args.heads} is not a multiple of --kv-heads {args.kv_heads}: change one")
    device = torch.device(args.device)
    bench = Bench(args, device)
    rows = [row for section in SECTIONS if args.only in (None, section) for row in getattr(bench, section)()]
    results = {"environment": environment(device), "roofline": bench.limits, "shape": bench.shape, "rows": rows}
    write(args.out, "kernels", results, COLUMNS, value="ms", label="what")


class Bench:
    """One problem and the rows of its sections."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.device, self.repeats, self.window = device, args.repeats, args.window
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.shape = {"tokens": args.tokens, "heads": args.heads, "kv_heads": args.kv_heads, "head_size": args.head_size}
        self.limits = roofline(device, small=args.small)
        g = torch.Generator(device).manual_seed(0)
        tokens, heads, size = args.tokens, args.kv_heads, args.head_size
        draw = lambda h: torch.randn(1, h, tokens, size, device=device, dtype=self.dtype, generator=g)  # noqa: E731
        self.query, self.key, self.value = draw(args.heads), draw(heads), draw(heads)
        logits = torch.randn(1, heads, tokens, device=device, generator=g) * 8 + 5  # merges three tokens of four
        self.hard = fn.mask_starts((logits > 0).float(), None)
        self.alpha, self.log_keep = torch.sigmoid(logits), F.logsigmoid(-logits)
        self.omega = torch.sigmoid(torch.randn(1, heads, tokens, device=device, generator=g) + 2)
        frequencies = 10000.0 ** (-torch.arange(0, size, 2) / size)
        self.rope = Rope(frequencies, dtype=torch.float32, device=device)(torch.arange(tokens, device=device))
        self.triton = choose(self.query) == "triton"

    def scan(self) -> Iterator[dict]:
        """Merge and rotation against the copy of as many bytes."""
        moved = 2 * 2 * self.key.numel() * self.key.element_size()  # k and v once in, once out
        inputs = [x.detach().requires_grad_() for x in (self.key, self.value, self.alpha, self.omega)]
        known = {"twin": lambda *x: merge_reference(*x, rope=self.rope)}
        if self.triton:
            known = {"triton": lambda *x: merge(*x, rope=self.rope, backend="triton"), **known}
        for name, run in known.items():
            yield from self._both("scan", name, run, inputs, moved / self.limits["copy_bytes_per_s"] * 1e3, 2.5)

    def attention(self) -> Iterator[dict]:
        """DMC's whole attention, merge included, of each backend, at once and late; and plain causal attention of PyTorch."""
        plain = [x.detach().requires_grad_() for x in (self.query, self.key, self.value)]
        flops = 2 * self.query.shape[1] * self.shape["tokens"] ** 2 * self.shape["head_size"]  # two causal products
        bound = flops / self.limits["matmul_flop_per_s"] * 1e3
        causal = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # noqa: E731
        base = list(self._both("attention", "plain: PyTorch's causal attention", causal, plain, bound, 3.5))
        yield from base
        inputs = [*plain, *(x.detach().requires_grad_() for x in (self.alpha, self.omega, self.log_keep))]
        for name in ["triton", "torch"] if self.triton else ["torch"]:

            def at_once(q, k, v, a, w, keep, name=name):  # noqa: ANN001, ANN202
                return dmc_attention(q, k, v, a, w, rope=self.rope, log_keep=keep, backend=name)

            def late(q, k, v, a, w, keep, name=name):  # noqa: ANN001, ANN202
                return late_attention(q, k, v, a, w, window=self.window, rope=self.rope, log_keep=keep, backend=name)

            for what, run in (("DMC", at_once), ("late merging", late)):
                for row, other in zip(self._both("attention", f"{what}: {name}", run, inputs, bound, 3.5), base, strict=True):
                    yield {**row, "of plain": row["ms"] / other["ms"]}

    def prefill(self) -> Iterator[dict]:
        """Closed entries and own states against causal attention over all keys; no gradients."""
        heads, tokens = self.key.shape[1:3]
        closes = F.pad(self.hard[0, :, 1:] == 0, (0, 1))
        most = int(closes.sum(1).max())
        order = torch.where(closes, 0, 1).argsort(dim=1, stable=True)[:, :most]
        places = torch.where(closes.gather(1, order), order, tokens).int()
        with torch.no_grad():
            own_keys, own_values = (x[0] for x in merge(self.key, self.value, self.hard, self.omega, rope=self.rope))
            take = order[..., None].expand(-1, -1, own_keys.shape[-1])
            inputs = (
                self.query[0].unflatten(0, (heads, -1)),
                own_keys.gather(1, take),
                own_values.gather(1, take),
                places,
                own_keys,
                own_values,
                torch.arange(tokens, dtype=torch.int32, device=self.device),
            )
            plain = times(
                lambda: F.scaled_dot_product_attention(self.query, self.key, self.value, is_causal=True, enable_gqa=True),
                self.device,
                repeats=self.repeats,
            )
            yield {"section": "prefill", "what": "plain: all keys", "pass": "forward", **plain, "of plain": 1.0}
            ours = times(lambda: prefill_attention(*inputs), self.device, repeats=self.repeats)
        ratio = tokens * heads / int(closes.sum())
        name = f"{'triton' if self.triton else 'twin'}: CR {ratio:.2f}"
        yield {"section": "prefill", "what": name, "pass": "forward", **ours, "of plain": ours["ms"] / plain["ms"]}

    def _both(
        self, section: str, name: str, run: Callable, inputs: list[torch.Tensor], bound: float, backward: float
    ) -> Iterator[dict]:
        """Rows of the forward pass, and of forward and backward together (bound: ``backward`` times the forward's)."""
        with torch.no_grad():
            found = times(lambda: run(*inputs), self.device, repeats=self.repeats)
        yield {"section": section, "what": name, "pass": "forward", **found, "of bound": found["ms"] / bound}
        weights: list[torch.Tensor] = []

        def step() -> None:
            out = run(*inputs)
            out = out if isinstance(out, tuple) else (out,)
            if not weights:
                weights.extend(torch.randn_like(x) for x in out)
            torch.autograd.grad(out, inputs, weights)

        found = times(step, self.device, repeats=self.repeats)
        yield {"section": section, "what": name, "pass": "both", **found, "of bound": found["ms"] / (bound * backward)}
        gc.collect()


if __name__ == "__main__":
    main()
