"""The application: its routes, and how a request becomes sequences and an answer."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse

from dmc.engine import LLM, SamplingParams
from dmc.engine.sequence import Sequence
from dmc.engine.service import EngineDead, Progress, Service, ShuttingDown, Stream
from dmc.server import errors, page
from dmc.server.answer import Chat, Completion, usage
from dmc.server.errors import RequestError
from dmc.server.guard import Guard
from dmc.server.metrics import Metrics
from dmc.server.schema import ChatRequest, CompletionRequest, Sampling
from dmc.server.settings import Settings

_Made = TypeVar("_Made")


class Api:
    """What the routes share.

    Args:
        service: that generates.
        settings: of the server.
    """

    def __init__(self, service: Service, settings: Settings) -> None:
        self.service, self.settings, self.llm = service, settings, service.llm
        self.metrics = Metrics(service, settings.name)
        service.on_step = lambda advanced: self.metrics.step(advanced, self.llm.engine.preemptions)
        self.started = int(time.time())

    def retry_after(self) -> int:
        """Seconds after which a place in the queue is likely free."""
        return 1 + self.service.waiting // self.llm.engine.max_batch

    async def completion(self, asked: CompletionRequest, request: Request) -> Response:
        """POST /v1/completions."""
        self._check_model(asked)
        prompts: list = [asked.prompt] if isinstance(asked.prompt, str) or isinstance(asked.prompt[0], int) else asked.prompt
        sequences = await self._sequences(prompts, asked, max_tokens=asked.max_tokens, logprobs=asked.logprobs)
        return await self._answer(Completion(asked.model, self.llm.tokenizer), asked, sequences, request)

    async def chat(self, asked: ChatRequest, request: Request) -> Response:
        """POST /v1/chat/completions."""
        self._check_model(asked)
        if asked.top_logprobs and not asked.logprobs:
            raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
        tokens = await self._checked(self.llm.tokenizer.chat, [message.turn() for message in asked.messages])
        room = self.llm.model.config.positions - len(tokens)
        most = asked.max_completion_tokens or asked.max_tokens or max(1, min(self.settings.default_max_tokens, room))
        logprobs = asked.top_logprobs if asked.logprobs else None
        sequences = await self._sequences([tokens], asked, max_tokens=most, logprobs=logprobs)
        return await self._answer(Chat(asked.model, self.llm.tokenizer), asked, sequences, request)

    def _check_model(self, asked: Sampling) -> None:
        if asked.model != self.settings.name:
            raise RequestError(
                f"the model {asked.model!r} is not served here; {self.settings.name!r} is",
                status=404,
                param="model",
                code="model_not_found",
            )
        if asked.stream_options.include_usage and not asked.stream:
            raise RequestError("stream_options need stream to be true", param="stream_options")

    async def _sequences(
        self, prompts: list[str] | list[list[int]], asked: Sampling, *, max_tokens: int, logprobs: int | None
    ) -> list[Sequence]:
        if len(prompts) * asked.n > self.service.max_waiting:
            raise RequestError(
                f"{len(prompts)} prompts with n={asked.n} are {len(prompts) * asked.n} completions, and at most "
                f"{self.service.max_waiting} can wait here: ask for fewer in one request",
                param="n" if asked.n > 1 else "prompt",
            )

        def made() -> list[Sequence]:
            params: SamplingParams = asked.params(max_tokens=max_tokens, logprobs=logprobs)
            return [sequence for prompt in prompts for sequence in self.llm.sequences(prompt, params)]

        return await self._checked(made)

    async def _checked(self, what: Callable[..., _Made], *arguments: object) -> _Made:
        """Runs something that tokenises, in a thread; what it rejects is the client's to fix."""
        try:
            return await asyncio.to_thread(what, *arguments)
        except ValueError as error:  # UnicodeEncodeError too: half a surrogate pair is not text
            raise RequestError(str(error)) from error

    async def _answer(self, form: Completion, asked: Sampling, sequences: list[Sequence], request: Request) -> Response:
        stream = self.service.submit(sequences)
        request.state.figures = figures = {}
        if asked.stream:
            return StreamingResponse(
                self._pieces(form, stream, asked.stream_options.include_usage, figures),
                media_type="text/event-stream",
                headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
            )
        listening = asyncio.ensure_future(_gone(request))
        collecting = asyncio.ensure_future(_collect(stream))
        try:
            await asyncio.wait({listening, collecting}, return_when=asyncio.FIRST_COMPLETED)
            if not collecting.done():
                return Response(status_code=499)  # nobody is there to read it
            ends = collecting.result()
        finally:
            listening.cancel()
            collecting.cancel()
            self._end(stream, figures)
        empty = next((end for end in ends if end.output.finish_reason == "memory" and not end.output.token_ids), None)
        if empty is not None:
            raise RequestError(_too_big(empty, self.llm), code="kv_memory")
        return JSONResponse(form.whole(ends, self._usage(stream)))

    async def _pieces(self, form: Completion, stream: Stream, with_usage: bool, figures: dict) -> AsyncIterator[bytes]:
        try:
            for opening in form.openings(len(stream.sequences)):
                yield _event(opening)
            async for progress in stream:
                if progress.output and progress.output.finish_reason == "memory" and not progress.output.token_ids:
                    yield _event(errors.error_body(400, _too_big(progress, self.llm), code="kv_memory"))
                elif progress.text or progress.output or progress.logprobs:
                    yield _event(form.piece(progress))
            if with_usage:
                yield _event(form.closing(self._usage(stream)))
        except (EngineDead, ShuttingDown) as error:
            yield _event(errors.error_body(503, str(error), code="engine_dead"))
        finally:
            self._end(stream, figures)
        yield b"data: [DONE]\n\n"

    def _end(self, stream: Stream, figures: dict) -> None:
        """Cancels what has not ended, and notes for the log what the request was."""
        left = [sequence for sequence in stream.sequences if sequence.finish_reason is None]
        if left:
            stream.cancel()
            self.metrics.cancelled(left)
        figures |= self._usage(stream)
        figures["preemptions"] = sum(sequence.preemptions for sequence in stream.sequences)
        stats = [sequence.stats for sequence in stream.sequences if sequence.stats]
        if stats:
            figures["held_bytes"] = sum(one.held_bytes for one in stats)
            figures["dense_bytes"] = sum(one.dense_bytes for one in stats)
            figures["cr"] = round(
                sum(one.cached_tokens for one in stats) * stats[0].entries.numel() / sum(int(one.entries.sum()) for one in stats),
                3,
            )
        if left:
            figures["cancelled"] = len(left)

    @staticmethod
    def _usage(stream: Stream) -> dict:
        prompts = sum(len(sequence.prompt) for sequence in stream.sequences if sequence.index == 0)
        return usage(prompts, sum(len(sequence.tokens) for sequence in stream.sequences))


