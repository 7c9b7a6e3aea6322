"""Two versions of one file into the text of its patch, as `git diff --no-color -U3` prints it.

The lines are compared by libgit2 on plain buffers, which know of no repository: attributes,
configured algorithms, textconv and external diff programs cannot reach in. Ids in `index` lines
are always cut to the same length, so the text does not depend on how large a repository is.
"""

from __future__ import annotations

import re

import pygit2
from pygit2.enums import DiffOption

from code2lora.history.model import FileChange
from code2lora.history.objects import Entry, show_path
from code2lora.history.renames import Delta

CONTEXT_LINES = 3
ABBREVIATED_ID = 7

_MUST_QUOTE = re.compile(rb'[\x00-\x1f"\\\x7f]')
_ESCAPES = dict(zip(b'\a\b\t\n\v\f\r"\\', b'abtnvfr"\\', strict=True))


def file_change(delta: Delta, old: bytes, new: bytes, decode_errors: str) -> FileChange:
    """Return one file's change; `old` and `new` are its contents, empty where it is not."""
    lines = _hunk_lines(old, new)
    patch = _header(delta, has_hunks=bool(lines)) + b"".join(line + b"\n" for line in lines)
    return FileChange(
        path=show_path(delta.path),
        old_path=None if delta.old_path is None else show_path(delta.old_path),
        status=delta.status,
        added=_side(lines, b"+", decode_errors),
        removed=_side(lines, b"-", decode_errors),
        patch=patch.decode("utf-8", decode_errors),
    )


def _hunk_lines(old: bytes, new: bytes) -> list[bytes]:
    if old == new:
        return []
    patch = pygit2.Patch.create_from(
        old,
        new,
        flag=DiffOption.FORCE_TEXT | DiffOption.INDENT_HEURISTIC,
        context_lines=CONTEXT_LINES,
    )
    text: bytes = patch.data
    lines = text[text.index(b"\n@@ ") + 1 :].split(b"\n")[:-1]
    # libgit2 cuts the line after the second `@@` where git does, but leaves a space at the cut.
    return [line.rstrip() if line.startswith(b"@@ ") else line for line in lines]


def _side(lines: list[bytes], sign: bytes, decode_errors: str) -> str:
    text = b"".join(line[1:] + b"\n" for line in lines if line.startswith(sign))
    return text.decode("utf-8", decode_errors)


def _header(delta: Delta, *, has_hunks: bool) -> bytes:
    old_path = delta.path if delta.old_path is None else delta.old_path
    old_name, new_name = _quote(b"a/" + old_path), _quote(b"b/" + delta.path)
    lines = [b"diff --git %s %s" % (old_name, new_name), *_mode_lines(delta.old, delta.new)]
    if delta.similarity is not None:
        lines.append(b"similarity index %d%%" % int(delta.similarity * 100))
        lines.append(b"rename from %s" % _quote(old_path))
        lines.append(b"rename to %s" % _quote(delta.path))
    lines += _index_line(delta.old, delta.new)
    if has_hunks:
        lines.append(b"--- " + (b"/dev/null" if delta.old is None else _end_name(old_name)))
        lines.append(b"+++ " + (b"/dev/null" if delta.new is None else _end_name(new_name)))
    return b"".join(line + b"\n" for line in lines)


def _mode_lines(old: Entry | None, new: Entry | None) -> list[bytes]:
    if old is not None and new is not None:
        if old.mode == new.mode:
            return []
        return [b"old mode %o" % old.mode, b"new mode %o" % new.mode]
    if new is not None:
        return [b"new file mode %o" % new.mode]
    return [] if old is None else [b"deleted file mode %o" % old.mode]


def _index_line(old: Entry | None, new: Entry | None) -> list[bytes]:
    ids = ["0" * ABBREVIATED_ID if side is None else side.id for side in (old, new)]
    if ids[0] == ids[1]:
        return []
    before, after = (id[:ABBREVIATED_ID].encode() for id in ids)
    same_mode = old is not None and new is not None and old.mode == new.mode
    mode = b" %o" % old.mode if same_mode and old is not None else b""
    return [b"index %s..%s%s" % (before, after, mode)]


def _quote(name: bytes) -> bytes:
    """Quote a name as git does with core.quotePath off."""
    if not _MUST_QUOTE.search(name):
        return name
    return b'"%s"' % _MUST_QUOTE.sub(_escape, name)


def _escape(match: re.Match[bytes]) -> bytes:
    byte = match.group()[0]
    return b"\\%c" % _ESCAPES[byte] if byte in _ESCAPES else b"\\%03o" % byte


def _end_name(name: bytes) -> bytes:
    """End a name with a space in it by a tab, so that a reader can tell where it ends."""
    return name + b"\t" if b" " in name else name
