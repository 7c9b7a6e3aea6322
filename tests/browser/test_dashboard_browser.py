"""The dashboard in a real Chromium, served by a real daemon with the bundled model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.browser.chromium import Chromium, find
from tests.daemon.conftest import Installation, fill, home, installation  # noqa: F401
from tests.gitrepo import GitRepo

PROGRAM = find()
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(PROGRAM is None, reason="needs Chromium"),
]

HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"


@pytest.fixture
def browser() -> Iterator[Chromium]:
    assert PROGRAM is not None
    with Chromium(PROGRAM) as opened:
        yield opened


def address(installation: Installation, path: Path) -> str:  # noqa: F811
    """Return what `code2lora dashboard` prints."""
    command = [sys.executable, "-m", "code2lora.cli", "dashboard", str(path), "--no-open", "--json"]
    done = subprocess.run(
        command, env=installation.environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    url = json.loads(done.stdout)["url"]
    assert isinstance(url, str)
    return url


def test_the_page_shows_what_happens(
    installation: Installation,  # noqa: F811
    repo: GitRepo,
    browser: Chromium,
) -> None:
    fill(repo, 3)
    head = repo.commit({"h.py": "h = 1\n"}, HOSTILE)
    worktree = installation.register(repo)
    installation.start()
    installation.wait_live(worktree, head)
    url = address(installation, repo.path)
    browser.open(url)

    rows = "[...document.querySelectorAll('#rows tr')]"
    browser.wait(f"{rows}.length === 4")
    assert browser.run(f"{rows}[0].dataset.commit") == head
    assert HOSTILE in browser.run(f"{rows}[0].innerText")
    assert browser.run("document.querySelectorAll('#rows img, #rows script').length") == 0
    assert browser.run("document.title") == "repo · code2lora"
    assert browser.run("location.pathname + location.search") == f"/dashboard?place={worktree.id}"
    assert browser.run("document.cookie") == ""
    browser.wait("document.querySelectorAll('#drift circle').length > 0")
    browser.wait("document.querySelectorAll('#gain circle').length > 0", timeout_s=90)
    assert "over base" in browser.run("document.querySelector('#gain .readout').innerText")
    browser.wait("/over generic/.test(document.getElementById('facts').innerText)")
    assert "own adapter" in browser.run("document.getElementById('facts').innerText")

    browser.run("document.querySelector('#drift .plot').focus()")
    browser.press("ArrowLeft")
    assert browser.wait("document.querySelector('tr.at')?.dataset.commit") == head

    browser.run(
        "document.getElementById('prefix').value = 'def function_1(';"
        "document.getElementById('max-tokens').value = 8;"
        "document.getElementById('ask').requestSubmit()"
    )
    told = "[...document.querySelectorAll('.told')].map((each) => each.textContent)"
    browser.wait(f"{told}.every((each) => / token/.test(each))")
    base, own = browser.run(told)
    assert base.startswith("no adapter · ")
    assert own.startswith("generation ")
    for answer in ("base", "own"):
        text = browser.run(f"document.querySelector('#{answer} pre').textContent")
        assert len(text) > len("def function_1(")

    new = repo.commit({"n.py": "n = 2\n"}, "made while somebody looks")
    browser.wait(f"{rows}[0].dataset.commit === '{new}'")
    browser.wait(f"{rows}[0].classList.contains('live')")
    assert browser.complaints() == []

    for width in (400, 1280):
        browser.resize(width, 900)
        assert browser.run("document.documentElement.scrollWidth") <= width

    with httpx.Client() as stranger:
        used = stranger.get(url)
        assert used.status_code == 401 and "set-cookie" not in used.headers


def reload(browser: Chromium) -> None:
    """Load the page anew and wait for its first data."""
    browser.run("window.isOld = true")
    browser.call("Page.reload")
    browser.wait("!window.isOld && / · /.test(document.title)")


def test_the_page_keeps_its_repository(
    installation: Installation,  # noqa: F811
    tmp_path: Path,
    browser: Chromium,
) -> None:
    """Over a reload, whichever section a link has led to, and with what the back button gives."""
    places = {}
    for name in ("first", "second"):
        repo = GitRepo(tmp_path / name)
        fill(repo, 1)
        places[name] = installation.register(repo)
    installation.start()
    chosen = "document.getElementById('place').value"
    titled = "document.title === '%s · code2lora'"

    browser.open(address(installation, tmp_path / "second"))
    browser.wait(titled % "second")
    browser.run("document.querySelector('nav a[href=\"#playground\"]').click()")
    assert browser.run("location.hash") == "#playground"
    reload(browser)
    assert browser.run(chosen) == str(places["second"].id)
    assert browser.run("location.hash") == "#playground"

    browser.run(
        f"document.getElementById('place').value = '{places['first'].id}';"
        "document.getElementById('place').dispatchEvent(new Event('change'))"
    )
    browser.wait(titled % "first")
    browser.run("document.querySelector('nav a[href=\"#model\"]').click()")
    browser.run("history.back()")
    browser.wait("location.hash === ''")
    reload(browser)
    assert browser.run(chosen) == str(places["first"].id)
    browser.run("history.back()")
    browser.wait(titled % "second")
    assert browser.run(chosen) == str(places["second"].id)
    assert browser.complaints() == []
