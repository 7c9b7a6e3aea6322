"""Blocks in hook files: what is written, what is refused, and what removal leaves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from code2lora.hooks import EVENTS, HookState, InstallReport, inspect, install, remove
from code2lora.hooks.block import Marks, extract, insert, is_damaged
from tests.gitrepo import GitRepo
from tests.hooks.conftest import Daemon, hook_tree, make_daemon, target_of, write_hook

pytestmark = pytest.mark.usefixtures("by_file")


def state(report: InstallReport, event: str = "post-commit") -> HookState:
    """Return one event's state."""
    return next(found for found in report.states if found.event == event)


def round_trip(repo: GitRepo, daemon: Daemon) -> InstallReport:
    """Install, see that a second time changes nothing, remove, and compare with before."""
    before = hook_tree(repo)
    report = install(target_of(repo), daemon.spec)
    during = hook_tree(repo)
    assert not install(target_of(repo), daemon.spec).changed
    assert hook_tree(repo) == during
    assert inspect(target_of(repo), daemon.spec).states == report.states
    remove(target_of(repo), daemon.spec)
    assert hook_tree(repo) == before
    return report


def test_new_files(repo: GitRepo, daemon: Daemon) -> None:
    report = install(target_of(repo), daemon.spec)

    hooks = repo.path / ".git/hooks"
    written = {path.name for path in hooks.iterdir() if path.suffix != ".sample"}
    assert report.complete and report.blocked == ()
    assert written == set(EVENTS)
    assert state(report) == HookState(
        "post-commit", "installed", how="file", path=hooks / "post-commit"
    )
    for event in EVENTS:
        assert (hooks / event).stat().st_mode & 0o777 == 0o755
        assert (hooks / event).read_bytes().startswith(b"#!/bin/sh\n# >>> code2lora hook >>>")


def test_new_files_go_again(repo: GitRepo, daemon: Daemon) -> None:
    round_trip(repo, daemon)


def test_a_folder_of_ours_goes_with_the_last_file(daemon: Daemon, tmp_path: Path) -> None:
    repo = GitRepo(tmp_path / "repo", options=["--template="])
    assert not (repo.path / ".git/hooks").exists()

    report = round_trip(repo, daemon)

    assert report.complete
    assert not (repo.path / ".git/hooks").exists()


def test_a_folder_of_ours_stays_if_it_is_used(daemon: Daemon, tmp_path: Path) -> None:
    repo = GitRepo(tmp_path / "repo", options=["--template="])
    install(target_of(repo), daemon.spec)
    theirs = write_hook(repo, "pre-push", "#!/bin/sh\n")

    remove(target_of(repo), daemon.spec)

    assert list((repo.path / ".git/hooks").iterdir()) == [theirs]


def test_an_empty_folder_of_theirs_stays(daemon: Daemon, tmp_path: Path) -> None:
    repo = GitRepo(tmp_path / "repo", options=["--template="])
    (repo.path / ".git/hooks").mkdir()

    round_trip(repo, daemon)


@pytest.mark.parametrize(
    "content",
    [
        b"#!/bin/sh\necho one\n",
        b"#!/bin/sh\necho no newline at the end",
        b"#!/bin/sh",
        b"#!/bin/sh\n",
        b"#!/bin/sh\n\r\necho carriage returns\r\nexit 0\r\n",
        b"#! /usr/bin/env -S FOO=1 bash -e\nexit 0\n",
        b"#!/usr/bin/env zsh\n",
        b"#!/bin/busybox sh\n",
        b"echo no shebang\n",
        b"\xef\xbb\xbf#!/bin/sh\necho byte order mark\n",
        b"",
        b"#!/bin/bash\necho \xff\xfe not UTF-8\n",
    ],
)
@pytest.mark.parametrize("mode", [0o755, 0o700, 0o2775])
def test_files_of_the_user_come_back(
    repo: GitRepo, daemon: Daemon, content: bytes, mode: int
) -> None:
    write_hook(repo, "post-merge", content, mode=mode)

    report = round_trip(repo, daemon)

    assert report.complete


