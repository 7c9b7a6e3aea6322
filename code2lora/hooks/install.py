"""Install, inspect and remove the wake-up hooks of one repository.

Each repository has one mechanism, chosen by the git that installs: hooks in git's configuration
where it has them, blocks in hook files otherwise. Installing by one removes the other. All three
functions may be repeated and may be cut off at any point: the next call completes what is left.
"""

from __future__ import annotations

from code2lora.hooks.config_hooks import (
    inspect_config,
    install_in_config,
    remove_from_config,
)
from code2lora.hooks.git import Git
from code2lora.hooks.hook_files import (
    inspect_files,
    install_in_files,
    remove_from_files,
)
from code2lora.hooks.model import (
    EVENTS,
    HookSpec,
    HookState,
    HookTarget,
    InstallReport,
    RemovalReport,
)


def install(target: HookTarget, spec: HookSpec, *, git: str = "git") -> InstallReport:
    """Install the hooks of all events and report how each stands.

    What only the user can do is reported, not raised: an event that is blocked costs delay, since
    the daemon also looks by itself. Raises UserError if git cannot be run on the repository.
    """
    repository = Git(target, git)
    if not repository.has_config_hooks:
        states, changed = install_in_files(repository, spec)
        removed, _ = remove_from_config(repository)
        return InstallReport(states, changed or bool(removed))
    states, changed = install_in_config(repository, spec)
    if any(state.how != "config" for state in states):
        return InstallReport(states, changed)
    removed, _ = remove_from_files(repository)
    return InstallReport(states, changed or bool(removed))


def inspect(target: HookTarget, spec: HookSpec, *, git: str = "git") -> InstallReport:
    """Report how the hook of every event stands; writes nothing.

    Raises UserError if git cannot be run on the repository.
    """
    repository = Git(target, git)
    in_files = inspect_files(repository, spec)
    if not repository.has_config_hooks:
        return InstallReport(in_files)
    in_config = inspect_config(repository, spec)
    return InstallReport(tuple(map(_stronger, in_config, in_files)))


def remove(target: HookTarget, spec: HookSpec, *, git: str = "git") -> RemovalReport:
    """Remove every hook of ours; files are left byte for byte as they would be without us.

    spec: used to find lines that the user added by hand; they are his, so they are reported.
    Raises UserError if git cannot be run on the repository.
    """
    repository = Git(target, git)
    from_config, kept_in_config = remove_from_config(repository)
    from_files, kept_in_files = remove_from_files(repository)
    by_hand = tuple(state for state in inspect_files(repository, spec) if state.how == "by hand")
    gone = {*from_config, *from_files}
    return RemovalReport(
        removed=tuple(event for event in EVENTS if event in gone),
        left=(*kept_in_config, *kept_in_files, *by_hand),
    )


def _stronger(in_config: HookState, in_file: HookState) -> HookState:
    """Return the state that tells what happens at the event: a hook file runs as well."""
    if in_config.status == "missing" and in_file.status == "installed":
        return in_file
    return in_config
