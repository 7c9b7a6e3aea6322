"""The shapes of llama.cpp's server that editors speak: `/infill`, `/completion` and `/props`.

What concerns llama.cpp's own workings (slots, samplers by name, its adapters) is ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from code2lora.serving import fields
from code2lora.serving.completion import (
    DEFAULT_MAX_TOKENS,
    Completion,
    CompletionRequest,
    ExtraFile,
    TokenChance,
)
from code2lora.serving.errors import ApiError, error_body
from code2lora.serving.fields import Body
from code2lora.serving.names import choice
from code2lora.serving.openai import CompletionCall, event
from code2lora.serving.prompt import well_formed

_UNLIMITED = 2**31
_SEVERAL_TEMPERATURE = 0.8
"""Several greedy completions would be one and the same; the first is greedy all the same."""


def parse_infill(body: Body, *, repository_header: str | None) -> CompletionCall:
    """Return what an /infill request asks for. Raises ApiError 400 that names the field."""
    prefix = fields.text(body, "input_prefix") or ""
    line = fields.text(body, "prompt") or ""  # the cursor's line, up to the cursor
    suffix = fields.text(body, "input_suffix") or ""
    extra = _extra(body)
    return _call(body, repository_header, prefix + line, suffix, extra)


def parse_native(body: Body, *, repository_header: str | None) -> CompletionCall:
    """Return what a /completion request asks for. Raises ApiError 400 that names the field."""
    return _call(body, repository_header, fields.prompt(body), None, ())


def response_fields(body: Body) -> tuple[str, ...]:
    """Return the only fields that the client wants, `/` between the names of nested ones."""
    value = body.get("response_fields")
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ApiError(400, "response_fields is not a list of strings", param="response_fields")
    return tuple(value)


def native_body(
    done: Sequence[Completion], *, model_id: str, call: CompletionCall, wanted: Sequence[str]
) -> dict[str, Any] | list[dict[str, Any]]:
    """Return the response to a request that does not stream; a list when several were asked for."""
    results = [_result(one, model_id, call, index=i) for i, one in enumerate(done)]
    bodies = [_flat(result, wanted) if wanted else result for result in results]
    return bodies[0] if call.request.n == 1 else bodies


class NativeChunks:
    """Formats the events of one streamed response. There is no end mark but the last event."""

    def __init__(self, model_id: str, *, call: CompletionCall, wanted: Sequence[str]) -> None:
        self._model_id = model_id
        self._call = call
        self._wanted = wanted

    def text(self, piece: str, index: int = 0, tokens: Sequence[TokenChance] = ()) -> bytes:
        """Return the event for a piece of the completion with this number."""
        content: dict[str, Any] = {"index": index, "content": piece, "tokens": [], "stop": False}
        if tokens:
            content["completion_probabilities"] = _probabilities(tokens)
        return event(content)

    def end(self, *done: Completion) -> bytes:
        """Return the last events, which tell all but the text."""
        ends = []
        for i, one in enumerate(done):
            result = _result(one, self._model_id, self._call, index=i) | {"content": ""}
            result.pop("completion_probabilities", None)
            ends.append(_flat(result, self._wanted) if self._wanted else result)
        return b"".join(map(event, ends))

    def error(self, error: ApiError) -> bytes:
        """Return the event for a failure after the response has begun; nothing follows it."""
        return event(error_body(error))


def props(model_id: str, context_tokens: int, n_slots: int, chat_template: str | None) -> Any:
    """Return the answer to /props."""
    return {
        "default_generation_settings": {
            "id": 0,
            "n_ctx": context_tokens,
            "speculative": False,
            "is_processing": False,
            "params": {
                "n_predict": DEFAULT_MAX_TOKENS,
                "temperature": 0.0,
                "top_p": 1.0,
                "top_k": 0,
                "stop": [],
                "stream": False,
            },
        },
        "total_slots": n_slots,
        "model_alias": model_id,
        "model_path": model_id,  # a name: where it lies is nobody's business
        "modalities": {"vision": False, "audio": False},
        "chat_template": chat_template or "",
        "bos_token": "",
        "eos_token": "",
        "build_info": "code2lora",
    }


def _call(
    body: Body,
    header: str | None,
    prompt: str,
    suffix: str | None,
    extra: tuple[ExtraFile, ...],
) -> CompletionCall:
    response_fields(body)  # refused before the work, not after it
    chosen = choice(body, header)
    n = fields.whole(body, "n_cmpl", at_least=1, at_most=fields.MAX_N) or 1
    temperature = _SEVERAL_TEMPERATURE if n > 1 else 0.0
    n_probs = fields.whole(body, "n_probs", at_least=0, at_most=fields.MAX_LOGPROBS)
    seed = fields.whole(body, "seed")
    limit_ms = fields.number(body, "t_max_predict_ms", 0.0, low=-1.0, high=1e9)
    request = CompletionRequest(
        prompt=well_formed(prompt),
        suffix=suffix,
        max_tokens=_n_predict(body),
        temperature=fields.number(body, "temperature", temperature, low=0.0, high=100.0),
        top_p=fields.number(body, "top_p", 1.0, low=0.0, high=1.0),
        top_k=max(0, fields.whole(body, "top_k") or 0),
        seed=None if seed == -1 else seed,
        stop=fields.stops(body),
        n=n,
        greedy_first="temperature" not in body,
        logprobs=n_probs or None,
        extra=extra,
        min_indent=fields.whole(body, "n_indent", at_least=0) or 0,
        predict_limit_ms=limit_ms if limit_ms > 0 else None,
    )
    return CompletionCall(
        requests=(request,),
        stream=fields.flag(body, "stream"),
        repository=chosen.repository,
        commit=chosen.commit,
        use=chosen.use,
        files=tuple(file.name for file in extra),
    )


def _n_predict(body: Body) -> int:
    n = fields.whole(body, "n_predict")
    if n is None:
        return DEFAULT_MAX_TOKENS
    return _UNLIMITED if n < 0 else n


def _extra(body: Body) -> tuple[ExtraFile, ...]:
    value = body.get("input_extra")
    entries = [] if value is None else value
    if not isinstance(entries, list) or len(entries) > fields.MAX_EXTRA_FILES:
        raise ApiError(
            400,
            f"input_extra is not a list of at most {fields.MAX_EXTRA_FILES}",
            param="input_extra",
        )
    files = []
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
            raise ApiError(400, "input_extra has an entry without text", param="input_extra")
        files.append(ExtraFile(fields.text(entry, "filename") or "tmp", entry["text"]))
    return tuple(files)


def _result(done: Completion, model_id: str, call: CompletionCall, *, index: int) -> dict[str, Any]:
    first_ms = done.first_token_ms if done.first_token_ms is not None else done.total_ms
    n_read = done.n_prompt_tokens - done.n_cached_tokens
    request = call.request
    result: dict[str, Any] = {
        "index": index,
        "content": done.text,
        "tokens": [],
        "id_slot": 0,
        "stop": True,
        "model": model_id,
        "tokens_predicted": done.n_tokens,
        "tokens_evaluated": done.n_prompt_tokens,
        "tokens_cached": done.n_prompt_tokens + done.n_tokens,
        "generation_settings": {
            "n_predict": request.max_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "top_k": request.top_k,
            "stop": list(request.stop),
        },
        "prompt": request.prompt,
        "has_new_line": "\n" in done.text,
        "truncated": False,
        "stop_type": _stop_type(done),
        "stopping_word": done.stop_text or "",
        "timings": {
            "cache_n": done.n_cached_tokens,
            **_timing("prompt", n_read, first_ms),
            **_timing("predicted", done.n_tokens, done.total_ms - first_ms),
        },
        "generation": done.adapter.generation if done.adapter else None,
    }
    if done.tokens:
        result["completion_probabilities"] = _probabilities(done.tokens)
    return result


def _stop_type(done: Completion) -> str:
    if done.finish_reason == "stop":
        return "word" if done.stop_text is not None else "eos"
    return "limit" if done.finish_reason == "length" else "none"


def _timing(name: str, n: int, took_ms: float) -> dict[str, float]:
    return {
        f"{name}_n": n,
        f"{name}_ms": took_ms,
        f"{name}_per_token_ms": took_ms / n if n else 0.0,
        f"{name}_per_second": n * 1e3 / took_ms if took_ms > 0 else 0.0,
    }


def _probabilities(tokens: Sequence[TokenChance]) -> list[dict[str, Any]]:
    def chance(text: str, logprob: float | None) -> dict[str, Any]:
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    return [
        chance(token.text, token.logprob) | {"top_logprobs": [chance(*top) for top in token.top]}
        for token in tokens
    ]


def _flat(result: dict[str, Any], wanted: Sequence[str]) -> dict[str, Any]:
    """Return the wanted fields alone, each under its whole path; those unknown are left out."""
    found = {}
    for path in wanted:
        value: Any = result
        for name in path.split("/"):
            if not isinstance(value, dict) or name not in value:
                break
            value = value[name]
        else:
            found[path] = value
    return found
