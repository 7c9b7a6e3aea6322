"""Hooks in git's configuration."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import code2lora.hooks.git
from code2lora.hooks import EVENTS, HookState, inspect, install, remove
from tests.gitrepo import GitRepo
from tests.hooks.conftest import Daemon, hook_tree, make_daemon, target_of, write_hook

pytestmark = pytest.mark.usefixtures("by_config")


def hook_config(repo: GitRepo) -> list[tuple[str, str]]:
    """Return what the repository's configuration says about hooks, without the commands."""
    done = repo.run("config", "--local", "--null", "--get-regexp", "^hook[.]", check=False)
    text = done.stdout.decode()
    pairs = [entry.split("\n", 1) for entry in text.split("\0") if entry]
    return [(key, value) for key, value in pairs if not key.endswith(".command")]


def test_only_the_configuration_is_written(repo: GitRepo, daemon: Daemon) -> None:
    before = hook_tree(repo)

    report = install(target_of(repo), daemon.spec)
    during = hook_tree(repo)
    again = install(target_of(repo), daemon.spec)

    assert report.complete and report.changed
    assert report.states == tuple(HookState(e, "installed", how="config") for e in EVENTS)
    assert (again.changed, again.states) == (False, report.states)
    assert hook_tree(repo) == during
    assert {name for name in during if during[name] != before[name]} == {"config"}
    assert hook_config(repo) == [
        entry
        for event in EVENTS
        for entry in (
            (f"hook.code2lora-{event}.parallel", "true"),
            (f"hook.code2lora-{event}.event", event),
        )
    ]
    assert remove(target_of(repo), daemon.spec).removed == EVENTS
    assert hook_tree(repo) == before


def test_a_command_stands_before_its_event(repo: GitRepo, daemon: Daemon) -> None:
    """A reader in between would meet an event without a command, which ends every commit."""
    install(target_of(repo), daemon.spec)

    keys = repo.git("config", "--local", "--name-only", "--get-regexp", "^hook[.]").splitlines()
    assert keys[:3] == [
        f"hook.code2lora-post-commit.{name}" for name in ("command", "parallel", "event")
    ]


def test_other_hooks_of_the_configuration_are_left_alone(repo: GitRepo, daemon: Daemon) -> None:
    repo.git("config", "hook.mine.command", "echo mine")
    repo.git("config", "hook.mine.event", "post-commit")
    before = hook_tree(repo)

    install(target_of(repo), daemon.spec)
    done = repo.run("commit", "--allow-empty", "--message", "x")
    remove(target_of(repo), daemon.spec)

    assert b"mine\n" in done.stderr + done.stdout
    assert daemon.take() == ["post-commit"]
    assert hook_tree(repo) == before


def test_the_users_parallel_hooks_stay_parallel(repo: GitRepo, daemon: Daemon) -> None:
    """Each waits for the other, which only works side by side."""
    repo.git("config", "hook.jobs", "4")
    for mine, other in (("one", "two"), ("two", "one")):
        wait = f"touch {mine}; n=0; while [ ! -e {other} ] && [ $n -lt 50 ]; do n=$((n+1)); "
        repo.git("config", f"hook.{mine}.command", wait + f"sleep 0.1; done; echo {mine} $n; :")
        repo.git("config", f"hook.{mine}.event", "post-merge")
        repo.git("config", f"hook.{mine}.parallel", "true")
    repo.commit({"a.py": ""})
    repo.switch("side", create=True)
    repo.commit({"b.py": ""})
    repo.switch("main")
    install(target_of(repo), daemon.spec)

    done = repo.run("merge", "side")

    assert daemon.take() == ["post-merge"]
    assert b" 50" not in done.stdout + done.stderr


