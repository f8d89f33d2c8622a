"""How much the predictions of a model change when the cache of some layers is encoded.

A window's first tokens are a prompt, whose keys and values are held exactly; the tokens after it are scored in one pass,
and their predictions kept. Then entries of some layers are replaced by decode(encode(.)), the same tokens scored again,
and the two predictions compared. Everything of the prompt is encoded but the sinks and the accumulating entry, the last page too,
so that heads with few entries count as well. The scored tokens see each other exactly.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dmc.cache import Codec, KVCache, LatePrompt, Prompt
from dmc.model import Decoder

PARTS = {"key": (True, False), "value": (False, True), "both": (True, True)}  # (keys, values) that are replaced
_CHUNK = 512  # tokens of a prompt in one pass
_LOGITS = 1 << 24  # held at once, in addition to the kept predictions
Pair = tuple[Tensor, Tensor]


class Probe:
    """A model's exact prompts and predictions for some windows; keeps ``[scored tokens of all windows, vocabulary]``.

    Args:
        model: to probe.
        cache: whose policy decides which entries exist; its pages are not used.
        windows: token ids, each a text of its own.
        scored: last tokens of each that are scored; the others are its prompt.

    Attributes:
        entries: of each layer that are encoded, of all windows and heads together.

    Raises:
        ValueError: if a window has no room for a prompt of two tokens.
    """

    @torch.no_grad()
    def __init__(self, model: Decoder, cache: KVCache, windows: Sequence[Sequence[int]], *, scored: int, sinks: int) -> None:
        if scored < 1 or min(map(len, windows)) < scored + 2:
            raise ValueError(f"windows must be longer than the {scored} scored tokens by 2 at least, and these at least 1")
        self.model, self.cache, self.scored, self.sinks = model, cache, scored, sinks
        self._prompts = [self._prefilled(window[:-scored]) for window in windows]
        tokens = torch.tensor([token for window in windows for token in window[-scored:]], device=model.device)
        x, step = model.embedding[tokens], self._step(self._prompts)
        self._inputs = []  # of each block
        for number in range(len(model.layers)):
            self._inputs.append(x)
            x = model.block(x, number, step)
        hidden = model.finish(x, len(model.layers), step)
        self._predicted = torch.cat([self._logprobs(part) for part in self._rows(hidden)])
        self.entries = [
            sum(int((self._counts(prompt, number) - sinks).clamp(min=0).sum()) for prompt in self._prompts)
            for number in range(len(model.layers))
        ]

    @torch.no_grad()
    def encoded(self, number: int, codec: Codec, page: int) -> list[Pair]:
        """Keys and values of one layer as they come back from a codec: of each window ``([H, N, D], [H, N, D])``."""
        return [self._encoded(number, prompt, codec, page) for prompt in self._prompts]

    @torch.no_grad()
    def kl(self, changed: Mapping[int, Sequence[Pair]], part: str = "both") -> Tensor:
        """KL of the exact predictions to those with changed layers, nats/token: ``[windows]``, fp64.

        Args:
            changed: layer → what `encoded` gave for it.
            part: "key", "value" or "both", of what is taken from it.
        """
        keys, values = PARTS[part]
        prompts: list = [copy.copy(prompt) for prompt in self._prompts]
        for place, prompt in enumerate(prompts):
            prompt.layers = list(prompt.layers)
            for number, pairs in changed.items():
                layer = prompt.layers[number] = copy.copy(prompt.layers[number])
                new = [tensor.to(layer.keys.dtype) for tensor in pairs[place]]
                layer.keys, layer.values = new[0] if keys else layer.keys, new[1] if values else layer.values
        first = min(changed)
        hidden = self.model.finish(self._inputs[first], first, self._step(prompts))
        sums = [
            (exact.exp() * (exact - self._logprobs(part))).sum(-1)
            for exact, part in zip(self._rows(self._predicted), self._rows(hidden), strict=True)
        ]
        return torch.cat(sums).double().view(len(prompts), -1).mean(-1).clamp(min=0).cpu()

    def _encoded(self, number: int, prompt: Prompt | LatePrompt, codec: Codec, page: int) -> Pair:
        """Encodes and decodes a layer as the cache does: a lossy codec sees keys without their bias."""
        layer, counts, bias = prompt.layers[number], self._counts(prompt, number), self.cache.key_bias
        if bias is None or not codec.lossy:
            return through(codec, layer.keys, layer.values, counts, page, self.sinks)
        heads = number * len(counts) + torch.arange(len(counts), device=layer.keys.device)
        added = bias.keys(heads, layer.positions.masked_fill(layer.positions >= prompt.done, -1))
        keys, values = through(codec, (layer.keys - added).to(layer.keys.dtype), layer.values, counts, page, self.sinks)
        return (keys + added).to(keys.dtype), values

    def _prefilled(self, tokens: Sequence[int]) -> Prompt | LatePrompt:
        prompt = self.cache.prompt()
        for start in range(0, len(tokens), _CHUNK):
            part = torch.tensor(tokens[start : start + _CHUNK], device=self.model.device)
            self.model.hidden(part, self._attend([(prompt, len(part))]))
        return prompt

    def _step(self, prompts: Sequence[Prompt | LatePrompt]):  # noqa: ANN202 - what `Llama.hidden` attends through
        copies: list = [copy.copy(prompt) for prompt in prompts]
        for prompt in copies:
            prompt.layers = list(prompt.layers)
        return self._attend([(prompt, self.scored) for prompt in copies])

    def _attend(self, chunks: list[tuple[Prompt | LatePrompt, int]]):  # noqa: ANN202
        none = torch.empty(0, dtype=torch.int64, device=self.model.device)
        return self.cache.step(none, none, chunks, self.model.rope)

    def _counts(self, prompt: Prompt | LatePrompt, number: int) -> Tensor:
        return (prompt.layers[number].positions < prompt.done).sum(-1)  # other positions are those of no entry

    def _rows(self, x: Tensor) -> Sequence[Tensor]:
        return x.split(max(1, _LOGITS // self.model.config.vocab_size))

    def _logprobs(self, hidden: Tensor) -> Tensor:
        return self.model.logits(hidden).log_softmax(-1)


def through(codec: Codec, keys: Tensor, values: Tensor, counts: Tensor, page: int, sinks: int) -> Pair:
    """Entries as they come back from a codec, page by page from the first after the sinks on.

    Args:
        codec: of pages.
        keys, values: ``[H, N, D]``.
        counts: ``[H]``, how many of the N are a head's own.
        page: entries of a page. What is left over at the end is the end of a page that begins earlier; a head with fewer
            entries than a page is a page of its own.
        sinks: first entries of each head that stay exact.

    Returns:
        Keys and values of the same shape and dtype; what is not a head's own stays as it was.
    """
    new = keys.clone(), values.clone()
    by_size: dict[int, list[tuple[int, int, bool]]] = {}  # entries of a page → (head, first entry, overlaps) of each
    for head, count in enumerate(counts.tolist()):
        length = count - sinks
        if 0 < length < page:
            by_size.setdefault(length, []).append((head, sinks, False))
        elif length >= page:
            pages = [(head, start, False) for start in range(sinks, count - page + 1, page)]
            pages += [(head, count - page, True)] if length % page else []
            by_size.setdefault(page, []).extend(pages)
    for size, pages in by_size.items():
        head, start, overlaps = torch.tensor(pages, device=keys.device).T
        place = start[:, None] + torch.arange(size, device=keys.device)
        which = head[:, None].expand_as(place), place
        back = codec.decode(codec.encode(keys[which], values[which]))
        for tensor, part in zip(new, back, strict=True):
            for some in (overlaps == 1, overlaps == 0):  # what two pages cover is taken from the one that is whole there
                tensor[which[0][some], which[1][some]] = part[some].to(tensor.dtype)
    return new
