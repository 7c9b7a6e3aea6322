"""Turn source files into rows of token ids, half of the excerpts with a hole to fill.

Reads   texts held in memory.
Writes  nothing; the state of a stream is a small plain dict, so a checkpoint can hold it.

A row is shorter than most files, so files are cut into excerpts of whole lines, and a hole is
made inside an excerpt: prefix, suffix and middle then lie in the same row. Every choice is drawn
from a generator seeded by (seed, epoch, excerpt), so a restored stream goes on as if never stopped.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from code2lora.training.pretraining.corpus import SourceFile
from code2lora.training.pretraining.tokenizer import (
    ADDED_TOKENS,
    END_OF_TEXT,
    FILE_SEP,
    FIM_MIDDLE,
    FIM_PREFIX,
    FIM_SUFFIX,
    SPECIAL_TOKENS,
    token_id,
)

_CONTROL = re.compile("|".join(re.escape(token) for token in SPECIAL_TOKENS + ADDED_TOKENS))
_IDENTIFIER = re.compile(r"[A-Za-z_]\w+")
_MAX_HEADER_TOKENS = 64
_MAX_WAITING = 16
"""More excerpts than this never wait for room: without plain ones no row could ever be filled."""


@dataclass(frozen=True, kw_only=True)
class Hole:
    """A text cut in three; ``prefix + middle + suffix`` is the text."""

    prefix: str
    middle: str
    suffix: str


@dataclass(frozen=True, kw_only=True)
class Excerpt:
    """A run of whole lines of one file."""

    path: str
    text: str


def cut_hole(text: str, rng: random.Random) -> Hole:
    """Cut the text at two random characters, the way that a developer leaves holes.

    Mostly the rest of a line or of an identifier, sometimes whole lines, sometimes anything: the
    middle is what an editor asks for, so it is short. A text of fewer than two characters gets an
    empty middle.
    """
    start, end = _hole_bounds(text, rng)
    return Hole(prefix=text[:start], middle=text[start:end], suffix=text[end:])


def excerpts(file: SourceFile, rng: random.Random, *, chars: int) -> list[Excerpt]:
    """Cut a file into runs of whole lines of half to three halves of ``chars`` characters.

    The joined texts are the file's; a single line longer than that stays whole. Paths lose the
    distribution's name, so that they look as they do in a repository.
    """
    path = file.path.partition("/")[2] or file.path
    found: list[Excerpt] = []
    lines: list[str] = []
    room = rng.randint(chars // 2, chars * 3 // 2)
    for line in file.text.splitlines(keepends=True):
        if lines and room < len(line):
            found.append(Excerpt(path=path, text="".join(lines)))
            lines = []
            room = rng.randint(chars // 2, chars * 3 // 2)
        lines.append(line)
        room -= len(line)
    if lines:
        found.append(Excerpt(path=path, text="".join(lines)))
    return found


class TokenStream:
    """An endless, deterministic sequence of rows of ``row_tokens`` ids.

    Plain excerpts are cut where a row ends and go on in the next one. An excerpt with a hole is
    not cut unless too many wait already: it waits until a row has room for all of it.
    """

    def __init__(
        self,
        files: Sequence[SourceFile],
        tokenizer: Tokenizer,
        *,
        row_tokens: int,
        seed: int,
        hole_share: float = 0.5,
        header_share: float = 0.5,
        excerpt_chars: int = 1200,
    ) -> None:
        # A file that spells a control token would be encoded to the control token itself.
        self._files = [file for file in files if not _CONTROL.search(file.text)]
        if not self._files:
            raise ValueError("no file to learn from")
        self._tokenizer = tokenizer
        self._row_tokens = row_tokens
        self._seed = seed
        self._hole_share = hole_share
        self._header_share = header_share
        self._excerpt_chars = excerpt_chars
        self._id = {token: token_id(tokenizer, token) for token in SPECIAL_TOKENS + ADDED_TOKENS}
        self._epoch = 0
        self._position = 0
        self._carry: list[int] = []
        self._waiting: list[list[int]] = []
        self._order: list[Excerpt] | None = None

    @property
    def epoch(self) -> int:
        """How often the files have been gone through."""
        return self._epoch

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on from here."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "carry": list(self._carry),
            "waiting": [list(ids) for ids in self._waiting],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where ``state`` was taken, over the same files and seed."""
        self._epoch = state["epoch"]
        self._position = state["position"]
        self._carry = list(state["carry"])
        self._waiting = [list(ids) for ids in state["waiting"]]
        self._order = None

    def rows(self, n_rows: int) -> Tensor:
        """Return the next rows, (n_rows, row_tokens) of int64."""
        return torch.tensor([self._next_row() for _ in range(n_rows)], dtype=torch.long)

    def _next_row(self) -> list[int]:
        row: list[int] = []
        waiting, self._waiting = self._waiting, []
        for ids in waiting:
            if len(row) + len(ids) <= self._row_tokens:
                row += ids
            else:
                self._waiting.append(ids)
        while len(row) < self._row_tokens:
            room = self._row_tokens - len(row)
            ids, whole = (self._carry, False) if self._carry else self._next_excerpt()
            self._carry = []
            if whole and len(ids) > room and len(self._waiting) < _MAX_WAITING:
                self._waiting.append(ids)
                continue
            row += ids[:room]
            self._carry = ids[room:]
        return row

    def _next_excerpt(self) -> tuple[list[int], bool]:
        """The ids of the next excerpt, and whether they must stay in one row."""
        if self._order is None:
            self._order = self._shuffled()
        if self._position == len(self._order):
            self._epoch, self._position = self._epoch + 1, 0
            self._order = self._shuffled()
        excerpt = self._order[self._position]
        rng = random.Random(f"{self._seed}/{self._epoch}/{self._position}")
        self._position += 1
        ids = self._header(excerpt) if rng.random() < self._header_share else []
        if rng.random() < self._hole_share:
            ids = ids + self._with_hole(excerpt, rng)
            # The few that are longer than any row are cut like plain ones.
            return ids, len(ids) <= self._row_tokens
        return [*ids, *self._encode(excerpt.text), self._id[END_OF_TEXT]], False

    def _shuffled(self) -> list[Excerpt]:
        rng = random.Random(f"{self._seed}/{self._epoch}")
        found = [
            excerpt
            for file in self._files
            for excerpt in excerpts(file, rng, chars=self._excerpt_chars)
        ]
        rng.shuffle(found)
        return found

    def _header(self, excerpt: Excerpt) -> list[int]:
        ids = self._encode(f"{excerpt.path}\n")
        return [self._id[FILE_SEP], *ids] if len(ids) <= _MAX_HEADER_TOKENS else []

    def _with_hole(self, excerpt: Excerpt, rng: random.Random) -> list[int]:
        hole = cut_hole(excerpt.text, rng)
        return [
            self._id[FIM_PREFIX],
            *self._encode(hole.prefix),
            self._id[FIM_SUFFIX],
            *self._encode(hole.suffix),
            self._id[FIM_MIDDLE],
            *self._encode(hole.middle),
            self._id[END_OF_TEXT],
        ]

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def validation_rows(
    files: Sequence[SourceFile], tokenizer: Tokenizer, *, row_tokens: int, n_rows: int
) -> Iterator[tuple[list[int], int]]:
    """Yield rows of plain text and the bytes that each row's targets stand for.

    A row is ``<|endoftext|>`` and the beginning of a file; all of its other ids are targets. Files
    too short to fill a row are passed over.
    """
    end = token_id(tokenizer, END_OF_TEXT)
    found = 0
    for file in files:
        if found == n_rows:
            return
        if _CONTROL.search(file.text):
            continue
        ids = tokenizer.encode(file.text, add_special_tokens=False).ids
        for start in range(0, len(ids) - row_tokens + 2, 4 * row_tokens):
            targets = ids[start : start + row_tokens - 1]
            # In the byte-level alphabet one character of a token stands for one byte.
            size_bytes = sum(len(tokenizer.id_to_token(token) or "") for token in targets)
            yield [end, *targets], size_bytes
            found += 1
            if found == n_rows:
                return


def line_ends(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the tokens that hold a line break."""
    mark = "\u010a"  # what the byte-level alphabet writes for it
    return frozenset(i for token, i in tokenizer.get_vocab().items() if mark in token)


def _hole_bounds(text: str, rng: random.Random) -> tuple[int, int]:
    if len(text) < 2:
        return len(text), len(text)
    kind = rng.random()
    start = rng.randrange(len(text))
    line_end = text.find("\n", start)
    line_end = len(text) if line_end < 0 else line_end
    if kind < 0.40:  # the rest of a line
        return start, line_end
    if kind < 0.65:  # an identifier, or the rest of one
        match = _IDENTIFIER.search(text, start)
        if match:
            return match.start() + rng.choice((0, 0, 1, 2)) % len(match[0]), match.end()
        return start, line_end
    if kind < 0.85:  # one to four whole lines
        line_start = text.rfind("\n", 0, start) + 1
        end = line_end
        for _ in range(rng.randrange(4)):
            following = text.find("\n", end + 1)
            end = following if following >= 0 else end
        return line_start, end
    return start, min(len(text), start + rng.randint(1, 200))
