"""Decide which files count: from the path and the size first, then from the content.

A recipe is part of what a checkpoint was trained on, so recipes are named and never edited by
configuration: `paper` (diffs of the released checkpoints), `paper-snapshot` (their snapshots) and
`source` (any source language).
"""

from __future__ import annotations

import posixpath
import re
from dataclasses import dataclass
from typing import Literal

from code2lora.errors import UserError
from code2lora.history import filenames
from code2lora.history.attributes import NO_ATTRIBUTES, PathAttributes

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
LFS_POINTER_MAX_BYTES = 1024

_HEADER_BYTES = 4096
_HEADER_LINES = 20
_LONG_LINE_BYTES = 1000

# Only in a line that is a comment: source code may well speak of generated files.
_GENERATED_MARK = re.compile(
    rb"""^\s*(?:\#|//|/\*|\*|--|;|%|<!--|\(\*|\{-|\"\"\"|''').*
    (?:@generated\b|\bdo\s+not\s+edit\b|\bcode\s+generated\s+by\b
    |\b(?:automatically|auto-?)\s*generated\s+(?:by|from)\b)""",
    re.IGNORECASE | re.VERBOSE,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRules:
    """One recipe: which files are read, and how much of them at most."""

    name: str
    suffixes: frozenset[str]
    """Lower case, with the dot; a file counts if its name ends so."""
    names: frozenset[str] = frozenset()
    """Whole file names that count whatever their suffix."""
    lock_files: frozenset[str] = frozenset()
    vendored_folders: frozenset[str] = frozenset()
    generated_folders: frozenset[str] = frozenset()
    generated_endings: tuple[str, ...] = ()
    minified_endings: tuple[str, ...] = ()
    skip_tests: bool = False
    """Leave out every path with "test" in one of its components, in any case."""
    honour_attributes: bool = False
    """Obey linguist-generated, linguist-vendored and -diff in the root .gitattributes."""
    check_content: bool = False
    """Leave out files whose text looks generated or minified."""
    decode_errors: Literal["replace", "ignore"] = "replace"
    """What becomes of bytes that are not UTF-8."""
    max_file_bytes: int = 1_000_000
    """Larger blobs are never read."""
    max_read_bytes: int = 64_000_000
    """Blob bytes read for one diff; what no longer fits, in path order, is too large."""
    max_patch_bytes: int = 4_000_000
    """Patch text of one diff; what no longer fits, in path order, is too large."""
    max_snapshot_bytes: int = 64_000_000
    """Text of one snapshot; its largest files are left out until the rest fits."""

    @staticmethod
    def named(name: str) -> FileRules:
        """Return a recipe by its name. Raises UserError if there is none."""
        try:
            return RECIPES[name]
        except KeyError:
            known = ", ".join(sorted(RECIPES))
            raise UserError(
                f"there is no file recipe {name!r}; known are {known}",
                hint="the recipe is named in the checkpoint's config.json",
            ) from None

    def reason_to_skip(
        self,
        path: str,
        size_bytes: int | None = None,
        attributes: PathAttributes = NO_ATTRIBUTES,
    ) -> str | None:
        """Return why a file is not read, or None if it counts; without a size, by its path."""
        folder, name = posixpath.split(path)
        folders = frozenset(folder.split("/"))
        given = attributes if self.honour_attributes else NO_ATTRIBUTES
        if name in self.lock_files:
            return "lock file"
        if given.is_vendored(bool(folders & self.vendored_folders)):
            return "vendored"
        if given.is_generated(self._has_generated_name(folders, name)):
            return "generated"
        if name.lower().endswith(self.minified_endings):
            return "minified"
        if name not in self.names and posixpath.splitext(name)[1].lower() not in self.suffixes:
            return "not source"
        if self.skip_tests and "test" in path.lower():
            return "test"
        if given.diff is False:
            return "binary"
        if size_bytes is not None and size_bytes > self.max_file_bytes:
            return "too large"
        return None

    def reason_to_skip_content(
        self, content: bytes, attributes: PathAttributes = NO_ATTRIBUTES
    ) -> str | None:
        """Return why a blob's content is not read as source, or None if it is."""
        if b"\0" in content:
            return "binary"
        if len(content) <= LFS_POINTER_MAX_BYTES and content.startswith(LFS_POINTER):
            return "lfs pointer"
        if not self.check_content:
            return None
        given = attributes if self.honour_attributes else NO_ATTRIBUTES
        if given.generated is None and has_generated_mark(content):
            return "generated"
        return "minified" if is_minified(content) else None

    def _has_generated_name(self, folders: frozenset[str], name: str) -> bool:
        return bool(folders & self.generated_folders) or name.lower().endswith(
            self.generated_endings
        )


def has_generated_mark(content: bytes) -> bool:
    """Tell whether one of the first lines is a comment that says a tool wrote the file."""
    lines = content[:_HEADER_BYTES].split(b"\n", _HEADER_LINES)[:_HEADER_LINES]
    return any(_GENERATED_MARK.match(line) for line in lines)


def is_minified(content: bytes) -> bool:
    """Tell whether most of the bytes lie in lines longer than any person writes."""
    # Every long line spans one of these windows whole, and few ordinary files have such a window.
    step = _LONG_LINE_BYTES // 2
    starts = range(0, len(content) - step, step)
    if all(content.find(b"\n", start, start + step) >= 0 for start in starts):
        return False
    long = sum(len(line) for line in content.split(b"\n") if len(line) > _LONG_LINE_BYTES)
    return 2 * long > len(content)


_PAPER = FileRules(
    name="paper",
    suffixes=filenames.PAPER_SUFFIXES,
    vendored_folders=filenames.PAPER_VENDORED_FOLDERS,
    generated_folders=filenames.PAPER_GENERATED_FOLDERS,
    skip_tests=True,
    max_file_bytes=2_000_000,
    max_read_bytes=1_000_000_000,
    max_patch_bytes=64_000_000,
    max_snapshot_bytes=1_000_000_000,
)

_PAPER_SNAPSHOT = FileRules(
    name="paper-snapshot",
    suffixes=frozenset({".py"}),
    decode_errors="ignore",
    max_file_bytes=2_000_000,
    max_read_bytes=1_000_000_000,
    max_patch_bytes=64_000_000,
    max_snapshot_bytes=1_000_000_000,
)

_SOURCE = FileRules(
    name="source",
    suffixes=filenames.SOURCE_SUFFIXES,
    names=filenames.SOURCE_NAMES,
    lock_files=filenames.LOCK_FILES,
    vendored_folders=filenames.VENDORED_FOLDERS,
    generated_folders=filenames.GENERATED_FOLDERS,
    generated_endings=filenames.GENERATED_ENDINGS,
    minified_endings=filenames.MINIFIED_ENDINGS,
    honour_attributes=True,
    check_content=True,
)

RECIPES = {rules.name: rules for rules in (_PAPER, _PAPER_SNAPSHOT, _SOURCE)}
"""Every recipe by its name."""
