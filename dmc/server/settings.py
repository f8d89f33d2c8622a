"""What the server is told when it starts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Settings of one server; every field is a flag of ``dmc serve``.

    Attributes:
        name: of the model, as requests name it.
        host, port: to listen on.
        api_key: asked for everywhere but at /health; None: nowhere.
        max_waiting: sequences that may wait; more are rejected with 429.
        default_max_tokens: of chat requests that do not say.
        max_body: bytes of a request.
        head_timeout: seconds until the head of a request must be there; then 408, or the connection is closed.
        body_timeout: seconds until a request's body must be there.
        drain_timeout: seconds that running requests have when the server is told to stop.
        stall_timeout: seconds without a finished step, though there is work, after which /health turns 503.

    Raises:
        ValueError: if a number is out of range.
    """

    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    max_waiting: int = 256
    default_max_tokens: int = 512
    max_body: int = 1 << 20
    head_timeout: float = 20.0
    body_timeout: float = 30.0
    drain_timeout: float = 30.0
    stall_timeout: float = 60.0

    def __post_init__(self) -> None:
        """Checks the ranges."""
        for field in ("max_waiting", "default_max_tokens", "max_body", "head_timeout", "body_timeout", "stall_timeout"):
            if getattr(self, field) <= 0:
                raise ValueError(f"{field} must be above 0, got {getattr(self, field)}")
        if not 0 <= self.port < 65536 or self.drain_timeout < 0 or self.api_key == "":
            raise ValueError("port must be from 0 to 65535, drain_timeout at least 0, and api_key not empty")
