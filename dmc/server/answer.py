"""The server's answers: the objects of OpenAI's two interfaces, whole or streamed."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass

from dmc.engine.sampler import TokenLogprob
from dmc.engine.service import Progress
from dmc.engine.tokenizer import Tokenizer

_REASONS = {"length": "length", "memory": "length", "eos": "stop", "stop": "stop", "cancelled": "stop"}


def usage(prompt_tokens: int, completion_tokens: int) -> dict:
    """OpenAI's count of tokens."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


@dataclass(frozen=True)
class Part:
    """New text of a choice, with its tokens.

    Attributes:
        index: of the choice.
        text: that is new.
        logprobs: of the new tokens; empty if they were not asked for.
        pieces: what each new token adds to the text.
        ended: the engine's finish_reason; None while there is more to come.
    """

    index: int
    text: str
    logprobs: list[TokenLogprob]
    pieces: list[str]
    ended: str | None

    @classmethod
    def streamed(cls, progress: Progress) -> Part:
        """What has become new."""
        ended = progress.output.finish_reason if progress.output else None
        return cls(progress.index, progress.text, progress.logprobs, progress.pieces, ended)

    @classmethod
    def whole(cls, end: Progress) -> Part:
        """All of a choice that has ended."""
        output = end.output
        return cls(end.index, output.text, output.logprobs or [], output.pieces, output.finish_reason)


@dataclass
class Completion:
    """The answer to POST /v1/completions.

    Attributes:
        model: name in the request.
        tokenizer: gives the texts of the tokens in log-probabilities.
    """

    model: str
    tokenizer: Tokenizer
    kind = "text_completion"

    def __post_init__(self) -> None:
        """Chooses the answer's id."""
        self.id, self.created = f"cmpl-{uuid.uuid4().hex}", int(time.time())
        self._offsets: dict[int, int] = {}

    def openings(self, count: int) -> list[dict]:
        """Events of a stream that come before the first token."""
        return []

    def piece(self, progress: Progress) -> dict:
        """One event of a stream."""
        return self._body([self._choice(Part.streamed(progress))])

    def whole(self, ends: list[Progress], used: dict) -> dict:
        """The answer to a request that does not stream."""
        return self._body([self._choice(Part.whole(end)) for end in ends]) | {"usage": used}

    def closing(self, used: dict) -> dict:
        """The last event of a stream that was asked for its usage."""
        return self._body([]) | {"usage": used}

    def _body(self, choices: list[dict]) -> dict:
        return {"id": self.id, "object": self.kind, "created": self.created, "model": self.model, "choices": choices}

    def _choice(self, part: Part) -> dict:
        return {"index": part.index, "text": part.text, "logprobs": self._logprobs(part), "finish_reason": _reason(part)}

    def _logprobs(self, part: Part) -> dict | None:
        """OpenAI's object. ``tokens`` are the pieces of the text, and ``text_offset`` counts its characters."""
        if not part.logprobs:
            return None
        tokens, offsets, at = self._texts(part), [], self._offsets.get(part.index, 0)
        for piece in part.pieces:
            offsets.append(at)
            at += len(piece)
        self._offsets[part.index] = at
        return {
            "tokens": tokens,
            "token_logprobs": [one.logprob for one in part.logprobs],
            "text_offset": offsets,
            "top_logprobs": [self._top(one, text) for one, text in zip(part.logprobs, tokens, strict=True)],
        }

    def _top(self, one: TokenLogprob, text: str) -> dict[str, float]:
        """The chosen token and the most likely ones by their texts; tokens that share a text have their id as the key."""
        top = {text: one.logprob}
        for token, value in one.top:
            if token != one.token_id:
                label = self._label(token)
                top[f"token_id:{token}" if label in top else label] = value
        return dict(sorted(top.items(), key=lambda item: -item[1]))

    def _texts(self, part: Part) -> list[str]:
        """Texts of the generated tokens: what each adds to the text. Those that the text leaves out give their own text."""
        texts = [
            self.tokenizer.name(one.token_id) if one.token_id in self.tokenizer.special and not piece else piece
            for one, piece in zip(part.logprobs, part.pieces, strict=True)
        ]
        if part.ended == "eos" and not texts[-1]:
            texts[-1] = self.tokenizer.piece(part.logprobs[-1].token_id)  # a token of stop_token_ids
        return texts

    def _label(self, token: int) -> str:
        """Text of a token that was not chosen. One that is only a part of a character is written as OpenAI does."""
        raw = self.tokenizer.raw_bytes(token)
        return self.tokenizer.piece(token) if raw is None else "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class Chat(Completion):
    """The answer to POST /v1/chat/completions."""

    kind = "chat.completion"

    def __post_init__(self) -> None:
        """Chooses the answer's id."""
        super().__post_init__()
        self.id = f"chatcmpl-{uuid.uuid4().hex}"

    def openings(self, count: int) -> list[dict]:
        """The role, for each choice."""
        return [self._event(index, {"role": "assistant", "content": ""}, None, None) for index in range(count)]

    def piece(self, progress: Progress) -> dict:
        """One event of a stream."""
        part = Part.streamed(progress)
        return self._event(part.index, {"content": part.text} if part.text else {}, self._logprobs(part), _reason(part))

    def closing(self, used: dict) -> dict:
        """See `Completion.closing`."""
        return super().closing(used) | {"object": "chat.completion.chunk"}

    def _event(self, index: int, delta: dict, logprobs: dict | None, finish: str | None) -> dict:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return self._body([choice]) | {"object": "chat.completion.chunk"}

    def _choice(self, part: Part) -> dict:
        message = {"role": "assistant", "content": part.text, "refusal": None}
        return {"index": part.index, "message": message, "logprobs": self._logprobs(part), "finish_reason": _reason(part)}

    def _logprobs(self, part: Part) -> dict | None:
        if not part.logprobs:
            return None
        content = []
        for one, text, piece in zip(part.logprobs, self._texts(part), part.pieces, strict=True):
            chosen = self._token(one.token_id, text, piece, one.logprob)
            top = [
                chosen if token == one.token_id else self._token(token, self._label(token), self.tokenizer.piece(token), value)
                for token, value in one.top
            ]
            content.append(chosen | {"top_logprobs": top})
        return {"content": content, "refusal": None}

    def _token(self, token: int, text: str, piece: str, value: float) -> dict:
        """OpenAI's object. The bytes of all tokens together are those of the text; None for tokens that it leaves out."""
        raw = self.tokenizer.raw_bytes(token)
        if raw is None and piece and token not in self.tokenizer.special:
            raw = piece.encode()
        return {"token": text, "logprob": value, "bytes": raw and list(raw)}


def _reason(part: Part) -> str | None:
    """OpenAI's finish_reason."""
    return part.ended and _REASONS[part.ended]