def create_app(llm: LLM, settings: Settings, service: Service | None = None) -> FastAPI:
    """The application over an `LLM`, whose engine's thread runs as long as the application does.

    Args:
        llm: to serve; it must have a tokenizer.
        settings: of the server.
        service: that runs it already; None: one is made and started.
    """
    service = service or Service(llm, max_waiting=settings.max_waiting)
    api = Api(service, settings)
    _ = llm.tokenizer  # fails now rather than at the first request
    app = FastAPI(title="dmc", docs_url=None, redoc_url=None)
    app.state.service = service
    app.add_middleware(Guard, settings=settings)
    errors.install(app, api.retry_after)
    _routes(app, api)
    page.install(app, service, settings.name)
    service.start()
    return app


def _routes(app: FastAPI, api: Api) -> None:
    generating = errors.documented(404, 422, 429, 503) | {
        200: {"description": "The answer; a stream of events where stream is true", "content": {"text/event-stream": {}}}
    }

    @app.post("/v1/completions", response_model=None, responses=generating)
    async def completions(asked: CompletionRequest, request: Request) -> Response:
        """Continues prompts."""
        return await api.completion(asked, request)

    @app.post("/v1/chat/completions", response_model=None, responses=generating)
    async def chat(asked: ChatRequest, request: Request) -> Response:
        """Answers a conversation, through the tokenizer's chat template."""
        return await api.chat(asked, request)

    @app.get("/v1/models", responses=errors.documented())
    async def models() -> dict:
        """The model that is served, with the largest number of positions."""
        return {"object": "list", "data": [_model(api)]}

    @app.get("/v1/models/{name:path}", responses=errors.documented(404))
    async def model(name: str) -> dict:
        """The same by its name."""
        if name != api.settings.name:
            raise RequestError(f"the model {name!r} is not served here", status=404, code="model_not_found")
        return _model(api)

    @app.get("/health", responses=errors.documented(503))
    async def health() -> JSONResponse:
        """200 if the engine works; 503 if it has failed, makes no progress or shuts down. Needs no API key."""
        service = api.service
        if service.death is not None:
            return errors.response(503, f"the engine has failed: {service.death}", code="engine_dead")
        if not service.accepting:
            return errors.response(503, "shutting down", code="shutting_down")
        if service.stalled(api.settings.stall_timeout):
            return errors.response(503, f"no step was finished for {api.settings.stall_timeout:g} seconds", code="stalled")
        return JSONResponse({"status": "ok"})

    @app.get("/metrics", response_class=PlainTextResponse, responses=errors.documented())
    async def metrics() -> Response:
        """Metrics in Prometheus' text format."""
        return Response(api.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _model(api: Api) -> dict:
    return {
        "id": api.settings.name,
        "object": "model",
        "created": api.started,
        "owned_by": "dmc",
        "max_model_len": api.llm.model.config.positions,
    }


def _event(body: dict) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace") + b"\n\n"


def _too_big(progress: Progress, llm: LLM) -> str:
    return (
        f"the {len(progress.output.prompt_token_ids)} tokens of the prompt need more than the "
        f"{llm.cache.page_limit} pages of {llm.cache.page_bytes} bytes that kv_memory holds"
    )


async def _collect(stream: Stream) -> list[Progress]:
    ends = [progress async for progress in stream if progress.output]
    return sorted(ends, key=lambda progress: progress.index)


async def _gone(request: Request) -> None:
    """Returns when the client goes away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
