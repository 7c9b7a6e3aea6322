"""Small requests to a server that a target names: JSON in, a status and a short text out.

Redirects are not followed, so that what is allowed to be asked is all that is asked.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from code2lora.adapters.publishers.target import Target
from code2lora.errors import UserError

TIMEOUT_S = 60.0
"""Longest wait for the server's next byte; a large adapter takes seconds to load."""

_ANSWER_BYTES = 65_536
_MESSAGE_CHARACTERS = 300


class Unavailable(UserError):
    """A server that may do what it was asked for at another time."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server said."""

    status: int
    text: str
    retry_after_s: float | None = None

    @property
    def message(self) -> str:
        """The server's words for what went wrong, one line."""
        text = self.text
        try:
            values = json.loads(text)
            if isinstance(values, dict):
                error = values.get("error") or values.get("detail") or text
                text = error.get("message", text) if isinstance(error, dict) else str(error)
        except ValueError:
            pass
        return " ".join(str(text).split())[:_MESSAGE_CHARACTERS] or "no reason given"

    @property
    def code(self) -> str | None:
        """The server's word for the kind of error, where it has one."""
        try:
            code = json.loads(self.text)["error"]["code"]
        except (ValueError, KeyError, TypeError):
            return None
        return code if isinstance(code, str) else None


@dataclass(frozen=True)
class Server:
    """The server of one target."""

    target: Target
    key: str | None = field(repr=False)
    timeout_s: float = TIMEOUT_S

    def get(self, path: str) -> Answer:
        """Return the answer to a GET. Raises Unavailable when there is none."""
        return self._ask("GET", path, None, {})

    def post(self, path: str, content: Mapping[str, Any]) -> Answer:
        """Return the answer to a POST of JSON. Raises Unavailable when there is none."""
        body = json.dumps(content).encode()
        return self._ask("POST", path, body, {"Content-Type": "application/json"})

    def send(self, method: str, path: str, file: Path | None = None) -> Answer:
        """Return the answer to a request with a file as its body, or none."""
        if file is None:
            return self._ask(method, path, None, {})
        with file.open("rb") as stream:
            size = str(os.fstat(stream.fileno()).st_size)
            headers = {"Content-Type": "application/octet-stream", "Content-Length": size}
            return self._ask(method, path, stream, headers)

    def _ask(
        self, method: str, path: str, body: bytes | BinaryIO | None, headers: dict[str, str]
    ) -> Answer:
        parts = urlsplit(self.target.destination)
        secure = parts.scheme == "https"
        connection = (HTTPSConnection if secure else HTTPConnection)(
            parts.hostname or "", parts.port, timeout=self.timeout_s
        )
        if self.key is not None:
            headers = {**headers, "Authorization": f"Bearer {self.key}"}
        try:
            connection.request(method, parts.path.rstrip("/") + path, body=body, headers=headers)
            return _read(connection.getresponse())
        except (OSError, HTTPException) as error:
            why = str(error) or type(error).__name__
            raise Unavailable(
                f"{self.target.label} does not answer: {why}",
                hint="start the server, then `code2lora publish now`",
            ) from error
        finally:
            connection.close()


def read_key(target: Target, environ: Mapping[str, str]) -> str | None:
    """Return the key to a target's server; None when it needs none.

    Raises UserError when the variable or the file is missing, or others can read the file.
    """
    if target.key_env is not None:
        key = environ.get(target.key_env, "").strip()
        if not key:
            raise UserError(
                f"{target.label} needs the key in {target.key_env}, which is not set",
                hint="set it where the daemon starts, or use `--key-file`",
            )
        return _checked(target, key)
    if target.key_file is None:
        return None
    file = Path(target.key_file)
    try:
        if file.stat().st_mode & 0o077:
            raise UserError(f"others can read the key in {file}", hint=f"`chmod 600 '{file}'`")
        return _checked(target, file.read_text(encoding="utf-8").strip())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{target.label}: the key in {file} cannot be read: {error}") from error


def _checked(target: Target, key: str) -> str:
    if not key or not key.isascii() or not key.isprintable():
        raise UserError(f"{target.label}: the key is empty or not one line of plain text")
    return key


def _read(response: HTTPResponse) -> Answer:
    after = response.headers.get("Retry-After", "")
    return Answer(
        status=response.status,
        text=response.read(_ANSWER_BYTES).decode(errors="replace"),
        retry_after_s=float(after) if after.isdecimal() else None,
    )