def test_the_users_later_edits_stay(repo: GitRepo, daemon: Daemon) -> None:
    ours = repo.path / ".git/hooks/post-commit"
    theirs = write_hook(repo, "post-merge", "#!/bin/sh")
    install(target_of(repo), daemon.spec)
    for path in (ours, theirs):
        path.write_bytes(path.read_bytes() + b"echo added\n")
        path.write_bytes(path.read_bytes().replace(b"#!/bin/sh\n", b"#!/bin/bash\n# mine\n", 1))

    install(target_of(repo), daemon.spec)
    remove(target_of(repo), daemon.spec)

    for path in (ours, theirs):
        assert path.read_bytes() == b"#!/bin/bash\n# mine\necho added\n"


def test_an_older_block_is_replaced(repo: GitRepo, daemon: Daemon, tmp_path: Path) -> None:
    before = hook_tree(repo)
    other = make_daemon(tmp_path / "elsewhere")
    install(target_of(repo), other.spec)

    outdated = inspect(target_of(repo), daemon.spec)
    report = install(target_of(repo), daemon.spec)
    repo.commit({"a.py": ""})

    assert [found.outdated for found in outdated.states] == [True] * 5
    assert not outdated.complete
    assert report.complete and report.changed
    assert (daemon.take(), other.take()) == (["post-commit"], [])
    remove(target_of(repo), daemon.spec)
    assert hook_tree(repo).keys() == before.keys()


def test_a_file_that_was_copied_is_cleaned_wherever_it_is_a_hook(
    repo: GitRepo, daemon: Daemon
) -> None:
    install(target_of(repo), daemon.spec)
    content = (repo.path / ".git/hooks/post-commit").read_bytes()
    for event in EVENTS:
        write_hook(repo, event, content)

    assert not inspect(target_of(repo), daemon.spec).complete
    assert install(target_of(repo), daemon.spec).complete
    remove(target_of(repo), daemon.spec)

    assert not any((repo.path / ".git/hooks" / event).exists() for event in EVENTS)


def _python(repo: GitRepo) -> Path:
    return write_hook(repo, "post-commit", "#!/usr/bin/env python3\nprint(1)\n")


def _binary(repo: GitRepo) -> Path:
    return write_hook(repo, "post-commit", b"\x7fELF\x02\x01\x01\0\0\0")


def _windows(repo: GitRepo) -> Path:
    return write_hook(repo, "post-commit", "#!/bin/sh\r\necho a\r\n")


def _not_executable(repo: GitRepo) -> Path:
    return write_hook(repo, "post-commit", "#!/bin/sh\necho a\n", mode=0o644)


def _folder(repo: GitRepo) -> Path:
    path = repo.path / ".git/hooks/post-commit"
    path.mkdir(parents=True)
    return path


def _committed_link(repo: GitRepo) -> Path:
    repo.commit({"scripts/hook": "#!/bin/sh\n"})
    path = repo.path / ".git/hooks/post-commit"
    path.symlink_to("../../scripts/hook")
    return path


def _dangling_link(repo: GitRepo) -> Path:
    path = repo.path / ".git/hooks/post-commit"
    path.symlink_to("nowhere")
    return path


def _half_a_block(repo: GitRepo) -> Path:
    text = "#!/bin/sh\n# >>> code2lora hook >>>\necho a\n"
    return write_hook(repo, "post-commit", text)


NEWER_GIT = "or use git 2.54 or later"
RUN_LINE = f"have it run the line, {NEWER_GIT}"


