"""`LLM`: a model directory, served from a compressed cache."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as List
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dmc import hub
from dmc.cache import Codec, Policy, codec, policy, policy_class
from dmc.cache.codecs.layers import read_layers
from dmc.cache.policies.gate import GatePolicy
from dmc.engine import launch, memory
from dmc.engine.core import Engine
from dmc.engine.detokenizer import Detokenizer
from dmc.engine.params import SamplingParams
from dmc.engine.parts import Parts
from dmc.engine.scoring import Score, score_batch
from dmc.engine.sequence import Output, Sequence
from dmc.engine.stats import Stats, total
from dmc.engine.tokenizer import Tokenizer
from dmc.fitted import FittedDecisions
from dmc.model import ModelConfig, read_config
from dmc.model.fingerprint import model_hash

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


class LLM:
    """A Llama directory, exported by this project or plain, ready to generate.

    Args:
        path: Hugging Face directory.
        policy: which entries the cache keeps: a name (`dmc.cache.policy_class`), or a policy that is ready made. None: that
            of the method which the model was retrofitted with ("dmc" or "dms"), "full" for a plain model.
        policy_settings: for a policy given by name, such as ``{"recent": 508}``. The window of "dms" is else the model's.
        decisions: file of `dmc calibrate --decisions`, or its content, for policy "gate": late eviction by fitted
            decisions, for a model that was not retrofitted (`dmc.cache.policies.gate`).
        target_cr: for policy "gate": tokens / entries at its setting ``length``, by default the length of the sequences
            that the decisions were fitted on.
        max_entries: entries of each key/value head behind the window of recent tokens, at most: a hard budget. Once a head has
            so many, what leaves the window is merged (dropped where the policy drops). For policies with such a window: late
            merging (a model retrofitted with dmc.window), "dms" and "gate". None: no bound.
        codec: how full pages are stored: a name (`dmc.cache.codec_class`), or a codec that is ready made.
        codec_settings: for a codec given by name, such as ``{"bits": 4}``.
        codec_layers: a file with settings for each layer, and the codec's name, in place of ``codec``: see
            `dmc.cache.codecs.layers.read_layers`.
        kv_memory: bytes of the page pool; "auto" takes a share of the memory that is left once the model is loaded, as the
            commands and the server do (`dmc.engine.memory`). None, the default here, lets the pool grow without a bound:
            several models in one process share a device, and none of them may claim what is left.
        max_batch: sequences that run at a time.
        page_size, sink_tokens, window, exact_dtype: see `dmc.cache.KVCache`.
        prefill_tokens: of prompts run through the model in one step, at most; longer ones go in chunks.
        dtype: "fp32", "bf16", "fp16", "fp64", or "auto": fp32 on the CPU, elsewhere the checkpoint's own.
        device: such as "cpu" or "cuda:0", or "auto": a GPU if there is one. With ranks "cpu" or "cuda", one GPU each.
        tensor_parallel: ranks, processes that each hold a part of the heads and of the weights; ``kv_memory`` is then
            that of each. The others are started here, or have been started by torchrun: on these this call never returns, it
            runs what rank 0 runs, and ends the process once rank 0 ends. See docs/serving-distributed.md.
        rank_timeout: seconds that a rank may keep the others waiting before all give up.

    Raises:
        ValueError: if the directory, a name or a setting is not usable, or a rank cannot start; one sentence that says
            why.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        policy: str | Policy | None = None,
        policy_settings: dict | None = None,
        decisions: str | Path | FittedDecisions | None = None,
        target_cr: float | None = None,
        max_entries: int | None = None,
        codec: str | Codec = "dense",
        codec_settings: dict | None = None,
        codec_layers: str | Path | None = None,
        kv_memory: int | str | None = None,
        max_batch: int = 16,
        page_size: int | None = None,
        sink_tokens: int | None = None,
        window: int | None = None,
        exact_dtype: str | None = None,
        prefill_tokens: int = 512,
        dtype: str = "auto",
        device: str = "auto",
        tensor_parallel: int = 1,
        rank_timeout: float = 120.0,
    ) -> None:
        self.path = path = hub.located(path)
        for name, value in (("max_batch", max_batch), ("prefill_tokens", prefill_tokens)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        memory.check(kv_memory)
        store, config = codec_for(codec, codec_settings, codec_layers, self.path), read_config(path)
        chosen = policy_for(
            config, path, policy, policy_settings, decisions=decisions, target_cr=target_cr, max_entries=max_entries
        )
        place, precision = resolve(device, dtype, config.dtype)
        parts = Parts(
            self.path,
            precision,
            chosen,
            store,
            max_batch,
            prefill_tokens,
            {
                "memory": kv_memory,
                "page_size": page_size,
                "sink_tokens": sink_tokens,
                "window": window,
                "exact_dtype": exact_dtype,
            },
        )
        self.engine: Engine = (
            parts.engine(place) if tensor_parallel == 1 else launch.start(parts, place, tensor_parallel, rank_timeout)
        )
        self.cache, self.model = self.engine.cache, self.engine.runner.model

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Tokenizer of the directory; read when first needed.

        Raises:
            ValueError: if there is none or it does not fit the model.
        """
        return Tokenizer(self.path, self.model.config.vocab_size)

    def generate(
        self, prompts: str | List[str] | List[List[int]], params: SamplingParams | List[SamplingParams] | None = None
    ) -> list[Output]:
        """Continues prompts, all together.

        Args:
            prompts: a text, texts, or lists of token ids.
            params: for all, or one for each; None: `SamplingParams()`.

        Returns:
            n outputs a prompt, in order. The cache is empty again.

        Raises:
            ValueError: if a prompt is empty, too long for the model or the pool, or no token of it.
        """
        every: list = [prompts] if isinstance(prompts, str) else list(prompts)
        params = params or SamplingParams()
        each = [params] * len(every) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(every):
            raise ValueError(f"{len(every)} prompts need one SamplingParams or as many, got {len(each)}")
        sequences = [sequence for prompt, own in zip(every, each, strict=True) for sequence in self.sequences(prompt, own)]
        for sequence in sequences:
            self.engine.add(sequence)
        try:
            while self.engine.busy:
                self.engine.step()
        finally:
            self.engine.abort()
        return [sequence.output() for sequence in sequences]

    def sequences(self, prompt: str | List[int], params: SamplingParams) -> list[Sequence]:
        """The n completions of a prompt, ready for `engine`.

        Raises:
            ValueError: if the prompt is empty, too long for the model or the pool, or no token of it.
        """
        tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        self._check_tokens(tokens, least=1)
        wrong = next((token for token in [*params.logit_bias, *params.stop_token_ids] if token >= self.vocabulary), None)
        if wrong is not None:
            raise ValueError(f"token id {wrong} is outside the model's vocabulary of {self.vocabulary}")
        has_text = (self.path / "tokenizer_config.json").is_file()
        if params.stop and not has_text:
            raise ValueError(f"stop texts need a tokenizer, and {self.path} has none")
        tokenizer, ends = self.tokenizer if has_text else None, self.model.config.eos_token_ids
        made = [Sequence(tokens, params, ends, Detokenizer(tokenizer, tokens), index) for index in range(params.n)]
        self.engine.check(made[0])
        return made

    def everywhere(self, function: Callable, *arguments: object, own: object = None) -> Any:
        """Runs a function that uses model and cache on every rank of the engine; see `Engine.everywhere`."""
        return self.engine.everywhere(function, *arguments, own=own)

    def check_integrity(self) -> None:
        """Checks the page pool, on every rank; see `KVCache.check_integrity`."""
        self.everywhere(_check_integrity)

    def check_ranks(self) -> None:
        """Notices, while nothing is computed, that a rank has ended.

        Raises:
            RankFailed: if so.
        """
        if self.engine.ranks:
            self.everywhere(_nothing)

    def close(self) -> None:
        """Ends the other ranks; without them there is nothing to end. The end of this process does the same."""
        if self.engine.ranks:
            self.engine.ranks.close()

    @property
    def vocabulary(self) -> int:
        """Tokens that the model knows."""
        return self.model.config.vocab_size

    def score(self, sequences: List[List[int]], *, prompt_tokens: int = 1) -> list[Score]:
        """Log-probabilities of given tokens through the cache as generation uses it.

        Args:
            sequences: token ids, at least 2 each.
            prompt_tokens: of each that are prefilled; every later one goes through the decode step.

        Returns:
            One score a sequence, in order. The cache is empty again.

        Raises:
            ValueError: if a sequence is too short, too long or holds no token ids, or the pool cannot hold it.
        """
        if prompt_tokens < 1:
            raise ValueError(f"prompt_tokens must be at least 1, got {prompt_tokens}")
        if self.engine.busy:
            raise ValueError("score needs the cache to itself; wait until the requests that run have ended")
        limit = self.cache.page_limit
        batch = self.engine.max_batch
        for tokens in sequences:
            self._check_tokens(tokens, least=2)
            if len(tokens) > self.model.config.positions:
                raise ValueError(
                    f"a sequence of {len(tokens)} tokens is longer than the model's "
                    f"{self.model.config.positions} positions{self.model.config.rope.why_limited}"
                )
            if limit is not None:
                batch = min(batch, limit // self.cache.worst_pages(len(tokens)))
        if batch == 0:
            raise ValueError(f"kv_memory of {limit} pages cannot hold the longest sequence; give it more")
        order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
        scores = {}
        for start in range(0, len(order), batch):
            some = order[start : start + batch]
            scores |= zip(some, self.everywhere(score_batch, [list(sequences[i]) for i in some], prompt_tokens), strict=True)
        return [scores[i] for i in range(len(sequences))]

    def _check_tokens(self, tokens: List[int], least: int) -> None:
        if len(tokens) < least:
            raise ValueError(f"a sequence of at least {least} tokens is needed, got {len(tokens)}: is the text empty?")
        wrong = next((token for token in tokens if not 0 <= token < self.vocabulary), None)
        if wrong is not None:
            raise ValueError(f"token id {wrong} is outside the model's vocabulary of {self.vocabulary}")


def total_stats(results: List[Output] | List[Score], seconds: float) -> Stats:
    """Figures of several outputs or scores together, which took ``seconds`` as a whole."""
    return total([result.stats for result in results], seconds)


def _check_integrity(engine: Engine, own: None) -> None:
    engine.cache.check_integrity()


def _nothing(engine: Engine, own: None) -> None:
    """A command that only shows whether every rank answers."""


def policy_for(
    config: ModelConfig,
    path: str | Path,
    chosen: str | Policy | None,
    settings: dict | None = None,
    *,
    decisions: str | Path | FittedDecisions | None = None,
    target_cr: float | None = None,
    max_entries: int | None = None,
) -> Policy:
    """The policy to serve a model with; rejects one that would take its decisions for what they are not.

    Args:
        config: of the model.
        path: its directory.
        chosen, settings, decisions, target_cr, max_entries: as `LLM` takes them, ``chosen`` as ``policy`` and ``settings`` as
            ``policy_settings``.

    Raises:
        ValueError: if the policy is unknown or does not fit the model, or a setting is not usable.
    """
    given = {name: value for name, value in (("decisions", decisions), ("target_cr", target_cr)) if value is not None}
    settings = _with_budget(config, chosen, _with_decisions(chosen, settings, given), max_entries)
    chosen = (config.method or "full") if chosen is None else chosen
    if chosen == config.method and config.window is not None:
        settings = {"window": config.window, **config.kept_first} | (settings or {})
    if (chosen == GatePolicy.name or isinstance(chosen, GatePolicy)) and config.decision is not None:
        raise ValueError(
            f"{path} was retrofitted with {config.method} and makes decisions of its own: policy gate is for models that were "
            "not, so leave it and its decisions out"
        )
    made = _made("policy", chosen, settings)
    made.check_model(config.num_hidden_layers, config.num_key_value_heads, config.hidden_size)
    if made.made_for is not None and made.made_for != (found := model_hash(path)):
        raise ValueError(
            f"the {made.name} policy's file was made for the model with hash {made.made_for}, and {path} has {found}"
        )
    if isinstance(made, GatePolicy):
        _check_fitted(made, config, path)
    if made.name == "dms" and config.method != "dms":
        plain = f"is a plain {config.family.model_type.capitalize()}"
        what = plain if config.method is None else f"was retrofitted with {config.method}"
        raise ValueError(f"{path} {what} and marks no tokens for eviction: policy dms needs a model retrofitted with dms")
    if made.name == "dms" and config.looks_ahead and made.ring != config.window:
        raise ValueError(
            f"{path} decides about a token when it leaves a window of {config.window}, and the policy has one of {made.ring}: "
            "leave out its setting window"
        )
    if made.name == "dmc" and config.method == "dms":
        raise ValueError(
            f"{path} was retrofitted with dms, whose decisions mark tokens for eviction: policy dmc would merge them; use "
            "policy dms, or one that uses no decisions, such as full"
        )
    if made.name == "dmc" and config.method == "dmc" and made.ring != config.window:
        now, then = ("merges at once" if w is None else f"has a window of {w}" for w in (made.ring, config.window))
        raise ValueError(f"{path} was retrofitted to what {then}, and the policy {now}: leave out its setting window")
    return made


def _check_fitted(made: GatePolicy, config: ModelConfig, path: str | Path) -> None:
    """Raises ValueError if the policy's decisions were fitted for another model."""
    heads, hidden = config.num_key_value_heads, config.hidden_size
    try:
        made.fitted.check(model_hash(path), config.num_hidden_layers, heads, hidden, made.ring)
    except ValueError as error:
        raise ValueError(f"{made.decisions or 'decisions'}: {error}") from None


def _with_decisions(chosen: str | Policy | None, settings: dict | None, given: dict) -> dict | None:
    """Settings of the policy with ``decisions`` and ``target_cr``, which policy gate alone takes."""
    if not given:
        return settings
    names = " and ".join(given)
    if chosen != GatePolicy.name:
        what = f"policy {chosen}" if isinstance(chosen, str) else "no policy" if chosen is None else "a policy that is ready made"
        raise ValueError(f"{names} {'are' if len(given) > 1 else 'is'} for policy gate, and {what} was given: give policy gate")
    twice = [name for name in given if name in (settings or {})]
    if twice:
        raise ValueError(f"{' and '.join(twice)} is given twice, as a setting of policy gate and next to it: give it once")
    return (settings or {}) | given


def _with_budget(config: ModelConfig, chosen: str | Policy | None, settings: dict | None, max_entries: int | None) -> dict | None:
    """Settings of the policy with ``max_entries``, which only policies with a window of recent tokens take."""
    if max_entries is None:
        return settings
    name = (config.method or "full") if chosen is None else chosen
    if not isinstance(name, str):
        raise ValueError("max_entries goes with a policy's name, not with a policy that is ready made: make that one with it")
    if "max_entries" in (settings or {}):
        raise ValueError(f"max_entries is given twice, as a setting of policy {name} and next to it: give it once")
    if not bounds(name, config):
        raise ValueError(
            f"max_entries={max_entries} bounds the entries behind a window of recent tokens, and policy {name} has none for this "
            "model: leave it out, or use late merging (a model retrofitted with dmc.window), policy dms or policy gate"
        )
    return (settings or {}) | {"max_entries": max_entries}


def bounds(name: str, config: ModelConfig) -> bool:
    """True if the policy of that name takes ``max_entries`` for a model: it has a window of recent tokens."""
    known = policy_class(name).settings()
    return "max_entries" in known and (name != "dmc" or (config.method == "dmc" and config.window is not None))


def resolve(device: str, dtype: str, saved: str | None) -> tuple[torch.device, torch.dtype]:
    """What the settings ``device`` and ``dtype`` of `LLM` mean for a checkpoint saved in the dtype of that name.

    Raises:
        ValueError: if a name is unknown or the device cannot be used.
    """
    place = _device(device)
    return place, _dtype(dtype, place, saved)


def codec_for(chosen: str | Codec, settings: dict | None, layers: str | Path | None, model: Path) -> Codec | list[Codec]:
    """The codec, or that of each layer; one that was made for a certain model must have been made for this one."""
    if layers is None:
        made = _made("codec", chosen, settings)
    elif chosen != "dense" or settings:
        raise ValueError("codec_layers names the codec and its settings itself: leave codec and codec_settings out")
    else:
        made = read_layers(layers)
    for one in made if isinstance(made, list) else [made]:
        if one.made_for is not None and one.made_for != (found := model_hash(model)):
            raise ValueError(
                f"the {one.name} codec's file was calibrated on the model with hash {one.made_for}, and {model} has {found}: "
                "run `dmc calibrate` on it"
            )
    return made


def _made(kind: str, chosen: str | Codec | Policy, settings: dict | None) -> Any:
    if isinstance(chosen, str):
        return {"codec": codec, "policy": policy}[kind](chosen, **(settings or {}))
    if settings:
        raise ValueError(f"{kind}_settings go with a {kind}'s name, not with a {kind} that is ready made")
    return chosen


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def _dtype(name: str, device: torch.device, saved: str | None) -> torch.dtype:
    if name == "auto":
        own = getattr(torch, saved or "", None)
        return torch.float32 if device.type == "cpu" or not isinstance(own, torch.dtype) else own
    if name not in DTYPES:
        raise ValueError(f"dtype must be auto or one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]
