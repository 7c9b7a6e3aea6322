"""Put an editor's configuration into a file that holds other settings too.

Only text of ours is replaced: a block between two comments, one entry of a list, single settings.
What a file says is compared before and after, so that a file that is read otherwise than here is
refused rather than spoilt.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from code2lora.adapters.files import placed_file
from code2lora.cli.editor_texts import TITLE, Editor, Endpoint, continue_model
from code2lora.errors import UserError

_COMMENTS = {"vim": '"', "lua": "--", "shell": "#"}
_BEGIN, _END = "code2lora begin", "code2lora end"


@dataclass(frozen=True)
class Written:
    """What became of a file."""

    path: Path
    """With links resolved."""
    changed: bool
    backup: Path | None
    """Where the file as it was is kept, if it was there and has changed."""


def write(editor: Editor, endpoint: Endpoint, file: Path) -> Written:
    """Merge an editor's configuration into a file, which is made if need be.

    Raises UserError when the file cannot be read, merged or written; it is then as it was.
    """
    path = file.expanduser().resolve()  # a link, as dotfiles often are, stays a link
    try:
        before = path.read_bytes().decode("utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} cannot be read: {error}",
            hint=f"`code2lora editor {editor.name}` prints what to put into it",
        ) from error
    try:
        after = merged(editor, endpoint, before)
    except ValueError as error:
        raise UserError(
            f"{path} cannot be merged with: {error}",
            hint=f"`code2lora editor {editor.name}` prints what to put into it",
        ) from error
    if after == before:
        return Written(path, False, None)
    backup = None
    with placed_file(path, force=True) as temporary:
        temporary.write_bytes(after.encode())
        if path.exists():
            backup = _backup(path)
            mode = path.stat().st_mode & 0o777
            temporary.chmod(mode & 0o700 if editor.holds_key else mode)
    return Written(path, True, backup)


def merged(editor: Editor, endpoint: Endpoint, text: str) -> str:
    """Return a file's text with an editor's configuration in it. ValueError says why it cannot."""
    if not text.strip():
        whole = editor.text(endpoint)
        return _block(editor, whole) if editor.syntax in _COMMENTS else whole
    if editor.syntax == "yaml":
        return _merged_yaml(text, continue_model(endpoint))
    if editor.settings is not None:
        return _merged_json(text, editor.settings(endpoint))
    return _merged_block(editor, text, editor.text(endpoint))


def _backup(path: Path) -> Path:
    """Copy a file beside itself, under the first name that is free."""
    number = 1
    while os.path.lexists(path.with_name(f"{path.name}.{number}.bak")):
        number += 1
    copy = path.with_name(f"{path.name}.{number}.bak")
    shutil.copy2(path, copy)
    return copy


# -- a block between comments ---------------------------------------------------------------------


def _block(editor: Editor, content: str) -> str:
    sign = _COMMENTS[editor.syntax]
    return f"{sign} {_BEGIN}\n{content}{sign} {_END}\n"


def _merged_block(editor: Editor, text: str, content: str) -> str:
    sign = re.escape(_COMMENTS[editor.syntax])
    ours = re.compile(rf"^{sign} {_BEGIN}\n.*?^{sign} {_END}\n", re.MULTILINE | re.DOTALL)
    new = _block(editor, content)
    rest, n_blocks = ours.subn("", text)
    if editor.name == "minuet" and re.search(r"minuet['\"]\s*\)?\s*\.setup", rest):
        raise ValueError("it sets minuet up already, and the later of two would win")
    if n_blocks:
        return ours.sub(lambda _: new, text, count=1)
    return text + ("" if text.endswith("\n") else "\n") + new


# -- Continue's YAML ------------------------------------------------------------------------------


def _merged_yaml(text: str, entry: str) -> str:
    """Return the text with our entry first in its list of models, in place of an older one."""
    import yaml

    try:
        before = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError("it is not valid YAML") from error
    if not isinstance(before, dict):
        raise ValueError("it is not a mapping")
    lines = text.splitlines(keepends=True)
    if not lines[-1].endswith("\n"):
        lines[-1] += "\n"
    _drop_entry(lines)
    at = next((i for i, line in enumerate(lines) if re.match(r"models:\s*(#.*)?$", line)), None)
    if at is None:
        lines += ["models:\n", entry]
    else:
        following = (re.match(r"( *)- ", line) for line in lines[at + 1 :])
        found = next((match for match in following if match), None)
        indent = found[1] if found else "  "
        shifted = [indent + line[2:] for line in entry.splitlines(keepends=True)]
        lines[at + 1 : at + 1] = shifted
    after = "".join(lines)
    [ours] = yaml.safe_load(entry)
    _check_yaml(before, yaml.safe_load(after), ours)
    return after


def _drop_entry(lines: list[str]) -> None:
    """Remove our entry of a list: its first line, and the deeper ones that follow."""
    for i, line in enumerate(lines):
        match = re.match(rf"( *)- name: [\"']?{TITLE}[\"']?\s*$", line)
        if match is None:
            continue
        end = i + 1
        while end < len(lines) and re.match(rf"{match[1]} +\S", lines[end]):
            end += 1
        del lines[i:end]
        return


def _check_yaml(before: dict[str, Any], after: Any, ours: dict[str, Any]) -> None:
    """Raise ValueError unless our entry came in and nothing else changed."""

    def others(models: Any) -> list[Any]:
        return [m for m in models or [] if not isinstance(m, dict) or m.get("name") != TITLE]

    expected = {**before, "models": [ours, *others(before.get("models"))]}
    if after != expected:
        raise ValueError("its list of models is written in a way that is not known here")


# -- JSON with comments ---------------------------------------------------------------------------

_TOKEN = re.compile(
    r'(?P<skip>\s+|//[^\n]*|/\*.*?\*/)|(?P<string>"(?:[^"\\]|\\.)*")|(?P<mark>[{}\[\]:,])'
    r"|(?P<word>[^\s{}\[\]:,\"/]+)",
    re.DOTALL,
)


def _merged_json(text: str, settings: Mapping[tuple[str, ...], Any]) -> str:
    before = _parse(text)
    if not isinstance(before, dict):
        raise ValueError("it is not an object")
    after = text
    for path, value in reversed(list(settings.items())):
        after = _set(after, path, value)
    expected = json.loads(json.dumps(before))
    for path, value in settings.items():
        inner = expected
        for key in path[:-1]:
            if not isinstance(inner.get(key), dict):
                inner[key] = {}
            inner = inner[key]
        inner[path[-1]] = value
    if _parse(after) != expected:
        raise ValueError("it is written in a way that is not known here")
    return after


def _parse(text: str) -> Any:
    """Return what JSON with comments and trailing commas says. ValueError when it says nothing."""
    kept: list[str] = []
    for match in _tokens(text):
        if match[0] in "}]" and kept and kept[-1] == ",":
            kept.pop()
        kept.append(match[0])
    return json.loads(" ".join(kept))


def _tokens(text: str) -> Iterator[re.Match[str]]:
    at = 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise ValueError(f"it is not valid JSON at character {at}")
        at = match.end()
        if match["skip"] is None:
            yield match


def _set(text: str, path: tuple[str, ...], value: Any) -> str:
    """Return the text with one setting changed, or added at the top of its object."""
    begin, depth = 0, 0
    members = _members(text, begin)
    while len(path) > depth + 1 and path[depth] in members:
        begin, end = members[path[depth]]
        if text[begin] != "{":
            inner: Any = value
            for key in reversed(path[depth + 1 :]):
                inner = {key: inner}
            return text[:begin] + _dump(inner, depth + 1) + text[end:]
        members = _members(text, begin)
        depth += 1
    key, rest = path[depth], path[depth + 1 :]
    for name in reversed(rest):
        value = {name: value}
    if key in members and not rest:
        begin, end = members[key]
        return text[:begin] + _dump(value, depth + 1) + text[end:]
    brace = text.index("{", begin) if begin else next(m.start() for m in _tokens(text))
    indent = "  " * (depth + 1)
    comma = "," if members else ""
    tail = "" if members or text[brace + 1 :].startswith("\n") else "\n" + "  " * depth
    entry = f"\n{indent}{json.dumps(key)}: {_dump(value, depth + 1)}{comma}{tail}"
    return text[: brace + 1] + entry + text[brace + 1 :]


def _dump(value: Any, depth: int) -> str:
    return json.dumps(value, indent=2).replace("\n", "\n" + "  " * depth)


def _members(text: str, begin: int) -> dict[str, tuple[int, int]]:
    """Return where the values of an object's members are; the object is the first from `begin`."""
    found: dict[str, tuple[int, int]] = {}
    depth, key, start, end, last = 0, "", -1, begin, ""
    for match in _tokens_from(text, begin):
        token = match[0]
        if depth == 1 and start < 0 and last == ":":
            start = match.start()
        if depth == 1 and match["string"] and last in ("{", ","):
            key = json.loads(token)
        if depth == 1 and start >= 0 and token in (",", "}"):
            found[key] = (start, end)
            start = -1
        depth += (token in ("{", "[")) - (token in ("}", "]"))
        last, end = token, match.end()
        if depth == 0:
            break
    return found


def _tokens_from(text: str, begin: int) -> Iterator[re.Match[str]]:
    return (match for match in _tokens(text) if match.start() >= begin)
