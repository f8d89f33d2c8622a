"""Perplexity, KL to the uncompressed model and bytes held, through the compressed cache as generation uses it.

Each window's prompt is prefilled and its pages encoded. The tokens after it are then fed one by one, several windows in
step: each goes into the cache, attends through the encoded pages, and the prediction of the next token is scored.
Bytes are taken from the tensors after every such step. Nothing is masked or simulated.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from dmc.cache import Codec, Policy, Prompt
from dmc.engine import LLM, scoring
from dmc.engine.core import Engine
from dmc.evaluation.provenance import commit, model_hash, versions
from dmc.evaluation.reference import Reference, check_fits
from dmc.evaluation.windows import Windows


@dataclass(frozen=True)
class Measurement:
    """One model, policy and codec on the windows of one text. "Mean" is over all scored steps of all windows.

    Attributes:
        model, model_hash: name of the directory; `dmc.evaluation.provenance.model_hash`.
        base, base_hash: the same of the uncompressed model, None without a reference.
        text, text_hash, windows_hash: name of the text; its hash; hash of the windows (`Windows`).
        windows, prompt_tokens, scored_tokens: number of windows, W; prefilled tokens of each, P; scored tokens of each, S.
        policy, codec, settings: name of the policy; name of the codec; settings of policy, codec and cache that are a number
            or a word.
        perplexity: of the scored tokens.
        base_perplexity: of the uncompressed model on the same tokens.
        kl: mean KL(uncompressed || this), nats/token.
        kl_stderr: standard error of that mean over windows; None for one window.
        kl_windows: mean of each window.
        agreement: share of steps at which both models find the same token most likely.
        held_bytes: of one window's cache, mean; everything counted, see `KVCache.held`.
        dense_bytes: of a dense bf16 cache of the same tokens, mean.
        ratio: dense_bytes / held_bytes.
        share: held_bytes / bytes of a dense bf16 cache of the base model, which can have more heads than this one; of this
            model itself without a reference.
        held_bytes_end, dense_bytes_end, ratio_end: the same after the last step, mean over windows.
        held_end: ``held_bytes_end`` by kind.
        cr: measured compression ratio at the end, tokens / entries over all windows, layers and heads.
        cr_per_layer: the same for each layer.
        codec_error: relative error (Frobenius) of encoded keys and values.
        seconds: of wall time, prefill included unless prompts were given.
        device, dtype, commit, versions: what it ran on.
    """

    model: str
    model_hash: str
    base: str | None
    base_hash: str | None
    text: str
    text_hash: str
    windows_hash: str
    windows: int
    prompt_tokens: int
    scored_tokens: int
    policy: str
    codec: str
    settings: dict[str, dict[str, float | int | str | None]]
    perplexity: float
    base_perplexity: float | None
    kl: float | None
    kl_stderr: float | None
    kl_windows: list[float] | None
    agreement: float | None
    held_bytes: float
    dense_bytes: float
    ratio: float
    share: float
    held_bytes_end: float
    dense_bytes_end: float
    ratio_end: float
    held_end: dict[str, float]
    cr: float
    cr_per_layer: list[float]
    codec_error: tuple[float, float]
    seconds: float
    device: str
    dtype: str
    commit: str
    versions: dict[str, str]

    def as_json(self) -> str:
        """On one line."""
        return json.dumps(asdict(self))


def measure(
    llm: LLM,
    windows: Windows,
    *,
    reference: Reference | None = None,
    prompts: list[Prompt] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Measurement:
    """Measures a model under its policy and codec.

    Args:
        llm: with an empty cache. As many windows run together as its ``max_batch`` (and ``kv_memory``) allows.
        windows: tokens of the model's vocabulary.
        reference: of the base model for these windows; None leaves out what compares with it.
        prompts: of `prefill`, from a model with the same weights and policy: saves doing it again for another codec.
        progress: called with a number of windows x steps that are done; the sum of all calls is W x S.

    Raises:
        ValueError: if the windows do not fit the model, the reference is for others or of another vocabulary, the cache is
            in use, or kv_memory cannot hold one window.
    """
    started = time.perf_counter()
    runs = forced(llm, windows, reference=reference, prompts=prompts, progress=progress)
    return _result(llm, windows, reference, runs, time.perf_counter() - started)


def forced(
    llm: LLM,
    windows: Windows,
    *,
    reference: Reference | None = None,
    prompts: list[Prompt] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Run]:
    """What `measure` averages: every scored step of every window. Arguments and errors are those of `measure`.

    Returns:
        Runs of windows that ran together, in the order of the windows.
    """
    batch, runs = _check(llm, windows, reference, prompts), []
    for start in range(0, len(windows.tokens), batch):
        rows = slice(start, min(start + batch, len(windows.tokens)))
        own = _Own(reference, rows, prompts and prompts[rows], progress)
        runs.append(llm.everywhere(_forced, windows.tokens[rows].tolist(), windows.prompt, own=own))
    llm.check_integrity()
    return runs


def prefill(llm: LLM, windows: Windows) -> list[Prompt]:
    """The prompts of windows, run through the model and ready for the cache; their pages are not encoded yet."""
    rows, chunk = windows.tokens[:, : windows.prompt].tolist(), llm.engine.prefill_tokens
    return [scoring.prefill(llm.engine.runner, row, chunk) for row in rows]


@dataclass(frozen=True)
class Run:
    """Windows that ran together, fp64 ``[W, S]`` each.

    Attributes:
        logprobs: of the scored tokens.
        held, dense: bytes of the cache, and of a dense bf16 cache of the same tokens, after each step.
        kl: to the uncompressed model, nats; None without a reference, as the next two.
        same: 1 where both models find the same token most likely, else 0.
        base: log-probabilities of the uncompressed model.
        held_end: bytes by kind after the last step, for each window.
        entries: int64 ``[L, H]`` after the last step, sum over the windows.
    """

    logprobs: Tensor
    held: Tensor
    dense: Tensor
    kl: Tensor | None
    same: Tensor | None
    base: Tensor | None
    held_end: list[dict[str, int]]
    entries: Tensor


@dataclass(frozen=True)
class _Own:
    """What rank 0 alone has: the reference, in which the windows are ``which``, prompts that are prefilled, and the progress."""

    reference: Reference | None
    which: slice
    prompts: list[Prompt] | None
    progress: Callable[[int], None] | None


def _forced(engine: Engine, windows: list[list[int]], prompt: int, own: _Own | None) -> Run:
    """Windows that run together, on all ranks; what follows from logits is rank 0's."""
    ready = own and own.prompts or [scoring.prefill(engine.runner, row[:prompt], engine.prefill_tokens) for row in windows]
    slots = []
    try:
        for one in ready:
            slots.append(engine.cache.load(one))
        return _feed(engine, slots, torch.tensor(windows), prompt, own)
    finally:
        for slot in slots:
            engine.cache.close(slot)


