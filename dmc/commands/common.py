"""Flags shared by several commands, and their conversion to settings."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from dmc.evaluation.spec import named

if TYPE_CHECKING:
    from dmc.engine import LLM

AUTO = "auto"  # of --kv-memory: see `dmc.engine.memory`, which is not imported here since it needs torch
_UNITS = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_CODEC_FLAGS = ("bits", "backbone", "group", "rank", "outliers")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the flags of commands that load a model into a cache."""
    parser.add_argument(
        "directory",
        metavar="DIR",
        help="directory of a model or of an export of this project, or its name on the Hub: org/name[@revision]",
    )
    cache = parser.add_argument_group("cache")
    cache.add_argument(
        "--policy",
        metavar="NAME[:SETTING=VALUE,...]",
        help="which entries exist: dmc or dms (default: what the model was retrofitted with; full for a "
        "plain model), full, streaming (:sinks=4,recent=252), h2o "
        "(:heavy=128,recent=128) or tova (:budget=256); the last three take share=0.25 of the tokens "
        "instead; snapkv, pyramidkv, adakv, expected, knorm, random, merged (:share=0.25); kvzap "
        "(:decisions=FILE); gate: fitted decisions (:decisions=FILE,target_cr=3,length=1024, and "
        "merge=true,power=1 to merge); or your own as module:Class",
    )
    cache.add_argument("--decisions", metavar="FILE", help="output file of dmc calibrate --decisions, for --policy gate")
    cache.add_argument(
        "--target-cr",
        type=float,
        metavar="CR",
        help="tokens / entries, for --policy gate, at its setting length: by default that of the sequences "
        "which the decisions were fitted on; longer texts reach a higher CR",
    )
    cache.add_argument(
        "--max-entries",
        type=int,
        metavar="N",
        help="hard budget: entries of each head behind the window of recent tokens, at most; for late merging (a "
        "model retrofitted with dmc.window), --policy dms and --policy gate. Once a head has N, whatever "
        "leaves the window merges, or is dropped by a policy that drops",
    )
    cache.add_argument(
        "--codec",
        default="dense",
        metavar="NAME[:SETTING=VALUE,...]",
        help="how full pages are stored: dense (default), int8, fp8, kivi (:bits=2), rotated (:bits=4), svd "
        "(:rank=16), eigen (:file=FILE of dmc calibrate), gear, gear-4bit or gear-2bit (the published "
        "recipe of GEAR), tcq, tcq-4bit, tcq-3bit or tcq-2bit (rotated, trellis-coded), or your own as "
        "module:Class",
    )
    cache.add_argument("--codec-layers", metavar="FILE", help="the codec and its settings for each layer, as JSON")
    cache.add_argument("--bits", type=int, help="gear, tcq, kivi: 2, 3, 4 or 8; rotated: 1 to 6 (4; kivi 2)")
    cache.add_argument("--backbone", help="gear: kcvt (default from 4 bits up), kivi (below), token, trellis or lloyd")
    cache.add_argument("--group", type=int, help="kivi, gear over kivi or token: values that share a scale (gear 64, kivi 32)")
    cache.add_argument("--rank", type=int, help="gear: of the low-rank part (4); svd: of the factors (16)")
    cache.add_argument("--outliers", type=float, help="gear: share of each vector kept in 16 bits (0.02)")
    cache.add_argument("--page-size", type=int, help="entries of a page (the codec's own)")
    cache.add_argument("--sink-tokens", type=int, help="first entries that stay in full precision (4 for lossy codecs, else 0)")
    cache.add_argument("--window", type=int, help="newest entries that stay in full precision (the codec's own: 0; kivi 96)")
    cache.add_argument("--exact-dtype", help="fp32, bf16, fp16 or int8: dtype of entries outside pages, and of dense ones")
    cache.add_argument(
        "--kv-memory",
        type=_pool_memory,
        default=AUTO,
        metavar="BYTES",
        help="size of the page pool, such as 512MiB (auto: on a GPU 90 %% of the memory that is free after "
        "loading the model; on a CPU half of the available RAM, at most 16 GiB, allocated as needed)",
    )
    machine = parser.add_argument_group("machine")
    machine.add_argument("--max-batch", type=int, default=16, help="maximum number of running sequences (16)")
    machine.add_argument("--prefill-tokens", type=int, default=512, help="maximum number of prompt tokens in one step (512)")
    machine.add_argument("--device", default="auto", help="cpu, cuda:0, ... (a GPU if there is one)")
    machine.add_argument(
        "--tensor-parallel",
        type=int,
        metavar="N",
        help="number of ranks (processes, or GPUs) that share the "
        "heads and weights (1, or as many as torchrun has started); --kv-memory is per rank",
    )
    machine.add_argument("--rank-timeout", type=float, default=120.0, help="seconds until a hanging rank counts as failed (120)")
    machine.add_argument("--dtype", default="auto", help="fp32, bf16, fp16 (fp32 on the CPU, else the checkpoint's)")


