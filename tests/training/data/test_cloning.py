from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from code2lora.cli.train.mine import parse_repository, read_list
from code2lora.errors import UserError
from code2lora.history.open import open_history
from code2lora.training.data.cloning import LIST, Cloned, Pin, clone, read_pins
from code2lora.training.data.mining import Repository, mine
from code2lora.training.data.shards import folder_name
from tests.gitrepo import GitRepo
from tests.training import worlds

NOWHERE = "0" * 40


@pytest.fixture
def served(tmp_path: Path) -> GitRepo:
    """`owner/name` below the folder that is served, with two commits."""
    repo = GitRepo(tmp_path / "served" / "owner" / "name")
    repo.commit({"a.py": "x = 1\n"})
    repo.commit({"a.py": "x = 2\n"})
    return repo


@pytest.fixture
def cloned(tmp_path: Path) -> Callable[..., dict[str, Cloned]]:
    """Clone into `out` from the folder that is served; return what became of each."""

    def run(*pins: Pin, **options: object) -> dict[str, Cloned]:
        source = (tmp_path / "served").as_uri()
        found = clone(pins, tmp_path / "out", **{"source": source, **options})  # type: ignore[arg-type]
        return {each.name: each for each in found}

    return run


Clone = Callable[..., dict[str, Cloned]]


def _hang(repo: GitRepo) -> None:
    """Make the server wait for ever as soon as it looks for an object."""
    os.mkfifo(repo.path / ".git" / "objects" / "info" / "alternates")


def _at(out: Path, pin: Pin) -> GitRepo:
    return GitRepo(out / f"{folder_name(pin.name)}.git", init=False)


def test_a_clone_is_the_history_of_its_commit_and_nothing_else(
    served: GitRepo, cloned: Clone, tmp_path: Path
) -> None:
    pin = Pin("owner/name", served.head)
    later = served.commit({"a.py": "x = 3\n"})
    served.git("tag", "v1")

    results = cloned(pin)

    assert results == {"owner/name": Cloned("owner/name", "cloned")}
    found = _at(tmp_path / "out", pin)
    assert found.head == pin.commit
    assert found.git("rev-list", "--count", "HEAD") == "2"
    assert found.git("rev-parse", "--is-bare-repository") == "true"
    assert found.run("symbolic-ref", "--quiet", "HEAD", check=False).returncode == 1
    assert found.run("cat-file", "-e", later, check=False).returncode != 0
    assert found.git("for-each-ref") == ""
    assert found.git("fsck", "--full") == ""
    history = open_history(found.path)
    assert history.resolve("HEAD") == pin.commit
    history.close()


def test_what_is_cloned_is_mined_to_the_same_bytes(cloned: Clone, tmp_path: Path) -> None:
    made = worlds.make_repository(tmp_path / "served" / "owner", "alpha")
    repo = GitRepo(made.git_dir.parent, init=False)
    cloned(Pin("owner/alpha", repo.head))

    [listed] = [parse_repository(text) for text in read_list(tmp_path / "out" / LIST)]
    mine([listed], tmp_path / "from-clone", worlds.MINE)
    mine([Repository("owner/alpha", made.git_dir)], tmp_path / "from-source", worlds.MINE)

    assert listed.name == "owner/alpha"
    tables = sorted((tmp_path / "from-source" / "owner+alpha").iterdir())
    assert tables
    for table in tables:
        same = tmp_path / "from-clone" / "owner+alpha" / table.name
        assert same.read_bytes() == table.read_bytes(), table.name


def test_what_is_there_is_kept_and_moved_when_the_list_says_so(
    served: GitRepo, cloned: Clone, tmp_path: Path
) -> None:
    first = Pin("owner/name", served.git("rev-parse", "HEAD~1"))
    second = Pin("owner/name", served.head)
    assert cloned(first)["owner/name"].status == "cloned"
    assert cloned(second)["owner/name"].status == "moved"
    assert _at(tmp_path / "out", second).git("rev-list", "--count", "HEAD") == "2"

    served.path.rename(tmp_path / "gone")
    assert cloned(second)["owner/name"].status == "kept", "nothing is asked of the server"
    failed = cloned(Pin("owner/name", NOWHERE))["owner/name"]
    assert failed.status == "failed"
    assert _at(tmp_path / "out", second).head == second.commit, "a failure leaves it as it was"


def test_what_cannot_be_cloned_is_reported_and_the_others_go_on(
    served: GitRepo, cloned: Clone, tmp_path: Path
) -> None:
    pins = [Pin("owner/none", NOWHERE), Pin("owner/name", served.head), Pin("owner/lost", NOWHERE)]
    served.clone(served.path.with_name("lost"))
    told = []

    results = cloned(*pins, workers=2, progress=lambda *now: told.append(now[1:]))

    assert {name: each.status for name, each in results.items()} == {
        "owner/none": "failed",
        "owner/name": "cloned",
        "owner/lost": "failed",
    }
    assert "does not appear to be a git repository" in results["owner/none"].reason
    assert "not our ref" in results["owner/lost"].reason
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [LIST, "owner+name.git"]
    assert (tmp_path / "out" / LIST).read_text() == "owner/name=owner+name.git\n"


