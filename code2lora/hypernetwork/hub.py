"""Fetch files of a Hugging Face repository at one commit, and check every byte. No torch here.

Reads   the hub's listing of the commit, then the files that are wanted.
Writes  one folder, and a folder for what has not arrived whole.

Nothing that comes over the network is trusted: a path in the listing may not leave the folder, a
file may not be longer than listed, and counts as fetched when its digest is the listed one. A
download that was cut off goes on where it was, in a later run too. (huggingface_hub's own download
begins anew there, which is why only its client is used.)
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO

from huggingface_hub import HfApi, errors, get_session, hf_hub_url, hf_raise_for_status
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

from code2lora.errors import UserError
from code2lora.hypernetwork.catalogue import Source

_ATTEMPTS = 4
"""In a row without a byte; after that a person has to look."""
_TIMEOUT_S = 30.0
"""Longest silence of the server."""
_CHUNK_BYTES = 1 << 20

_UNSAFE = re.compile(r"[\x00-\x1f\x7f\\:]")
"""In a path: what means something else on some system."""

_TransportError: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]
"""What huggingface_hub's client raises, of whichever library it is."""

Tell = Callable[[int], None]
"""Called with a number of bytes that have arrived, or were found to be there."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository at one commit."""

    path: str
    n_bytes: int
    blob_id: str
    """Git's id of the file, or of the pointer that stands for a large one."""
    sha256: str | None
    """Of a large file's content; a small one is known by its blob id."""


@dataclass(frozen=True)
class Listing:
    """The wanted files of one repository at one commit."""

    source: Source
    files: tuple[RemoteFile, ...]
    licence: str | None
    """What the repository's card says, if anything."""

    @property
    def n_bytes(self) -> int:
        """What they come to."""
        return sum(file.n_bytes for file in self.files)


