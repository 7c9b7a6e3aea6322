"""What cannot be read: one line that says what is wrong, on both backends, and never a hang."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from code2lora.errors import UserError
from code2lora.history.open import Backend, open_history
from code2lora.history.rules import FileRules
from tests.gitrepo import GitRepo
from tests.history.conftest import Open

SOURCE = FileRules.named("source")


def refusal(path: Path, backend: Backend | None = None) -> UserError:
    with pytest.raises(UserError) as told:
        open_history(path, backend=backend)
    assert "\n" not in told.value.message
    assert told.value.hint
    return told.value


def loose_file(repo: GitRepo, id: str) -> Path:
    path = repo.path / ".git" / "objects" / id[:2] / id[2:]
    path.chmod(0o644)
    return path


def test_no_such_folder(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none").message == f"there is no {tmp_path / 'none'}"


def test_not_a_repository(tmp_path: Path) -> None:
    told = refusal(tmp_path)
    assert told.message == f"{tmp_path} is not inside a git repository"
    assert told.hint is not None and "git init" in told.hint


def test_damaged_head(repo: GitRepo) -> None:
    (repo.path / ".git" / "HEAD").write_text("nonsense\n")
    told = refusal(repo.path)
    assert told.message == (
        f"the git repository at {repo.path} is damaged: git does not recognise it"
    )


def test_damaged_configuration(repo: GitRepo) -> None:
    with open(repo.path / ".git" / "config", "a") as file:
        file.write("[[[\n")
    told = refusal(repo.path)
    assert told.message.startswith(f"git cannot read the repository at {repo.path}: bad config")


def test_unknown_format(repo: GitRepo) -> None:
    repo.git("config", "core.repositoryFormatVersion", "1")
    with open(repo.path / ".git" / "config", "a") as file:
        file.write("[extensions]\n\tfromTheFuture = yes\n")
    told = refusal(repo.path)
    assert "has a format that the installed git does not know" in told.message
    assert "fromthefuture" in told.message
    assert told.hint == "install a newer git"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root to chown")
def test_owned_by_someone_else(repo: GitRepo, hermetic_home: Path, opened_any: Open) -> None:
    repo.commit({"a.py": "1\n"})
    for path in (repo.path, repo.path / ".git"):
        os.chown(path, 65_534, 65_534)
    told = refusal(repo.path)
    assert told.message == (
        f"the repository at {repo.path} is owned by another user, so git does not read it"
    )
    assert told.hint is not None and f"--add safe.directory {repo.path}" in told.hint
    trust = hermetic_home / "home" / ".gitconfig"
    trust.write_text(f"[safe]\n\tdirectory = {repo.path}\n")
    try:
        assert opened_any(repo.path).head().branch == "main"
    finally:
        trust.unlink()


def test_git_is_not_installed(
    tmp_path: Path, repo: GitRepo, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = repo.commit({"a.py": "1\n"})
    monkeypatch.setenv("PATH", str(tmp_path))
    assert refusal(repo.path, "git").message == "the git command was not found"
    history = open_history(repo.path)
    assert history.head().commit == commit
    assert history.diff(commit, SOURCE).changes
    history.close()


def test_damaged_branch(repo: GitRepo, opened: Open) -> None:
    repo.commit({"a.py": "1\n"})
    (repo.path / ".git" / "refs" / "heads" / "main").write_text("nonsense\n")
    with pytest.raises(UserError, match=r"reference (HEAD|refs/heads/main) cannot be read"):
        opened(repo.path).head()


def test_missing_commit_of_head(repo: GitRepo, opened: Open) -> None:
    commit = repo.commit({"a.py": "1\n"})
    loose_file(repo, commit).unlink()
    history = opened(repo.path)
    assert history.head().commit == commit
    with pytest.raises(UserError, match=f"commit {commit} is missing from the repository"):
        history.commit(commit)


def test_missing_objects(repo: GitRepo, opened: Open) -> None:
    commit = repo.commit({"a.py": "1\n", "b.py": "2\n"})
    history = opened(repo.path)
    loose_file(repo, repo.git("rev-parse", "HEAD:a.py")).unlink()
    diff = history.diff(commit, SOURCE)
    assert [change.path for change in diff.changes] == ["b.py"]
    assert [(s.path, s.reason) for s in diff.skipped] == [("a.py", "missing object")]
    loose_file(repo, repo.git("rev-parse", "HEAD^{tree}")).unlink()
    with pytest.raises(UserError, match=r"tree \w+ is missing from the repository"):
        history.diff(commit, SOURCE)


@pytest.mark.parametrize("damage", ["empty", "truncated", "garbage", "longer"])
@pytest.mark.parametrize("what", ["HEAD", "HEAD^{tree}", "HEAD:a.py"])
def test_damaged_objects(repo: GitRepo, opened: Open, what: str, damage: str) -> None:
    commit = repo.commit({"a.py": "".join(f"{n * 7919}\n" for n in range(2_000)), "b.py": "1\n"})
    file = loose_file(repo, repo.git("rev-parse", what))
    whole = file.read_bytes()
    damaged = {
        "empty": b"",
        "truncated": whole[: len(whole) // 2],
        "garbage": b"garbage" + whole[7:],
        "longer": whole[:-4] + b"more",
    }
    file.write_bytes(damaged[damage])
    history = opened(repo.path)
    with pytest.raises(UserError, match=file.parent.name + file.name) as told:
        history.diff(commit, SOURCE)
        history.snapshot(commit, SOURCE)
    assert told.value.hint is not None and "git fsck" in told.value.hint
    with pytest.raises(UserError):
        history.snapshot(commit, SOURCE)
    file.write_bytes(whole)
    assert len(history.diff(commit, SOURCE).changes) == 2


@pytest.mark.parametrize("damage", ["truncated", "zeroed"])
def test_damaged_pack(repo: GitRepo, opened: Open, damage: str) -> None:
    commit = repo.commit({f"{n}.py": os.urandom(2_000).hex() for n in range(20)})
    repo.git("repack", "-q", "-a", "-d")
    (pack,) = (repo.path / ".git" / "objects" / "pack").glob("*.pack")
    pack.chmod(0o644)
    whole = pack.read_bytes()
    half = len(whole) // 2
    pack.write_bytes(whole[:half] + (b"\0" * (len(whole) - half) if damage == "zeroed" else b""))
    history = opened(repo.path)
    with pytest.raises(UserError, match=r"cannot be read|is missing"):
        history.snapshot(commit, SOURCE)


def test_malformed_commit(repo: GitRepo, opened: Open) -> None:
    raw = b"nothing of a commit\n\nmessage\n"
    odd = repo.git("hash-object", "-t", "commit", "-w", "--literally", "--stdin", data=raw)
    with pytest.raises(UserError, match=f"commit {odd} is malformed"):
        opened(repo.path).commit(odd)


def test_a_few_trees_that_unfold_to_billions(
    repo: GitRepo, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("code2lora.history.objects.MAX_TREE_ENTRIES", 2_000)
    entry = f"100644 blob {repo.git('hash-object', '-w', '--stdin', data=b'x')}\tf.py\n"
    for _ in range(10):
        tree = repo.git("mktree", data=entry.encode())
        entry = "".join(f"040000 tree {tree}\td{n}\n" for n in range(10))
    commit = repo.git("commit-tree", tree, "-m", "bomb")
    with pytest.raises(UserError, match="a tree with more than 2,000 entries is not read"):
        opened(repo.path).diff(commit, SOURCE)


def test_deeply_nested_folders(repo: GitRepo, opened: Open) -> None:
    entry = f"100644 blob {repo.git('hash-object', '-w', '--stdin', data=b'x')}\tf.py\n"
    trees = []
    for _ in range(60):
        trees.append(repo.git("mktree", data=entry.encode()))
        entry = f"040000 tree {trees[-1]}\td\n"
    commit = repo.git("commit-tree", trees[-1], "-m", "deep")
    diff = opened(repo.path).diff(commit, SOURCE)
    assert [change.path for change in diff.changes] == ["d/" * 59 + "f.py"]


def test_a_helper_that_was_killed_is_replaced(repo: GitRepo) -> None:
    commit = repo.commit({"a.py": "1\n"})
    history = open_history(repo.path, backend="git")
    expected = history.diff(commit, SOURCE)
    for helper in (history._source._contents, history._source._headers):  # type: ignore[attr-defined]
        helper._process.kill()
        helper._process.wait()
    assert history.diff(commit, SOURCE) == expected
    history.close()
    assert history.diff(commit, SOURCE) == expected
    history.close()
