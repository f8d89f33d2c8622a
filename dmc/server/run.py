"""Runs the server in this process until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import signal
from types import FrameType

import uvicorn
from fastapi import FastAPI

from dmc.engine import LLM
from dmc.engine.service import Service
from dmc.server import logs
from dmc.server.app import create_app
from dmc.server.protocol import protocol
from dmc.server.settings import Settings

_LAST_ANSWERS = 2.0  # seconds between the engine's failure and the end of the process: clients and probes hear of it


def serve(llm: LLM, settings: Settings) -> int:
    """Serves until SIGTERM or SIGINT, which let running requests end within the drain timeout → the exit code.

    A second signal ends it at once. Where the engine fails, every client gets an error, /health turns 503, and the
    exit code is 1. Logs go where `dmc.server.logs.start` sent them.
    """
    service = Service(llm, max_waiting=settings.max_waiting)
    pages = llm.cache.page_limit
    if pages is not None:
        logs.event("page pool", pages=pages, bytes=pages * llm.cache.page_bytes)
    app = create_app(llm, settings, service)
    server = _Server(config(app, settings), service, settings)
    service.on_death = server.died
    try:
        server.run()
    finally:
        service.stop()
    return 1 if service.death is not None or not server.started else 0


def config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    """How uvicorn serves the application."""
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=5,
        http=protocol(settings.head_timeout),
        h11_max_incomplete_event_size=64 * 1024,
    )


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, service: Service, settings: Settings) -> None:
        super().__init__(config)
        self._service, self._settings, self._draining = service, settings, False

    async def startup(self, sockets: list | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started:
            ports = [socket.getsockname()[1] for server in self.servers for socket in server.sockets]
            logs.event("listening", host=self._settings.host, port=ports[0], model=self._settings.name)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains: the port stays open and answers 503. The second ends at once."""
        if self._draining or not self.started:
            super().handle_exit(signal.SIGINT, frame)
            super().handle_exit(signal.SIGINT, frame)
            return
        self._draining = True
        self._loop.call_soon_threadsafe(lambda: self._loop.create_task(self._drain(sig)))

    def died(self, error: BaseException) -> None:
        """Called in the engine's thread."""
        logs.event("engine failed", level=logging.ERROR, error=error)
        self._loop.call_soon_threadsafe(self._loop.call_later, _LAST_ANSWERS, self._exit)

    async def _drain(self, sig: int) -> None:
        logs.event("draining", signal=signal.Signals(sig).name, seconds=self._settings.drain_timeout)
        await self._service.drain(self._settings.drain_timeout)
        self._exit()

    def _exit(self) -> None:
        self.should_exit = True