class Hub:
    """The hub, with the token and through the proxies that huggingface_hub finds."""

    def __init__(self, endpoint: str | None = None, *, pause_s: float = 1.0) -> None:
        """Talk to an address.

        endpoint: None for HF_ENDPOINT, or else huggingface.co
        pause_s: before the second attempt; doubled for each further one
        """
        self._api = HfApi(endpoint=endpoint)
        self._pause_s = pause_s

    @property
    def endpoint(self) -> str:
        """Its address."""
        return str(self._api.endpoint)

    def list(self, source: Source) -> Listing:
        """Return the files that are wanted of a repository.

        Raises UserError when the repository or the commit is not there, is not open to the user,
        or lists what must not be fetched.
        """
        with explained(f"{source.repository} at {source.revision[:12]}", self.endpoint):
            info = self._api.model_info(
                source.repository,
                revision=source.revision,
                files_metadata=True,
                timeout=_TIMEOUT_S,
            )
        if info.sha != source.revision:
            raise UserError(
                f"{self.endpoint} gave commit {info.sha} of {source.repository}, "
                f"but {source.revision} was asked for",
                hint=_DISTRUST,
            )
        found = [_remote_file(sibling, source.repository) for sibling in info.siblings or ()]
        listing = Listing(
            source,
            tuple(file for file in found if source.wants(file.path)),
            licence=getattr(info.card_data, "license", None),
        )
        _check_listing(listing)
        return listing

    def fetch(
        self, source: Source, file: RemoteFile, folder: Path, partial: Path, tell: Tell
    ) -> str:
        """Put one file below a folder and return its hex sha256.

        partial: a folder of our own, for what has not arrived whole
        Raises UserError when the server fails, or sends something else than it listed.
        """
        target = _place(folder, file.path)
        digest = _Digest(file)
        if target.is_file():
            with target.open("rb") as stream:
                digest.update_from(stream)
            if digest.is_right:
                tell(file.n_bytes)
                return digest.sha256
            target.unlink()
        name = hashlib.sha256(f"{source.repository}/{source.revision}/{file.path}".encode())
        unfinished = partial / name.hexdigest()[:32]
        digest = self._fetch_into(unfinished, source, file, tell)
        if not digest.is_right:
            unfinished.unlink()
            raise _other_content(source, file)
        os.replace(unfinished, target)
        return digest.sha256

    def _fetch_into(self, path: Path, source: Source, file: RemoteFile, tell: Tell) -> _Digest:
        """Bring a file that may have begun to arrive to its full length."""
        with _open_private(path) as stream:
            digest = _Digest(file)
            digest.update_from(stream)
            if digest.n_bytes > file.n_bytes:
                digest = _start_over(stream, file)
            tell(digest.n_bytes)
            failures = 0
            while digest.n_bytes < file.n_bytes:
                before = digest.n_bytes
                try:
                    digest = self._receive(stream, digest, source, file, tell)
                    error = None
                except _TransportError as caught:
                    if not _may_pass(caught):
                        raise _explanation(caught, file.path, self.endpoint) from caught
                    error = caught
                if digest.n_bytes < file.n_bytes:  # cut off, with or without an error
                    failures = 0 if digest.n_bytes > before else failures + 1
                    if failures >= _ATTEMPTS:
                        raise _explanation(error, file.path, self.endpoint) from error
                    time.sleep(self._pause_s * 2**failures)
            stream.flush()
            os.fsync(stream.fileno())
        return digest

    def _receive(
        self, stream: BinaryIO, digest: _Digest, source: Source, file: RemoteFile, tell: Tell
    ) -> _Digest:
        """Append what one response brings and return the digest of all of it."""
        url = hf_hub_url(
            source.repository, file.path, revision=source.revision, endpoint=self.endpoint
        )
        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
        if digest.n_bytes:
            headers["Range"] = f"bytes={digest.n_bytes}-"
        with get_session().stream("GET", url, headers=headers, timeout=_TIMEOUT_S) as response:
            if response.status_code == 416:  # it ends before the listed length
                _start_over(stream, file)
                raise _other_content(source, file)
            hf_raise_for_status(response)
            if digest.n_bytes and response.status_code != 206:
                tell(-digest.n_bytes)
                digest = _start_over(stream, file)
            for chunk in response.iter_bytes():  # of any size, so that none is lost to a cut
                if digest.n_bytes + len(chunk) > file.n_bytes:
                    _start_over(stream, file)
                    raise UserError(
                        f"{source.repository}: {file.path} is longer than the "
                        f"{file.n_bytes:,} bytes that the hub lists",
                        hint=_DISTRUST,
                    )
                stream.write(chunk)
                digest.update(chunk)
                tell(len(chunk))
        return digest


class _Digest:
    """The running digests of a file: sha256 for the record, and git's where it is known by that."""

    def __init__(self, file: RemoteFile) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self._blob = hashlib.sha1(f"blob {file.n_bytes}\0".encode(), usedforsecurity=False)
        self.n_bytes = 0

    def update(self, data: bytes) -> None:
        self._sha256.update(data)
        if self._file.sha256 is None:
            self._blob.update(data)
        self.n_bytes += len(data)

    def update_from(self, stream: BinaryIO) -> None:
        while data := stream.read(_CHUNK_BYTES):
            self.update(data)

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    @property
    def is_right(self) -> bool:
        """Whether it is the file that was listed."""
        if self._file.sha256 is not None:
            return self.n_bytes == self._file.n_bytes and self.sha256 == self._file.sha256
        return self.n_bytes == self._file.n_bytes and self._blob.hexdigest() == self._file.blob_id


_DISTRUST = "check HF_ENDPOINT; do not use this server if it is not your own mirror"


