"""Ask a long-lived `git cat-file` for objects.

git answers in the order of the questions. It ends itself over some damaged objects, and older
versions do so over an object that a partial clone lacks: then a new process takes over at the
next question.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from code2lora.errors import UserError
from code2lora.history.gitcommand import (
    first_complaint,
    git_arguments,
    git_environment,
    git_not_installed,
)

_ASK_AT_ONCE = 100
"""Questions written before answers are read; both must fit into pipes, or both sides wait."""
_END_S = 5.0
_MAX_COMPLAINT_BYTES = 1_000_000


class CatFile:
    """One helper process, started when it is first needed."""

    def __init__(self, git_dir: Path, mode: str) -> None:
        """mode: `--batch` for contents, `--batch-check` for sizes."""
        self._command = git_arguments(["cat-file", mode], git_dir=git_dir)
        self._process: subprocess.Popen[bytes] | None = None
        self._complaints: IO[bytes] | None = None

    def content(self, id: str) -> tuple[str, bytes] | None:
        """Return kind and content, or None if the repository lacks it.

        Raises UserError when it is damaged.
        """
        with self._whole_answers():
            output = self._ask([id])
            header = self._header(output, id)
            if header is None:
                return None
            kind, size = header
            content = output.read(size + 1)
            if len(content) <= size:
                raise _damaged(id, self._read_complaints())
            return kind, content[:-1]

    def sizes(self, ids: Sequence[str]) -> list[int | None]:
        """Return the sizes in bytes, None for what the repository lacks."""
        with self._whole_answers():
            return self._sizes(ids)

    def _sizes(self, ids: Sequence[str]) -> list[int | None]:
        sizes: list[int | None] = []
        while len(sizes) < len(ids):
            asked = ids[len(sizes) : len(sizes) + _ASK_AT_ONCE]
            output = self._ask(asked)
            for id in asked:
                header = self._header(output, id)
                sizes.append(None if header is None else header[1])
                if self._process is None:
                    break
        return sizes

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            _end(process)
        if self._complaints is not None:
            self._complaints.close()
            self._complaints = None

    @contextmanager
    def _whole_answers(self) -> Iterator[None]:
        """End the process if an answer is left half read, or the next question would get it."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    def _ask(self, ids: Sequence[str]) -> IO[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._start()
        assert self._process is not None
        assert self._process.stdin is not None and self._process.stdout is not None
        # A broken pipe means that it ended over an earlier one of these: reading shows which.
        with suppress(BrokenPipeError):
            self._process.stdin.write("".join(f"{id}\n" for id in ids).encode("ascii"))
            self._process.stdin.flush()
        return self._process.stdout

    def _start(self) -> None:
        self.close()
        # A file and not a pipe: nothing has to read it for git to go on.
        self._complaints = tempfile.TemporaryFile(prefix="code2lora-git-")  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                self._command,
                env=git_environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._complaints,
            )
        except FileNotFoundError as error:
            raise git_not_installed() from error

    def _header(self, output: IO[bytes], id: str) -> tuple[str, int] | None:
        """Return kind and size; None if the object is missing, and then git may have ended."""
        words = output.readline().split()
        if len(words) == 3:
            return words[1].decode("ascii"), int(words[2])
        complaints = self._read_complaints()
        if not words:
            self.close()
            if "promisor" not in complaints:
                raise _damaged(id, complaints)
        elif f"{id[:2]}/{id[2:]}" in complaints or id in complaints:
            raise _damaged(id, complaints)
        return None

    def _read_complaints(self) -> str:
        assert self._complaints is not None
        # By position, because the file's offset is shared with the process that writes.
        descriptor = self._complaints.fileno()
        return os.pread(descriptor, _MAX_COMPLAINT_BYTES, 0).decode("utf-8", "replace")


def _damaged(id: str, complaints: str) -> UserError:
    detail = first_complaint(complaints) or "git ended without a word"
    return UserError(
        f"object {id} cannot be read: {detail}", hint="`git fsck` names what is broken"
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    with process:
        assert process.stdin is not None and process.stdout is not None
        with suppress(BrokenPipeError):
            process.stdin.close()
        process.stdout.close()
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
