"""Turn JSON bodies of the OpenAI completions API into requests, and results into JSON.

The legacy completions shape with what editors send of it; fields that are not known here are
ignored. Ours are `repository`, `commit` and `use` in the request and `code2lora` in the response.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from code2lora.serving import fields
from code2lora.serving.completion import (
    DEFAULT_MAX_TOKENS,
    AdapterIdentity,
    Completion,
    CompletionRequest,
    TokenChance,
    Use,
)
from code2lora.serving.errors import ApiError, error_body
from code2lora.serving.fields import Body
from code2lora.serving.model import BaseModel
from code2lora.serving.names import choice
from code2lora.serving.prompt import well_formed

REPOSITORY_HEADER = "X-Code2lora-Repo"
GENERATION_HEADER = "X-Code2lora-Generation"
SWAP_HEADER = "X-Code2lora-Swap-Ms"
"""How long the adapter took to be ready when it was swapped in."""
BASE_GENERATION = "base"
"""The generation header's value when no adapter was used."""

_MAX_SCORED = 256
"""Lists of log-probabilities, one number for each token of a prompt, that one response may hold."""


@dataclass(frozen=True, slots=True)
class CompletionCall:
    """One POST that asks for completions."""

    requests: tuple[CompletionRequest, ...]
    """One for each prompt, alike in all else."""
    stream: bool
    repository: str | None
    """A repository's id or name as the registry knows it; None leaves it to the resolver."""
    commit: str | None
    """A commit hash or the beginning of one; None means the repository's current adapter."""
    use: Use
    echo: bool = False
    """The text begins with the prompt."""
    include_usage: bool = False
    """A stream's very last event counts the tokens and has no choices."""
    files: tuple[str, ...] = ()
    """Names of files around the cursor; they may tell the repository where nothing else does."""

    @property
    def request(self) -> CompletionRequest:
        """The first, and where the shape of request knows one prompt alone the only one."""
        return self.requests[0]

    @property
    def echoed(self) -> tuple[str, ...]:
        """What each choice begins with, in the order of the choices."""
        return tuple(
            request.prompt if self.echo else ""
            for request in self.requests
            for _ in range(request.n)
        )


def parse_call(body: Body, model: BaseModel, *, repository_header: str | None) -> CompletionCall:
    """Return what a completions request asks for. Raises ApiError 400 that names the field."""
    chosen = choice(body, repository_header)
    echo = fields.flag(body, "echo")
    requests, files = _requests(body, model, echo=echo)
    if requests[0].score_prompt:
        _check_scores(requests)
    return CompletionCall(
        requests=requests,
        stream=fields.flag(body, "stream"),
        repository=chosen.repository,
        commit=chosen.commit,
        use=chosen.use,
        echo=echo,
        include_usage=include_usage(body),
        files=files,
    )


def parse_fill(body: Body, model: BaseModel, *, repository_header: str | None) -> CompletionCall:
    """Return what a request for one hole, answered as a chat is, asks for. Raises as above."""
    fields.prompt(body)
    return parse_call({**body, "echo": None}, model, repository_header=repository_header)


def include_usage(body: Body) -> bool:
    """Tell whether a stream is to end with an event that counts the tokens."""
    options = body.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict):
        raise ApiError(400, "stream_options is not an object", param="stream_options")
    return fields.flag(options, "include_usage")


def completion_body(*done: Completion, model_id: str, echoed: Sequence[str] = ()) -> dict[str, Any]:
    """Return the response to a request that does not stream.

    echoed: what each choice begins with, where prompts are to be echoed
    """
    choices = []
    for i, (one, prefix) in enumerate(zip(done, echoed or [""] * len(done), strict=True)):
        tokens = [*one.prompt_tokens, *_shifted(one.tokens, len(prefix))]
        choices.append(_choice(prefix + one.text, one.finish_reason, i, tokens))
    return {**envelope("cmpl", "text_completion", model_id), "choices": choices, **outcome(done)}


class Chunks:
    """Formats the events of one streamed response; all carry the same id."""

    def __init__(
        self, model_id: str, *, echoed: Sequence[str] = (), include_usage: bool = False
    ) -> None:
        self._envelope = envelope("cmpl", "text_completion", model_id)
        self._echoed = tuple(echoed)
        self._prefixes = {i: prefix for i, prefix in enumerate(echoed) if prefix}
        self._include_usage = include_usage

    def text(self, piece: str, index: int = 0, tokens: Sequence[TokenChance] = ()) -> bytes:
        """Return the event for a piece of the completion with this number."""
        if index in self._prefixes:  # tokens that come with it are the prompt's
            piece = self._prefixes.pop(index) + piece
        elif self._echoed:
            tokens = _shifted(tokens, len(self._echoed[index]))
        return event({**self._envelope, "choices": [_choice(piece, None, index, tokens)]})

    def end(self, *done: Completion) -> bytes:
        """Return the last events, which say why the texts end, and the end mark."""
        first = b"".join(self.text("", index) for index in list(self._prefixes))
        ends = [
            {**self._envelope, "choices": [_choice("", one.finish_reason, i)]}
            for i, one in enumerate(done)
        ]
        ends[-1] |= outcome(done)
        if self._include_usage:
            ends.append({**self._envelope, "choices": [], "usage": outcome(done)["usage"]})
        return first + b"".join(map(event, ends)) + DONE

    def error(self, error: ApiError) -> bytes:
        """Return the event for a failure after the response has begun; nothing follows it."""
        return event(error_body(error))


def generation_header(adapter: AdapterIdentity | None) -> str:
    """Return the generation header's value."""
    return adapter.generation if adapter else BASE_GENERATION


