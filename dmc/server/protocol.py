"""HTTP/1.1 as uvicorn speaks it, with a limit on the time that the head of a request may take.

uvicorn closes connections that are idle after an answer, but waits for ever for the first head, and for the rest of one
that has begun; a client that sends nothing more would hold its connection for as long as it likes.
"""

from __future__ import annotations

import asyncio
import json

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from dmc.server import errors


def protocol(head_timeout: float) -> type[H11Protocol]:
    """A protocol class for ``uvicorn.Config(http=...)``.

    Args:
        head_timeout: seconds from the connection, or from the first byte after an answer, to the end of the head.
    """

    class Protocol(_TimedHead):
        seconds = head_timeout

    return Protocol


class _TimedHead(H11Protocol):
    seconds: float
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.trailing_data[0]:  # the next head has begun, so the connection is not idle
            self._unset_keepalive_if_required()
            self._watch()

    def connection_lost(self, error: Exception | None) -> None:
        self._stop()
        super().connection_lost(error)

    def _watch(self) -> None:
        """The timer runs while a head is awaited; more of its bytes do not start it again."""
        if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
            self._stop()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self.seconds, self._late)

    def _stop(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _late(self) -> None:
        self._head_timer = None
        if self.transport.is_closing() or self.conn.their_state is not h11.IDLE:
            return
        begun = bool(self.conn.trailing_data[0])
        if begun and self.conn.our_state is h11.IDLE:  # who has sent nothing gets no answer
            body = json.dumps(errors.error_body(408, f"the head of the request was not there after {self.seconds:g} seconds"))
            head = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
            for event in (
                h11.Response(status_code=408, headers=head, reason=b"Request Timeout"),
                h11.Data(data=body.encode()),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event))
        self.transport.close()
