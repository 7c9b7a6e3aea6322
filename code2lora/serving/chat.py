"""Chat completions in OpenAI's shape, for models that have a chat template.

The template comes with the model, so it runs in a sandbox that lets it reach nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from code2lora.serving import fields
from code2lora.serving.completion import Completion, CompletionRequest, TokenChance
from code2lora.serving.errors import ApiError, error_body
from code2lora.serving.fields import Body
from code2lora.serving.model import BaseModel
from code2lora.serving.names import choice
from code2lora.serving.openai import (
    DONE,
    CompletionCall,
    envelope,
    event,
    include_usage,
    outcome,
    sampling,
)

_DEFAULT_MAX_TOKENS = 512
_ROLES = ("system", "developer", "user", "assistant", "tool")


def parse_chat(body: Body, model: BaseModel, *, repository_header: str | None) -> CompletionCall:
    """Return what a chat request asks for. Raises ApiError 400 that names the field."""
    chosen = choice(body, repository_header)
    arguments = sampling(body)
    wants = fields.flag(body, "logprobs")
    n_top = fields.whole(body, "top_logprobs", at_least=0, at_most=fields.MAX_LOGPROBS) or 0
    limits = [fields.whole(body, k, at_least=0) for k in ("max_completion_tokens", "max_tokens")]
    given = [limit for limit in limits if limit is not None]
    request = CompletionRequest(
        prompt=render(model, _messages(body)),
        max_tokens=given[0] if given else _DEFAULT_MAX_TOKENS,
        logprobs=n_top if wants else None,
        **arguments,
    )
    return CompletionCall(
        requests=(request,),
        stream=fields.flag(body, "stream"),
        repository=chosen.repository,
        commit=chosen.commit,
        use=chosen.use,
        include_usage=include_usage(body),
    )


def render(model: BaseModel, messages: Sequence[dict[str, str]]) -> str:
    """Return a conversation as the model reads it, up to where it is to go on.

    Raises ApiError 400 when the model has no template or its template refuses the messages.
    """
    if model.chat_template is None:
        raise ApiError(
            400,
            "this model has no chat template: it completes text and was not made to chat",
            hint="ask /v1/completions",
        )
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    environment.globals["raise_exception"] = _refuse
    separator = model.separator_id
    try:
        return environment.from_string(model.chat_template).render(
            messages=list(messages),
            add_generation_prompt=True,
            bos_token="",
            eos_token="" if separator is None else model.decode([separator]),
        )
    except (TemplateError, TypeError, ValueError, KeyError, OverflowError) as error:
        raise ApiError(
            400, f"the model's chat template refuses the messages: {error}", param="messages"
        ) from error


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _messages(body: Body) -> list[dict[str, str]]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "messages is not a list of messages", param="messages")
    return [_message(message) for message in messages]


def _message(message: Any) -> dict[str, str]:
    if not isinstance(message, dict) or message.get("role") not in _ROLES:
        raise ApiError(400, f"a message has no role of {', '.join(_ROLES)}", param="messages")
    content = message.get("content") or ""
    if isinstance(content, list):
        if not all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
            raise ApiError(400, "a message has parts that are not text", param="messages")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ApiError(400, "a message's content is not text", param="messages")
    return {"role": message["role"], "content": content}


def chat_body(done: Sequence[Completion], *, model_id: str) -> dict[str, Any]:
    """Return the response to a chat request that does not stream."""
    choices = [
        {
            "index": i,
            "message": {"role": "assistant", "content": one.text},
            "logprobs": _logprobs(one.tokens),
            "finish_reason": one.finish_reason,
        }
        for i, one in enumerate(done)
    ]
    head = envelope("chatcmpl", "chat.completion", model_id)
    return {**head, "choices": choices, **outcome(done)}


class ChatChunks:
    """Formats the events of one streamed chat response."""

    def __init__(self, model_id: str, *, include_usage: bool = False) -> None:
        self._envelope = envelope("chatcmpl", "chat.completion.chunk", model_id)
        self._include_usage = include_usage
        self._begun: set[int] = set()

    def text(self, piece: str, index: int = 0, tokens: Sequence[TokenChance] = ()) -> bytes:
        """Return the event for a piece of the answer with this number."""
        delta = {"content": piece}
        if index not in self._begun:
            self._begun.add(index)
            delta["role"] = "assistant"
        return self._event(index, delta, None, tokens)

    def end(self, *done: Completion) -> bytes:
        """Return the last events and the end mark."""
        empty = [self.text("", i) for i in range(len(done)) if i not in self._begun]
        ends = [self._event(i, {}, one.finish_reason) for i, one in enumerate(done)]
        counts = {**self._envelope, "choices": [], "usage": outcome(done)["usage"]}
        last = [event(counts)] if self._include_usage else []
        return b"".join([*empty, *ends, *last, DONE])

    def error(self, error: ApiError) -> bytes:
        """Return the event for a failure after the response has begun; nothing follows it."""
        return event(error_body(error))

    def _event(
        self,
        index: int,
        delta: dict[str, str],
        finish_reason: str | None,
        tokens: Sequence[TokenChance] = (),
    ) -> bytes:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": _logprobs(tokens),
            "finish_reason": finish_reason,
        }
        return event({**self._envelope, "choices": [choice]})


def _logprobs(tokens: Sequence[TokenChance]) -> dict[str, Any] | None:
    if not tokens:
        return None
    content = [
        _chance(token.text, token.logprob) | {"top_logprobs": [_chance(*top) for top in token.top]}
        for token in tokens
    ]
    return {"content": content}


def _chance(text: str, logprob: float | None) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}
