"""Request bodies: OpenAI's parameters, and vLLM's names for sampling parameters that OpenAI lacks.

Three rules hold for every object of a request:

- ``null`` means that the field is not given, for every field.
- An unknown field is rejected, not ignored.
- A parameter of OpenAI that is not served is accepted if its value asks for nothing (``tools: []``,
  ``response_format: {"type": "text"}``), and rejected otherwise.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

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
Nothing = Annotated[list[Any], Field(max_length=0)]

NOT_SERVED = frozenset(
    {
        "annotations",
        "audio",
        "best_of",
        "echo",
        "function_call",
        "functions",
        "metadata",
        "modalities",
        "moderation",
        "prediction",
        "prompt_cache_options",
        "prompt_cache_retention",
        "reasoning_effort",
        "response_format",
        "service_tier",
        "store",
        "suffix",
        "tool_call_id",
        "tool_calls",
        "tool_choice",
        "tools",
        "verbosity",
        "web_search_options",
    }
)
"""Fields of OpenAI's requests that no value makes do anything here; the error for one of them says so."""

FORMS = {
    "prompt": "a string, a list of strings, a list of token ids or a list of lists of token ids",
    "stop": "a string or a list of at most 16 strings",
    "content": "a string or a list of text parts",
}
"""Fields that have several types, in words."""


def _describe_nulls(schema: dict[str, Any]) -> None:
    """Adds null to the JSON Schema of an object: for optional properties, and for properties that are not known."""
    for name, field in schema["properties"].items():
        if name not in schema.get("required", ()) and {"type": "null"} not in field.get("anyOf", ()):
            default = {"default": field.pop("default")} if "default" in field else {}
            schema["properties"][name] = {"anyOf": [field, {"type": "null"}]} | default
    schema["additionalProperties"] = {"type": "null"}


class Strict(BaseModel):
    """An object of a request: null means not given, unknown fields are rejected, and a string is not a number."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra=_describe_nulls)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, value: object) -> object:
        return {name: each for name, each in value.items() if each is not None} if isinstance(value, dict) else value


class StreamOptions(Strict):
    """What a stream ends with."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Sampling(Strict):
    """Parameters of both kinds of request."""

    model: str
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    n: Annotated[int, Field(ge=1, le=128), WHOLE] = 1
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    stop: Text | Annotated[list[Text], Field(max_length=16)] = Field(default_factory=list)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = Field(default_factory=dict)
    seed: Seed | None = None
    user: str | None = None
    top_k: Token = 0
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=100)
    stop_token_ids: list[Token] = Field(default_factory=list, max_length=64)
    ignore_eos: bool = False

    def params(self, *, max_tokens: int, logprobs: int | None) -> SamplingParams:
        """The engine's form of these parameters.

        Raises:
            ValueError: if a key of logit_bias is not a token id.
        """
        if wrong := [key for key in self.logit_bias if not (key.isascii() and key.isdigit())]:
            raise ValueError(f"logit_bias: {wrong[0]!r} is not a token id")
        same = (
            "temperature",
            "top_p",
            "n",
            "stop",
            "presence_penalty",
            "frequency_penalty",
            "seed",
            "top_k",
            "min_p",
            "repetition_penalty",
            "stop_token_ids",
            "ignore_eos",
        )
        return SamplingParams(
            max_tokens=max_tokens,
            logprobs=logprobs,
            logit_bias={int(key): value for key, value in self.logit_bias.items()},
            **{name: getattr(self, name) for name in same},
        )


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=128)]
        | Annotated[list[Token], Field(min_length=1)]
        | (Annotated[list[list[Token]], Field(min_length=1, max_length=128)])
    )
    max_tokens: Count = 16
    logprobs: Likeliest | None = None
    echo: Literal[False] = False
    suffix: Literal[""] = ""
    best_of: Literal[1] = 1


class TextPart(Strict):
    """A part of a message; only text is served."""

    type: Literal["text"]
    text: str


class RefusalPart(Strict):
    """A part of an assistant's message in which it refused to answer."""

    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        """What the assistant said."""
        return self.refusal


class Instruction(Strict):
    """A system's, developer's or user's message."""

    role: Literal["system", "developer", "user"]
    content: str | list[TextPart]
    name: str | None = None

    def turn(self) -> dict[str, str]:
        """The message in the form that chat templates take."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text} | ({} if self.name is None else {"name": self.name})


class Answer(Strict):
    """An assistant's message, as this server and others send it: any field but the role may be null or missing.

    A refusal is what the assistant said if there is no content.
    """

    role: Literal["assistant"]
    content: str | list[Annotated[TextPart | RefusalPart, Field(discriminator="type")]] | None = None
    refusal: str | None = None
    name: str | None = None
    tool_calls: Nothing = Field(default_factory=list)
    annotations: Nothing = Field(default_factory=list)

    def turn(self) -> dict[str, str]:
        """The message in the form that chat templates take."""
        content = self.refusal or "" if self.content is None else self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": self.role, "content": text} | ({} if self.name is None else {"name": self.name})


class TextFormat(Strict):
    """The only form of answers that is served."""

    type: Literal["text"]


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: list[Annotated[Instruction | Answer, Field(discriminator="role")]] = Field(min_length=1, max_length=4096)
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Likeliest = 0
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    tools: Nothing = Field(default_factory=list)
    tool_choice: Literal["none", "auto"] = "none"
    parallel_tool_calls: bool = False
    functions: Nothing = Field(default_factory=list)
    function_call: Literal["none", "auto"] = "none"
    response_format: TextFormat = TextFormat(type="text")
    modalities: list[Literal["text"]] = ["text"]
    metadata: Annotated[dict[str, str], Field(max_length=0)] = Field(default_factory=dict)
    store: Literal[False] = False
    service_tier: Literal["auto", "default"] = "auto"
    reasoning_effort: Literal["none"] = "none"
    verbosity: Literal["medium"] = "medium"
