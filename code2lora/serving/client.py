"""Ask the model worker over its Unix socket.

Imports the standard library alone, so that commands start fast and the supervisor stays small.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse
from pathlib import Path
from types import TracebackType
from typing import Any

from code2lora.errors import UserError
from code2lora.serving.completion import AdapterIdentity, Completion, CompletionRequest, Use

CONNECT_TIMEOUT_S = 5.0
TIMEOUT_S = 600.0
_POLL_S = 0.1
_LOGS_HINT = "`code2lora daemon logs`"


@dataclass(frozen=True, slots=True)
class Health:
    """What the worker says of itself."""

    ready: bool
    message: str
    """`ok`, or why it cannot complete yet."""


class _UnixConnection(HTTPConnection):
    """One connection to the worker's socket, for one request."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        """Connect. Raises UserError when nobody listens."""
        self.sock = socket.socket(socket.AF_UNIX)
        try:
            self.sock.settimeout(CONNECT_TIMEOUT_S)
            self.sock.connect(str(self._path))
        except OSError as error:
            self.sock.close()
            raise UserError(
                f"no model worker answers at {self._path}", hint="`code2lora daemon start`"
            ) from error
        self.sock.settimeout(self.timeout)

    def abort(self) -> None:
        """End the request from another thread."""
        if self.sock is not None:
            with suppress(OSError):  # it may have ended by itself
                self.sock.shutdown(socket.SHUT_RDWR)


class WorkerClient:
    """Asks the model worker, with a connection for each request; usable from several threads."""

    def __init__(self, socket_path: Path, *, timeout_s: float = TIMEOUT_S) -> None:
        """Connect at the first request.

        timeout_s: longest wait for the next piece of an answer, and for the model to load
        """
        self._socket_path = socket_path
        self._timeout_s = timeout_s
        self._open: set[_UnixConnection] = set()
        self._lock = threading.Lock()

    def complete(
        self,
        request: CompletionRequest,
        *,
        repository: str | None = None,
        commit: str | None = None,
        use: Use = "own",
    ) -> Completion:
        """Return a completion by the repository's adapter, once the model is loaded.

        Raises UserError when no worker answers or it refuses.
        """
        body = _completion_body(request, repository, commit, use, stream=False)
        with self._send("/v1/completions", body, wait=True) as response:
            return _completion(_read_json(response))

    def complete_stream(
        self,
        request: CompletionRequest,
        *,
        repository: str | None = None,
        commit: str | None = None,
        use: Use = "own",
    ) -> CompletionStream:
        """Return the pieces of a completion as they come. Raises as `complete` does."""
        body = _completion_body(request, repository, commit, use, stream=True)
        stack = ExitStack()
        response = stack.enter_context(self._send("/v1/completions", body, wait=True))
        return CompletionStream(response, stack, self._failures)

    def health(self) -> Health:
        """Return whether the worker can complete. Raises UserError when none answers."""
        with self._exchange("GET", "/health", None) as response:
            if response.status == 200:
                return Health(ready=True, message="ok")
            return Health(ready=False, message=_error(response).message)

    def post(self, path: str, content: Mapping[str, Any]) -> dict[str, Any]:
        """Post a JSON object and return the one that answers.

        Raises UserError when no worker answers, or with the message and hint of a refusal.
        """
        with self._send(path, content) as response:
            return _read_json(response)

    def close(self) -> None:
        """End the requests that other threads have under way; they raise UserError."""
        with self._lock:
            for connection in self._open:
                connection.abort()

    def __enter__(self) -> WorkerClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @contextmanager
    def _send(
        self, path: str, content: Mapping[str, Any], *, wait: bool = False
    ) -> Iterator[HTTPResponse]:
        """Yield a successful response before its body is read.

        wait: ask again while the worker says that it will soon be able to answer
        """
        give_up_s = time.monotonic() + self._timeout_s
        body = json.dumps(content).encode("ascii")
        while True:
            with self._exchange("POST", path, body) as response:
                if response.status < 400:
                    yield response
                    return
                soon = wait and response.headers["Retry-After"] is not None
                if not soon or time.monotonic() > give_up_s:
                    raise _error(response)
            time.sleep(_POLL_S)

    @contextmanager
    def _exchange(self, method: str, path: str, body: bytes | None) -> Iterator[HTTPResponse]:
        """Yield the response to one request, whatever its status, and close its connection."""
        connection = _UnixConnection(self._socket_path, self._timeout_s)
        with self._lock:
            self._open.add(connection)
        try:
            with self._failures(), _answer(connection, method, path, body) as response:
                yield response
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """Turn the failures of a connection into words."""
        try:
            yield
        except TimeoutError as error:
            raise UserError(
                f"the model worker has said nothing for {self._timeout_s:g} s", hint=_LOGS_HINT
            ) from error
        except (OSError, HTTPException) as error:
            raise _ended() from error


