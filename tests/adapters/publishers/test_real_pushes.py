"""From `git commit` to another server: hooks, supervisor, worker and publisher as they really run.

The server is a stand-in for vLLM's documented contract: it is asked over a real socket, checks the
request and the directory, and loads nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from code2lora.daemon.publishing import last_pushes
from code2lora.state_store.records import Adapter, Worktree
from tests.adapters.publishers.servers import VllmStub, serving
from tests.daemon.conftest import (  # noqa: F401
    Installation,
    fill,
    home,
    installation,
)
from tests.gitrepo import GitRepo

COMMAND = (sys.executable, "-m", "code2lora.cli")


class Scene:
    """A repository that was taken in and whose hooks wake a real daemon."""

    worktree: Worktree

    def __init__(self, installation: Installation, repo: GitRepo) -> None:  # noqa: F811
        self.installation = installation
        self.repo = repo
        ours = {k: v for k, v in installation.environment.items() if k.startswith("CODE2LORA_")}
        self.environment = {
            **repo.environment,
            **ours,
            "PYTHONPATH": str(Path(__file__).parents[3]),
        }

    def run(self, *arguments: str) -> str:
        done = subprocess.run(
            [*COMMAND, *arguments],
            env=self.environment,
            cwd=self.repo.path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr + self.installation.logs()
        return done.stdout

    def commit(self, name: str) -> str:
        """Commit with git itself, which runs our hook."""
        (self.repo.path / f"{name}.py").write_text(f"def {name}():\n    return '{name}'\n")
        for command in (["git", "add", "."], ["git", "commit", "-q", "-m", f"add {name}"]):
            subprocess.run(command, cwd=self.repo.path, env=self.environment, check=True)
        return self.repo.head

    def live(self, commit: str) -> Adapter:
        return self.installation.wait_live(self.worktree, commit)

    def wait_pushed(self, line: str, adapter: Adapter) -> None:
        """Wait until the daemon has noted the push of an adapter."""
        store = self.installation.store

        def is_pushed() -> bool:
            last = last_pushes(store, self.worktree).get(line, {})
            return last.get("adapter") == adapter.id

        self.installation.wait(is_pushed, f"generation {adapter.generation} is not pushed")


@pytest.fixture
def scene(installation: Installation, repo: GitRepo) -> Scene:  # noqa: F811
    fill(repo, 2)
    made = Scene(installation, repo)
    made.run("init", str(repo.path))
    [made.worktree] = installation.store.worktrees()
    return made


def paths(stub: VllmStub) -> list[Path]:
    return [Path(content["lora_path"]) for _, _, content in stub.requests]


def test_every_commit_arrives_in_order_under_a_path_of_its_own(scene: Scene) -> None:
    stub = VllmStub(max_rank=32)  # `vllm serve --max-lora-rank 32`
    with serving(stub):
        line = scene.run("publish", "add", "vllm", stub.url, "--name", "app").strip()
        scene.live(scene.repo.head)
        adapters, contents = [], {}
        for name in ("one", "two", "three"):
            adapter = scene.live(scene.commit(name))
            scene.wait_pushed(line, adapter)
            adapters.append(adapter)
            assert stub.adapters["app"] == adapter.path
            contents[adapter.path] = read_all(Path(adapter.path))
    given = [str(path) for path in paths(stub)]
    assert [path for path in given if path in contents] == [a.path for a in adapters]
    assert given[-1] == adapters[-1].path and len(set(given)) == len(given)
    assert [a.generation for a in adapters] == sorted({a.generation for a in adapters})
    assert all(content["load_inplace"] is True for _, _, content in stub.requests)
    for adapter in adapters:  # what was handed over has not changed since
        assert read_all(Path(adapter.path)) == contents[adapter.path]
        assert Path(adapter.path).name.startswith(adapter.commit[:12])


def read_all(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_server_that_was_down_gets_the_newest_generation_when_it_is_back(scene: Scene) -> None:
    stub = VllmStub(max_rank=32)  # `vllm serve --max-lora-rank 32`
    with serving(stub):
        line = scene.run("publish", "add", "vllm", stub.url, "--name", "app").strip()
        scene.wait_pushed(line, scene.live(scene.commit("before")))
        before = len(stub.requests)
    port = int(stub.url.rpartition(":")[2])

    missed = [scene.live(scene.commit(name)) for name in ("missed", "newest")]  # nothing blocks
    store, repository = scene.installation.store, scene.worktree.repository_id
    [failure] = scene.installation.wait(lambda: store.failures(repository), "no failure is told")
    assert "does not answer" in failure.message
    assert "does not answer" in scene.run("status", "--json")

    with serving(stub, port=port):  # nobody commits, nobody asks for it
        scene.wait_pushed(line, missed[-1])
        assert [str(path) for path in paths(stub)[before:]] == [missed[-1].path]
        assert stub.adapters["app"] == missed[-1].path
        assert not store.failures(repository)
        following = scene.live(scene.commit("following"))
        scene.wait_pushed(line, following)
    assert stub.adapters["app"] == following.path
    assert os.path.isdir(following.path)
