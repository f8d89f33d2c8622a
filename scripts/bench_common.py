"""What the benchmarks share: times with their spread, the roofline of the device, and what is written down.

Not run alone; see bench_kernels.py, bench_layer.py and bench_decode.py.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def times(run: Callable[[], object], device: torch.device, *, repeats: int, budget: float = 5.0) -> dict[str, float]:
    """Milliseconds of ``run``: median, and the quarters below and above it, over at most ``repeats`` calls.

    One call warms up (and compiles). On CUDA every call is timed on the device, after its L2 cache was overwritten.
    Stops early after ``budget`` seconds, with at least three calls.
    """
    run()
    flush = torch.empty(1 << 26, dtype=torch.int32, device=device) if device.type == "cuda" else None
    found, started = [], time.perf_counter()
    for _ in range(max(3, repeats)):
        if flush is None:
            begin = time.perf_counter()
            run()
            found.append((time.perf_counter() - begin) * 1e3)
        else:
            flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            found.append(begin.elapsed_time(end))
        if len(found) >= 3 and time.perf_counter() - started > budget:
            break
    low, median, high = statistics.quantiles(found, n=4)
    return {"ms": median, "ms_low": low, "ms_high": high, "calls": len(found)}


def roofline(device: torch.device, *, small: bool) -> dict[str, float]:
    """Copy bandwidth (bytes read and written a second, 1 GiB tensors) and matmul rate (FLOP/s, 8192 wide), measured."""
    count, width = (1 << 22, 256) if small else (1 << 30, 8192)
    source = torch.zeros(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = times(lambda: target.copy_(source), device, repeats=20)["ms"]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(width, width, device=device, dtype=dtype) for _ in range(2))
    product = times(lambda: a @ b, device, repeats=20)["ms"]
    return {"copy_bytes_per_s": 2e3 * count / copy, "matmul_flop_per_s": 2e3 * width**3 / product}


def environment(device: torch.device) -> dict[str, str]:
    """Hardware, versions, commit and command."""
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = "none"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"
    return {
        "device": name,
        "torch": torch.__version__,
        "triton": version,
        "python": platform.python_version(),
        "commit": commit or "unknown",
        "command": " ".join(["python", *sys.argv]),
    }


def write(folder: Path, name: str, results: dict, columns: list[str], *, value: str, label: str) -> None:
    """``results`` as NAME.json, its rows as NAME.md and as a bar plot NAME.png of ``value`` over ``label``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    about = results["environment"]
    limits = results["roofline"]
    lines = [
        f"`{about['command']}`, {about['device']}, torch {about['torch']}, triton {about['triton']}, commit {about['commit']}.",
        f"Measured in the same run: copy {limits['copy_bytes_per_s'] / 1e9:.0f} GB/s, "
        f"matmul {limits['matmul_flop_per_s'] / 1e12:.2f} TFLOP/s. Medians; quarters in the JSON.",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
    ]
    for row in results["rows"]:
        lines.append("| " + " | ".join(_shown(row.get(column)) for column in columns) + " |")
    (folder / f"{name}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines), flush=True)
    _plot(folder / f"{name}.png", results["rows"], value, label)


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return "" if value is None else str(value)


def _plot(path: Path, rows: list[dict], value: str, label: str) -> None:
    try:
        import matplotlib
    except ImportError:
        print(f"no plot: matplotlib is not installed ({path.name})", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if row.get(value) is not None]
    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.3 * len(rows)))
    axes.barh([str(row[label]) for row in rows][::-1], [row[value] for row in rows][::-1])
    axes.set_xlabel(value)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