def _answer(
    connection: _UnixConnection, method: str, path: str, body: bytes | None
) -> HTTPResponse:
    """Return the response to one request before its body is read."""
    headers = {} if body is None else {"Content-Type": "application/json"}
    # a worker that refuses a request need not have read all of it
    with suppress(BrokenPipeError, ConnectionResetError):
        connection.request(method, path, body, headers)
    return connection.getresponse()


def _ended() -> UserError:
    return UserError("the model worker ended before it had answered", hint=_LOGS_HINT)


class CompletionStream:
    """Iterates over the pieces of one completion; leaving its `with` block cancels the rest."""

    def __init__(
        self,
        response: HTTPResponse,
        stack: ExitStack,
        failures: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._response = response
        self._stack = stack
        self._failures = failures
        self._pieces: list[str] = []
        self.completion: Completion | None = None
        """The whole, once the last piece has come."""

    def __iter__(self) -> Iterator[str]:
        """Yield the pieces. Raises UserError when the worker fails or ends in between."""
        with self, self._failures():
            for line in self._response:
                piece = self._take(line.decode().rstrip())
                if piece:
                    yield piece
        if self.completion is None:
            raise _ended()

    def __enter__(self) -> CompletionStream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _take(self, line: str) -> str:
        """Return the text of one line of the event stream."""
        field, _, value = line.partition(": ")
        if field != "data" or value == "[DONE]":
            return ""
        event = json.loads(value)
        if "error" in event:
            raise UserError(event["error"]["message"], hint=event["error"].get("hint"))
        piece = str(event["choices"][0]["text"])
        self._pieces.append(piece)
        if event["choices"][0]["finish_reason"] is not None:
            self.completion = _completion(event, text="".join(self._pieces))
        return piece


def _completion_body(
    request: CompletionRequest,
    repository: str | None,
    commit: str | None,
    use: Use,
    *,
    stream: bool,
) -> dict[str, Any]:
    return {
        "prompt": request.prompt,
        "suffix": request.suffix,
        "max_tokens": request.max_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "seed": request.seed,
        "stop": list(request.stop),
        "stream": stream,
        "repository": repository,
        "commit": commit,
        "use": use,
    }


def _completion(body: dict[str, Any], *, text: str | None = None) -> Completion:
    """Return what a response says; `text` replaces that of its only choice."""
    choice, usage, ours = body["choices"][0], body["usage"], body["code2lora"]
    identity = AdapterIdentity(ours["repository"], ours["commit"], ours["generation"])
    return Completion(
        text=choice["text"] if text is None else text,
        finish_reason=choice["finish_reason"],
        n_prompt_tokens=usage["prompt_tokens"],
        n_tokens=usage["completion_tokens"],
        first_token_ms=ours["first_token_ms"],
        total_ms=ours["total_ms"],
        adapter=None if ours["generation"] is None else identity,
    )


def _read_json(response: HTTPResponse) -> dict[str, Any]:
    content = json.loads(response.read())
    assert isinstance(content, dict), "the worker answers with objects"
    return content


def _error(response: HTTPResponse) -> UserError:
    """Return what a refusal says; a server that is not ours says nothing of use."""
    try:
        error = json.loads(response.read())["error"]
        return UserError(str(error["message"]), hint=error.get("hint"))
    except (ValueError, KeyError, TypeError, AttributeError):
        return UserError(
            f"the model worker answered with status {response.status}", hint=_LOGS_HINT
        )
