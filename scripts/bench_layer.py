"""One Llama layer's training step with DMC next to the same layer without: time and peak memory.

    python scripts/bench_layer.py                        # on a GPU: a Llama 2 7B layer, 4,096 tokens
    python scripts/bench_layer.py --tokens 32768         # the same at 32K
    python scripts/bench_layer.py --device cpu --small   # a trial of the script itself: the numbers mean nothing

A step is forward and backward of norm, projections, attention and MLP, gradients of all weights included, in bf16, of a few
layers on top of each other (times and memory are those of one), so that the device is kept busy as in training. DMC adds
its decision head, the relaxed decisions with noise, the merge and the biased attention. The plain layer runs PyTorch's
fastest causal attention. Writes layer.json, layer.md and layer.png to --out.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from bench_common import ROOT, environment, roofline, times, write
from torch import Tensor, nn

sys.path.insert(0, str(ROOT))

from dmc.kernels.attention.attend import dmc_attention, plain_attention  # noqa: E402
from dmc.kernels.backend import choose  # noqa: E402
from dmc.kernels.decisions.decide import Drawn, soft_decisions  # noqa: E402
from dmc.rope import Rope  # noqa: E402

COLUMNS = ["what", "tokens", "ms", "of plain", "peak MB", "memory of plain", "tokens/s"]


class Layer(nn.Module):
    """A Llama layer; ``backend`` None: without DMC."""

    def __init__(self, hidden: int, inner: int, heads: int, kv_heads: int, backend: str | None) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size, self.backend = heads, kv_heads, hidden // heads, backend
        self.qkv = nn.Linear(hidden, (heads + 2 * kv_heads) * self.size, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)
        self.gate_up, self.down = nn.Linear(hidden, 2 * inner, bias=False), nn.Linear(inner, hidden, bias=False)
        self.norms = nn.ParameterList(nn.Parameter(torch.ones(hidden)) for _ in range(2))
        self.decision = nn.Linear(hidden, 2 * kv_heads, bias=False) if backend else None

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """``[B, T, hidden]`` → the same."""
        normed = F.rms_norm(x, x.shape[-1:], self.norms[0])
        query, key, value = (
            part.unflatten(-1, (-1, self.size)).transpose(1, 2)
            for part in self.qkv(normed).split([n * self.size for n in (self.heads, self.kv_heads, self.kv_heads)], dim=-1)
        )
        if self.decision is None:
            mixed = plain_attention(query, key, value, rope=rope)
        else:
            logits, weights = (10 * self.decision(normed).float().unflatten(-1, (-1, 2)).permute(3, 0, 2, 1)).unbind(0)
            first = torch.arange(x.shape[1], device=x.device) == 0
            drawn = Drawn(0, 0, 0, torch.arange(len(x), device=x.device), 0, torch.arange(x.shape[1], device=x.device))
            made = soft_decisions(
                logits, weights, first.expand(len(x), 1, -1), drawn, offset=2.5, temperature=0.1, backend=self.backend
            )
            mixed = dmc_attention(
                query, key, value, made.alpha, made.omega, rope=rope, log_keep=made.log_keep, backend=self.backend
            )
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(F.rms_norm(x, x.shape[-1:], self.norms[1])).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


def main() -> None:
    """Wires only."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.add_argument("--tokens", type=int, default=4096, help="length of the sequence (default 4096)")
    parser.add_argument("--hidden", type=int, default=4096, help="default 4096")
    parser.add_argument("--inner", type=int, default=11008, help="of the MLP (default 11008)")
    parser.add_argument("--heads", type=int, default=32, help="query heads (default 32)")
    parser.add_argument("--kv-heads", type=int, default=32, help="key/value heads (default 32)")
    parser.add_argument("--layers", type=int, default=4, help="in a step (default 4)")
    parser.add_argument("--repeats", type=int, default=20, help="timed steps at most (default 20)")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to try the script")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="directory of the results (default runs/bench)")
    args = parser.parse_args()
    if args.small:
        args.tokens, args.hidden, args.inner, args.heads, args.kv_heads, args.repeats = 128, 64, 128, 4, 2, 3
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    triton = choose(torch.empty(1, args.hidden // args.heads, device=device, dtype=dtype)) == "triton"
    rows: list[dict] = []
    for backend in (None, *(("triton", "torch") if triton else ("torch",))):
        rows.append(measure(args, device, dtype, backend, rows[0] if rows else None))
    results = {"environment": environment(device), "roofline": roofline(device, small=args.small), "rows": rows}
    write(args.out, "layer", results, COLUMNS, value="ms", label="what")


def measure(args: argparse.Namespace, device: torch.device, dtype: torch.dtype, backend: str | None, plain: dict | None) -> dict:
    """One row: time of a step, and its peak memory over what is held before it, of each layer."""
    torch.manual_seed(0)
    shape = args.hidden, args.inner, args.heads, args.kv_heads, backend
    layers = nn.ModuleList(Layer(*shape) for _ in range(args.layers)).to(device, dtype)
    x = torch.randn(1, args.tokens, args.hidden, device=device, dtype=dtype, requires_grad=True)
    size = args.hidden // args.heads
    frequencies = 10000.0 ** (-torch.arange(0, size, 2) / size)
    rope = Rope(frequencies, dtype=torch.float32, device=device)(torch.arange(args.tokens, device=device))
    weight = torch.randn_like(x)

    def step() -> None:
        out = x
        for layer in layers:
            out = layer(out, rope)
        torch.autograd.grad(out, [x, *layers.parameters()], weight)

    found, peak = times(step, device, repeats=args.repeats), None
    found |= {name: found[name] / args.layers for name in ("ms", "ms_low", "ms_high")}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        peak = (torch.cuda.max_memory_allocated() - before) / 1e6 / args.layers
    row = {
        "what": f"DMC: {backend}" if backend else "plain",
        "tokens": args.tokens,
        **found,
        "peak MB": peak,
        "tokens/s": args.tokens / found["ms"] * 1e3,
    }
    base = plain or row
    return {**row, "of plain": row["ms"] / base["ms"], "memory of plain": peak and peak / base["peak MB"]}


if __name__ == "__main__":
    main()
