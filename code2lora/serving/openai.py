"""Turn JSON bodies of the OpenAI completions API into requests, and results into JSON.

The legacy completions shape with what editors send of it; fields that are not known here are
ignored. Ours are `repository`, `commit` and `use` in the request and `code2lora` in the response.
"""

from __future__ import annotations

import json
import math
import re
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from code2lora.errors import UserError
from code2lora.serving.completion import (
    DEFAULT_MAX_TOKENS,
    AdapterIdentity,
    Completion,
    CompletionRequest,
    Use,
)

REPOSITORY_HEADER = "X-Code2lora-Repo"
GENERATION_HEADER = "X-Code2lora-Generation"
BASE_GENERATION = "base"
"""The generation header's value when no adapter was used."""

MAX_STOPS = 32
MAX_STOP_CHARACTERS = 256

_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
_COMMIT = re.compile(r"[0-9a-f]{4,64}")
_KINDS = {429: "rate_limit_error", 500: "server_error", 503: "unavailable_error"}


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


@dataclass(frozen=True, slots=True)
class CompletionCall:
    """One POST to the completions endpoint."""

    request: CompletionRequest
    stream: bool
    repository: str | None
    """A repository's id as the registry knows it; None leaves the choice to the resolver."""
    commit: str | None
    """A commit hash or the beginning of one; None means the repository's current adapter."""
    use: Use


def parse_json(body: bytes) -> dict[str, Any]:
    """Return the JSON object in a request's body. Raises ApiError 400."""
    try:
        content = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "the body is not valid JSON") from error
    if not isinstance(content, dict):
        raise ApiError(400, "the body is not a JSON object")
    return content


def parse_call(body: Mapping[str, Any], *, repository_header: str | None) -> CompletionCall:
    """Return what a completions request asks for. Raises ApiError 400 that names the field."""
    for name in ("n", "best_of"):
        if body.get(name) not in (None, 1):
            raise ApiError(
                400, f"{name} is {body[name]!r}, but one completion is given", param=name
            )
    use = _text(body, "use") or "own"
    if use not in get_args(Use):
        raise ApiError(400, f"use is {use!r}, not own, generic or base", param="use")
    stream = body.get("stream")
    if stream not in (None, True, False):
        raise ApiError(400, "stream is not true or false", param="stream")
    return CompletionCall(
        request=_request(body),
        stream=bool(stream),
        repository=_repository(body, repository_header),
        commit=_matching(_text(body, "commit"), _COMMIT, "commit", "a hexadecimal commit hash"),
        use=use,  # type: ignore[arg-type]  # is one of Use's arguments
    )


def completion_body(completion: Completion, *, model_id: str) -> dict[str, Any]:
    """Return the response to a request that does not stream."""
    return {
        **_envelope(model_id),
        "choices": [_choice(completion.text, completion.finish_reason)],
        **_outcome(completion),
    }


class Chunks:
    """Formats the events of one streamed response; all carry the same id."""

    def __init__(self, model_id: str) -> None:
        self._envelope = _envelope(model_id)

    def text(self, piece: str) -> bytes:
        """Return the event for a piece of text."""
        return _event({**self._envelope, "choices": [_choice(piece, None)]})

    def end(self, completion: Completion) -> bytes:
        """Return the last event, which says why the text ends, and the end mark."""
        last = {
            **self._envelope,
            "choices": [_choice("", completion.finish_reason)],
            **_outcome(completion),
        }
        return _event(last) + b"data: [DONE]\n\n"

    def error(self, error: ApiError) -> bytes:
        """Return the event for a failure after the response has begun; nothing follows it."""
        return _event(error_body(error))


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


def generation_header(adapter: AdapterIdentity | None) -> str:
    """Return the generation header's value."""
    return adapter.generation if adapter else BASE_GENERATION


def _request(body: Mapping[str, Any]) -> CompletionRequest:
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise ApiError(400, "prompt is not one string", param="prompt")
    suffix = body.get("suffix")
    if suffix is False:  # how some editors say that the prompt is complete
        suffix = None
    if not isinstance(suffix, str | None):
        raise ApiError(400, "suffix is not a string", param="suffix")
    max_tokens = _whole(body, "max_tokens", at_least=0)
    return CompletionRequest(
        prompt=prompt,
        suffix=suffix,
        max_tokens=DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens,
        temperature=_number(body, "temperature", 0.0, low=0.0, high=100.0),
        top_p=_number(body, "top_p", 1.0, low=0.0, high=1.0),
        seed=_whole(body, "seed"),
        stop=_stops(body.get("stop")),
    )


def _repository(body: Mapping[str, Any], header: str | None) -> str | None:
    named = header or _text(body, "repository") or (_text(body, "model") or "").partition("@")[2]
    return _matching(named or None, _REPOSITORY, "repository", "a repository's id")


def _matching(value: str | None, pattern: re.Pattern[str], name: str, what: str) -> str | None:
    if value is not None and not pattern.fullmatch(value):
        raise ApiError(400, f"{name} is not {what}", param=name)
    return value


def _text(body: Mapping[str, Any], name: str) -> str | None:
    value = body.get(name)
    if not isinstance(value, str | None):
        raise ApiError(400, f"{name} is not a string", param=name)
    return value


def _whole(body: Mapping[str, Any], name: str, *, at_least: int | None = None) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise ApiError(400, f"{name} is not a whole number", param=name)
    if at_least is not None and value < at_least:
        raise ApiError(400, f"{name} is {value}, less than {at_least}", param=name)
    return value


def _number(
    body: Mapping[str, Any], name: str, default: float, *, low: float, high: float
) -> float:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ApiError(400, f"{name} is not a number", param=name)
    if not low <= value <= high or not math.isfinite(value):
        raise ApiError(400, f"{name} is not between {low:g} and {high:g}", param=name)
    return float(value)


def _stops(value: Any) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ApiError(400, "stop is not a string or a list of strings", param="stop")
    if len(stops) > MAX_STOPS or any(len(stop) > MAX_STOP_CHARACTERS for stop in stops):
        raise ApiError(
            400,
            f"stop has more than {MAX_STOPS} strings or one over {MAX_STOP_CHARACTERS} characters",
            param="stop",
        )
    return tuple(stops)


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _envelope(model_id: str) -> dict[str, Any]:
    return {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": model_id,
    }


def _choice(text: str, finish_reason: str | None) -> dict[str, Any]:
    return {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}


def _outcome(completion: Completion) -> dict[str, Any]:
    adapter = completion.adapter
    n_prompt, n_new = completion.n_prompt_tokens, completion.n_tokens
    return {
        "usage": {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_new,
            "total_tokens": n_prompt + n_new,
        },
        "code2lora": {
            "repository": adapter.repository if adapter else None,
            "commit": adapter.commit if adapter else None,
            "generation": adapter.generation if adapter else None,
            "first_token_ms": completion.first_token_ms,
            "total_ms": completion.total_ms,
        },
    }


def _event(content: dict[str, Any]) -> bytes:
    # ASCII: readers that split lines at every Unicode line end cannot split the text
    return b"data: " + json.dumps(content, separators=(",", ":")).encode("ascii") + b"\n\n"
