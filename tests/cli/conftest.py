"""Fixtures: directories of a test's own, the command in this process, a store with a history."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner
from sqlalchemy import update

from code2lora.cli.app import cli
from code2lora.daemon.registration import register
from code2lora.history import open_history
from code2lora.settings import Settings, load_settings
from code2lora.state_store import Store
from code2lora.state_store.records import (
    Adapter,
    Anchor,
    NewAdapter,
    NewScore,
    NewState,
    Use,
    Worktree,
)
from code2lora.state_store.schema import states
from tests.gitrepo import GitRepo

CHECKPOINT = "c" * 64
N_BYTES = 1_234_567
"""Of the weights of a published adapter."""
AGE = timedelta(minutes=3)


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    status: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    """The settings of a fresh installation; its paths are short enough for a Unix socket."""
    root = Path(tempfile.mkdtemp(prefix="c2l-", dir="/tmp"))
    for name in ("config", "state", "data", "runtime"):
        monkeypatch.setenv(f"CODE2LORA_{name.upper()}_DIR", str(root / name))
    yield load_settings()
    shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def code2lora(home: Settings) -> Run:
    """Run the command in this process, as if from a shell without a terminal."""

    def run(*arguments: object, text: str | None = None) -> Outcome:
        done = CliRunner().invoke(cli, [str(argument) for argument in arguments], input=text)
        return Outcome(done.exit_code, done.stdout, done.stderr)

    return run


class Known:
    """A registered repository whose commits have states, as a daemon would have left them."""

    def __init__(self, settings: Settings, store: Store, repo: GitRepo) -> None:
        self.settings = settings
        self.store = store
        self.repo = repo
        # Hooks find this process alive, so no commit starts a daemon.
        settings.pid_file.parent.mkdir(parents=True, exist_ok=True)
        settings.pid_file.write_text(f"{os.getpid()}\n")
        self.worktree: Worktree = register(settings, store, repo.path).worktree
        self.repository_id = self.worktree.repository_id
        store.register_checkpoint(
            CHECKPOINT,
            encoder_fingerprint="e" * 64,
            name="tiny",
            base_model="tiny-base",
            config={},
        )

    def absorb(
        self,
        commits: Sequence[str],
        *,
        between: Collection[int] = (),
        provisional: Collection[int] = (),
    ) -> Anchor:
        """Store a state of each commit, oldest first; the first is the anchor.

        between: numbers of the commits that are no steps and have no state
        provisional: numbers of those that are no steps and have one all the same
        """
        anchor = self.store.add_anchor(self.repository_id, CHECKPOINT, commits[0], "active")
        history = open_history(self.repo.path)
        parent = None
        for step, commit in enumerate(commits):
            if step in between:
                continue
            known = history.commit(commit)
            self.store.put_state(
                anchor.id,
                NewState(
                    commit=commit,
                    parent=parent,
                    step=step,
                    provisional=step in provisional,
                    state=hashlib.sha256(commit.encode()).digest() * 64,
                    committed_at=datetime.fromtimestamp(known.committed_at_s, UTC),
                    summary=known.summary,
                    diff_key=hashlib.sha256(commit.encode()).hexdigest() if step else None,
                    n_tokens=1000 * step,
                    n_changed_files=step,
                    embed_ms=2.0 * step,
                    advance_ms=1.0,
                    drift=0.125 * step if step else None,
                ),
            )
            parent = parent if step in provisional else commit
        history.close()
        return anchor

    def thin(self, *, step: int) -> None:
        """Let the bytes of one state go."""
        with self.store._writing() as db:
            db.execute(update(states).where(states.c.step == step).values(state=None))

    def score(
        self, commits: Sequence[str], *, use: Use = "own", base: float = 0.25, generic: float = 0.0
    ) -> None:
        """Score commits, with what the own adapter saves, in nats for each of 100 tokens.

        use: what the gate serves from then on
        """
        for commit in commits:
            self.store.add_score(
                NewScore(
                    repository_id=self.repository_id,
                    checkpoint=CHECKPOINT,
                    commit=commit,
                    told=commits[0],
                    state_sha256="5" * 64,
                    rows_sha256=hashlib.sha256(commit.encode()).hexdigest(),
                    n_rows=3,
                    n_tokens=100,
                    base_nats=300.0 + 100 * base,
                    generic_nats=300.0 + 100 * generic,
                    own_nats=300.0,
                    use=use,
                    took_ms=20.0,
                )
            )

    def publish(self, commit: str, *, use: Use = "own") -> Adapter:
        """Make an adapter directory for an absorbed commit, and make it live."""
        state = self.store.find_state(self.repository_id, CHECKPOINT, commit)
        assert state is not None
        weights = f"{commit}{use}".encode().ljust(N_BYTES, b"\0")
        digest = hashlib.sha256(weights).hexdigest()
        path = self.settings.adapters_dir / self.repository_id / f"{commit[:12]}-{digest[:12]}"
        path.mkdir(parents=True)
        (path / "adapter_model.safetensors").write_bytes(weights)
        return self.store.publish(
            self.worktree.id,
            NewAdapter(
                state_id=state.info.id,
                path=str(path),
                sha256=digest,
                n_bytes=N_BYTES,
                generate_ms=3.0,
                write_ms=4.0,
                use=use,
            ),
        )


@pytest.fixture
def store(home: Settings) -> Iterator[Store]:
    """The installation's store; what is written through it happened three minutes ago."""
    home.prepare()
    with Store.open(home.resolved_database_url, clock=lambda: datetime.now(UTC) - AGE) as opened:
        yield opened


@pytest.fixture
def known(home: Settings, store: Store, repo: GitRepo) -> Known:
    """A registered repository with four commits: three absorbed, the third one published."""
    commits = [repo.commit({"a.py": f"x = {n}\n"}, f"change {n}") for n in range(3)]
    made = Known(home, store, repo)
    made.absorb(commits)
    made.publish(commits[-1])
    repo.commit({"b.py": "y = 1\n"}, "not absorbed")
    return made


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, repo: GitRepo) -> Path:
    """The repository's root, which is the current directory."""
    monkeypatch.chdir(repo.path)
    return repo.path