def envelope(kind: str, what: str, model_id: str) -> dict[str, Any]:
    """Return what every response and event of one request begins with."""
    return {
        "id": f"{kind}-{uuid.uuid4().hex}",
        "object": what,
        "created": int(time.time()),
        "model": model_id,
    }


def outcome(done: Sequence[Completion]) -> dict[str, Any]:
    """Return the counts of tokens, and our own part: which adapter answered, how fast."""
    first, n_new = done[0], sum(one.n_tokens for one in done)
    adapter, read = first.adapter, [one for one in done if one.index == 0]
    n_prompt = sum(one.n_prompt_tokens for one in read)
    return {
        "usage": {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_new,
            "total_tokens": n_prompt + n_new,
            "prompt_tokens_details": {"cached_tokens": sum(one.n_cached_tokens for one in read)},
        },
        "code2lora": {
            "repository": adapter.repository if adapter else None,
            "commit": adapter.commit if adapter else None,
            "generation": adapter.generation if adapter else None,
            "first_token_ms": first.first_token_ms,
            "total_ms": first.total_ms,
        },
    }


def event(content: dict[str, Any]) -> bytes:
    """Return one event of a stream."""
    # ASCII: readers that split lines at every Unicode line end cannot split the text
    return b"data: " + json.dumps(content, separators=(",", ":")).encode("ascii") + b"\n\n"


DONE = b"data: [DONE]\n\n"


def sampling(body: Body) -> dict[str, Any]:
    """Return the fields that all OpenAI shapes share, as a request's arguments."""
    return {
        "n": fields.whole(body, "n", at_least=1, at_most=fields.MAX_N) or 1,
        "temperature": fields.number(body, "temperature", 0.0, low=0.0, high=100.0),
        "top_p": fields.number(body, "top_p", 1.0, low=0.0, high=1.0),
        "top_k": max(0, fields.whole(body, "top_k") or 0),
        "seed": fields.whole(body, "seed"),
        "stop": fields.stops(body),
    }


def _requests(
    body: Body, model: BaseModel, *, echo: bool
) -> tuple[tuple[CompletionRequest, ...], tuple[str, ...]]:
    """Return the requests and the file that they are in, if the client tells."""
    arguments = sampling(body)
    best_of = fields.whole(body, "best_of")
    if best_of not in (None, arguments["n"]):
        raise ApiError(400, f"best_of is {best_of}, but all completions are given", param="best_of")
    files: tuple[str, ...] = ()
    if "segments" in body:  # as Tabby's editor plugins put it
        prefix, suffix, files = _segments(body["segments"])
        prompts: list[str | tuple[int, ...]] = [prefix]
    else:
        complete = body.get("suffix") is False  # as some editors say it
        prompts, suffix = fields.prompts(body), None if complete else fields.text(body, "suffix")
    max_tokens = fields.whole(body, "max_tokens", at_least=0)
    logprobs = fields.whole(body, "logprobs", at_least=0, at_most=fields.MAX_LOGPROBS)
    shared = CompletionRequest(
        prompt="",
        suffix=suffix,
        max_tokens=DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens,
        logprobs=logprobs,
        score_prompt=echo and logprobs is not None,
        **arguments,
    )
    return tuple(_with_prompt(shared, one, model, echo=echo) for one in prompts), files


def _with_prompt(
    shared: CompletionRequest, prompt: str | tuple[int, ...], model: BaseModel, *, echo: bool
) -> CompletionRequest:
    """Return the request for one prompt."""
    if isinstance(prompt, str):
        return replace(shared, prompt=well_formed(prompt))
    if shared.suffix is not None:
        raise ApiError(
            400, "a prompt of token ids has no suffix: put both into the ids", param="suffix"
        )
    strange = next((i for i in prompt if not 0 <= i < model.n_ids), None)
    if strange is not None:
        raise ApiError(
            400, f"prompt has the token id {strange}, not 0 to {model.n_ids - 1}", param="prompt"
        )
    return replace(shared, prompt=model.decode(prompt) if echo else "", prompt_ids=prompt)


def _check_scores(requests: Sequence[CompletionRequest]) -> None:
    """Refuse to score prompts that are not read as they are, or too many at once."""
    first = requests[0]
    if first.suffix is not None:
        raise ApiError(
            400, "logprobs of a prompt are not given where there is a suffix", param="suffix"
        )
    n_lists = len(requests) * first.n * (1 + (first.logprobs or 0))
    if n_lists > _MAX_SCORED:
        raise ApiError(
            400,
            f"{len(requests)} prompts, n {first.n} and logprobs {first.logprobs} with echo are "
            f"{n_lists} lists of log-probabilities, more than {_MAX_SCORED}",
            hint="send fewer prompts at once",
            param="prompt",
        )


def _segments(value: Any) -> tuple[str, str | None, tuple[str, ...]]:
    if not isinstance(value, dict) or not isinstance(value.get("prefix"), str):
        raise ApiError(400, "segments is not an object with a prefix", param="segments")
    path = fields.text(value, "filepath")
    return value["prefix"], fields.text(value, "suffix"), (path,) if path else ()


def _shifted(tokens: Sequence[TokenChance], n: int) -> list[TokenChance]:
    """Return tokens that begin `n` characters later."""
    return [replace(token, offset=token.offset + n) for token in tokens]


def _choice(
    text: str, finish_reason: str | None, index: int = 0, tokens: Sequence[TokenChance] = ()
) -> dict[str, Any]:
    logprobs = None
    if tokens:
        logprobs = {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [
                None if token.logprob is None else dict(reversed(token.top)) for token in tokens
            ],
            "text_offset": [token.offset for token in tokens],
        }
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
