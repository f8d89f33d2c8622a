"""Size of the page pool where nobody gives one: ``kv_memory="auto"``, the default of the commands and the server."""

from __future__ import annotations

from pathlib import Path

import torch

AUTO = "auto"
GPU_SHARE = 0.9  # of the GPU memory that is free once the model is loaded
CPU_SHARE = 0.5  # of the RAM that is available once the model is loaded, for all ranks of a machine together
CPU_MOST = 16 << 30  # bytes

_CGROUP = Path("/sys/fs/cgroup")


def check(kv_memory: int | str | None) -> None:
    """Raises ValueError if a setting is neither a number of bytes, nor "auto", nor None."""
    if isinstance(kv_memory, bool) or not (kv_memory is None or kv_memory == AUTO or isinstance(kv_memory, int)):
        raise ValueError(f"kv_memory must be a number of bytes, {AUTO!r} or None, got {kv_memory!r}")


def automatic(device: torch.device, ranks_here: int = 1) -> int:
    """Bytes for the page pool of one rank, after its model is loaded.

    Args:
        device: of the cache.
        ranks_here: ranks that share the RAM of this machine.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what the loading of the model has left counts as free
        return int(GPU_SHARE * torch.cuda.mem_get_info(device)[0])
    return int(min(CPU_SHARE * available(), CPU_MOST) / ranks_here)


def available(cgroup: Path = _CGROUP) -> int:
    """Bytes of RAM that this process can still take: what the machine has, or what the limit of its container leaves."""
    import psutil

    machine, limit = psutil.virtual_memory().available, _container(cgroup)
    return machine if limit is None else max(0, min(machine, limit))


def _container(root: Path) -> int | None:
    """What the limit of the control group leaves, as a container sees it (version 2, then 1); None without a limit."""
    for limit, used, statistics, cached in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ):
        try:
            most, taken = (root / limit).read_text().strip(), int((root / used).read_text())
            fields = dict(line.split() for line in (root / statistics).read_text().splitlines())
        except (OSError, ValueError):
            continue
        if most.isdigit():
            return int(most) - taken + int(fields.get(cached, 0))  # file pages are given up when memory is needed
    return None
