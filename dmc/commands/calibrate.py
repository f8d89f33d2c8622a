"""`dmc calibrate`: bases of the eigen codec, or decision heads."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

_BASES = {"budget": 0.02, "windows": 8}  # flags of one mode and their defaults
_DECISIONS = {"window": 64, "sinks": 4, "sequences": None, "ridge": 1e-3, "arrival_only": False, "target": "later", "heads": None}
_CONTEXT = {False: 512, True: 1024}


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.add_argument("directory", metavar="DIR", help="Hugging Face directory of the model")
    parser.add_argument(
        "--text",
        required=True,
        metavar="FILE",
        help="UTF-8 text similar to the text to be served; with --decisions also .jsonl, .xz, or stdlib",
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="file to write, such as eigen.safetensors")
    parser.add_argument("--context", type=int, help="tokens per window or sequence (512; with --decisions 1024)")
    parser.add_argument("--device", default="auto", help="cpu, cuda:0, ... (a GPU if there is one)")
    parser.add_argument("--dtype", default="auto", help="fp32, bf16, fp16 (fp32 on the CPU, else the checkpoint's)")
    bases = parser.add_argument_group("bases of the eigen codec (without --decisions)")
    bases.add_argument("--budget", type=float, help="maximum relative error of a layer's attention output (0.02)")
    bases.add_argument("--windows", type=int, help="number of windows, evenly spaced over the text (8)")
    decisions = parser.add_argument_group("decision heads, fitted from forward passes alone")
    decisions.add_argument("--decisions", action="store_true", help="fit decision heads; one file serves every compression ratio")
    decisions.add_argument("--window", type=int, metavar="W", help="newest tokens, always kept (64)")
    decisions.add_argument("--sinks", type=int, metavar="S", help="first tokens of a document, always kept (4)")
    decisions.add_argument("--sequences", type=int, metavar="N", help="sequences of the text (as many as it has, at most 100)")
    decisions.add_argument(
        "--target",
        metavar="NAME",
        help="attention that the heads predict: later (default), of later tokens of the text; repeat, of a "
        "second copy of the text; or both",
    )
    decisions.add_argument("--ridge", type=float, help="strength of the ridge regression (0.001)")
    decisions.add_argument(
        "--arrival-only", action="store_true", default=None, help="decide when a token arrives, not W tokens later"
    )
    decisions.add_argument(
        "--heads",
        metavar="EXPORT",
        help="take the trained heads of this export, a retrofit of DIR with dmc.method=dms and dmc.train=decision",
    )


def run(options: argparse.Namespace) -> None:
    """Calibrates, writes the file and prints what was found.

    Raises:
        ValueError: if the text, the model or a number is not usable, or the file cannot be written.
    """
    out = Path(options.out)
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}")
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise ValueError(f"--out {out} cannot be written: name a file in a folder that can be")
    if out.suffix == ".safetensors" and out.parent.resolve() == Path(options.directory).resolve():
        raise ValueError(f"--out {out} would count as weights of the model in that folder: name another folder")
    own, other = (_DECISIONS, _BASES) if options.decisions else (_BASES, _DECISIONS)
    for name in other:
        if getattr(options, name) is not None:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} does nothing {'with' if options.decisions else 'without'} --decisions: leave it out")
    if options.heads is not None:
        for name in ("window", "ridge", "arrival_only", "target"):
            if getattr(options, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} does nothing with --heads, whose heads are trained: leave it out")
    chosen = {name: default if (given := getattr(options, name)) is None else given for name, default in own.items()}
    context = _CONTEXT[options.decisions] if options.context is None else options.context
    (_fit_decisions if options.decisions else _find_bases)(options, out, context, **chosen)


def _find_bases(options: argparse.Namespace, out: Path, context: int, *, budget: float, windows: int) -> None:
    from dmc.engine.llm import resolve
    from dmc.evaluation.calibrate import calibrate
    from dmc.evaluation.windows import read_windows
    from dmc.model import read_config

    if context < 4:
        raise ValueError(f"--context must be at least 4, got {context}")
    config = read_config(options.directory)
    device, dtype = resolve(options.device, options.dtype, config.dtype)
    cut = read_windows(options.text, options.directory, prompt=context - 2, scored=1, count=windows)
    layers = calibrate(Path(options.directory), cut, out, budget=budget, device=device, dtype=dtype)
    size = config.head_dim
    print(f"layer  keys  values  of {size}   error")
    for number, layer in enumerate(layers):
        print(f"{number:5}  {layer.key_rank:4}  {layer.value_rank:6}  {'':{len(str(size)) + 3}}  {layer.error:.4f}")
    held = sum(2 * (layer.key_rank + layer.value_rank) + 4 for layer in layers) / (4 * size * len(layers))
    print(f"{out}: an encoded entry takes {held:.2f} of its bytes in bf16 (eigen:file={out})")


def _fit_decisions(
    options: argparse.Namespace,
    out: Path,
    context: int,
    *,
    window: int,
    sinks: int,
    sequences: int | None,
    ridge: float,
    arrival_only: bool,
    target: str,
    heads: str | None,
) -> None:
    from dmc.engine.llm import resolve
    from dmc.evaluation.fit_decisions import FitSettings, fit_decisions
    from dmc.evaluation.sequences import read_sequences
    from dmc.evaluation.trained_heads import trained_decisions
    from dmc.model import read_config

    settings = FitSettings(window=window, sinks=sinks, look_ahead=not arrival_only, ridge=ridge, target=target)
    if heads is None:
        settings.fitted(context)
    config = read_config(options.directory)
    device, dtype = resolve(options.device, options.dtype, config.dtype)
    text = read_sequences(options.text, options.directory, length=context, count=sequences)
    run = {"out": out, "device": device, "dtype": dtype, "meta": {"command": shlex.join(["dmc", *sys.argv[1:]])}}
    if heads is None:
        fitted = fit_decisions(options.directory, text, settings, **run)
        print("layer   R2")
        for number, value in enumerate(fitted.meta["r2"]):
            print(f"{number:5}  {value:.2f}")
    else:
        fitted = trained_decisions(options.directory, heads, text, sinks=sinks, **run)
    most, how = context / (fitted.window + 1 + sinks), "fitted" if heads is None else f"trained ({heads}), scores measured"
    print(f"{out}: decisions for every CR up to {most:.1f} at {context} tokens, {how} on {text.tokens.numel():,} tokens")
