"""A place that new adapters are pushed to, and the line of git configuration that names it.

    KIND DESTINATION [OPTION=VALUE ...]

Words are quoted as in a shell. A key for a server is never in the line: an option names the
environment variable or the file that holds it.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from urllib.parse import urlsplit

from code2lora.errors import UserError

KINDS = {
    "vllm": "vLLM, over POST /v1/load_lora_adapter",
    "mistralrs": "mistral.rs, over POST /v1/load_lora_adapter",
    "llamacpp": "llama-server in router mode, by its preset file and GET /models?reload=1",
    "ollama": "Ollama, over POST /api/create",
    "directory": "a directory, as new entries",
}
LOOPBACK = ("127.0.0.1", "localhost", "::1")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_URL_KINDS = frozenset(KINDS) - {"directory"}
_DEFAULT_KEEP = 3


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where to push to, checked."""

    kind: str
    destination: str
    """A URL; for `directory` an absolute path."""
    name: str
    """What the adapter is called there."""
    key_env: str | None = None
    """Environment variable with the server's key."""
    key_file: str | None = None
    """File with the server's key, which nobody else can read."""
    host: str | None = None
    """The one host beside this machine that the destination may be on."""
    format: str | None = None
    """`directory`: `peft` or `gguf`."""
    keep: int = _DEFAULT_KEEP
    """`directory`, `llamacpp`: how many generations stay."""
    preset: str | None = None
    """`llamacpp`: the router's preset file."""
    model: str | None = None
    """`llamacpp`: the base's GGUF file, for a new section; `ollama`: the base's name there."""

    def __post_init__(self) -> None:
        """Raise UserError when a part is missing, malformed or of another kind's."""
        if self.kind not in KINDS:
            raise _wrong(f"the kind is {self.kind!r}, expected one of: {', '.join(KINDS)}")
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, str) and not value.isprintable():
                raise _wrong(f"{item.name} is {value!r}, expected printable text")
        if not _NAME.fullmatch(self.name):
            raise _wrong(
                f"the name is {self.name!r}, expected letters, digits, '.', '_' and '-'",
                hint="`--name` gives another one",
            )
        if self.kind in _URL_KINDS:
            self._check_url()
        else:
            _check_path("the directory", self.destination)
        self._check_options()

    @property
    def label(self) -> str:
        """How messages call it."""
        return f"{self.kind} {self.destination}"

    @property
    def text(self) -> str:
        """The line of git configuration."""
        words = [self.kind, self.destination]
        for item in fields(self)[2:]:
            value = getattr(self, item.name)
            if value is not None and value != item.default:
                words.append(f"{item.name.replace('_', '-')}={value}")
        return shlex.join(words)

    def _check_url(self) -> None:
        try:
            parts = urlsplit(self.destination)
            host, _ = parts.hostname, parts.port
        except ValueError as error:
            raise _wrong(f"{self.destination!r} is not a URL: {error}") from error
        if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment:
            raise _wrong(f"{self.destination!r} is not a URL such as http://127.0.0.1:8000")
        if parts.username is not None or parts.password is not None:
            raise _wrong(
                "the URL holds a user or a password, which git configuration would show",
                hint="`--key-file` or `--key-env` names where the key is",
            )
        if host not in LOOPBACK and host != self.host:
            raise _wrong(
                f"{host} is another machine, which would be told this adapter's name and path",
                hint=f"`--host {host}` allows it",
            )

    def _check_options(self) -> None:
        allowed = {
            "key_env": _URL_KINDS,
            "key_file": _URL_KINDS,
            "host": _URL_KINDS,
            "format": {"directory"},
            "preset": {"llamacpp"},
            "model": {"llamacpp", "ollama"},
        }
        for name, kinds in allowed.items():
            if getattr(self, name) is not None and self.kind not in kinds:
                raise _wrong(f"{self.kind} has no option {name.replace('_', '-')}")
        if self.format not in (None, "peft", "gguf"):
            raise _wrong(f"the format is {self.format!r}, expected peft or gguf")
        if self.keep < 1:
            raise _wrong(f"keep is {self.keep}, expected at least 1")
        if self.key_env is not None and not _VARIABLE.fullmatch(self.key_env):
            # What is no name of a variable may be the key itself, so it is not repeated.
            raise _wrong("key-env is not the name of an environment variable")
        if self.key_file is not None:
            _check_path("key-file", self.key_file)
        if self.kind == "llamacpp":
            if self.preset is None:
                raise _wrong("llamacpp needs the router's preset file", hint="add `--preset FILE`")
            for name in ("preset", "model"):
                _check_preset_path(name, getattr(self, name))
        if self.kind == "ollama" and not self.model:
            raise _wrong(
                "ollama needs the name of the base model there",
                hint="add `--model qwen2.5-coder:1.5b-base`",
            )


def parse(text: str) -> Target:
    """Return the target that a line of git configuration names. Raises UserError."""
    try:
        kind, destination, *rest = shlex.split(text)
    except ValueError as error:
        raise _wrong(f"{text!r} is not KIND DESTINATION [OPTION=VALUE ...]") from error
    known = {item.name.replace("_", "-"): item.name for item in fields(Target)[2:]}
    given: dict[str, str | int] = {}
    for word in rest:
        option, equals, value = word.partition("=")
        if option not in known or not equals:
            raise _wrong(f"{option!r} is not an option; there are {', '.join(known)}")
        given[known[option]] = value
    try:
        given["keep"] = int(given.get("keep", _DEFAULT_KEEP))
    except ValueError as error:
        raise _wrong(f"keep is {given['keep']!r}, expected a number") from error
    if "name" not in given:
        raise _wrong(f"{text!r} has no name=")
    return Target(kind=kind, destination=destination, **given)  # type: ignore[arg-type]


def _check_path(what: str, path: str) -> None:
    if not Path(path).is_absolute():
        raise _wrong(f"{what} is {path!r}, expected an absolute path")


def _check_preset_path(name: str, path: str | None) -> None:
    """Refuse a path that a line of a preset file cannot hold."""
    if path is None:
        return
    _check_path(name, path)
    if re.search(r"[;#\r\n]", path):
        raise _wrong(f"{name} is {path!r}; in a preset file ';' and '#' begin a comment")


def _wrong(message: str, hint: str | None = None) -> UserError:
    return UserError(message, hint=hint or "`code2lora publish add --help`")
