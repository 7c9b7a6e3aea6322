"""Repositories and their worktrees."""

from __future__ import annotations

from sqlalchemy import Connection, delete, insert, select, update

from code2lora.state_store.database import Database, columns_of, first, insert_missing
from code2lora.state_store.records import Repository, Worktree
from code2lora.state_store.schema import repositories, worktrees

_REPOSITORY = select(*columns_of(Repository, repositories))
_WORKTREE = select(*columns_of(Worktree, worktrees))


class Repositories(Database):
    """Which repositories are followed, and where each HEAD stands."""

    def add_repository(self, repository_id: str, *, path: str, name: str) -> Repository:
        """Return the repository, registered under this path and name; a removed one comes back."""
        values = {"path": path, "name": name, "removed_at": None}
        row = {"id": repository_id, "created_at": self._now(), **values}
        with self._writing() as db:
            insert_missing(db, repositories, repositories.c.id, [row])
            this = repositories.c.id == repository_id
            db.execute(update(repositories).where(this).values(values))
            return _only_repository(db, repository_id)

    def remove_repository(self, repository_id: str) -> None:
        """Stop following a repository; its states stay, so that it can come back at once."""
        with self._writing() as db:
            this = repositories.c.id == repository_id
            db.execute(update(repositories).where(this).values(removed_at=self._now()))
            db.execute(delete(worktrees).where(worktrees.c.repository_id == repository_id))

    def forget_repository(self, repository_id: str) -> bool:
        """Delete every row of a repository. False when there is none.

        Its adapter directories are the caller's to delete.
        """
        with self._writing() as db:
            this = repositories.c.id == repository_id
            return db.execute(delete(repositories).where(this)).rowcount > 0

    def repositories(self, *, include_removed: bool = False) -> list[Repository]:
        """Return the repositories that are followed, by name."""
        query = _REPOSITORY.order_by(repositories.c.name, repositories.c.id)
        if not include_removed:
            query = query.where(repositories.c.removed_at.is_(None))
        return self._all(Repository, query)

    def repository(self, repository_id: str) -> Repository | None:
        """Return one repository, followed or removed."""
        return self._first(Repository, _REPOSITORY.where(repositories.c.id == repository_id))

    def upsert_worktree(self, repository_id: str, *, git_dir: str, path: str | None) -> Worktree:
        """Return the worktree with this git directory, registered under this path.

        A git directory that another repository had before is a new worktree.
        Raises LookupError when there is no such repository.
        """
        with self._writing() as db:
            lock_repository(db, repository_id)
            this = worktrees.c.git_dir == git_dir
            db.execute(delete(worktrees).where(this, worktrees.c.repository_id != repository_id))
            values = {"path": path, "updated_at": self._now()}
            if db.execute(update(worktrees).where(this).values(values)).rowcount == 0:
                row = {"repository_id": repository_id, "git_dir": git_dir, **values}
                db.execute(insert(worktrees).values(row))
            worktree = first(db, Worktree, _WORKTREE.where(this))
            assert worktree is not None
            return worktree

    def worktrees(self, repository_id: str | None = None) -> list[Worktree]:
        """Return the worktrees of one repository, or of all."""
        query = _WORKTREE.order_by(worktrees.c.id)
        if repository_id is not None:
            query = query.where(worktrees.c.repository_id == repository_id)
        return self._all(Worktree, query)

    def worktree(self, worktree_id: int) -> Worktree | None:
        """Return one worktree."""
        return self._first(Worktree, _WORKTREE.where(worktrees.c.id == worktree_id))

    def find_worktree(self, git_dir: str) -> Worktree | None:
        """Return the worktree with this git directory."""
        return self._first(Worktree, _WORKTREE.where(worktrees.c.git_dir == git_dir))

    def remove_worktree(self, worktree_id: int) -> None:
        """Forget a worktree that git no longer has."""
        with self._writing() as db:
            db.execute(delete(worktrees).where(worktrees.c.id == worktree_id))

    def set_head(self, worktree_id: int, commit: str | None, branch: str | None) -> None:
        """Record where HEAD was seen. Raises LookupError when the worktree is gone."""
        values = {"head_commit": commit, "head_branch": branch, "updated_at": self._now()}
        with self._writing() as db:
            this = worktrees.c.id == worktree_id
            if db.execute(update(worktrees).where(this).values(values)).rowcount == 0:
                raise LookupError(f"worktree {worktree_id} is gone")


def lock_repository(db: Connection, repository_id: str) -> None:
    """Let one writer at a time change what hangs on a repository (SQLite has only one anyway).

    Raises LookupError when there is no such repository.
    """
    lock = select(repositories.c.id).where(repositories.c.id == repository_id).with_for_update()
    if db.execute(lock).first() is None:
        raise LookupError(f"repository {repository_id} is gone")


def _only_repository(db: Connection, repository_id: str) -> Repository:
    repository = first(db, Repository, _REPOSITORY.where(repositories.c.id == repository_id))
    assert repository is not None
    return repository
