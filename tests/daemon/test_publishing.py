"""The daemon pushes what is live, once, without anybody waiting, and remembers how it went."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from code2lora.adapters.layout import AdapterMetadata
from code2lora.adapters.publish import publish
from code2lora.adapters.publishers.target import Target
from code2lora.daemon.publishing import (
    Publishing,
    confirm_publisher,
    confirmed_publishers,
    forget_publisher,
    last_pushes,
    push_worktree,
    stage_of,
)
from code2lora.history import open_history
from code2lora.history.gitconfig import add_publisher, publishers, remove_publisher
from code2lora.settings import Settings
from code2lora.state_store import Store
from code2lora.state_store.records import Adapter, NewAdapter, NewState, Worktree
from tests.adapters.publishers.servers import VllmStub, serving
from tests.cli.conftest import CHECKPOINT, Known
from tests.gitrepo import GitRepo
from tests.hypernetwork import tiny


@dataclass
class Scene:
    """A registered repository whose adapters are real directories."""

    settings: Settings
    store: Store
    repo: GitRepo
    worktree: Worktree

    def publish(self, text: str) -> Adapter:
        """Commit and publish an adapter for it."""
        commit = self.repo.commit({"a.py": text}, text)
        anchor = self.store.add_anchor(self.worktree.repository_id, CHECKPOINT, commit, "active")
        self.store.put_state(
            anchor.id,
            NewState(
                commit=commit,
                parent=None,
                step=0,
                state=hashlib.sha256(commit.encode()).digest(),
                committed_at=self.worktree.updated_at,
                summary=text,
            ),
        )
        state = self.store.find_state(self.worktree.repository_id, CHECKPOINT, commit)
        assert state is not None
        lora = tiny.random_lora(seed=int(commit[:6], 16), rank=8)
        metadata = AdapterMetadata(
            repository=self.worktree.repository_id,
            commit=commit,
            state_sha256="5" * 64,
            checkpoint=CHECKPOINT,
            base_model="tiny",
        )
        written = publish(lora, metadata, self.settings.adapters_dir, n_layers=2)
        return self.store.publish(
            self.worktree.id,
            NewAdapter(
                state_id=state.info.id,
                path=str(written.path),
                sha256=written.sha256,
                n_bytes=written.n_bytes,
                generate_ms=1.0,
                write_ms=1.0,
            ),
        )

    def add(self, target: Target, *, confirm: bool = True) -> str:
        history = open_history(self.repo.path)
        add_publisher(history, target.text)
        history.close()
        if confirm:
            confirm_publisher(self.settings, self.worktree.repository_id, target.text)
        return target.text

    def failures(self) -> list[str]:
        return [failure.message for failure in self.store.failures(self.worktree.repository_id)]


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    settings = Settings(
        config_dir=tmp_path / "config", state_dir=tmp_path / "state", data_dir=tmp_path / "data"
    )
    settings.prepare()
    repo = GitRepo(tmp_path / "repo")
    repo.commit({"a.py": "x = 1\n"})
    store = Store.open(settings.resolved_database_url)
    known = Known(settings, store, repo)
    return Scene(settings, store, repo, known.worktree)


@pytest.fixture(autouse=True)
def closed(scene: Scene) -> Iterator[None]:
    yield
    scene.store.close()


def eventually(test: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not test():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def test_every_new_generation_is_pushed_once(scene: Scene) -> None:
    stub = VllmStub()
    with serving(stub):
        line = scene.add(Target(kind="vllm", destination=stub.url, name="app"))
        publishing = Publishing(scene.settings, scene.store, {})
        publishing.offer(scene.worktree.id)  # nothing is live yet
        paths = []
        for text in ("y = 1\n", "y = 2\n"):
            live = scene.publish(text)
            for _ in range(3):
                publishing.offer(scene.worktree.id)
            eventually(lambda live=live: stub.adapters.get("app") == live.path)
            paths.append(live.path)
        eventually(lambda: _generation(scene, line) == live.generation)
        assert [request[2]["lora_path"] for request in stub.requests] == paths
        publishing.close()

        # another daemon knows what was pushed
        publishing = Publishing(scene.settings, scene.store, {})
        publishing.offer(scene.worktree.id)
        following = scene.publish("y = 3\n")
        publishing.offer(scene.worktree.id)
        eventually(lambda: _generation(scene, line) == following.generation)
        assert len(stub.requests) == 3
        publishing.close()


def _generation(scene: Scene, line: str) -> object:
    return last_pushes(scene.store, scene.worktree).get(line, {}).get("generation")


def test_offering_never_waits(scene: Scene) -> None:
    """Not even for a server that does not answer."""
    release = threading.Event()

    class Slow(VllmStub):
        def respond(self, *arguments: object) -> tuple[int, object]:
            release.wait(20)
            return super().respond(*arguments)  # type: ignore[arg-type]

    stub = Slow()
    with serving(stub):
        scene.add(Target(kind="vllm", destination=stub.url, name="app"))
        publishing = Publishing(scene.settings, scene.store, {})
        scene.publish("y = 1\n")
        began_s = time.monotonic()
        publishing.offer(scene.worktree.id)
        live = scene.publish("y = 2\n")
        publishing.offer(scene.worktree.id)
        assert time.monotonic() - began_s < 10 and not stub.adapters
        release.set()
        eventually(lambda: stub.adapters.get("app") == live.path)
        publishing.close()
        eventually(lambda: not publishing._thread.is_alive())  # type: ignore[union-attr]


def test_a_failure_is_recorded_until_a_push_succeeds(scene: Scene) -> None:
    stub = VllmStub()
    folder = scene.settings.data_dir / "copies"
    with serving(stub):
        line = scene.add(Target(kind="vllm", destination=stub.url, name="app"))
        scene.add(Target(kind="directory", destination=str(folder), name="app"))
        scene.publish("y = 1\n")
        stub.allows_updates = False
        vllm, copies = push_worktree(scene.settings, scene.store, scene.worktree, {})
        assert copies.error is None  # one that fails keeps no other from being pushed
        [vllm] = push_worktree(scene.settings, scene.store, scene.worktree, {})
        assert vllm.error is not None and "404" in vllm.error
        [failure] = scene.store.failures(scene.worktree.repository_id)
        assert failure.n_times == 2 and failure.message == vllm.error
        assert failure.hint is not None and failure.stage == stage_of(line)
        # what a refresh resolves is its own
        scene.store.resolve_failures(scene.worktree.repository_id, worktree_id=scene.worktree.id)
        assert len(scene.failures()) == 1
        stub.allows_updates = True
        [done] = push_worktree(scene.settings, scene.store, scene.worktree, {})
        assert done.error is None and scene.failures() == []
        assert push_worktree(scene.settings, scene.store, scene.worktree, {}) == []
        assert len(push_worktree(scene.settings, scene.store, scene.worktree, {}, again=True)) == 2


def test_what_may_pass_is_tried_again_by_itself(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("code2lora.daemon.publishing.FIRST_RETRY_S", 0.02)
    monkeypatch.setattr("code2lora.daemon.publishing.LONGEST_RETRY_S", 0.05)
    stub = VllmStub()
    with serving(stub):
        scene.add(Target(kind="vllm", destination=stub.url, name="app"))
        publishing = Publishing(scene.settings, scene.store, {})
        stub.answers = [(500, {"error": "busy"})] * 4
        live = scene.publish("y = 1\n")
        publishing.offer(scene.worktree.id)
        eventually(lambda: stub.adapters.get("app") == live.path)
        eventually(lambda: scene.failures() == [])

        # what nobody has mended is not asked for over and over
        stub.allows_updates = False
        scene.publish("y = 2\n")
        publishing.offer(scene.worktree.id)
        eventually(lambda: scene.failures() != [])
        time.sleep(0.3)
        [failure] = scene.store.failures(scene.worktree.repository_id)
        assert failure.n_times == 1
        publishing.close()


def test_what_came_with_the_repository_is_not_obeyed(scene: Scene, tmp_path: Path) -> None:
    secret = tmp_path / "id_ed25519"
    secret.write_text("the key")
    secret.chmod(0o600)
    stub = VllmStub()
    with serving(stub):
        target = Target(kind="vllm", destination=stub.url, name="app", key_file=str(secret))
        line = scene.add(target, confirm=False)
        scene.publish("y = 1\n")
        [done] = push_worktree(scene.settings, scene.store, scene.worktree, {})
        assert done.error is not None and "was not added here" in done.error
        assert stub.requests == [] and scene.failures() == [done.error]
        confirm_publisher(scene.settings, scene.worktree.repository_id, line)
        [done] = push_worktree(scene.settings, scene.store, scene.worktree, {})
        assert done.error is None and scene.failures() == []
    forget_publisher(scene.settings, scene.worktree.repository_id, line)
    assert confirmed_publishers(scene.settings, scene.worktree.repository_id) == frozenset()


def test_a_line_that_nobody_can_read(scene: Scene) -> None:
    history = open_history(scene.repo.path)
    add_publisher(history, "scp somewhere name=a")
    history.close()
    confirm_publisher(scene.settings, scene.worktree.repository_id, "scp somewhere name=a")
    scene.publish("y = 1\n")
    [done] = push_worktree(scene.settings, scene.store, scene.worktree, {})
    assert (done.label, done.name) == ("scp somewhere name=a", None)
    assert done.error is not None and "the kind is 'scp'" in done.error


def test_a_linked_worktree_has_a_name_of_its_own(scene: Scene, tmp_path: Path) -> None:
    folder = tmp_path / "copies"
    scene.add(Target(kind="directory", destination=str(folder), name="app"))
    live = scene.publish("y = 1\n")
    scene.repo.git("worktree", "add", "-q", "-b", "side", str(tmp_path / "side tree"))
    git_dir = scene.repo.path / ".git" / "worktrees" / "side tree"
    if not git_dir.is_dir():
        [git_dir] = (scene.repo.path / ".git" / "worktrees").iterdir()
    side = scene.store.upsert_worktree(
        scene.worktree.repository_id, git_dir=str(git_dir), path=str(tmp_path / "side tree")
    )
    scene.store.set_live(side.id, live.id)
    for worktree in (scene.worktree, side):
        [done] = push_worktree(scene.settings, scene.store, worktree, {})
        assert done.error is None
    names = sorted(path.name for path in folder.iterdir())
    assert names[0].startswith("app-0000") and names[1].startswith("app.side-tree-0000")


def test_values_in_git_configuration(repo: GitRepo) -> None:
    history = open_history(repo.path)
    odd = "directory '/srv/a [b] *.c?' name=a"
    for line in ("vllm http://127.0.0.1 name=a", odd, "vllm http://127.0.0.1 name=ab"):
        add_publisher(history, line)
        add_publisher(history, line)
    assert publishers(history)[1] == odd and len(publishers(history)) == 3
    remove_publisher(history, odd)
    remove_publisher(history, "vllm http://127.0.0.1 name=a")
    remove_publisher(history, "vllm http://127.0.0.1 name=a")
    assert publishers(history) == ("vllm http://127.0.0.1 name=ab",)
    history.close()


def test_neither_torch_nor_numpy_until_they_are_needed() -> None:
    """The supervisor imports this module."""
    code = (
        "import sys, json, code2lora.daemon.publishing;"
        "print(json.dumps([name in sys.modules for name in ('torch', 'numpy', 'gguf')]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env=environment, check=True
    )
    assert json.loads(done.stdout) == [False, False, False]