def _feed(engine: Engine, slots: list[int], windows: Tensor, first: int, own: _Own | None) -> Run:
    cache, scored = engine.cache, windows.shape[1] - 1 - first
    shape = len(slots), scored
    kept = {name: torch.zeros(shape, dtype=torch.float64) for name in ("logprobs", "held", "dense", "kl", "same", "base")}
    fed = [scoring.Fed(slot, tokens, first, first + scored) for slot, tokens in zip(slots, windows.tolist(), strict=True)]
    reference = own and own.reference

    def after() -> None:
        place = fed[0].fed - 1 - first  # all windows are equally long
        kept["held"][:, place] = torch.tensor([sum(cache.held(slot).values()) for slot in slots], dtype=torch.float64)
        kept["dense"][:, place] = cache.dense_bytes(fed[0].fed)

    def take(_: list[scoring.Fed], predicted: Tensor) -> None:
        position = fed[0].fed
        place = position - 1 - first
        following = windows[:, position, None].to(predicted.device)
        step = {"logprobs": predicted.gather(-1, following)[:, 0]}
        if reference:
            wanted = reference.logprobs(own.which, place).to(predicted.device)
            step["base"] = wanted.gather(-1, following)[:, 0]
            step["kl"] = torch.nn.functional.kl_div(predicted, wanted, log_target=True, reduction="none").sum(-1)
            step["same"] = predicted.argmax(-1) == wanted.argmax(-1)
        for name, values in step.items():
            kept[name][:, place] = values.double().cpu()
        if own.progress:
            own.progress(len(slots))

    scoring.feed(engine.runner, fed, take, after)
    compared = {name: kept[name] if reference else None for name in ("kl", "same", "base")}
    return Run(
        kept["logprobs"],
        kept["held"],
        kept["dense"],
        **compared,
        held_end=[cache.held(slot) for slot in slots],
        entries=torch.stack([cache.entries(slot).cpu() for slot in slots]).sum(0),
    )


