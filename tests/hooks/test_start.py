"""Starting the daemon from a hook: in the background, cut loose from git, and not every time."""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from code2lora.hooks import install
from code2lora.hooks.body import body
from tests.gitrepo import GitRepo
from tests.hooks.conftest import Daemon, make_daemon, target_of

PATIENCE_S = 10.0


def wait_for(true: Callable[[], bool]) -> None:
    """Wait until the condition holds; fail after a while."""
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.01)


@pytest.fixture
def dead(tmp_path: Path) -> Daemon:
    """No daemon runs; its start is written down in `runs` by a program with an awkward name."""
    daemon = starter(tmp_path, "true")
    daemon.die()
    return daemon


def starter(root: Path, text: str) -> Daemon:
    """Make a daemon whose start is this shell text, after a line in `runs` for each argument."""
    program = root / "it's a program"
    runs = shlex.quote(str(root / "runs"))
    program.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$*\" >>{runs}\n{text}\n")
    program.chmod(0o755)
    daemon = make_daemon(root / "state", (str(program), "-I", "two words", "$x"))
    daemon.die()
    return daemon


def runs(daemon: Daemon) -> int:
    """Count how often the start command ran."""
    file = daemon.spec.inbox.parent.parent / "runs"
    return len(file.read_text().splitlines()) if file.exists() else 0


def poke(daemon: Daemon, times: int) -> None:
    """Run the hook's text so often."""
    text = body("post-commit", daemon.spec)
    for _ in range(times):
        subprocess.run(["sh", "-c", text], check=True, timeout=PATIENCE_S)


def count(daemon: Daemon) -> str:
    """Return what the inbox remembers about failed starts."""
    file = daemon.spec.inbox / "starts"
    return file.read_text() if file.exists() else ""


def test_a_commit_starts_the_daemon(repo: GitRepo, dead: Daemon, tmp_path: Path) -> None:
    install(target_of(repo), dead.spec)

    repo.commit({"a.py": ""})

    wait_for(lambda: (dead.spec.inbox / "starts").exists() and count(dead) == "")
    assert (tmp_path / "runs").read_text() == "-I two words $x\n"
    assert dead.take() == ["post-commit"]


def test_a_living_daemon_is_left_alone(dead: Daemon) -> None:
    dead.spec.pid_file.write_text(f"{os.getpid()}\n")

    poke(dead, 3)

    assert sorted(os.listdir(dead.spec.inbox)) == ["pokes"]


def gated(root: Path) -> tuple[Daemon, Path]:
    """Make a daemon whose start goes on until the second value, a file, appears."""
    gate = root / "gate"
    name = shlex.quote(str(gate))
    daemon = starter(
        root, f"n=0\nwhile [ ! -e {name} ] && [ $((n += 1)) -lt 300 ]\ndo sleep 0.1\ndone"
    )
    return daemon, gate


def test_git_does_not_wait(repo: GitRepo, tmp_path: Path, method: str) -> None:
    """Neither for the process, nor until it closes an output that it had inherited."""
    daemon, gate = gated(tmp_path)
    install(target_of(repo), daemon.spec)

    repo.commit({"a.py": ""})  # reads git's output to its end

    wait_for(lambda: runs(daemon) == 1)
    assert count(daemon) == "1\n"  # it has not ended
    gate.touch()
    wait_for(lambda: count(daemon) == "")


def test_no_shell_waits(shell: list[str], tmp_path: Path) -> None:
    daemon, gate = gated(tmp_path)
    text = body("post-commit", daemon.spec) + "echo after\n"

    done = subprocess.run([*shell, "-c", text], check=True, capture_output=True, timeout=PATIENCE_S)

    wait_for(lambda: runs(daemon) == 1)
    assert (done.stdout, done.stderr, count(daemon)) == (b"after\n", b"", "1\n")
    gate.touch()
    wait_for(lambda: count(daemon) == "")