@pytest.mark.parametrize(
    ("make", "reason", "hint"),
    [
        (_python, "{path} is not a shell script (python3)", RUN_LINE),
        (_binary, "{path} is a binary", RUN_LINE),
        (
            _windows,
            "{path} has Windows line endings in its first line, so git cannot run it",
            RUN_LINE,
        ),
        (
            _not_executable,
            "{path} is not executable, so git ignores it",
            "`chmod +x {path}`",
        ),
        (_folder, "{path} cannot be read: Is a directory", "make it a readable file"),
        (
            _committed_link,
            "{path} is a symbolic link to ../../scripts/hook",
            f"add the line to it yourself, {NEWER_GIT}",
        ),
        (
            _dangling_link,
            "{path} is a symbolic link to nowhere",
            f"add the line to it yourself, {NEWER_GIT}",
        ),
        (
            _half_a_block,
            "{path} holds only one end of our block",
            "delete what is left of it, from `# >>> code2lora` to `# <<< code2lora`",
        ),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else "",
)
def test_what_is_refused(
    repo: GitRepo, daemon: Daemon, make: Callable[[GitRepo], Path], reason: str, hint: str
) -> None:
    path = make(repo)
    before = None if not path.is_file() else path.read_bytes()

    report = install(target_of(repo), daemon.spec)

    found = state(report)
    assert (found.status, found.reason, found.hint) == (
        "blocked",
        reason.format(path=path),
        hint.format(path=path),
    )
    assert report.blocked == (found,)  # the other events are installed
    assert before == (None if not path.is_file() else path.read_bytes())
    assert inspect(target_of(repo), daemon.spec).states == report.states


def test_half_a_block_is_reported_by_removal(repo: GitRepo, daemon: Daemon) -> None:
    path = _half_a_block(repo)

    report = remove(target_of(repo), daemon.spec)

    assert [(found.path, found.status) for found in report.left] == [(path, "blocked")]
    assert path.read_bytes() == b"#!/bin/sh\n# >>> code2lora hook >>>\necho a\n"


def test_our_block_in_a_file_that_was_switched_off(repo: GitRepo, daemon: Daemon) -> None:
    path = write_hook(repo, "post-commit", "#!/bin/sh\necho a\n")
    install(target_of(repo), daemon.spec)
    path.chmod(0o644)

    assert state(inspect(target_of(repo), daemon.spec)).reason == (
        f"{path} is not executable, so git ignores it"
    )
    remove(target_of(repo), daemon.spec)
    assert (path.stat().st_mode & 0o777, path.read_bytes()) == (0o644, b"#!/bin/sh\necho a\n")


def test_a_folder_that_cannot_be_made(repo: GitRepo, daemon: Daemon) -> None:
    repo.git("config", "core.hooksPath", ".git/not/there")

    report = install(target_of(repo), daemon.spec)

    path = repo.path / ".git/not/there/post-commit"
    assert state(report).reason == f"{path} cannot be written: No such file or directory"
    assert len(report.blocked) == 5 and not report.changed


def test_no_temporary_file_is_left_by_a_failed_write(
    repo: GitRepo, daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    before = hook_tree(repo)
    monkeypatch.setattr("os.fsync", fail)

    report = install(target_of(repo), daemon.spec)

    assert state(report).reason == (
        f"{repo.path}/.git/hooks/post-commit cannot be written: No space left on device"
    )
    assert hook_tree(repo) == before


def test_a_python_script_that_pokes_by_itself_counts(repo: GitRepo, tmp_path: Path) -> None:
    daemon = make_daemon(tmp_path / "state")
    report = install(target_of(repo), daemon.spec)
    _python(repo)
    report = inspect(target_of(repo), daemon.spec)
    line = state(report).line
    assert line is not None

    write_hook(
        repo, "post-commit", f"#!/usr/bin/env python3\nimport os\nos.system(r'''{line}''')\n"
    )
    repo.commit({"a.py": ""})

    assert state(inspect(target_of(repo), daemon.spec)).how == "by hand"
    assert daemon.take() == ["post-commit"]


LINES = st.sampled_from(
    [b"#!/bin/sh", b"#!/bin/bash -e", b"#!/usr/bin/perl", b"", b"exit 0", b"\r", b"# x", b"\0"]
)
CONTENT = st.one_of(st.binary(max_size=40), st.lists(LINES, max_size=5).map(b"\n".join))


@settings(max_examples=60)
@given(content=CONTENT, text=st.sampled_from([b"", b"one\n", b"one\ntwo\n"]))
@example(content=b"#!", text=b"x\n")
def test_insertion_and_extraction_are_inverse(content: bytes, text: bytes) -> None:
    assume(extract(content) is None and not is_damaged(content))

    with_block = insert(content, text, Marks())
    found = extract(with_block)

    assert not is_damaged(with_block)
    assert found is not None and found[0] == content


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(content=CONTENT, mode=st.sampled_from([0o755, 0o644, 0o700]))
def test_any_hook_comes_back(repo: GitRepo, daemon: Daemon, content: bytes, mode: int) -> None:
    write_hook(repo, "post-commit", content, mode=mode)

    round_trip(repo, daemon)