def load(options: argparse.Namespace) -> LLM:
    """Load the model and cache that the flags of `add_model` describe."""
    from dmc.engine import LLM  # torch: not needed for --help

    policy, settings = named(options.policy) if options.policy else (None, None)
    codec, own = codec_choice(options)
    return LLM(
        options.directory,
        policy=policy,
        policy_settings=settings,
        decisions=options.decisions,
        target_cr=options.target_cr,
        max_entries=options.max_entries,
        codec=codec,
        codec_settings=own,
        codec_layers=options.codec_layers,
        kv_memory=options.kv_memory,
        page_size=options.page_size,
        sink_tokens=options.sink_tokens,
        window=options.window,
        exact_dtype=options.exact_dtype,
        max_batch=options.max_batch,
        prefill_tokens=options.prefill_tokens,
        dtype=options.dtype,
        device=options.device,
        tensor_parallel=ranks(options),
        rank_timeout=options.rank_timeout,
    )


def ranks(options: argparse.Namespace) -> int:
    """Number of ranks: what --tensor-parallel says, or as many as torchrun has started."""
    started = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    return started if options.tensor_parallel is None else options.tensor_parallel


def codec_choice(options: argparse.Namespace) -> tuple[str, dict[str, float | int | str]]:
    """Return the name and settings of the codec that the flags of `add_model` select."""
    name, own = named(options.codec)
    return name, own | {flag: value for flag in _CODEC_FLAGS if (value := getattr(options, flag)) is not None}


def add_prompts(parser: argparse.ArgumentParser) -> None:
    """Add the flags of commands that take texts."""
    text = parser.add_argument_group("prompts (at least one; several run as a batch)")
    text.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="text to continue; may repeat")
    text.add_argument("--prompt-file", action="append", default=[], metavar="FILE", help="file to continue; - is stdin")


def read_prompts(options: argparse.Namespace) -> list[str]:
    """Return the texts that the flags of `add_prompts` give.

    Raises:
        ValueError: if there is none, or a file cannot be read as UTF-8.
    """
    prompts = options.prompt + [read(name) for name in options.prompt_file]
    if not prompts:
        raise ValueError("nothing to continue: give --prompt TEXT or --prompt-file FILE")
    return prompts


def read(name: str) -> str:
    """Text of a file (without a byte order mark), or of stdin for "-"; ValueError if it cannot be read as UTF-8."""
    try:
        return sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text") from error
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror}") from error


def memory(text: str) -> int:
    """``"512MiB"`` → bytes; an argparse type."""
    number = text.rstrip("KMGiB")
    unit = text[len(number) :]
    if not number.isdigit() or unit not in _UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write bytes, or a number with {', '.join(_UNITS)[2:]}")
    return int(number) * _UNITS[unit]


def _pool_memory(text: str) -> int | str:
    return text if text == AUTO else memory(text)


def check_output(flag: str, path: str | None) -> None:
    """Raises ValueError, one sentence, if a file to be written has no folder or is one itself."""
    if path and not Path(path).absolute().parent.is_dir():
        raise ValueError(f"{flag} {path}: there is no folder {Path(path).absolute().parent}")
    if path and Path(path).is_dir():
        raise ValueError(f"{flag} {path} is a folder: name a file")


def write_whole(path: str, text: str) -> None:
    """Writes a file atomically."""
    number, name = tempfile.mkstemp(dir=Path(path).absolute().parent, suffix=".part")
    try:
        with open(number, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)  # mkstemp's own mode keeps others out
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