def test_descriptors_of_the_caller_are_closed(tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    daemon = starter(
        tmp_path,
        f"for n in 3 4 5 6 7 8 9; do ( : >&$n ) 2>/dev/null && echo $n >>{shlex.quote(str(seen))}; "
        f"done\nread -r x && echo stdin >>{shlex.quote(str(seen))}\necho done",
    )
    text = "exec 3>&1 5>&2 9>&1\n" + body("post-commit", daemon.spec)

    subprocess.run(["sh", "-c", text], check=True, input=b"given\n", capture_output=True)

    wait_for(lambda: (daemon.spec.inbox / "start.log").exists() and count(daemon) == "")
    assert (daemon.spec.inbox / "start.log").read_text() == "done\n"
    assert not seen.exists()


def test_the_daemon_is_not_tied_to_the_repository(
    repo: GitRepo, tmp_path: Path, method: str
) -> None:
    """It must neither inherit the repository nor the person and date of one commit."""
    daemon = starter(tmp_path, f"env >{shlex.quote(str(tmp_path / 'env'))}")
    linked = GitRepo(tmp_path / "linked", init=False)
    repo.commit({"a.py": ""})
    repo.worktree(linked.path, "side")
    install(target_of(linked), daemon.spec)

    linked.commit({"b.py": ""})  # in a linked worktree git sets GIT_DIR

    wait_for(lambda: (tmp_path / "env").exists() and count(daemon) == "")
    names = {line.partition("=")[0] for line in (tmp_path / "env").read_text().splitlines()}
    allowed = {"GIT_CONFIG_NOSYSTEM", "GIT_CONFIG_GLOBAL", "GIT_TERMINAL_PROMPT"}
    allowed |= {"GIT_ALLOW_PROTOCOL", "GIT_COMMITTER_NAME", "GIT_COMMITTER_EMAIL"}
    assert {name for name in names if name.startswith("GIT_")} <= allowed | {"GIT_COMMITTER_DATE"}
    assert daemon.lines[-1][2] != ""


def test_a_broken_start_is_not_tried_at_every_commit(tmp_path: Path) -> None:
    daemon = starter(tmp_path, "echo broken >&2\nexit 1")
    tried: list[int] = []
    for number in range(1, 34):
        before = runs(daemon)
        poke(daemon, 1)
        if number in (1, 4, 16, 32):
            wait_for(lambda before=before: runs(daemon) == before + 1)  # type: ignore[misc]
            tried.append(number)

    time.sleep(0.2)
    assert tried == [1, 4, 16, 32]
    assert runs(daemon) == len(tried)
    assert count(daemon) == "33\n"
    assert (daemon.spec.inbox / "start.log").read_text() == "broken\n"


def test_after_a_start_that_worked_the_next_one_is_not_held_back(dead: Daemon) -> None:
    for number in range(1, 4):
        poke(dead, 1)
        wait_for(lambda number=number: runs(dead) == number and count(dead) == "")  # type: ignore[misc]


def test_a_foolish_count_is_a_new_count(dead: Daemon) -> None:
    (dead.spec.inbox / "starts").write_text("x y $(exit 1)\n")

    poke(dead, 1)

    wait_for(lambda: runs(dead) == 1 and count(dead) == "")


def test_an_interpreter_that_is_gone_is_not_started(tmp_path: Path, dead: Daemon) -> None:
    gone = Daemon(replace(dead.spec, start_command=(str(tmp_path / "gone"), "x")))

    poke(gone, 2)

    assert sorted(os.listdir(gone.spec.inbox)) == ["pokes"]


def test_nothing_is_started_that_could_not_be_counted(dead: Daemon) -> None:
    """Else a full disk would mean one process for each commit."""
    (dead.spec.inbox / "starts").mkdir()

    poke(dead, 3)

    time.sleep(0.2)
    assert runs(dead) == 0


def test_full_disk(repo: GitRepo, tmp_path: Path, shell: list[str]) -> None:
    """A file system of one page, full to the last byte."""
    daemon = starter(tmp_path, "exit 1")
    inbox = shlex.quote(str(daemon.spec.inbox))
    script = tmp_path / "script"
    script.write_text(
        f"mount -t tmpfs -o size=4k none {inbox} || exit 77\n"
        f"cat /dev/zero >{inbox}/filler 2>/dev/null\n"
        f"ls -s {inbox}/filler >&2\n"
        f"{shlex.join(shell)} -euc {shlex.quote(body('post-commit', daemon.spec) + 'echo after')}\n"
        f"status=$?; stat -c %s {inbox}/pokes; exit $status\n"
    )
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", str(script)],
        capture_output=True,
        check=False,
    )
    if done.returncode == 77 or b"unshare" in done.stderr:
        pytest.skip("cannot mount a small file system here")

    assert (done.returncode, done.stdout) == (0, b"after\n0\n"), done
    time.sleep(0.1)
    assert runs(daemon) == 0


def test_relative_paths_are_a_bug_of_the_caller(dead: Daemon) -> None:
    with pytest.raises(AssertionError, match="absolute"):
        replace(dead.spec, start_command=("python", "-m", "x"))
