"""Find a repository and read its objects through the git command: slower, and knows every format.

Two `git cat-file` processes are kept, one for contents and one for sizes. They start at the first
question, and end with this process at the latest, because their input then closes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from code2lora.errors import UserError
from code2lora.history.catfile import CatFile
from code2lora.history.gitcommand import first_complaint, resolve_revision, run_git
from code2lora.history.model import Head
from code2lora.history.objects import Kind, damaged_object, unreadable_reference


class CommandSource:
    """Objects and references of one worktree."""

    backend = "git"

    def __init__(self, path: Path) -> None:
        """Open the repository that holds `path`. Raises UserError that says what git says."""
        self.git_dir, self.worktree = find_repository(path)
        self._contents = CatFile(self.git_dir, "--batch")
        self._headers = CatFile(self.git_dir, "--batch-check")

    def head(self) -> Head:
        """Return where HEAD points now."""
        symbolic = run_git("symbolic-ref", "--quiet", "HEAD", git_dir=self.git_dir)
        if symbolic.returncode not in (0, 1):  # 1: detached
            raise unreadable_reference("HEAD", first_complaint(symbolic.stderr))
        name = symbolic.stdout.rstrip("\n") or "HEAD"
        target = run_git("rev-parse", "--quiet", "--verify", name, git_dir=self.git_dir)
        commit = target.stdout.strip() or None
        if commit is None:
            # Nothing there, or nothing readable: only for-each-ref tells the two apart.
            listed = run_git("for-each-ref", name, git_dir=self.git_dir)
            if name == "HEAD" or listed.stderr:
                raise unreadable_reference(
                    name, first_complaint(listed.stderr) or "not an object id"
                )
        return Head(commit, None if name == "HEAD" else name.removeprefix("refs/heads/"))

    def resolve(self, revision: str) -> str | None:
        """Return the id of the commit that a revision names, or None."""
        return resolve_revision(self.git_dir, revision)

    def read(self, id: str, kind: Kind) -> bytes | None:
        """Return an object's content, or None if the repository lacks it; never fetches."""
        found = self._contents.content(id)
        if found is None:
            return None
        if found[0] != kind:
            raise damaged_object(id, kind, f"it is a {found[0]}")
        return found[1]

    def sizes(self, ids: Sequence[str]) -> list[int | None]:
        """Return the sizes in bytes without reading the contents, None for what is lacking."""
        return self._headers.sizes(ids)

    def close(self) -> None:
        """End the helper processes."""
        self._contents.close()
        self._headers.close()


def find_repository(path: Path) -> tuple[Path, Path | None]:
    """Return the git directory and the working tree that hold a path, as git finds them.

    Raises UserError that says what git says.
    """
    asked = ("--is-bare-repository", "--is-inside-work-tree", "--absolute-git-dir")
    done = run_git("rev-parse", *asked, cwd=path)
    if done.returncode != 0:
        raise _refusal(path, done.stderr)
    bare, inside, named = done.stdout.removesuffix("\n").split("\n", 2)
    git_dir = Path(named).resolve()
    if inside == "true":
        top = run_git("rev-parse", "--show-toplevel", cwd=path).stdout.removesuffix("\n")
        return git_dir, Path(top).resolve()
    return git_dir, None if bare == "true" else _worktree_of(git_dir)


def _worktree_of(git_dir: Path) -> Path | None:
    """Return the working tree of a git directory that was given by itself."""
    try:
        linked = (git_dir / "gitdir").read_text("utf-8", "surrogateescape").rstrip("\n")
        return (git_dir / linked).resolve().parent
    except FileNotFoundError:
        pass
    configured = run_git("config", "--get", "core.worktree", git_dir=git_dir).stdout
    if configured:
        return (git_dir / configured.removesuffix("\n")).resolve()
    return git_dir.parent if git_dir.name == ".git" else None


def _refusal(path: Path, stderr: str) -> UserError:
    if "not a git repository" in stderr:
        return _not_a_repository(path)
    if "dubious ownership" in stderr:
        return UserError(
            f"the repository at {path} is owned by another user, so git does not read it",
            hint=f"if you trust it: `git config --global --add safe.directory {path}`",
        )
    words = " ".join(stderr.replace("fatal:", "").split())
    if "extension" in words or "repo version" in words:
        return UserError(
            f"the repository at {path} has a format that the installed git does not know: {words}",
            hint="install a newer git",
        )
    return UserError(
        f"git cannot read the repository at {path}: {first_complaint(stderr)}",
        hint=f"`git -C {path} status` says more",
    )


def _not_a_repository(path: Path) -> UserError:
    for folder in (path, *path.parents):
        bare = (folder / "objects").is_dir() and (folder / "refs").is_dir()
        if bare or (folder / ".git").exists():
            return UserError(
                f"the git repository at {folder} is damaged: git does not recognise it",
                hint="HEAD, objects/ or refs/ is missing or broken; restore it, or clone again",
            )
    return UserError(
        f"{path} is not inside a git repository", hint="`git init` makes one, or go to another"
    )