def test_a_stop_gives_up_what_is_being_fetched_and_leaves_nothing_of_it(
    served: GitRepo, cloned: Clone, tmp_path: Path
) -> None:
    pins = [Pin("owner/name", served.head), Pin("owner/slow", served.head)]
    slow = served.clone(served.path.with_name("slow"))
    _hang(slow)
    begun_s = time.monotonic()
    half = tmp_path / "out" / ".tmp-owner+slow.git"
    seen = []

    def stop() -> bool:
        seen.append(half.exists())
        return time.monotonic() - begun_s > 1.0

    results = cloned(*pins, Pin("owner/never-begun", served.head), stop=stop)

    assert results == {"owner/name": Cloned("owner/name", "cloned")}
    assert any(seen), "it had begun"
    assert time.monotonic() - begun_s < 30
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [LIST, "owner+name.git"]
    (slow.path / ".git" / "objects" / "info" / "alternates").unlink()
    assert cloned(*pins)["owner/slow"].status == "cloned"


def test_what_a_kill_left_behind_is_no_clone(
    served: GitRepo, cloned: Clone, tmp_path: Path
) -> None:
    half = tmp_path / "out" / ".tmp-owner+name.git"
    (half / "objects").mkdir(parents=True)
    (half / "HEAD").write_text("gibberish")

    assert cloned(Pin("owner/name", served.head))["owner/name"].status == "cloned"
    assert not half.exists()


def test_nothing_of_the_repository_or_of_a_template_is_run(
    served: GitRepo, cloned: Clone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "ran"
    hooks = tmp_path / "template" / "hooks"
    hooks.mkdir(parents=True)
    for name in ("reference-transaction", "post-checkout", "post-index-change"):
        (hooks / name).write_text(f"#!/bin/sh\ntouch '{marker}'\n")
        (hooks / name).chmod(0o755)
    served.commit(
        {
            ".gitattributes": "* filter=evil\n",
            ".gitmodules": '[submodule "s"]\n\tpath = s\n\turl = ext::sh -c touch%20ran\n',
        }
    )
    settings = tmp_path / "gitconfig"
    settings.write_text(
        f"[init]\n\ttemplateDir = {tmp_path / 'template'}\n[core]\n\thooksPath = {hooks}\n"
        f"[filter \"evil\"]\n\tsmudge = touch '{marker}'\n[fetch]\n\trecurseSubmodules = true\n"
    )
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(settings))
    pin = Pin("owner/name", served.head)

    assert cloned(pin)["owner/name"].status == "cloned"

    assert not marker.exists()
    assert not (_at(tmp_path / "out", pin).path / "hooks").exists()
    with settings.open("a") as file:
        file.write(f"[url \"ext::sh -c 'touch {marker}' \"]\n\tinsteadOf = file://\n")
    failed = cloned(Pin("owner/other", served.head))["owner/other"]
    assert (failed.status, failed.reason) == ("failed", "transport 'ext' not allowed")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("../name COMMIT", "'../name' is no owner/name"),
        ("owner/.. COMMIT", "'owner/..' is no owner/name"),
        ("owner/a..b COMMIT", "'owner/a..b' is no owner/name"),
        ("-c/name COMMIT", "'-c/name' is no owner/name"),
        ("owner/--upload-pack=x COMMIT", "is no owner/name"),
        ("owner/sub/name COMMIT", "is no owner/name"),
        ("name COMMIT", "'name' is no owner/name"),
        ("owner/n\u0430me COMMIT", "is no owner/name"),
        ("https://host/owner/name COMMIT", "is no owner/name"),
        ("owner/name HEAD", "'HEAD' is no full commit id"),
        ("owner/name --all", "'--all' is no full commit id"),
        ("owner/name", "expected `owner/name COMMIT`, found 'owner/name'"),
        ("owner/name COMMIT more", "expected `owner/name COMMIT`"),
    ],
)
def test_a_line_that_is_no_pin_is_refused(line: str, complaint: str, tmp_path: Path) -> None:
    file = tmp_path / "list.txt"
    file.write_text(f"# one\n\na/b {NOWHERE}  # fine\n{line.replace('COMMIT', NOWHERE)}\n")

    with pytest.raises(UserError) as caught:
        read_pins(file)

    assert caught.value.message.startswith(f"{file}, line 4: ")
    assert complaint in caught.value.message


def test_a_name_that_is_listed_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "list.txt"
    file.write_text(f"a/b {NOWHERE}\nA/B {NOWHERE}\n")

    with pytest.raises(UserError, match="lists a/b more than once"):
        read_pins(file)


@pytest.mark.parametrize("source", ["ext::sh -c true", "http://host", "ssh://host", "/srv", "-x"])
def test_only_https_and_files_are_cloned_from(source: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected https:// or file://"):
        clone([], tmp_path / "out", source=source)

    assert not (tmp_path / "out").exists()


def test_the_bundled_list_is_read() -> None:
    pins = read_pins()

    assert len(pins) > 100
    assert [pin.name for pin in pins] == sorted((pin.name for pin in pins), key=str.lower)
