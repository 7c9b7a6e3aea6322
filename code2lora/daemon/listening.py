"""Open the sockets that the supervisor lends to the worker, and keep the token for the TCP one."""

from __future__ import annotations

import logging
import os
import secrets
import socket
from pathlib import Path

from code2lora.errors import UserError
from code2lora.settings import LOOPBACK_ADDRESS, Settings

log = logging.getLogger(__name__)

_BACKLOG = 128
_TOKEN_BYTES = 32


def listen_unix(settings: Settings) -> socket.socket:
    """Return the listening Unix socket, which the user alone can open."""
    path = settings.socket
    if len(os.fsencode(path)) > 100:
        raise UserError(
            f"the socket path {path} is longer than a Unix socket allows",
            hint="set CODE2LORA_RUNTIME_DIR to a shorter directory",
        )
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    path.chmod(0o600)
    listener.listen(_BACKLOG)
    listener.setblocking(False)
    return listener


def listen_tcp(settings: Settings) -> socket.socket | None:
    """Return the listening TCP socket that settings ask for; None when they ask for none.

    A port that another program holds is logged and done without: commits go on being absorbed.
    """
    if not settings.http_port:
        return None
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((LOOPBACK_ADDRESS, settings.http_port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        log.warning(
            "no editor can connect: port %d cannot be opened: %s; set http_port to another",
            settings.http_port,
            error.strerror,
        )
        return None
    listener.setblocking(False)
    if settings.http_auth == "token":
        ensure_token(settings)
    return listener


def reserve_tcp(settings: Settings) -> socket.socket | None:
    """Return a TCP socket on a free port that nobody can connect to before it listens.

    The worker lets it listen when the owner wants to look at the dashboard. None when there is none
    to be had.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.bind((LOOPBACK_ADDRESS, 0))
        if settings.http_auth == "token":
            ensure_token(settings)
    except OSError as error:
        listener.close()
        log.warning("the dashboard cannot be opened: %s", error.strerror)
        return None
    listener.setblocking(False)
    return listener


def is_listening(listener: socket.socket) -> bool:
    """Tell whether a socket accepts connections, whichever process has made it so."""
    return bool(listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def ensure_token(settings: Settings) -> str:
    """Return what editors must send over TCP; made at the first call, in a file of the user's."""
    file = settings.http_token_file
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        token = read_token(file)
        if token is not None:
            return token
        file.unlink(missing_ok=True)  # torn by a full disk, or opened up to others
        return ensure_token(settings)
    token = secrets.token_urlsafe(_TOKEN_BYTES)
    with os.fdopen(descriptor, "w") as stream:
        stream.write(token + "\n")
    return token


def read_token(file: Path) -> str | None:
    """Return the token in a file; None when there is none, or others could have read it."""
    try:
        if file.stat().st_mode & 0o077:
            log.warning("others could read %s, so its token is not used", file)
            return None
        token = file.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
    return token if len(token) >= _TOKEN_BYTES else None
