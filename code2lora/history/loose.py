"""Read loose objects: one deflated file each, header and content."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

from code2lora.errors import UserError

_HEADER_BYTES = 64
_MAX_ALTERNATES = 32


class LooseObjects:
    """The loose objects of some object folders; packed ones are none of its business."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._roots = [f"{folder}/" for folder in folders]

    def read(self, id: str) -> tuple[str, bytes] | None:
        """Return kind and content, or None if there is no such loose object.

        Raises UserError when it is damaged.
        """
        deflated = self._load(id, -1)
        if deflated is None:
            return None
        inflater = zlib.decompressobj()
        try:
            inflated = inflater.decompress(deflated)
        except zlib.error as error:
            raise _damaged(id) from error
        kind, size = _parse_header(id, inflated)
        content = inflated[inflated.index(b"\0") + 1 :]
        if not inflater.eof or len(content) != size:
            raise _damaged(id)
        return kind, content

    def size(self, id: str) -> int | None:
        """Return the size of the content in bytes, reading only the header."""
        deflated = self._load(id, 4 * _HEADER_BYTES)
        if deflated is None:
            return None
        try:
            return _parse_header(id, zlib.decompressobj().decompress(deflated, _HEADER_BYTES))[1]
        except zlib.error as error:
            raise _damaged(id) from error

    def _load(self, id: str, n_bytes: int) -> bytes | None:
        for root in self._roots:
            try:
                with open(f"{root}{id[:2]}/{id[2:]}", "rb", buffering=0) as file:
                    return file.read(n_bytes)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise UserError(f"object {id} cannot be read: {error.strerror}") from error
        return None


def _parse_header(id: str, inflated: bytes) -> tuple[str, int]:
    kind, _, size = inflated[:_HEADER_BYTES].partition(b"\0")[0].partition(b" ")
    if b"\0" not in inflated[:_HEADER_BYTES] or not size.isdigit():
        raise _damaged(id)
    return kind.decode("ascii", "replace"), int(size)


def _damaged(id: str) -> UserError:
    return UserError(f"object {id} is damaged", hint="`git fsck` names what is broken")


def object_folders(objects: Path) -> list[Path]:
    """Return an object folder and those that it borrows from through info/alternates."""
    folders: list[Path] = []
    waiting = [objects]
    while waiting and len(folders) < _MAX_ALTERNATES:
        folder = waiting.pop(0).resolve()
        if folder in folders:
            continue
        folders.append(folder)
        try:
            lines = (folder / "info" / "alternates").read_text("utf-8", "surrogateescape")
        except OSError:
            continue
        named = (line for line in lines.split("\n") if line and not line.startswith("#"))
        waiting.extend(folder / line for line in named)
    return folders
