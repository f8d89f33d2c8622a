"""What a measurement was made with: hashes of models, the commit, versions."""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from pathlib import Path

import torch
import transformers

from dmc.model.fingerprint import model_hash

__all__ = ["commit", "hardware", "model_hash", "versions"]


@cache
def commit() -> str:
    """Commit of this checkout, "-dirty" behind it if files differ from it; "unknown" if this is not a checkout."""
    here = Path(__file__).resolve()
    top = _git("rev-parse", "--show-toplevel")
    if not top or here != Path(top) / "dmc" / "evaluation" / here.name:
        return "unknown"
    return _git("describe", "--always", "--dirty", "--exclude=*") or "unknown"


def versions() -> dict[str, str]:
    """Versions of Python and the libraries that numbers depend on."""
    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}


def hardware(device: str) -> str:
    """Name of the hardware: the GPU's name, or the processor's with the threads that torch uses."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    threads = torch.get_num_threads()
    return f"{threads} thread{'s' * (threads > 1)} of {names[0] if names else platform.processor() or platform.machine()}"


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
