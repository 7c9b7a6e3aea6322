"""The files of one tree into the texts that count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from code2lora.history.attributes import Attributes
from code2lora.history.model import Skipped, SourceFile
from code2lora.history.objects import ObjectSource, TreeChange, link_reason, show_path
from code2lora.history.rules import FileRules

_Key = tuple[bytes, str]
"""Path and blob id of a file."""


def snapshot_files(
    source: ObjectSource, found: Sequence[TreeChange], rules: FileRules, attributes: Attributes
) -> tuple[tuple[SourceFile, ...], tuple[Skipped, ...]]:
    """Return the files that count and the others, in path order.

    found: the changes from the empty tree
    """
    reasons: dict[bytes, str] = {}
    wanted = _by_path(found, rules, attributes, reasons)
    sizes = dict(zip(wanted, source.sizes([id for _, id in wanted]), strict=True))
    kept = _by_size(sizes, rules, reasons)
    files = []
    for path, id in kept:
        content = source.read(id, "blob")
        shown = show_path(path)
        if content is None:
            reasons[path] = "missing object"
        elif (reason := rules.reason_to_skip_content(content, attributes.of(shown))) is not None:
            reasons[path] = reason
        else:
            files.append(SourceFile(shown, id, content.decode("utf-8", rules.decode_errors)))
    skipped = (Skipped(show_path(path), reason) for path, reason in sorted(reasons.items()))
    return tuple(files), tuple(skipped)


def _by_path(
    found: Sequence[TreeChange],
    rules: FileRules,
    attributes: Attributes,
    reasons: dict[bytes, str],
) -> list[_Key]:
    wanted = []
    for change in found:
        entry = change.new
        if entry is None:
            continue
        shown = show_path(change.path)
        if entry.is_file:
            reason = rules.reason_to_skip(shown, None, attributes.of(shown))
        else:
            reason = link_reason(entry)
        if reason is None:
            wanted.append((change.path, entry.id))
        else:
            reasons[change.path] = reason
    return wanted


def _by_size(
    sizes: Mapping[_Key, int | None], rules: FileRules, reasons: dict[bytes, str]
) -> list[_Key]:
    """Return what fits, in path order: the largest files give way first."""
    known = {}
    for key, size in sizes.items():
        if size is None:
            reasons[key[0]] = "missing object"
        elif size > rules.max_file_bytes:
            reasons[key[0]] = "too large"
        elif size == 0:
            reasons[key[0]] = "empty"
        else:
            known[key] = size
    n_bytes = sum(known.values())
    for key in sorted(known, key=lambda key: (-known[key], key)):
        if n_bytes <= rules.max_snapshot_bytes:
            break
        n_bytes -= known.pop(key)
        reasons[key[0]] = "too large"
    return list(known)
