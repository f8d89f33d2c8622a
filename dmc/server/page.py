"""The page to try the model on, and what feeds it: an answer token by token, with what was merged where."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import torch
from fastapi import FastAPI
from fastapi.responses import HTMLResponse, Response, StreamingResponse
from pydantic import Field

from dmc.engine import SamplingParams
from dmc.engine.service import EngineDead, Progress, Service, ShuttingDown, Stream
from dmc.server.errors import RequestError, documented, error_body
from dmc.server.schema import Count, Seed, Strict

_PAGE = Path(__file__).with_name("page.html")


class TryRequest(Strict):
    """POST /try."""

    prompt: str = Field(min_length=1)
    max_tokens: Count = 64
    temperature: float = Field(1.0, ge=0, le=100)
    seed: Seed | None = None


def install(app: FastAPI, service: Service, name: str) -> None:
    """Adds ``/`` and ``/try``."""

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(_PAGE.read_text(encoding="utf-8").replace("@MODEL@", _escaped(name)))

    stream = {"description": "A stream of events", "content": {"text/event-stream": {}}}

    @app.post("/try", response_class=StreamingResponse, responses=documented(422, 429, 503) | {200: stream})
    async def trial(asked: TryRequest) -> Response:
        """Streams text with its merges, for the playground."""
        params = SamplingParams(max_tokens=asked.max_tokens, temperature=asked.temperature, seed=asked.seed)
        try:
            (sequence,) = service.llm.sequences(asked.prompt, params)
        except ValueError as error:
            raise RequestError(str(error)) from error
        sequence.trace = []
        events = _events(service, service.submit([sequence]))
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


async def _events(service: Service, stream: Stream) -> AsyncIterator[bytes]:
    """One event for the prompt and each token: pieces of text, and for each token fed the hex digits of its merges.

    The digits hold one bit a layer and head, layer by layer, the first in the highest bit.
    """
    sequence = stream.sequences[0]
    shape, tokenizer = service.llm.cache.model_shape, service.llm.tokenizer
    yield _event({"layers": shape.layers, "heads": shape.heads, "pieces": tokenizer.pieces(sequence.prompt)})
    try:
        async for progress in stream:
            yield _event(
                {
                    "pieces": [
                        piece or (tokenizer.name(token) if token in tokenizer.special else "")
                        for token, piece in zip(progress.tokens, progress.pieces, strict=True)
                    ],
                    "merges": [_bits(merges) for merges in progress.merges],
                    "held": progress.held_bytes,
                    "dense": progress.dense_bytes,
                    "finish": _finish(progress),
                }
            )
    except (EngineDead, ShuttingDown) as error:
        yield _event(error_body(503, str(error)))
    finally:
        stream.cancel()


def _finish(progress: Progress) -> str | None:
    return progress.output.finish_reason if progress.output else None


def _bits(merges: torch.Tensor) -> str:
    bits = "".join("1" if bit else "0" for bit in merges.flatten().tolist())
    bits += "0" * (-len(bits) % 4)
    return f"{int(bits, 2):0{len(bits) // 4}x}"


def _event(body: dict) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
