"""Measure what our hook adds to `git commit`, against an empty hook, in paired runs.

    python benchmarks/hook_cost.py [--commits 200] [--git /path/to/git]

Three clones of one repository take turns, commit by commit, in an order that is drawn anew each
time: one without a hook, one with an empty one, one with ours. The pid file names a living process,
so that nothing is started. With a git that has hooks in its configuration, the empty hook is one of
those too. Prints medians in milliseconds, and of the differences between runs of the same turn.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from code2lora.hooks import HookSpec, HookTarget, install

KINDS = ("no hook", "empty hook", "our hook")
WARM_UP = 10


def environment(home: Path) -> dict[str, str]:
    """Return an environment without the user's configuration."""
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_AUTHOR_NAME": "A",
        "GIT_AUTHOR_EMAIL": "a@example.com",
        "GIT_COMMITTER_NAME": "A",
        "GIT_COMMITTER_EMAIL": "a@example.com",
    }


def prepare(root: Path, git: str) -> dict[str, Path]:
    """Make one repository of each kind."""
    repositories = {kind: root / kind.replace(" ", "-") for kind in KINDS}
    for path in repositories.values():
        path.mkdir()
        run = [git, "-C", str(path)]
        subprocess.run([*run, "init", "--quiet"], check=True, env=environment(root))
        subprocess.run([*run, "config", "gc.auto", "0"], check=True, env=environment(root))
    ours = repositories["our hook"]
    inbox = root / "inbox"
    inbox.mkdir()
    (root / "pid").write_text(str(os.getpid()))
    spec = HookSpec(inbox, root / "pid", ("/bin/false",))
    report = install(HookTarget(ours / ".git", ours / ".git", ours), spec, git=git)
    assert report.complete
    empty = repositories["empty hook"]
    if report.states[0].how == "config":
        for key, value in (("command", ": && :"), ("event", "post-commit")):
            subprocess.run(
                [git, "-C", str(empty), "config", f"hook.empty.{key}", value], check=True
            )
    else:
        hook = empty / ".git/hooks/post-commit"
        hook.parent.mkdir(exist_ok=True)
        hook.write_text("#!/bin/sh\n")
        hook.chmod(0o755)
    print(f"installed in: {report.states[0].how}")
    return repositories


def commit_ms(git: str, path: Path, env: dict[str, str]) -> float:
    """Make an empty commit and return how long git took."""
    command = [git, "commit", "--quiet", "--allow-empty", "--message", "x"]
    start = time.perf_counter()
    subprocess.run(command, cwd=path, env=env, check=True)
    return (time.perf_counter() - start) * 1000


def main() -> None:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--commits", type=int, default=200)
    parser.add_argument("--git", default="git")
    options = parser.parse_args()
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        repositories = prepare(root, options.git)
        env = environment(root)
        for turn in range(options.commits + WARM_UP):
            for kind in random.sample(KINDS, len(KINDS)):
                elapsed = commit_ms(options.git, repositories[kind], env)
                if turn >= WARM_UP:
                    times[kind].append(elapsed)
        arrived = len((root / "inbox/pokes").read_bytes().splitlines())
    assert arrived == options.commits + WARM_UP, f"{arrived} lines arrived"
    version = subprocess.run([options.git, "version"], capture_output=True, text=True, check=True)
    print(f"{version.stdout.strip()}, {options.commits} commits of each kind")
    for kind in KINDS:
        print(f"{kind:>12}: median {statistics.median(times[kind]):6.2f} ms")
    pairs = list(zip(times["our hook"], times["empty hook"], strict=True))
    added = statistics.median(ours - empty for ours, empty in pairs)
    ratio = statistics.median(ours / empty for ours, empty in pairs)
    print(f"added by ours over an empty hook: median {added:.2f} ms, ratio {ratio:.3f}")


if __name__ == "__main__":
    main()
