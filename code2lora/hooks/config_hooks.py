"""Keep our hooks in the repository's configuration, for git that runs hooks from there.

Such a hook runs before the hook file and besides it, wherever `core.hooksPath` points, in every
worktree. Each event has a section of its own, because git does not tell a command its event.

Git refuses every commit while an event is named without a command, so the command is written
first and a section is removed as a whole.
"""

from __future__ import annotations

from collections import defaultdict

from code2lora.hooks.body import body
from code2lora.hooks.git import ConfigWriteError, Git
from code2lora.hooks.model import EVENTS, HookSpec, HookState

_OFF = frozenset({"false", "no", "off", "0", ""})


def install_in_config(git: Git, spec: HookSpec) -> tuple[tuple[HookState, ...], bool]:
    """Write what is missing or outdated; return how every event stands, and whether we wrote.

    A configuration that cannot be written leaves its events blocked, with git's reason.
    """
    settled: list[HookState] = []
    changed = False
    failure: ConfigWriteError | None = None
    for state in inspect_config(git, spec):
        if state.status == "blocked" or (state.status == "installed" and not state.outdated):
            settled.append(state)
            continue
        try:
            if failure is None:  # else the same file would make us wait once more
                _write(git, state.event, spec)
                changed = True
        except ConfigWriteError as error:
            failure = error
        if failure is None:
            settled.append(HookState(state.event, "installed", how="config"))
        else:
            settled.append(_unwritable(git, state.event, failure))
    return tuple(settled), changed


def inspect_config(git: Git, spec: HookSpec) -> tuple[HookState, ...]:
    """Return how every event stands, judged by the configuration alone."""
    sections = _sections(git)
    switched_off = _switched_off(git)
    states: list[HookState] = []
    for event in EVENTS:
        section = sections.get(_name(event), {})
        off = [key for key in (event, _name(event)) if key in switched_off]
        if off:
            states.append(_disabled(event, off[0]))
        elif section.get("event") != [event]:
            states.append(HookState(event, "missing"))
        else:
            outdated = section != _wanted(event, spec)
            states.append(HookState(event, "installed", how="config", outdated=outdated))
    return tuple(states)


def remove_from_config(git: Git) -> tuple[tuple[str, ...], tuple[HookState, ...]]:
    """Remove our sections; return the events they were for, and those that could not be removed."""
    sections = _sections(git)
    removed: list[str] = []
    left: list[HookState] = []
    for event in EVENTS:
        if _name(event) not in sections:
            continue
        try:
            git.remove_section(f"hook.{_name(event)}")
            removed.append(event)
        except ConfigWriteError as error:
            left.append(_unwritable(git, event, error))
    return tuple(removed), tuple(left)


def _name(event: str) -> str:
    return f"code2lora-{event}"


def _wanted(event: str, spec: HookSpec) -> dict[str, list[str]]:
    """Return our section for an event, variables in the order in which they must be written."""
    return {
        # Git appends `"$@"`, which must be arguments of the last command and not a new one.
        "command": [body(event, spec).rstrip("\n")],
        # Without this the user's own parallel hooks of the event would run one by one.
        "parallel": ["true"],
        "event": [event],
    }


def _write(git: Git, event: str, spec: HookSpec) -> None:
    for variable, values in _wanted(event, spec).items():
        git.set_config(f"hook.{_name(event)}.{variable}", values[0])


def _sections(git: Git) -> dict[str, dict[str, list[str]]]:
    """Return our sections of the local configuration: name, variable, values; without `enabled`."""
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for key, value in git.get_config(r"^hook\.code2lora-", local=True):
        name, _, variable = key.removeprefix("hook.").rpartition(".")
        if variable != "enabled":
            found[name][variable].append(value)
    return found


def _switched_off(git: Git) -> set[str]:
    """Return the hook names and events that any configuration file in force switches off."""
    entries = git.get_config(r"^hook\..*\.enabled$", local=False)
    strongest = {
        key.removeprefix("hook.").removesuffix(".enabled"): value for key, value in entries
    }
    return {name for name, value in strongest.items() if value.lower() in _OFF}


def _disabled(event: str, name: str) -> HookState:
    return HookState(
        event,
        "blocked",
        reason=f"hook.{name}.enabled is false in git's configuration",
        hint=f"`git config --unset hook.{name}.enabled`",
    )


def _unwritable(git: Git, event: str, error: ConfigWriteError) -> HookState:
    return HookState(
        event,
        "blocked",
        reason=f"git cannot write {git.target.common_dir / 'config'}: {error}",
        hint="make the file and its folder writable",
    )
