"""Root .gitattributes files, held against `git check-attr`."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from code2lora.history.attributes import MAX_FILE_BYTES, PathAttributes, parse_attributes
from tests.gitrepo import GitRepo

PATHS = [
    *("a.py", "gen.py", "sub/a.py", "sub/gen.py", "sub/deep/a.py", "gen/a.py", "x/gen/a.py"),
    *("a b.py", "[x].py", "*.py", "src/gen/x/y.py", "src/y.py", "a.PY", "!a.py"),
]

FILES = [
    "*.py linguist-generated\n",
    "gen.py linguist-generated=true diff\nsub/gen.py -linguist-generated\n",
    "/a.py linguist-generated\nsub/*.py -diff\n",
    "sub/** linguist-vendored\nsub/deep/** -linguist-vendored\n",
    "**/gen/** linguist-generated=false\ngen/* linguist-generated\n",
    "src/**/y.py linguist-generated\n",
    '"a b.py" binary\n# *.py binary\n\n   *.PY   -diff   text\n',
    "[a-g]*.py -diff\n[!a]*.py linguist-generated\n[^a]?n.py linguist-vendored\n",
    "\\[x\\].py -diff\n\\*.py linguist-generated\n",
    "*.py linguist-generated\nsub/*.py !linguist-generated\n",
    "gen/ linguist-generated\ngen linguist-generated\n",
    "!a.py -diff\n*.py diff=python\n",
    "a.py\tlinguist-generated\r\n",
]


def of_git(repo: GitRepo, content: str, paths: list[str]) -> dict[str, PathAttributes]:
    """Return what git says; the file lies in the repository's root."""
    (repo.path / ".gitattributes").write_text(content, newline="")
    names = {"linguist-generated": "generated", "linguist-vendored": "vendored", "diff": "diff"}
    said: dict[str, dict[str, bool]] = {path: {} for path in paths}
    out = repo.git("check-attr", "-z", *names, "--", *paths).split("\0")[:-1]
    for path, name, value in zip(out[::3], out[1::3], out[2::3], strict=True):
        if value != "unspecified":
            said[path][names[name]] = value not in ("unset", "false")
    return {path: PathAttributes(**fields) for path, fields in said.items()}


@pytest.mark.parametrize("content", FILES)
def test_as_git_reads_them(repo: GitRepo, content: str) -> None:
    attributes = parse_attributes(content.encode())
    assert {path: attributes.of(path) for path in PATHS} == of_git(repo, content, PATHS)


# Not `**` beside other characters: there git 2.39.5 may match across a slash, against its own
# documentation (gitignore, "other consecutive asterisks"); git 2.55 does not.
SEGMENT = (
    st.lists(st.sampled_from(["a", "b", "*", "?", "ab", "[ab]"]), min_size=1, max_size=4)
    .map("".join)
    .filter(lambda segment: "**" not in segment)
)
PATTERN = st.lists(st.one_of(SEGMENT, st.just("**")), min_size=1, max_size=4).map("/".join)
PATH = st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=4).map("/".join)


@settings(max_examples=40, deadline=None)
@given(patterns=st.lists(PATTERN, min_size=1, max_size=4), paths=st.sets(PATH, min_size=5))
def test_any_pattern_as_git_reads_it(
    tmp_path_factory: pytest.TempPathFactory, patterns: list[str], paths: set[str]
) -> None:
    repo = GitRepo(tmp_path_factory.mktemp("attributes"))
    values = ("-diff", "diff", "linguist-generated", "linguist-vendored")
    content = "".join(f"{p} {v}\n" for p, v in zip(patterns, values, strict=False))
    attributes = parse_attributes(content.encode())
    chosen = sorted(paths)
    assert {path: attributes.of(path) for path in chosen} == of_git(repo, content, chosen)


def test_hostile_patterns_cost_little() -> None:
    evil = "*a" * 200 + "b"
    content = f"{evil} -diff\n**/{evil} -diff\n{'**/a/' * 80}b -diff\n".encode()
    attributes = parse_attributes(content)
    assert len(attributes.rules) == 3
    start = time.process_time()
    for path in ("a" * 250, "/".join(["a" * 50] * 60), "a/" * 500 + "c"):
        assert attributes.of(path) == PathAttributes()
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe\x00 -diff\n", b"[ -diff\n", b"[z-a].py -diff\n", b'"open -diff\n', b"\\ -diff\n"],
)
def test_broken_lines_say_nothing(content: bytes) -> None:
    assert parse_attributes(content).of("a.py") == PathAttributes()


def test_an_enormous_file_says_nothing() -> None:
    assert parse_attributes(b"*.py -diff\n" * (MAX_FILE_BYTES // 10)).rules == ()


def test_no_file_below_the_root_counts(repo: GitRepo, tmp_path: Path) -> None:
    from code2lora.history.open import open_history
    from code2lora.history.rules import FileRules

    commit = repo.commit({"sub/.gitattributes": "* -diff\n", "sub/a.py": "1\n"})
    history = open_history(repo.path)
    files = history.snapshot(commit, FileRules.named("source")).files
    history.close()
    assert [file.path for file in files] == ["sub/a.py"]
