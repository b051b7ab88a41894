"""What a client is told when a request cannot be done: an HTTP status, a type, one line."""

from __future__ import annotations

from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse


class Refused(HTTPException):
    """A request that is refused.

    Attributes:
        kind: a word that programs can compare.
        details: more fields of the error.
    """

    def __init__(
        self,
        status: int,
        kind: str,
        message: str,
        headers: dict[str, str] | None = None,
        **details: Any,
    ) -> None:
        """status: of HTTP. message: one line for people. headers: more of the answer."""
        super().__init__(status, message, headers)
        self.kind, self.details = kind, details

    def answer(self) -> JSONResponse:
        """What the client gets."""
        body = {"error": {"type": self.kind, "message": self.detail, **self.details}}
        return JSONResponse(body, self.status_code, self.headers)


class Busy(Refused):
    """Somebody else looks at the session already."""

    def __init__(self) -> None:
        super().__init__(409, "busy", "stream: expected one at a time, found another one open")


def not_found(what: str) -> Refused:
    """Nothing of this name is here."""
    return Refused(404, "not_found", f"{what}: expected one that is here, found none of this name")
