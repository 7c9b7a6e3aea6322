"""The model ids that clients choose weights by.

    code2lora/qwen2.5-coder-mini                    the repository that the request names otherwise
    code2lora/qwen2.5-coder-mini@base               no adapter
    code2lora/qwen2.5-coder-mini@generic            the mean repository's adapter
    code2lora/qwen2.5-coder-mini@REPOSITORY         that repository's live adapter
    code2lora/qwen2.5-coder-mini@REPOSITORY@COMMIT  its adapter at one commit

What stands before the first `@` is not looked at. Editors do: several choose the template of a
fill-in-the-middle prompt by it, and take a name with `qwen` and `coder` in it to mean the control
tokens that our models know.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import get_args

from code2lora.serving.completion import AdapterIdentity, Use
from code2lora.serving.errors import ApiError
from code2lora.serving.fields import Body, text
from code2lora.serving.model import ControlTokens

_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
_COMMIT = re.compile(r"[0-9a-f]{4,64}")
_SHOWN_COMMIT = 12


@dataclass(frozen=True, slots=True)
class Choice:
    """Which weights a request wants."""

    repository: str | None
    """A repository's id or name as the registry knows it; None leaves it to the resolver."""
    commit: str | None
    """A commit hash or the beginning of one; None means the repository's current adapter."""
    use: Use


def choice(body: Body, header: str | None) -> Choice:
    """Return what a request's header, fields and model id choose, in that order of weight.

    Raises ApiError 400 that names the field.
    """
    use, repository, commit = _from_model(text(body, "model") or "")
    asked = text(body, "use") or use
    if asked not in get_args(Use):
        raise ApiError(400, f"use is {asked!r}, not own, generic or base", param="use")
    named = header or text(body, "repository")
    if named and named != repository:
        commit = None  # the id's commit is another repository's
    commit = text(body, "commit") or commit
    return Choice(
        repository=_matching(named or repository, _REPOSITORY, "repository", "a repository's id"),
        commit=_matching(commit, _COMMIT, "commit", "a hexadecimal commit hash"),
        use=asked,  # type: ignore[arg-type]  # is one of Use's arguments
    )


def is_repository(name: str) -> bool:
    """Tell whether a name can stand in a model id."""
    return _REPOSITORY.fullmatch(name) is not None and name not in ("base", "generic")


def public_id(model_id: str, control: ControlTokens) -> str:
    """Return the id under which clients find a model."""
    maker, _, name = model_id.rpartition("/")
    known = "qwen" in name.lower() and "coder" in name.lower()
    if known or control.fim_prefix is None:
        return model_id
    return f"{maker}/qwen2.5-coder-{name}"


def answered_id(model: str, adapter: AdapterIdentity | None, *, pinned: bool) -> str:
    """Return the id of the weights that answered."""
    if adapter is None:
        return model
    if adapter.repository is None:
        return f"{model}@generic"
    commit = adapter.commit or ""
    return f"{model}@{adapter.repository}" + (f"@{commit[:_SHOWN_COMMIT]}" if pinned else "")


def _from_model(model: str) -> tuple[str, str | None, str | None]:
    """Return use, repository and commit of a model id."""
    _, _, named = model.partition("@")
    if named in ("base", "generic"):
        return named, None, None
    repository, _, commit = named.partition("@")
    return "own", repository or None, commit or None


def _matching(value: str | None, pattern: re.Pattern[str], name: str, what: str) -> str | None:
    if value and not pattern.fullmatch(value):
        raise ApiError(400, f"{name} is not {what}", param=name)
    return value or None