def _check(llm: LLM, windows: Windows, reference: Reference | None, prompts: list[Prompt] | None) -> int:
    """How many windows can run together."""
    config, limit = llm.model.config, llm.cache.page_limit
    check_fits(windows, config.vocab_size, config.positions, llm.path)
    if llm.engine.busy:
        raise ValueError("measuring needs the cache to itself; wait until the requests that run have ended")
    if reference and reference.windows_hash != windows.hash:
        raise ValueError("the reference was made for other windows; make it again for these")
    if reference and len(reference.head) != config.vocab_size:
        raise ValueError(
            f"base model {reference.model} has a vocabulary of {len(reference.head)} and {llm.path} one of {config.vocab_size}: "
            "only models of one tokenizer can be compared"
        )
    if prompts is not None and len(prompts) != len(windows.tokens):
        raise ValueError(f"{len(windows.tokens)} windows need as many prompts, got {len(prompts)}")
    if prompts is not None and llm.engine.ranks:
        raise ValueError("prompts that were prefilled are of a whole model: leave them out with tensor parallelism")
    if limit is None:
        return llm.engine.max_batch
    batch = min(llm.engine.max_batch, limit // llm.cache.worst_pages(windows.tokens.shape[1] - 1))
    if batch == 0:
        raise ValueError(f"kv_memory of {limit} pages cannot hold a window; give it more, or ask for shorter windows")
    return batch


def _result(llm: LLM, windows: Windows, reference: Reference | None, runs: list[Run], seconds: float) -> Measurement:
    count, tokens = len(windows.tokens), windows.tokens.shape[1] - 1
    logprobs, held, dense = (torch.cat([getattr(run, name) for run in runs]) for name in ("logprobs", "held", "dense"))
    kl = error = each = same = base = None
    tokens_mean = windows.prompt + (windows.scored + 1) / 2
    uncompressed = tokens_mean * reference.token_bytes if reference else dense.mean().item()
    if reference:
        each = torch.cat([run.kl for run in runs]).mean(1)
        kl, error = each.mean().item(), each.std().item() / math.sqrt(count) if count > 1 else None
        same = torch.cat([run.same for run in runs]).mean().item()
        base = _perplexity(torch.cat([run.base for run in runs]))
    ends = [end for run in runs for end in run.held_end]
    entries = torch.stack([run.entries for run in runs]).sum(0)
    cache = llm.cache
    return Measurement(
        model=llm.path.resolve().name,
        model_hash=model_hash(llm.path),
        base=reference and reference.model,
        base_hash=reference and reference.model_hash,
        text=windows.name,
        text_hash=windows.text_hash,
        windows_hash=windows.hash,
        windows=count,
        prompt_tokens=windows.prompt,
        scored_tokens=windows.scored,
        policy=cache.policy.name,
        codec=cache.codec_name,
        settings=cache_settings(llm),
        perplexity=_perplexity(logprobs),
        base_perplexity=base,
        kl=kl,
        kl_stderr=error,
        kl_windows=each if each is None else each.tolist(),
        agreement=same,
        held_bytes=held.mean().item(),
        dense_bytes=dense.mean().item(),
        ratio=(dense.mean() / held.mean()).item(),
        share=held.mean().item() / uncompressed,
        held_bytes_end=held[:, -1].mean().item(),
        dense_bytes_end=dense[:, -1].mean().item(),
        ratio_end=(dense[:, -1].mean() / held[:, -1].mean()).item(),
        held_end={kind: sum(end[kind] for end in ends) / count for kind in ends[0]},
        cr=count * tokens * entries.numel() / int(entries.sum()),
        cr_per_layer=(count * tokens * entries.shape[1] / entries.sum(1)).tolist(),
        codec_error=cache.codec_error,
        seconds=seconds,
        device=llm.model.device.type,
        dtype=str(llm.model.dtype).removeprefix("torch."),
        commit=commit(),
        versions=versions(),
    )


def _perplexity(logprobs: Tensor) -> float:
    return math.exp(-logprobs.mean().item())


def cache_settings(llm: LLM) -> dict[str, dict | list[dict]]:
    """What policy and codec (or each layer's) were made with, where it is a number or a word, and the cache's own."""
    cache, codec = llm.cache, llm.cache.codec
    made = _plain(codec) if isinstance(codec, Codec) else [_plain(one) for one in codec]
    return {
        "policy": _plain(cache.policy) | ({"trained": True} if getattr(cache.policy, "trained", False) else {}),
        "codec": made,
        "cache": {
            "page_size": cache.page_size,
            "sink_tokens": cache.sink_tokens,
            "window": cache.window,
            "exact_dtype": str(cache.exact_dtype).removeprefix("torch."),
        },
    }


def _plain(thing: Policy | Codec) -> dict[str, float | int | str | None]:
    values = {name: getattr(thing, name, _Absent) for name in thing.settings()}
    return {name: value for name, value in values.items() if isinstance(value, int | float | str | None)}


class _Absent:
    """Stands for a setting that the object does not keep."""
