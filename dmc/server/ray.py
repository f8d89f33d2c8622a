"""Replicas behind Ray Serve: each is one engine with the application over it. Needs ``pip install -e '.[ray]'`` in the checkout.

    serve run dmc.server.ray:build directory=DIR replicas=2 codec=tcq
    serve deploy deploy/ray-serve.yaml

Ray's proxy spreads requests over the replicas, streams answers through, and replaces a replica whose process has ended
or whose engine has failed or stands still.
"""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from typing import ClassVar, Literal

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve

from dmc.engine import LLM
from dmc.engine.service import EngineDead, Service
from dmc.server import logs
from dmc.server.app import create_app
from dmc.server.settings import Settings

_LAST_ANSWERS = 2.0  # seconds between the engine's failure and the end of the process: its clients hear of it
_MORE_REQUESTS = 64  # that reach a replica beyond those it takes, to be rejected with 429 rather than wait unseen


class Arguments(BaseModel):
    """Arguments of `build`: the settings of `LLM` and of `Settings` under their names, and how many replicas there are.

    Attributes:
        directory: as every machine of the cluster finds it.
        name: of the model, as requests name it; None: the directory's.
        replicas: engines.
        api_key: None: DMC_API_KEY of a replica's environment, or none.
        health_period: seconds between two looks at a replica's engine.
    """

    model_config = ConfigDict(extra="forbid")

    directory: str
    name: str | None = None
    replicas: int = Field(1, ge=1)
    health_period: float = Field(5.0, gt=0)

    policy: str | None = None
    policy_settings: dict[str, float | int | str] | None = None
    decisions: str | None = None
    target_cr: float | None = None
    max_entries: int | None = None
    codec: str = "dense"
    codec_settings: dict[str, float | int | str] | None = None
    codec_layers: str | None = None
    kv_memory: int | Literal["auto"] | None = "auto"
    max_batch: int = Field(16, ge=1)
    page_size: int | None = None
    sink_tokens: int | None = None
    window: int | None = None
    exact_dtype: str | None = None
    prefill_tokens: int = 512
    dtype: str = "auto"
    device: str = "auto"
    tensor_parallel: int = 1
    rank_timeout: float = 120.0

    api_key: str | None = None
    max_waiting: int = Field(256, ge=1)
    default_max_tokens: int = 512
    max_body: int = 1 << 20
    body_timeout: float = 30.0
    drain_timeout: float = 30.0
    stall_timeout: float = 60.0

    def llm(self) -> LLM:
        """The engine.

        Raises:
            ValueError: see `LLM`.
        """
        ours = {"directory", "name", "replicas", "health_period"} | set(Settings.__dataclass_fields__)
        return LLM(self.directory, **self.model_dump(exclude=ours))

    def settings(self) -> Settings:
        """Settings of the application.

        Raises:
            ValueError: see `Settings`.
        """
        key = self.api_key or os.environ.get("DMC_API_KEY") or None
        fields = self.model_dump(include=set(Settings.__dataclass_fields__) - {"name", "api_key"})
        return Settings(name=self.name or Path(self.directory).resolve().name, api_key=key, **fields)


class Replica:
    """One engine, alone in its process.

    Args:
        arguments: of the deployment.

    Attributes:
        made: the one of this process.
    """

    made: ClassVar[Replica]

    def __init__(self, arguments: Arguments) -> None:
        logs.start()
        self.llm, self.settings = arguments.llm(), arguments.settings()
        self.service = Service(self.llm, max_waiting=self.settings.max_waiting, on_death=self._died)
        self.application: FastAPI = create_app(self.llm, self.settings, self.service)
        Replica.made = self

    async def check_health(self) -> None:
        """Asked by Ray now and then.

        Raises:
            EngineDead: if the engine has failed or makes no progress, after which Ray replaces the replica.
        """
        if self.service.death is not None:
            raise EngineDead(f"the engine has failed: {self.service.death}")
        if self.service.stalled(self.settings.stall_timeout):
            raise EngineDead(f"the engine has made no progress for {self.settings.stall_timeout:g} seconds")

    async def __del__(self) -> None:
        """Called by Ray when the replica is no longer needed and its requests are done, or have had their time."""
        await self.service.drain(0)
        self.service.stop()
        self.llm.close()

    def _died(self, error: BaseException) -> None:
        """The process ends, as that of ``dmc serve`` does: Ray notices at once and makes another."""
        logs.event("engine failed", level=logging.ERROR, error=error)
        threading.Timer(_LAST_ANSWERS, os._exit, [1]).start()


def _application() -> FastAPI:
    """What a replica answers with; Ray asks for it once the replica is made."""
    return Replica.made.application


def build(arguments: Arguments) -> serve.Application:
    """The application for ``serve run`` and ``serve deploy``.

    Raises:
        ValueError: if a setting is unknown or out of range.
    """
    settings = arguments.settings()
    return (
        serve.deployment(serve.ingress(_application)(Replica))
        .options(
            name=Replica.__name__,
            num_replicas=arguments.replicas,
            max_ongoing_requests=arguments.max_batch + arguments.max_waiting + _MORE_REQUESTS,
            health_check_period_s=arguments.health_period,
            graceful_shutdown_timeout_s=settings.drain_timeout,
        )
        .bind(arguments)
    )