def test_an_incomplete_or_outdated_section_is_mended(
    repo: GitRepo, daemon: Daemon, tmp_path: Path
) -> None:
    install(target_of(repo), make_daemon(tmp_path / "elsewhere").spec)
    repo.git("config", "--unset", "hook.code2lora-post-merge.command")
    repo.git("config", "--add", "hook.code2lora-post-rewrite.event", "post-commit")
    repo.git("config", "--unset", "hook.code2lora-post-checkout.event")

    report = inspect(target_of(repo), daemon.spec)
    installed = install(target_of(repo), daemon.spec)
    repo.commit({"a.py": ""})

    assert [(found.status, found.outdated) for found in report.states] == [
        ("installed", True),
        ("installed", True),
        ("missing", False),
        ("missing", False),
        ("installed", True),
    ]
    assert installed.complete
    assert daemon.take() == ["post-commit"]


@pytest.mark.parametrize("name", ["post-commit", "code2lora-post-commit"])
def test_what_the_user_switched_off_stays_off(repo: GitRepo, daemon: Daemon, name: str) -> None:
    repo.git("config", f"hook.{name}.enabled", "false")

    report = install(target_of(repo), daemon.spec)

    assert [(found.event, found.reason, found.hint) for found in report.blocked] == [
        (
            "post-commit",
            f"hook.{name}.enabled is false in git's configuration",
            f"`git config --unset hook.{name}.enabled`",
        )
    ]
    assert inspect(target_of(repo), daemon.spec).states == report.states
    repo.git("config", f"hook.{name}.enabled", "true")
    assert install(target_of(repo), daemon.spec).complete


def test_a_configuration_that_stays_locked(
    repo: GitRepo, daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(code2lora.hooks.git, "_LOCK_PATIENCE_S", 0.1)
    (repo.path / ".git/config.lock").touch()

    report = install(target_of(repo), daemon.spec)

    config = repo.path / ".git/config"
    assert len(report.blocked) == 5 and not report.changed
    assert report.blocked[0].reason == (
        f"git cannot write {config}: could not lock config file {config}: File exists"
    )


def test_file_blocks_give_way_to_the_configuration(
    repo: GitRepo, daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Git was updated: one poke for a commit, not two, and the hook file is as it was."""
    path = write_hook(repo, "post-commit", "#!/bin/sh\necho hi\n")
    since = code2lora.hooks.git.CONFIG_HOOKS_SINCE
    monkeypatch.setattr(code2lora.hooks.git, "CONFIG_HOOKS_SINCE", (99, 0))
    install(target_of(repo), daemon.spec)
    monkeypatch.setattr(code2lora.hooks.git, "CONFIG_HOOKS_SINCE", since)

    seen = inspect(target_of(repo), daemon.spec)
    report = install(target_of(repo), daemon.spec)
    repo.commit({"a.py": ""})

    assert [found.how for found in seen.states] == ["file"] * 5
    assert [found.how for found in report.states] == ["config"] * 5 and report.changed
    assert path.read_bytes() == b"#!/bin/sh\necho hi\n"
    assert daemon.take() == ["post-commit"]

    monkeypatch.setattr(code2lora.hooks.git, "CONFIG_HOOKS_SINCE", (99, 0))
    assert [s.status for s in inspect(target_of(repo), daemon.spec).states] == ["missing"] * 5
    back = install(target_of(repo), daemon.spec)
    repo.commit({"a.py": "a = 1\n"})

    assert [found.how for found in back.states] == ["file"] * 5
    assert hook_config(repo) == []
    assert daemon.take() == ["post-commit"]


def test_hooks_of_any_kind_and_place_do_not_matter(
    repo: GitRepo, daemon: Daemon, tmp_path: Path
) -> None:
    """Neither a hook in Python, nor committed hooks, nor none at all."""
    write_hook(repo, "post-commit", "#!/usr/bin/env python3\nprint('python')\n")
    report = install(target_of(repo), daemon.spec)
    done = repo.run("commit", "--allow-empty", "--message", "x")
    assert b"python" in done.stderr + done.stdout

    repo.commit({".githooks/post-commit": "#!/bin/sh\necho committed\n"})
    os.chmod(repo.path / ".githooks/post-commit", 0o755)
    for place in (".githooks", str(tmp_path), os.devnull):
        repo.git("config", "core.hooksPath", place)
        repo.git("commit", "--quiet", "--allow-empty", "--message", "x")

    assert report.complete
    assert inspect(target_of(repo), daemon.spec).complete
    assert daemon.take() == ["post-commit"] * 5
