"""Write the shell text that a hook runs.

The text rides on other people's git commands, so: built-ins only (one process less is a
millisecond less), nothing on stdout or stderr, status 0 whatever happens, stdin untouched, no
variable left behind. It is the left side of an `||`, where `set -e` has no force, and it runs in
any POSIX shell with any of `-e`, `-u`, `-x`, `-C`, `-f` set.

The supervisor is started only when its pid does not answer, and not by every hook: the count of
starts that did not succeed is kept in the inbox, and only some counts lead to another try. That
part runs in a subshell, so that it may exit, and the start itself behind `&`, so that git never
waits for it. What stays is a shell of its own and not a fork of this one, which would hold on to
the copies of git's stdout and stderr that a shell keeps while it redirects them.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from code2lora.hooks.model import POKES, START_LOG, STARTS, HookSpec

LOCAL_VARIABLES = (
    "GIT_ALTERNATE_OBJECT_DIRECTORIES",
    "GIT_COMMON_DIR",
    "GIT_CONFIG",
    "GIT_CONFIG_COUNT",
    "GIT_CONFIG_PARAMETERS",
    "GIT_DIR",
    "GIT_GRAFT_FILE",
    "GIT_IMPLICIT_WORK_TREE",
    "GIT_INDEX_FILE",
    "GIT_INTERNAL_SUPER_PREFIX",
    "GIT_NAMESPACE",
    "GIT_NO_REPLACE_OBJECTS",
    "GIT_OBJECT_DIRECTORY",
    "GIT_PREFIX",
    "GIT_QUARANTINE_PATH",
    "GIT_REPLACE_REF_BASE",
    "GIT_SHALLOW_FILE",
    "GIT_WORK_TREE",
)
"""What ties a process to one repository or to one git command; a superset of what
`git rev-parse --local-env-vars` prints."""

_OF_THE_COMMAND = (
    "GIT_AUTHOR_DATE",
    "GIT_AUTHOR_EMAIL",
    "GIT_AUTHOR_NAME",
    "GIT_EDITOR",
    "GIT_EXEC_PATH",
    "GIT_REFLOG_ACTION",
)

_BODY = """\
{{
printf '%s\\t%s\\t%s\\n' {event} "${{PWD-}}" "${{GIT_DIR-}}" >>{pokes}
code2lora_pid=
read -r code2lora_pid <{pid_file}
case $code2lora_pid in
'' | *[!0-9]*) false ;;
*) kill -0 "$code2lora_pid" ;;
esac || (
[ -x {program} ] || exit
count=
read -r count <{starts}
case $count in '' | *[!0-9]*) count=0 ;; esac
count=$((count + 1))
printf '%s\\n' "$count" >|{starts} || exit
case $count in
1 | 4) ;;
*) [ $((count % 16)) -eq 0 ] || exit ;;
esac
unset {variables}
trap '' HUP
/bin/sh -c '"$@" && : >|"$0"' {starts} {command} \\
</dev/null >|{log} 2>&1 3>&- 4>&- 5>&- 6>&- 7>&- 8>&- 9>&- &
)
unset code2lora_pid
}} 2>/dev/null || :
"""


def body(event: str, spec: HookSpec) -> str:
    """Return the shell text for one event; several lines, the last of which may take arguments.

    Bytes of paths that are not UTF-8 are surrogates, as `os.fsdecode` makes them.
    """
    inbox = spec.inbox
    return _BODY.format(
        event=event,
        pokes=_quoted(inbox / POKES),
        pid_file=_quoted(spec.pid_file),
        program=shlex.quote(spec.start_command[0]),
        starts=_quoted(inbox / STARTS),
        log=_quoted(inbox / START_LOG),
        variables=" ".join((*LOCAL_VARIABLES, *_OF_THE_COMMAND)),
        command=shlex.join(spec.start_command),
    )


def line_to_add(event: str, spec: HookSpec) -> str:
    """Return one line of shell that a user can add to a hook that is his alone to edit.

    It pokes but starts nothing, so that it stays short enough to be read and trusted.
    """
    return (
        f'{{ printf \'{event}\\t%s\\t%s\\n\' "${{PWD-}}" "${{GIT_DIR-}}" '
        f">>{_quoted(spec.inbox / POKES)}; }} 2>/dev/null || :"
    )


def pokes_by_hand(content: bytes, event: str, spec: HookSpec) -> bool:
    """Tell whether a hook file has a line of the user's that pokes our inbox for this event."""
    pokes = os.fsencode(_quoted(spec.inbox / POKES))
    return any(
        pokes in line and event.encode() in line and not line.lstrip().startswith(b"#")
        for line in content.splitlines()
    )


def _quoted(path: Path) -> str:
    return shlex.quote(os.fspath(path))
