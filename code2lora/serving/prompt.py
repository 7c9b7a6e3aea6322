"""Turn the text around a cursor into the token ids that the model reads.

What does not fit the context window is dropped where it is farthest from the cursor: the prefix
from its left, the suffix from its right, three parts of prefix to one of suffix.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from code2lora.errors import UserError
from code2lora.serving.completion import CompletionRequest
from code2lora.serving.model import BaseModel, control_text

SUFFIX_SHARE = 4
"""A suffix that competes with the prefix for room gets one part in this many."""

CHARACTERS_PER_TOKEN = 16
"""More than source text averages in any vocabulary; text beyond this many characters a token of
room is not even tokenized."""

_REPOSITORY_NAME, _FILE_NAME = "project", "filename"  # nobody tells us the true ones


def build_prompt(
    model: BaseModel, request: CompletionRequest, *, context_tokens: int
) -> tuple[list[int], int]:
    """Return the prompt's ids, and how many tokens there is room and leave to produce.

    Together they fit `context_tokens`; at least half of that is the prompt's if it needs it.
    Raises UserError when there is a suffix and the tokenizer has no FIM tokens, or when a prompt
    of which nothing may be left out does not fit.
    """
    if request.score_prompt or request.prompt_ids is not None:
        return _whole_prompt(model, request, context_tokens)
    prompt = well_formed(request.prompt)
    room = context_tokens * CHARACTERS_PER_TOKEN
    head = _head(model, request, room)
    if request.suffix is None or _is_complete(model, prompt):
        written = model.structural.search(prompt) is not None
        parts = _written_parts(model, prompt if written else prompt[-room:])
    elif request.suffix == "" and not head:
        # nothing to join up with: plain continuation is what a decoder does best
        parts = _Parts(begin=model.begin_ids, prefix=model.encode_text(prompt[-room:]))
    else:
        suffix = well_formed(request.suffix)[:room]
        prefix = model.encode_text(prompt[-room:])
        parts = _fim_parts(model, prefix, model.encode_text(suffix), head=head)
    free = context_tokens - max(1, len(parts))
    n_new = min(request.max_tokens, max(context_tokens // 2, free))
    return parts.fit(context_tokens - n_new) or _stand_in(model), n_new


def _whole_prompt(
    model: BaseModel, request: CompletionRequest, context_tokens: int
) -> tuple[list[int], int]:
    """Return a prompt that is read as it is or not at all, and the room beside it."""
    if request.prompt_ids is not None:
        ids = list(request.prompt_ids)
    else:
        prompt = well_formed(request.prompt)
        if len(prompt) > context_tokens * CHARACTERS_PER_TOKEN:
            raise UserError(
                f"the prompt has {len(prompt)} characters, more than {context_tokens} tokens hold",
                hint="send less of it",
            )
        ids = _written_parts(model, prompt).fit(sys.maxsize)
    ids = ids or _stand_in(model)
    room = context_tokens - min(1, request.max_tokens)
    if len(ids) > room:
        raise UserError(
            f"the prompt has {len(ids)} tokens, but there is room for {room}",
            hint="send less of it",
        )
    return ids, min(request.max_tokens, context_tokens - len(ids))


def _head(model: BaseModel, request: CompletionRequest, room: int) -> list[int]:
    """Return the other files as the model knows them from its training, the last one nearest."""
    control = model.control
    if not request.extra or control.repo_name is None or control.file_sep is None:
        return []
    ids = [control.repo_name, *model.encode_text(f"{_REPOSITORY_NAME}\n")]
    for file in request.extra:
        text = well_formed(f"{file.name}\n{file.text}\n")[:room]
        ids += [control.file_sep, *model.encode_text(text)]
    return [*ids, control.file_sep, *model.encode_text(f"{_FILE_NAME}\n")]


def _is_complete(model: BaseModel, prompt: str) -> bool:
    """Tell whether the client has already put prefix and suffix together."""
    ends = prompt.rstrip().endswith(control_text("fim_middle"))
    return ends and model.control.fim_middle is not None


def well_formed(text: str) -> str:
    """Return text with halves of surrogate pairs joined where they meet and replaced elsewhere.

    Editors that count in UTF-16 units cut characters in two.
    """
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    """The ids of a prompt in the places that truncation treats differently."""

    begin: tuple[int, ...]
    """Always first."""
    head: Sequence[int] = ()
    """Other files of the repository."""
    prefix: Sequence[int]
    suffix: Sequence[int] = ()
    marks: tuple[int, int, int] | None = None
    """What stands before the prefix, before the suffix and at the end; None: no suffix."""

    def __len__(self) -> int:
        return self._fixed + len(self.head) + len(self.prefix) + len(self.suffix)

    @property
    def _fixed(self) -> int:
        return len(self.begin) + (3 if self.marks else 0)

    def fit(self, n: int) -> list[int]:
        """Return at most `n` ids; other files (the head) go first, then prefix and suffix."""
        room = max(0, n - self._fixed)
        n_prefix = min(len(self.prefix), room - min(len(self.suffix), room // SUFFIX_SHARE))
        n_suffix = min(len(self.suffix), room - n_prefix)
        head = _last(self.head, room - n_prefix - n_suffix)
        prefix, suffix = _last(self.prefix, n_prefix), self.suffix[:n_suffix]
        if self.marks is None:
            return [*self.begin, *prefix]
        before, after, here = self.marks
        return [*self.begin, *head, before, *prefix, after, *suffix, here]


def _last(ids: Sequence[int], n: int) -> Sequence[int]:
    return ids[len(ids) - n :] if n < len(ids) else ids


def _written_parts(model: BaseModel, prompt: str) -> _Parts:
    """Take a prompt as it is written, control tokens included."""
    ids = model.encode(prompt)
    begin = model.begin_ids
    if begin and tuple(ids[: len(begin)]) == begin:
        ids = ids[len(begin) :]
    marks = (model.control.fim_prefix, model.control.fim_suffix, model.control.fim_middle)
    at = [ids.index(mark) if mark in ids else -1 for mark in marks]
    if 0 <= at[0] < at[1] < at[2] == len(ids) - 1:
        head, prefix, suffix = ids[: at[0]], ids[at[0] + 1 : at[1]], ids[at[1] + 1 : at[2]]
        return _fim_parts(model, prefix, suffix, head=head)
    return _Parts(begin=begin, prefix=ids)


def _fim_parts(
    model: BaseModel, prefix: Sequence[int], suffix: Sequence[int], *, head: Sequence[int] = ()
) -> _Parts:
    control = model.control
    if control.fim_prefix is None or control.fim_suffix is None or control.fim_middle is None:
        raise UserError(
            "this model cannot fill in the middle: its tokenizer has no FIM tokens",
            hint="send the prompt without a suffix",
        )
    marks = (control.fim_prefix, control.fim_suffix, control.fim_middle)
    return _Parts(begin=model.begin_ids, head=head, prefix=prefix, suffix=suffix, marks=marks)


def _stand_in(model: BaseModel) -> list[int]:
    """Return what an empty prompt is read as: the beginning of a document."""
    if model.separator_id is None:
        raise UserError("the prompt is empty", hint="give some text to continue")
    return [model.separator_id]
