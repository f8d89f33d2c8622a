"""Requests as OpenAI defines them, with vLLM's names for what OpenAI lacks. Unknown fields are refused."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from dmc.engine import SamplingParams


def _whole(value: object) -> object:
    """1.0 is an integer in JSON Schema, and so in the description that clients are given."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE = BeforeValidator(_whole)
Text = Annotated[str, Field(min_length=1)]
Token = Annotated[int, Field(ge=0), WHOLE]
Count = Annotated[int, Field(ge=1), WHOLE]
Seed = Annotated[int, Field(ge=0, lt=2**63), WHOLE]
Likeliest = Annotated[int, Field(ge=0, le=20), WHOLE]


class Strict(BaseModel):
    """No unknown fields; no numbers out of strings."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Strict):
    """What a stream ends with."""

    include_usage: bool = False


class Sampling(Strict):
    """What both kinds of request have."""

    model: str
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    n: Annotated[int, Field(ge=1, le=128), WHOLE] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: Seed | None = None
    user: str | None = None
    top_k: Token = 0
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=100)
    stop_token_ids: list[Token] = Field(default_factory=list, max_length=64)
    ignore_eos: bool = False

    def params(self, *, max_tokens: int, logprobs: int | None) -> SamplingParams:
        """As the engine takes them.

        Raises:
            ValueError: if a key of logit_bias is no token id.
        """
        bias = self.logit_bias or {}
        if wrong := [key for key in bias if not (key.isascii() and key.isdigit())]:
            raise ValueError(f"logit_bias: {wrong[0]!r} is no token id")
        same = ("temperature", "top_p", "n", "presence_penalty", "frequency_penalty", "seed", "top_k", "min_p",
                "repetition_penalty", "stop_token_ids", "ignore_eos")
        return SamplingParams(
            max_tokens=max_tokens, logprobs=logprobs, stop=self.stop or (),
            logit_bias={int(key): value for key, value in bias.items()}, **{name: getattr(self, name) for name in same},
        )


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=128)] | Annotated[list[Token], Field(min_length=1)] | (
        Annotated[list[list[Token]], Field(min_length=1, max_length=128)]
    )
    max_tokens: Count = 16
    logprobs: Likeliest | None = None
    echo: Literal[False] = False
    suffix: None = None
    best_of: Literal[1] | None = None


class TextPart(Strict):
    """A piece of a message; only text is served."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=4096)
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Likeliest | None = None
