"""The one error shape that HTTP clients see."""

from __future__ import annotations

from typing import Any

from code2lora.errors import UserError

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "unavailable_error",
}


class ApiError(UserError):
    """A request that cannot be answered, with the HTTP status that says so."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        hint: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        """Name the field that is wrong (`param`), or when the same request may succeed."""
        super().__init__(message, hint=hint)
        self.status = status
        self.param = param
        self.retry_after_s = retry_after_s

    @classmethod
    def of(cls, error: UserError, status: int = 400) -> ApiError:
        """Return an error of the rooms below with a status; one that has a status keeps it."""
        return error if isinstance(error, cls) else cls(status, error.message, hint=error.hint)


def error_body(error: ApiError) -> dict[str, Any]:
    """Return an error as OpenAI clients read it; `hint` says what to do."""
    return {
        "error": {
            "message": error.message,
            "type": _KINDS.get(error.status, "invalid_request_error"),
            "param": error.param,
            "code": error.status,
            "hint": error.hint,
        }
    }
