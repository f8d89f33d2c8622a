"""Errors as OpenAI's clients expect them: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from dmc.engine.service import EngineDead, QueueFull, ShuttingDown
from dmc.server import validation

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
}


class RequestError(Exception):
    """Something that the client can fix.

    Args:
        message: one sentence.
        status: 4xx.
        param: the field that is wrong.
        code: a short name of the error.
    """

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


class ErrorObject(BaseModel):
    """Error object of a response, as OpenAI's."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is an error."""

    error: ErrorObject


def documented(*statuses: int) -> dict[int, dict]:
    """Responses of a route for its OpenAPI description: those that every route has, and these."""
    every = (400, 401, 405, 408, 413)
    return {status: {"model": ErrorBody, "description": HTTPStatus(status).phrase} for status in (*every, *statuses)}


def error_body(status: int, message: str, *, param: str | None = None, code: str | None = None) -> dict:
    """The error object; what the message quotes of a request may be no valid Unicode."""
    message, param = (text and text.encode("utf-8", "replace").decode() for text in (message, param))
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def response(
    status: int, message: str, *, param: str | None = None, code: str | None = None, headers: dict[str, str] | None = None
) -> JSONResponse:
    """The error object as a response."""
    return JSONResponse(error_body(status, message, param=param, code=code), status_code=status, headers=headers)


def install(app: FastAPI, retry_after: Callable[[], int]) -> None:
    """Makes every error of the application one of these; ``retry_after()`` says for how many seconds to stay away."""

    @app.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> JSONResponse:
        return response(error.status, str(error), param=error.param, code=error.code)

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        found = error.errors()
        if found[0]["type"] == "json_invalid":
            return response(400, f"the body is not valid JSON: {found[0].get('ctx', {}).get('error', found[0]['msg'])}")
        message, param = validation.explain(found, error.body)
        return response(422, message, param=param)

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        return response(error.status_code, str(error.detail), headers=dict(error.headers or {}))

    @app.exception_handler(QueueFull)
    async def full(_: Request, error: QueueFull) -> JSONResponse:
        return response(429, str(error), code="queue_full", headers={"Retry-After": str(retry_after())})

    @app.exception_handler(ShuttingDown)
    async def stopping(_: Request, error: ShuttingDown) -> JSONResponse:
        return response(503, str(error), code="shutting_down", headers={"Retry-After": "30"})

    @app.exception_handler(EngineDead)
    async def dead(_: Request, error: EngineDead) -> JSONResponse:
        return response(503, str(error), code="engine_dead")
