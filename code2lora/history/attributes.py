"""Read a .gitattributes file as text, for the few attributes that say a file is not source.

Only the file in the root of the commit's tree counts: the same commit must give the same answer
in every clone. Macros, negative patterns and attributes of other names are passed over, and the
patterns are matched in time linear in pattern times path, because anyone may have written them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import translate
from functools import lru_cache

MAX_FILE_BYTES = 256_000
_NOTHING = re.compile(r"(?!)")
_MAX_LINES = 2_000
_MAX_PATTERN_CHARS = 500

_FIELDS = {"linguist-generated": "generated", "linguist-vendored": "vendored", "diff": "diff"}
_LINE = re.compile(r'^\s*(?:"((?:[^"\\]|\\.)*)"|([^\s"#]\S*))\s+(.*)$')


@dataclass(frozen=True, slots=True)
class PathAttributes:
    """What is said of one path; None where nothing is."""

    generated: bool | None = None
    vendored: bool | None = None
    diff: bool | None = None

    def is_generated(self, looks_so: bool) -> bool:
        """Return what is said, or else what the name suggests."""
        return looks_so if self.generated is None else self.generated

    def is_vendored(self, looks_so: bool) -> bool:
        """Return what is said, or else what the name suggests."""
        return looks_so if self.vendored is None else self.vendored


NO_ATTRIBUTES = PathAttributes()


@dataclass(frozen=True, slots=True)
class _Rule:
    segments: tuple[re.Pattern[str] | None, ...]
    """One pattern for each path component; None stands for `**`, any number of components."""
    values: tuple[tuple[str, bool | None], ...]


@dataclass(frozen=True, slots=True)
class Attributes:
    """The rules of one .gitattributes file."""

    rules: tuple[_Rule, ...] = ()

    def of(self, path: str) -> PathAttributes:
        """Return what is said of a path; a later line wins over an earlier one."""
        if not self.rules:
            return NO_ATTRIBUTES
        parts = path.split("/")
        found: dict[str, bool | None] = {}
        for rule in self.rules:
            if _matches(rule.segments, parts):
                found.update(rule.values)
        return replace(NO_ATTRIBUTES, **found)


@lru_cache(maxsize=64)
def parse_attributes(content: bytes) -> Attributes:
    """Return the rules of a .gitattributes file; lines that mean nothing to us are left out."""
    if len(content) > MAX_FILE_BYTES:
        return Attributes()
    lines = content.decode("utf-8", "replace").split("\n")[:_MAX_LINES]
    return Attributes(tuple(rule for line in lines if (rule := _parse_line(line)) is not None))


def _parse_line(line: str) -> _Rule | None:
    match = _LINE.match(line)
    if match is None:
        return None
    quoted, plain, words = match.groups()
    pattern = re.sub(r"\\(.)", r"\1", quoted) if quoted is not None else plain
    values = tuple(_values(words.split()))
    if not values or pattern.startswith(("!", "[attr]")) or len(pattern) > _MAX_PATTERN_CHARS:
        return None
    # A pattern without a slash is a file name at any depth; one with a slash starts at the root.
    if "/" not in pattern:
        pattern = f"**/{pattern}"
    parts = pattern.lstrip("/").split("/")
    return _Rule(tuple(None if part == "**" else _segment(part) for part in parts), values)


def _values(words: Iterable[str]) -> Iterable[tuple[str, bool | None]]:
    for word in words:
        name, _, value = word.lstrip("-!").partition("=")
        if name == "binary" and word == name:
            yield "diff", False
        elif (field := _FIELDS.get(name)) is not None:
            said = not word.startswith("-") and value.lower() != "false"
            yield field, None if word.startswith("!") else said


def _segment(glob: str) -> re.Pattern[str]:
    # The standard library's translation cannot backtrack, so no pattern is slow; it knows neither
    # `\x` nor `[^x]`, which git does.
    without_escapes = re.sub(r"\\(.)", lambda m: f"[{m[1]}]" if m[1] in "*?[" else m[1], glob)
    return re.compile(translate(without_escapes.replace("[^", "[!")))


def _matches(segments: tuple[re.Pattern[str] | None, ...], parts: list[str]) -> bool:
    """Match component by component; only the last `**` seen can ever need to take more."""
    at = position = 0
    retry: tuple[int, int] | None = None
    while position < len(parts):
        segment = segments[at] if at < len(segments) else _NOTHING
        if segment is None:
            retry = (at, position)
            at += 1
        elif segment.match(parts[position]):
            at, position = at + 1, position + 1
        elif retry is not None:
            retry = (retry[0], retry[1] + 1)
            at, position = retry[0] + 1, retry[1]
        else:
            return False
    return at == len(segments)
