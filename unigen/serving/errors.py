"""Error responses: OpenAI's error object, and the handlers that write it for every exception of a route.

Does not depend on: engines, jobs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException

ERROR_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
"""OpenAI's `type` of an error by HTTP status; other 4xx are invalid_request_error and 5xx are server_error."""
UNION_TAGS = ("body", "int", "str", "float", "list[float]")
"""Parts of pydantic's error locations that are no field names: the body, and the types of a union."""
MAX_PARAM_LENGTH, MAX_MESSAGE_LENGTH = 200, 1000


class ErrorFields(TypedDict):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorObject(TypedDict):
    """Body of an error response."""

    error: ErrorFields


class ErrorBody(BaseModel):
    """OpenAI's error object."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    message: str
    type: str
    param: str | None
    """Path of the field that is wrong."""
    code: str | None


class ErrorResponse(BaseModel):
    """Schema of an error response in the OpenAPI document."""

    error: ErrorBody


def error_body(
    message: str, *, kind: str = "invalid_request_error", param: str | None = None, code: str | None = None
) -> ErrorObject:
    """Return the body of an error response.

    Lone surrogates, which JSON can express and UTF-8 cannot, become question marks.

    Args:
        message: what is wrong and how to mend it, in one line.
        kind: OpenAI's `type` of the error.
        param: the field of the request that is wrong, as in "messages.0.content".
        code: identifier for programs, as in "invalid_api_key".
    """

    def utf8(text: str) -> str:
        return text.encode("utf-8", "replace").decode()

    return {
        "error": {
            "message": utf8(message),
            "type": utf8(kind),
            "param": param and utf8(param),
            "code": code and utf8(code),
        }
    }


class HTTPError(Exception):
    """An error response in place of the answer.

    Args:
        status: HTTP status.
        message: what is wrong and how to mend it, in one line.
        param: the field of the request that is wrong.
        code: identifier for programs.
        retry_after: seconds after which the client may try again; 0 says nothing about it.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: int = 0
    ) -> None:
        super().__init__(message)
        kind = ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.status, self.body = status, error_body(message, kind=kind, param=param, code=code)
        self.headers = {"retry-after": str(retry_after)} if retry_after else {}


def validation_message(error: Mapping[str, Any]) -> tuple[str, str | None]:
    """Describe one error of pydantic.

    Args:
        error: an entry of `ValidationError.errors()`.

    Returns:
        The message in one line, and the path of the field, as in "messages.0.content".
    """
    location, kind = tuple(error["loc"]), error["type"]
    if location == ("body",) and kind in ("missing", "model_attributes_type", "model_type"):
        return "the body must be a JSON object, sent with the header content-type: application/json", None
    param = ".".join(str(part) for part in location if part not in UNION_TAGS)[:MAX_PARAM_LENGTH] or None
    if kind == "extra_forbidden":
        return f"unknown field {str(location[-1])[:100]!r}: leave it out", param
    if kind == "json_invalid":
        return f"the body is no JSON: {error.get('ctx', {}).get('error', error['msg'])}", None
    message = error["msg"].removeprefix("Value error, ")[:MAX_MESSAGE_LENGTH]
    return (f"{param}: {message}" if param else message), param


def add_error_handlers(app: FastAPI, endpoints: Sequence[str]) -> None:
    """Answer every exception of a route with OpenAI's error object.

    Args:
        app: the app.
        endpoints: the routes that the message of a 404 or 405 lists, as in "POST /v1/chat/completions".
    """

    @app.exception_handler(HTTPError)
    async def on_http_error(_: Request, error: HTTPError) -> Response:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def on_validation_error(_: Request, error: RequestValidationError) -> Response:
        message, param = validation_message(error.errors()[0])
        return JSONResponse(error_body(message, param=param), 400)

    @app.exception_handler(HTTPException)
    async def on_starlette_error(request: Request, error: HTTPException) -> Response:
        message = str(error.detail)
        if error.status_code in (404, 405):
            place = f"{request.method[:20]} {request.url.path[:200]}"
            message = f"there is no {place} here: there are {', '.join(endpoints)}"
        return JSONResponse(HTTPError(error.status_code, message).body, error.status_code, error.headers)
