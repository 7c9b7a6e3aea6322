"""One writer at a time for each repository, in whichever process."""

from __future__ import annotations

from filelock import FileLock

from code2lora.settings import Settings

LOCK_TIMEOUT_S = 600.0


def repository_lock(settings: Settings, repository_id: str) -> FileLock:
    """Return the lock that whoever writes a repository's states or adapters holds."""
    locks = settings.state_dir / "locks"
    locks.mkdir(mode=0o700, exist_ok=True)
    return FileLock(locks / repository_id, timeout=LOCK_TIMEOUT_S)
