"""The shell text itself, in every shell that is here and under every option that can hurt."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from code2lora.hooks.body import LOCAL_VARIABLES, body, line_to_add
from tests.gitrepo import GitRepo
from tests.hooks.conftest import Daemon

OPTIONS = ["", "-eu", "-x", "-euCf"]

# Output, variables and status are what the user's part of a hook can see of ours.
_AFTER = (
    'echo "status $? stdin $(cat) pid ${code2lora_pid-unset}"\n'
    "case $- in *e*) set +e ;; esac\ncase $- in *x*) set +x ;; esac\nexit 7\n"
)


def run_script(
    shell: list[str], options: str, text: str, folder: Path
) -> subprocess.CompletedProcess[bytes]:
    """Run `text`, then a line of the user's, as one script."""
    script = folder / "script"
    script.write_bytes(os.fsencode(text + _AFTER))
    environment = {key: os.environ[key] for key in ("PATH", "HOME")} | {"GIT_DIR": "/g i/t"}
    return subprocess.run(
        [*shell, *([options] if options else []), str(script)],
        cwd=folder,
        env=environment,
        input=b"given",
        capture_output=True,
        check=False,
        timeout=20,
    )


def untouched(done: subprocess.CompletedProcess[bytes], options: str) -> bool:
    """Tell whether the user's part ran as if it were alone."""
    quiet = "x" in options or done.stderr == b""
    traced = b"code2lora" in done.stderr.replace(b"${code2lora_pid-unset}", b"")
    expected = b"status 0 stdin given pid unset\n"
    return (done.returncode, done.stdout, quiet, traced) == (7, expected, True, False)


@pytest.mark.parametrize("options", OPTIONS)
def test_one_line_and_no_trace(
    shell: list[str], options: str, daemon: Daemon, tmp_path: Path
) -> None:
    if shell == ["zsh"] and "C" in options:
        pytest.skip("under this option zsh appends to no new file")
    if shell == ["mksh"] and "x" in options:
        pytest.skip("mksh traces to the stderr that it started with")

    done = run_script(shell, options, body("post-merge", daemon.spec), tmp_path)

    assert daemon.lines == [["post-merge", str(tmp_path), "/g i/t"]]
    assert untouched(done, options), done
    assert os.listdir(daemon.spec.inbox) == ["pokes"]  # nothing was started


def _full_disk(daemon: Daemon) -> None:
    (daemon.spec.inbox / "pokes").symlink_to("/dev/full")
    (daemon.spec.inbox / "starts").symlink_to("/dev/full")
    daemon.die()


def _no_inbox(daemon: Daemon) -> None:
    daemon.spec.inbox.rmdir()


def _inbox_is_a_file(daemon: Daemon) -> None:
    daemon.spec.inbox.rmdir()
    daemon.spec.inbox.write_bytes(b"")


def _no_pid_file(daemon: Daemon) -> None:
    daemon.spec.pid_file.unlink()


def _foolish_pid_file(daemon: Daemon) -> None:
    daemon.spec.pid_file.write_bytes(b"-1 \\n $(exit 9)\xff\0")


def _empty_pid_file(daemon: Daemon) -> None:
    daemon.spec.pid_file.write_bytes(b"")


@pytest.mark.parametrize("options", ["", "-eu"])
@pytest.mark.parametrize(
    "trouble",
    [
        _full_disk,
        _no_inbox,
        _inbox_is_a_file,
        _no_pid_file,
        _foolish_pid_file,
        _empty_pid_file,
        Daemon.die,
    ],
    ids=lambda trouble: trouble.__name__.strip("_"),
)
def test_trouble_is_swallowed(
    shell: list[str], options: str, trouble: object, daemon: Daemon, tmp_path: Path
) -> None:
    if trouble is _full_disk and not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    assert callable(trouble)
    trouble(daemon)

    done = run_script(shell, options, body("post-commit", daemon.spec), tmp_path)

    assert untouched(done, options), done


def test_the_line_to_add_pokes_and_leaves_no_trace(
    shell: list[str], daemon: Daemon, tmp_path: Path
) -> None:
    text = line_to_add("post-rewrite", daemon.spec) + "\n"

    done = run_script(shell, "-eu", text, tmp_path)
    daemon.die()
    (daemon.spec.inbox / "pokes").rename(daemon.spec.inbox / "taken")
    daemon.spec.inbox.rename(tmp_path / "gone")
    without = run_script(shell, "-eu", text, tmp_path)

    assert (tmp_path / "gone/taken").read_text() == f"post-rewrite\t{tmp_path}\t/g i/t\n"
    assert untouched(done, "-eu"), done
    assert untouched(without, "-eu"), without


def test_only_builtins_run(daemon: Daemon, tmp_path: Path) -> None:
    """With no command to be found, the line is written all the same."""
    text = f"PATH=/nowhere\n{body('post-commit', daemon.spec)}"

    subprocess.run(["/bin/sh", "-c", os.fsencode(text)], cwd=tmp_path, check=True)

    assert len(daemon.lines) == 1


def test_bytes_that_are_no_text_survive(daemon: Daemon, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()

    subprocess.run(["sh", "-c", body("post-commit", daemon.spec)], cwd=folder, check=True)

    assert daemon.lines == [["post-commit", str(folder), ""]]


def test_arguments_may_follow_the_last_line(daemon: Daemon, tmp_path: Path) -> None:
    """Git appends "$@" to a command of its configuration."""
    text = body("post-checkout", daemon.spec).removesuffix("\n") + ' "$@"'

    done = subprocess.run(["sh", "-ec", text, "hook", "a", "b"], capture_output=True, check=False)

    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_every_local_variable_of_git_is_known(repo: GitRepo) -> None:
    assert set(repo.git("rev-parse", "--local-env-vars").split()) <= set(LOCAL_VARIABLES)


def test_one_write_for_one_line(daemon: Daemon, tmp_path: Path) -> None:
    """Hooks of several worktrees append at once; none may land within another's line."""
    script = tmp_path / "many"
    script.write_bytes(os.fsencode(body("post-commit", daemon.spec)) * 200)
    running = [subprocess.Popen(["sh", str(script)], cwd=tmp_path) for _ in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]

    assert daemon.lines == [["post-commit", str(tmp_path), ""]] * 600
