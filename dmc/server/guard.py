"""What stands before the application: the key, the size and the time of a body, a name for each request."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import time
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dmc.server import errors, logs
from dmc.server.settings import Settings


class _TooLarge(Exception):
    pass


class Guard:
    """ASGI middleware; reads the body itself, so that neither its size nor its slowness reaches the application.

    Args:
        app: behind it.
        settings: key and limits.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app, self.settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope["state"]["id"] = name = uuid.uuid4().hex
        started, status = time.perf_counter(), 0

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", name.encode())]
            await send(message)

        try:
            await self._guarded(scope, receive, named)
        finally:
            seconds = time.perf_counter() - started
            logs.event(
                "request",
                id=name,
                method=scope["method"],
                path=scope["path"],
                status=status,
                seconds=round(seconds, 4),
                **scope["state"].get("figures", {}),
            )

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._allowed(scope):
            scheme = 'Basic realm="dmc", charset="UTF-8"' if scope["path"] == "/" else "Bearer"
            answer = errors.response(
                401,
                "an API key is needed: send it as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": scheme},
            )
            await answer(scope, receive, send)
            return
        try:
            body = await asyncio.wait_for(self._body(scope, receive), self.settings.body_timeout)
        except _TooLarge:
            answer = errors.response(
                413, f"the body is larger than {self.settings.max_body} bytes", headers={"Connection": "close"}
            )
        except TimeoutError:
            answer = errors.response(
                408, f"the body was not there after {self.settings.body_timeout:g} seconds", headers={"Connection": "close"}
            )
        else:
            if body is not None:
                await self.app(scope, _replay(body, receive), send)
            return
        await answer(scope, receive, send)

    def _allowed(self, scope: Scope) -> bool:
        if self.settings.api_key is None or scope["path"] == "/health":
            return True
        scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"basic":  # a browser: it asks for a name and a password, and sends them with each request
            given = _password(given)
        elif scheme.lower() != b"bearer":
            return False
        return hmac.compare_digest(given, self.settings.api_key.encode())

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None if the client went away before it was there."""
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > self.settings.max_body:
            raise _TooLarge
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self.settings.max_body:
                raise _TooLarge
            if not message.get("more_body", False):
                return b"".join(parts)


def _password(encoded: bytes) -> bytes:
    """What stands behind the colon of HTTP's basic credentials; nothing, if they are none."""
    try:
        return base64.b64decode(encoded, validate=True).partition(b":")[2]
    except binascii.Error:
        return b""


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body once more, then whatever follows it: the client's going away."""
    left = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return left.pop() if left else await receive()

    return again