def _remote_file(sibling: Any, repository: str) -> RemoteFile:
    """Return one entry of a listing. Raises UserError when it is not what a file can be."""
    path = str(sibling.rfilename)
    if _UNSAFE.search(path) or {"", ".", ".."} & set(path.split("/")):
        raise UserError(
            f"{repository} lists a file named {path!r}, which would leave its folder",
            hint=_DISTRUST,
        )
    n_bytes = sibling.size if sibling.lfs is None else sibling.lfs["size"]
    if not isinstance(n_bytes, int) or n_bytes < 0 or not isinstance(sibling.blob_id, str):
        raise UserError(f"{repository} lists {path} without its size or its id", hint=_DISTRUST)
    sha256 = None if sibling.lfs is None else str(sibling.lfs["sha256"])
    return RemoteFile(path, n_bytes, sibling.blob_id, sha256)


def _check_listing(listing: Listing) -> None:
    source = listing.source
    if not listing.files:
        names = ", ".join(source.files)
        raise UserError(f"{source.repository} at {source.revision[:12]} has none of: {names}")
    if listing.n_bytes > source.max_bytes:
        raise UserError(
            f"{source.repository} lists {listing.n_bytes:,} bytes, "
            f"expected at most {source.max_bytes:,}",
            hint=_DISTRUST,
        )
    for file in listing.files:
        expected = source.sha256.get(file.path, "*")
        if file.sha256 is not None and not fnmatchcase(file.sha256, expected):
            raise UserError(
                f"{source.repository} lists {file.path} with the sha256 {file.sha256}, "
                f"expected {expected}",
                hint=_DISTRUST,
            )


def _place(folder: Path, path: str) -> Path:
    """Return where a listed file goes, its folder made. No symbolic link is followed on the way."""
    place = folder
    for part in path.split("/"):
        if place.is_symlink():
            raise UserError(f"{place} is a symbolic link", hint="remove it, then pull again")
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        place = place / part
    if place.is_symlink():
        place.unlink()
    return place


@contextmanager
def _open_private(path: Path) -> Iterator[BinaryIO]:
    """Open a file of our own for reading and appending; never through a symbolic link."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    with os.fdopen(os.open(path, flags, 0o600), "r+b") as stream:
        yield stream


def _start_over(stream: BinaryIO, file: RemoteFile) -> _Digest:
    stream.seek(0)
    stream.truncate()
    return _Digest(file)


def _other_content(source: Source, file: RemoteFile) -> UserError:
    return UserError(
        f"{source.repository}: {file.path} arrived with another content than the hub lists",
        hint="run the same again; if it happens twice, do not trust the server",
    )


def _may_pass(error: Exception) -> bool:
    """Tell whether an error may be gone at the next attempt."""
    if isinstance(error, errors.HfHubHTTPError):
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    return True


@contextmanager
def explained(what: str, endpoint: str, done: str = "fetched from") -> Iterator[None]:
    """Turn what huggingface_hub raises into a UserError: `what` cannot be `done` the endpoint."""
    try:
        yield
    # An answer that is not understood fails wherever it is first looked at, and a failed upload is
    # a RuntimeError.
    except (_TransportError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise _explanation(error, what, endpoint, done) from error


def _explanation(
    error: Exception | None, what: str, endpoint: str, done: str = "fetched from"
) -> UserError:
    if isinstance(error, errors.OfflineModeIsEnabled):
        return UserError("HF_HUB_OFFLINE forbids using the network", hint="unset HF_HUB_OFFLINE")
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            return UserError(
                f"{endpoint} refuses {what}: status {status}",
                hint="log in with `hf auth login`, or set HF_TOKEN to a token that is allowed to",
            )
        return UserError(
            f"{endpoint} has no {what}"
            if status == 404
            else f"{endpoint}: {what}: status {status}",
            hint="check HF_ENDPOINT, or try again later; what arrived is kept",
        )
    reason = str(error).splitlines()[0] if error is not None and str(error) else "it hung up"
    return UserError(
        f"{what} cannot be {done} {endpoint}: {reason}",
        hint="check the network, HF_ENDPOINT and the proxies; the same command goes on",
    )
