"""Commits, diffs and snapshots of real repositories, on both backends, held against git itself."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from code2lora.errors import UserError
from code2lora.history.model import Head, Skipped
from code2lora.history.rules import FileRules
from tests.gitrepo import FIRST_DATE_S, GitRepo
from tests.history.comparing import EVERYTHING, git_patches, patches
from tests.history.conftest import Open

SOURCE = FileRules.named("source")
PAPER = FileRules.named("paper")
BODY = "".join(f"line {n}\n" for n in range(40))


def test_commit_says_who_when_and_what(repo: GitRepo, opened: Open) -> None:
    first = repo.commit({"a.py": "x = 1\n"}, "Add a\n\nThe body is not the summary.")
    second = repo.commit({"a.py": "x = 2\n"}, "Ändere a")
    history = opened(repo.path)
    commit = history.commit(second)
    assert (commit.id, commit.parents) == (second, (first,))
    assert (commit.author, commit.summary) == ("Ada Author", "Ändere a")
    assert FIRST_DATE_S < commit.committed_at_s < FIRST_DATE_S + 3600
    assert history.commit(first).summary == "Add a"


def test_commit_text_is_decoded_and_harmless(repo: GitRepo, opened: Open) -> None:
    repo.commit({"a": "1"})
    tree = repo.git("rev-parse", "HEAD^{tree}")
    raw = (
        f"tree {tree}\nauthor Jos\udce9 <j@x> 1 +0000\ncommitter J <j@x> -5 +0000\n"
        "encoding ISO-8859-1\n\nCaf\udce9 \x1b[31mred\x07\n"
    ).encode("utf-8", "surrogateescape")
    odd = repo.git("hash-object", "-t", "commit", "-w", "--literally", "--stdin", data=raw)
    commit = opened(repo.path).commit(odd)
    assert commit.author == "José"
    assert commit.summary == "Café \ufffd[31mred\ufffd"
    assert commit.committed_at_s == -5


def test_first_parents_skip_what_was_merged(repo: GitRepo, opened: Open) -> None:
    root = repo.commit({"a.py": "1\n"})
    repo.switch("side", create=True)
    side = repo.commit({"b.py": "2\n"})
    repo.switch("main")
    main = repo.commit({"a.py": "3\n"})
    merge = repo.merge("side")
    history = opened(repo.path)
    assert [commit.id for commit in history.first_parents(merge)] == [merge, main, root]
    assert [commit.id for commit in history.first_parents(merge, limit=2)] == [merge, main]
    assert list(history.first_parents(merge, limit=0)) == []
    diff = history.diff(merge, SOURCE)
    assert diff.parent == main
    assert [change.path for change in diff.changes] == ["b.py"]
    assert side in history.commit(merge).parents


def test_head_of_every_kind(repo: GitRepo, opened: Open) -> None:
    history = opened(repo.path)
    assert history.head() == Head(None, "main")
    first = repo.commit({"a.py": "1\n"})
    assert history.head() == Head(first, "main")
    repo.switch("deep/er", create=True)
    second = repo.commit({"a.py": "2\n"})
    assert history.head() == Head(second, "deep/er")
    repo.git("pack-refs", "--all")
    assert history.head() == Head(second, "deep/er")
    repo.git("checkout", "--quiet", "--detach", first)
    assert history.head() == Head(first, None)
    repo.switch("fresh", orphan=True)
    assert history.head() == Head(None, "fresh")


def test_orphan_branch_has_its_own_root(repo: GitRepo, opened: Open) -> None:
    repo.commit({"a.py": "1\n"})
    repo.switch("other", orphan=True)
    root = repo.commit({"b.py": "2\n"})
    history = opened(repo.path)
    assert [commit.id for commit in history.first_parents(root)] == [root]
    diff = history.diff(root, SOURCE)
    assert diff.parent is None
    assert [(change.path, change.status) for change in diff.changes] == [("b.py", "A")]


def test_resolve(repo: GitRepo, opened: Open) -> None:
    first = repo.commit({"a.py": "1\n"})
    second = repo.commit({"a.py": "2\n"})
    repo.git("tag", "--annotate", "v1", first, "--message", "one")
    history = opened(repo.path)
    for revision, expected in {
        "HEAD": second,
        "HEAD~1": first,
        "v1": first,
        first[:9]: first,
        second: second,
        "main^": first,
    }.items():
        assert history.resolve(revision) == expected
    for wrong in ("", " ", "nothing", "HEAD:a.py", "--all", "HEAD\nHEAD", "a\0b", "0" * 40):
        with pytest.raises(UserError, match="names no commit of"):
            history.resolve(wrong)


def test_an_abbreviated_hash_is_no_commit(repo: GitRepo, opened: Open) -> None:
    first = repo.commit({"a.py": "1\n"})
    with pytest.raises(UserError, match="is not a full commit hash"):
        opened(repo.path).diff(first[:12], SOURCE)


def test_a_tree_is_no_commit(repo: GitRepo, opened: Open) -> None:
    repo.commit({"a.py": "1\n"})
    tree = repo.git("rev-parse", "HEAD^{tree}")
    with pytest.raises(UserError, match="it is a tree"):
        opened(repo.path).commit(tree)


def test_added_and_removed_lines(repo: GitRepo, opened: Open) -> None:
    repo.commit({"a.py": "one\ntwo\nthree", "gone.py": "x\n"})
    commit = repo.commit({"a.py": "one\n-- 2\n+three\n", "gone.py": None, "new.py": "y\r\nz"})
    changes = {change.path: change for change in opened(repo.path).diff(commit, SOURCE).changes}
    assert changes["a.py"].added == "-- 2\n+three\n"
    assert changes["a.py"].removed == "two\nthree\n"
    assert (changes["gone.py"].status, changes["gone.py"].removed) == ("D", "x\n")
    assert (changes["new.py"].status, changes["new.py"].added) == ("A", "y\r\nz\n")


ODD_NAMES = ["with space.py", "tab\there.py", 'quo"te.py', "new\nline.py", "ünï.py", "back\\s.py"]
STEPS: list[dict[str, str | bytes | None]] = [
    {"a.py": BODY, "empty.py": "", "no_newline.py": "x", "crlf.py": "a\r\nb\r\n"},
    {"a.py": BODY.replace("line 20\n", "changed\n"), "no_newline.py": "x\n", "empty.py": "e\n"},
    {"a.py": None, "sub/b.py": BODY + "more\n"},
    {"sub/b.py": BODY + "even more\n", "crlf.py": "a\nb\n", "no_newline.py": "x\ny"},
    {name: f"{name!r}\n" for name in ODD_NAMES},
    {name: None for name in ODD_NAMES} | {"moved/" + name: f"{name!r}\n" for name in ODD_NAMES},
    {"latin.py": b"# caf\xe9\n", "form\x0cfeed.py": "a\x0cb\x1cc\u2028d\n"},
    {"latin.py": b"# caf\xe9\nx = 1\n", "sub/b.py": None, "sub": BODY},
    {"sub": None, "c.c": "int main(void)\n{\n" + BODY + "}\n", "copy.py": BODY},
    {"c.c": "int main(void)\n{\n" + BODY.replace("line 35", "there") + "}\n"},
]


def test_patches_are_those_of_git(repo: GitRepo, opened: Open) -> None:
    commits = [repo.commit(step) for step in STEPS]
    history = opened(repo.path)
    for commit in commits:
        expected = git_patches(repo, commit)
        assert patches(history.diff(commit, EVERYTHING)) == expected
        assert expected


def test_long_function_lines_in_hunk_headers(repo: GitRepo, opened: Open) -> None:
    text = f"def {'f' * 75} ({'x' * 40}):\n" + BODY
    repo.commit({"a.py": text})
    commit = repo.commit({"a.py": text.replace("line 30\n", "")})
    assert patches(opened(repo.path).diff(commit, SOURCE)) == git_patches(repo, commit)


def test_mode_and_type_changes(repo: GitRepo, opened: Open) -> None:
    repo.commit({"run.py": BODY, "link.py": BODY})
    (repo.path / "run.py").chmod(0o755)
    (repo.path / "link.py").unlink()
    (repo.path / "link.py").symlink_to("run.py")
    commit = repo.commit()
    diff = opened(repo.path).diff(commit, SOURCE)
    assert patches(diff) == [p for p in git_patches(repo, commit) if "120000" not in p]
    assert [(change.path, change.status) for change in diff.changes] == [
        ("link.py", "D"),
        ("run.py", "M"),
    ]
    assert diff.skipped == (Skipped("link.py", "symlink"),)


def test_empty_commit(repo: GitRepo, opened: Open) -> None:
    parent = repo.commit({"a.py": "1\n"})
    commit = repo.commit(allow_empty=True)
    diff = opened(repo.path).diff(commit, SOURCE)
    assert (diff.parent, diff.changes, diff.skipped, diff.unified) == (parent, (), (), "")


def test_names_that_are_not_utf8(repo: GitRepo, opened: Open) -> None:
    (repo.path / os.fsdecode(b"caf\xe9.py")).write_text("x\n")
    commit = repo.commit()
    history = opened(repo.path)
    assert history.diff(commit, SOURCE).changes[0].path == "caf\ufffd.py"
    assert history.snapshot(commit, SOURCE).files[0].path == "caf\ufffd.py"


def make_one_of_each(repo: GitRepo) -> dict[str, str]:
    """Commit one file for every reason to skip, and return the expected reasons."""
    other = GitRepo(repo.path.parent / "other")
    other.commit({"a.py": "1\n"})
    repo.git("-c", "protocol.file.allow=always", "submodule", "add", "-q", str(other.path), "mod")
    (repo.path / "link.py").symlink_to("ok.py")
    repo.commit(
        {
            "ok.py": "x = 1\n",
            "nul.py": b"a\0b\n",
            "big.py": b"x" * (SOURCE.max_file_bytes + 1),
            "pb.py": "# Code generated by a tool. DO NOT EDIT.\nx = 1\n",
            "vendor/v.py": "x = 1\n",
            "uv.lock": "x\n",
            "m.js": "a();" * 1000 + "\n",
            "j.min.js": "a()\n",
            "data.csv": "1,2\n",
            "lfs.py": "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            "said.py": "x = 1\n",
            "shown.py": "# @generated\nx = 1\n",
            "hidden.py": "x = 1\n",
            ".gitattributes": "said.py linguist-generated\nshown.py -linguist-generated\n"
            "hidden.py -diff\n",
        }
    )
    return {
        ".gitattributes": "not source",
        ".gitmodules": "not source",
        "big.py": "too large",
        "data.csv": "not source",
        "hidden.py": "binary",
        "j.min.js": "minified",
        "lfs.py": "lfs pointer",
        "link.py": "symlink",
        "m.js": "minified",
        "mod": "submodule",
        "nul.py": "binary",
        "pb.py": "generated",
        "said.py": "generated",
        "uv.lock": "lock file",
        "vendor/v.py": "vendored",
    }


def test_every_reason_to_skip(repo: GitRepo, opened: Open) -> None:
    expected = make_one_of_each(repo)
    history = opened(repo.path)
    diff, snapshot = history.diff(repo.head, SOURCE), history.snapshot(repo.head, SOURCE)
    for found in (diff.skipped, snapshot.skipped):
        assert {skipped.path: skipped.reason for skipped in found} == expected
        assert [skipped.path for skipped in found] == sorted(expected)
    assert [change.path for change in diff.changes] == ["ok.py", "shown.py"]
    assert [file.path for file in snapshot.files] == ["ok.py", "shown.py"]


def test_a_large_file_is_never_read(
    repo: GitRepo, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo.commit({"big.py": b"x\n" * 10_000_000, "a.py": "1\n"})
    commit = repo.commit({"big.py": None, "moved.py": b"x\n" * 10_000_001, "a.py": "2\n"})
    history = opened(repo.path)
    source = history._source
    largest = 0
    read = source.read

    def watched(id: str, kind: str) -> bytes | None:
        nonlocal largest
        content = read(id, kind)  # type: ignore[arg-type]
        largest = max(largest, len(content or b""))
        return content

    monkeypatch.setattr(source, "read", watched)
    diff = history.diff(commit, SOURCE)
    assert [change.path for change in diff.changes] == ["a.py"]
    assert {skipped.reason for skipped in diff.skipped} == {"too large"}
    history.snapshot(commit, SOURCE)
    assert 0 < largest < 10_000


def test_budgets_of_a_diff(repo: GitRepo, opened: Open) -> None:
    commit = repo.commit({f"{n}.py": f"{n}\n" * 500 for n in range(4)})
    history = opened(repo.path)
    for rules in (replace(SOURCE, max_read_bytes=2_500), replace(SOURCE, max_patch_bytes=3_600)):
        diff = history.diff(commit, rules)
        assert [change.path for change in diff.changes] == ["0.py", "1.py"]
        assert diff.skipped == (Skipped("2.py", "too large"), Skipped("3.py", "too large"))


def test_snapshot_reads_the_commit_and_not_the_working_tree(repo: GitRepo, opened: Open) -> None:
    commit = repo.commit({"b.py": "b\n", "a.py": b"caf\xe9\n", "none.py": "", "d/a.py": "b\n"})
    repo.write({"a.py": "other\n", "untracked.py": "no\n"})
    snapshot = opened(repo.path).snapshot(commit, SOURCE)
    assert [(file.path, file.text) for file in snapshot.files] == [
        ("a.py", "caf\ufffd\n"),
        ("b.py", "b\n"),
        ("d/a.py", "b\n"),
    ]
    assert snapshot.files[1].blob == repo.git("rev-parse", "HEAD:b.py")
    assert snapshot.skipped == (Skipped("none.py", "empty"),)


def test_more_files_than_are_asked_for_at_once(repo: GitRepo, opened: Open) -> None:
    commit = repo.commit({f"{n}.py": "x" * (n + 1) for n in range(330)})
    files = opened(repo.path).snapshot(commit, SOURCE).files
    assert {file.path: len(file.text) for file in files} == {f"{n}.py": n + 1 for n in range(330)}


def test_largest_files_of_a_snapshot_give_way(repo: GitRepo, opened: Open) -> None:
    commit = repo.commit({"a.py": "a" * 600, "b.py": "b" * 500, "c.py": "c" * 400})
    snapshot = opened(repo.path).snapshot(commit, replace(SOURCE, max_snapshot_bytes=1_000))
    assert [file.path for file in snapshot.files] == ["b.py", "c.py"]
    assert snapshot.skipped == (Skipped("a.py", "too large"),)


def test_paper_recipe_of_a_diff_and_of_a_snapshot(repo: GitRepo, opened: Open) -> None:
    files = ("src/a.py", "README.md", "doc/x.rst", "latest/b.py", "c.js", "build/d.py")
    commit = repo.commit({name: b"x\xff\n" for name in files})
    history = opened(repo.path)
    changed = [change.path for change in history.diff(commit, PAPER).changes]
    assert changed == ["README.md", "doc/x.rst", "src/a.py"]
    snapshot = history.snapshot(commit, FileRules.named("paper-snapshot"))
    assert [file.path for file in snapshot.files] == ["build/d.py", "latest/b.py", "src/a.py"]
    assert {file.text for file in snapshot.files} == {"x\n"}


def test_nothing_that_a_repository_configures_has_a_say(repo: GitRepo, opened: Open) -> None:
    commit = make_configured(repo)
    plain = repo.path.parent / "plain"
    repo.git("clone", "--quiet", "--no-local", str(repo.path), str(plain))
    (plain / ".gitattributes").unlink()
    expected = opened(plain).diff(commit, SOURCE)
    found = opened(repo.path)
    assert found.diff(commit, SOURCE) == expected
    assert found.snapshot(commit, SOURCE).files
    assert found.head().commit == commit
    assert found.resolve("HEAD") == commit
    assert len(expected.changes) == 2
    assert not (repo.path / "pwned").exists()


def make_configured(repo: GitRepo) -> str:
    """Commit to a repository that would run programs and bend diffs if it were let."""
    command = f"touch '{repo.path / 'pwned'}'; cat"
    repo.commit({"a.py": BODY, "b.py": "x\n", ".gitattributes": "*.py diff=evil filter=evil\n"})
    commit = repo.commit({"a.py": BODY.replace("line 7", "  line 7"), "c.py": "x\ny\n"})
    for key in ("diff.external", "diff.evil.command", "diff.evil.textconv", "core.fsmonitor"):
        repo.git("config", key, command)
    for key in ("filter.evil.smudge", "filter.evil.clean", "core.sshCommand", "core.pager"):
        repo.git("config", key, command)
    bent = {"diff.algorithm": "patience", "diff.noprefix": "true", "diff.context": "0"}
    for key, value in {**bent, "diff.renames": "false", "core.abbrev": "40"}.items():
        repo.git("config", key, value)
    (repo.path / ".git" / "info" / "attributes").write_text("*.py -diff\n")
    repo.git("replace", commit, "HEAD~1")
    return commit


def test_the_environment_of_a_hook_has_no_say(
    repo: GitRepo, tmp_path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = repo.commit({"a.py": "1\n"})
    other = GitRepo(tmp_path / "elsewhere")
    other.commit({"b.py": "2\n"})
    monkeypatch.setenv("GIT_DIR", str(other.path / ".git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(other.path / ".git" / "index"))
    monkeypatch.setenv("GIT_OBJECT_DIRECTORY", str(other.path / ".git" / "objects"))
    history = opened(repo.path)
    assert history.head().commit == commit
    assert [file.path for file in history.snapshot(commit, SOURCE).files] == ["a.py"]
