"""What is sent back: the objects of OpenAI's two interfaces, whole or in pieces."""

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
        "prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def reason(progress: Progress) -> str | None:
    """OpenAI's finish_reason of a piece."""
    return progress.output and _REASONS[progress.output.finish_reason]


@dataclass
class Completion:
    """Of POST /v1/completions.

    Attributes:
        model: as the request names it.
        tokenizer: for the texts of log-probabilities.
    """

    model: str
    tokenizer: Tokenizer
    kind = "text_completion"

    def __post_init__(self) -> None:
        """Names the answer."""
        self.id, self.created = f"cmpl-{uuid.uuid4().hex}", int(time.time())
        self._offsets: dict[int, int] = {}

    def openings(self, count: int) -> list[dict]:
        """Pieces that come before the first token."""
        return []

    def piece(self, progress: Progress) -> dict:
        """One piece of a stream."""
        return self._body([self._choice(progress.index, progress.text, progress.logprobs, reason(progress))])

    def whole(self, ends: list[Progress], used: dict) -> dict:
        """The answer in one."""
        return self._body([
            self._choice(end.index, end.output.text, end.output.logprobs or [], reason(end)) for end in ends
        ]) | {"usage": used}

    def closing(self, used: dict) -> dict:
        """The last piece of a stream that was asked for its usage."""
        return self._body([]) | {"usage": used}

    def _body(self, choices: list[dict]) -> dict:
        return {"id": self.id, "object": self.kind, "created": self.created, "model": self.model, "choices": choices}

    def _choice(self, index: int, text: str, logprobs: list[TokenLogprob], finish: str | None) -> dict:
        return {"index": index, "text": text, "logprobs": self._logprobs(index, logprobs), "finish_reason": finish}

    def _logprobs(self, index: int, logprobs: list[TokenLogprob]) -> dict | None:
        if not logprobs:
            return None
        tokens = [self.tokenizer.piece(one.token_id) for one in logprobs]
        offsets, at = [], self._offsets.get(index, 0)
        for token in tokens:
            offsets.append(at)
            at += len(token)
        self._offsets[index] = at
        return {
            "tokens": tokens, "token_logprobs": [one.logprob for one in logprobs], "text_offset": offsets,
            "top_logprobs": [{self.tokenizer.piece(token): value for token, value in one.top} for one in logprobs],
        }


class Chat(Completion):
    """Of POST /v1/chat/completions."""

    kind = "chat.completion"

    def __post_init__(self) -> None:
        """Names the answer."""
        super().__post_init__()
        self.id = f"chatcmpl-{uuid.uuid4().hex}"

    def openings(self, count: int) -> list[dict]:
        """The role, for each choice."""
        return [self._part(index, {"role": "assistant", "content": ""}, [], None) for index in range(count)]

    def piece(self, progress: Progress) -> dict:
        """One piece of a stream."""
        delta = {"content": progress.text} if progress.text else {}
        return self._part(progress.index, delta, progress.logprobs, reason(progress))

    def closing(self, used: dict) -> dict:
        """See `Completion.closing`."""
        return super().closing(used) | {"object": "chat.completion.chunk"}

    def _part(self, index: int, delta: dict, logprobs: list[TokenLogprob], finish: str | None) -> dict:
        choice = {"index": index, "delta": delta, "logprobs": self._logprobs(index, logprobs), "finish_reason": finish}
        return self._body([choice]) | {"object": "chat.completion.chunk"}

    def _choice(self, index: int, text: str, logprobs: list[TokenLogprob], finish: str | None) -> dict:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": self._logprobs(index, logprobs), "finish_reason": finish}

    def _logprobs(self, index: int, logprobs: list[TokenLogprob]) -> dict | None:
        if not logprobs:
            return None
        content = []
        for one in logprobs:
            top = [self._token(token, value) for token, value in one.top]
            content.append(self._token(one.token_id, one.logprob) | {"top_logprobs": top})
        return {"content": content, "refusal": None}

    def _token(self, token: int, value: float) -> dict:
        text = self.tokenizer.piece(token)
        return {"token": text, "logprob": value, "bytes": list(text.encode())}
