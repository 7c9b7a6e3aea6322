"""Read the fields of a request's JSON object; each mistake names its field."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, TypeGuard

from code2lora.serving.errors import ApiError

MAX_STOPS = 32
MAX_STOP_CHARACTERS = 256
MAX_N = 8
MAX_LOGPROBS = 20
MAX_EXTRA_FILES = 256
MAX_PROMPTS = 128

_NO_PROMPT = "prompt is not a string, a list of token ids, or a list of such prompts"

Body = Mapping[str, Any]


def parse_json(body: bytes) -> dict[str, Any]:
    """Return the JSON object in a request's body. Raises ApiError 400."""
    try:
        content = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "the body is not valid JSON") from error
    if not isinstance(content, dict):
        raise ApiError(400, "the body is not a JSON object")
    return content


def text(body: Body, name: str) -> str | None:
    """Return a string, or None when it is not given."""
    value = body.get(name)
    if not isinstance(value, str | None):
        raise ApiError(400, f"{name} is not a string", param=name)
    return value


def flag(body: Body, name: str) -> bool:
    """Return true or false; false when it is not given."""
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise ApiError(400, f"{name} is not true or false", param=name)
    return bool(value)


def whole(
    body: Body, name: str, *, at_least: int | None = None, at_most: int | None = None
) -> int | None:
    """Return a whole number within limits, or None when it is not given."""
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise ApiError(400, f"{name} is not a whole number", param=name)
    if at_least is not None and value < at_least:
        raise ApiError(400, f"{name} is {value}, less than {at_least}", param=name)
    if at_most is not None and value > at_most:
        raise ApiError(400, f"{name} is {value}, more than {at_most}", param=name)
    return value


def number(body: Body, name: str, default: float, *, low: float, high: float) -> float:
    """Return a number within limits, or the default when it is not given."""
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ApiError(400, f"{name} is not a number", param=name)
    if not low <= value <= high or not math.isfinite(value):
        raise ApiError(400, f"{name} is not between {low:g} and {high:g}", param=name)
    return float(value)


def stops(body: Body) -> tuple[str, ...]:
    """Return the stop strings."""
    value = body.get("stop")
    found = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(stop, str) for stop in found):
        raise ApiError(400, "stop is not a string or a list of strings", param="stop")
    if len(found) > MAX_STOPS or any(len(stop) > MAX_STOP_CHARACTERS for stop in found):
        raise ApiError(
            400,
            f"stop has more than {MAX_STOPS} strings or one over {MAX_STOP_CHARACTERS} characters",
            param="stop",
        )
    return tuple(found)


def prompt(body: Body) -> str:
    """Return the one prompt."""
    value = body.get("prompt")
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, str):
        raise ApiError(400, "prompt is not one string", param="prompt")
    return value


def prompts(body: Body) -> list[str | tuple[int, ...]]:
    """Return all prompts, each as text or as token ids, which may be any whole numbers."""
    value = body.get("prompt")
    several = value if isinstance(value, list) and not _is_ids(value) else [value]
    if len(several) > MAX_PROMPTS:
        raise ApiError(
            400, f"prompt has {len(several)} prompts, more than {MAX_PROMPTS}", param="prompt"
        )
    found: list[str | tuple[int, ...]] = []
    for one in several:
        if not isinstance(one, str) and not _is_ids(one):
            raise ApiError(400, _NO_PROMPT, param="prompt")
        found.append(one if isinstance(one, str) else tuple(one))
    if not found:
        raise ApiError(400, _NO_PROMPT, param="prompt")
    return found


def _is_ids(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and bool(value) and all(type(one) is int for one in value)


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
