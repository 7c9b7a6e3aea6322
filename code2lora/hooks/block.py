"""Put our block into the bytes of a hook file, and take it out again without a trace.

The block stands directly after the shebang, because many hooks end in `exec` or leave early. What
it takes to restore the file is written into the block's own first line, so that removal needs no
record elsewhere and works after the user has edited the rest.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields

NEW_FILE = b"#!/bin/sh\n"
"""What a hook file of our own begins with."""

_SHELLS = frozenset({b"sh", b"bash", b"dash", b"ash", b"ksh", b"ksh93", b"mksh", b"zsh"})
_FIRST = b"# >>> code2lora hook >>>"
_LAST = b"# <<< code2lora hook <<<"
_BLOCK = re.compile(
    rb"^" + _FIRST + rb"(?P<marks>[^\r\n]*)\r?\n.*?^" + _LAST + rb"[^\S\n]*(?:\n|\Z)",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Marks:
    """What we did to make room for the block, and undo when it goes."""

    file: bool = False
    """We created the file."""
    directory: bool = False
    """We created the directory it lies in."""
    newline: bool = False
    """We ended the shebang line."""

    def encode(self) -> bytes:
        """Return the marks as words for the block's first line, each after a space."""
        words = [field.name.encode() for field in fields(self) if getattr(self, field.name)]
        return b"".join(b" " + word for word in words)

    @classmethod
    def decode(cls, words: bytes) -> Marks:
        """Return the marks that the block's first line names; unknown words are passed over."""
        present = words.decode("ascii", "replace").split()
        return cls(**{field.name: field.name in present for field in fields(cls)})


def why_not_shell(content: bytes) -> str | None:
    """Return why a block of shell cannot go into this hook, in words that follow the path.

    None if it can. A file without a shebang is run by sh; so does git.
    """
    first = content.split(b"\n", 1)[0]
    if not first.startswith(b"#!"):
        return "is a binary" if b"\0" in content else None
    if b"\r" in first:
        return "has Windows line endings in its first line, so git cannot run it"
    words = [word for word in re.split(rb"[ \t]+", first[2:]) if word]
    program = _program(words)
    if program in _SHELLS:
        return None
    return f"is not a shell script ({(program or first).decode('utf-8', 'replace')})"


def _program(words: list[bytes]) -> bytes:
    """Return the name of the interpreter in a shebang, behind `env` and `busybox`."""
    names = iter(words)
    name = _base(next(names, b""))
    if name == b"env":
        real = (word for word in names if not word.startswith(b"-") and b"=" not in word)
        name = _base(next(real, b""))
    if name == b"busybox":
        name = _base(next(names, b""))
    return name


def _base(path: bytes) -> bytes:
    return path.rsplit(b"/", 1)[-1]


def insert(content: bytes, text: bytes, marks: Marks) -> bytes:
    """Return the file with a block of `text` after its shebang, or first where it has none."""
    head, tail = b"", content
    if content.startswith(b"#!"):
        line, found, tail = content.partition(b"\n")
        head = line + b"\n"
        marks = Marks(file=marks.file, directory=marks.directory, newline=not found)
    return head + _FIRST + marks.encode() + b"\n" + text + _LAST + b"\n" + tail


def extract(content: bytes) -> tuple[bytes, Marks] | None:
    """Return the file without our blocks and the first block's marks; None if it has no block."""
    found = _BLOCK.search(content)
    if found is None:
        return None
    marks = Marks.decode(found["marks"])
    rest = _BLOCK.sub(b"", content)
    if marks.newline and found.end() == len(content):
        rest = rest.removesuffix(b"\n")
    return rest, marks


def is_damaged(content: bytes) -> bool:
    """Tell whether a marker of ours stands alone, so that the block's extent is unknown."""
    rest = _BLOCK.sub(b"", content)
    return _FIRST in rest or _LAST in rest


def is_current(content: bytes, text: bytes) -> bool:
    """Tell whether the file holds one block, and that with exactly this text."""
    blocks = _BLOCK.findall(content)
    return len(blocks) == 1 and b"\n" + text + _LAST in content


def is_ours_alone(rest: bytes, marks: Marks) -> bool:
    """Tell whether a file without its block holds nothing but what we created it with."""
    return marks.file and rest == NEW_FILE
