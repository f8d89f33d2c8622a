"""`dmc calibrate`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def add(parser: argparse.ArgumentParser) -> None:
    """Its flags."""
    parser.add_argument("directory", metavar="DIR", help="Hugging Face directory of the model")
    parser.add_argument("--text", required=True, metavar="FILE", help="any UTF-8 text like that to be served")
    parser.add_argument("--out", required=True, metavar="FILE", help="to write, such as eigen.safetensors")
    parser.add_argument("--budget", type=float, default=0.02,
                        help="how far a layer's attention output may be off, relative (0.02)")
    parser.add_argument("--windows", type=int, default=8, help="of the text, evenly over it (8)")
    parser.add_argument("--context", type=int, default=512, help="tokens of a window (512)")
    parser.add_argument("--device", default="auto", help="cpu, cuda:0, ... (a GPU if there is one)")
    parser.add_argument("--dtype", default="auto", help="fp32, bf16, fp16 (fp32 on the CPU, else the checkpoint's)")


def run(options: argparse.Namespace) -> None:
    """Calibrates and prints the ranks.

    Raises:
        ValueError: if the text, the model or a number is not usable, or the file cannot be written.
    """
    from dmc.engine.llm import resolve
    from dmc.evaluation.calibrate import calibrate
    from dmc.evaluation.windows import read_windows
    from dmc.model import read_config

    out = Path(options.out)
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}")
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise ValueError(f"--out {out} cannot be written: name a file in a folder that can be")
    if options.context < 4:
        raise ValueError(f"--context must be at least 4, got {options.context}")
    config = read_config(options.directory)
    device, dtype = resolve(options.device, options.dtype, config.dtype)
    windows = read_windows(
        options.text, options.directory, prompt=options.context - 2, scored=1, count=options.windows
    )
    layers = calibrate(Path(options.directory), windows, out, budget=options.budget, device=device, dtype=dtype)
    size = config.head_dim
    print(f"layer  keys  values  of {size}   error")
    for number, layer in enumerate(layers):
        print(f"{number:5}  {layer.key_rank:4}  {layer.value_rank:6}  {'':{len(str(size)) + 3}}  {layer.error:.4f}")
    held = sum(2 * (layer.key_rank + layer.value_rank) + 4 for layer in layers) / (4 * size * len(layers))
    print(f"{out}: an encoded entry takes {held:.2f} of its bytes in bf16 (eigen:file={out})")
