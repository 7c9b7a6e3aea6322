"""A process that writes to a store, for tests: `python -m tests.state_store.writer URL NAME N`.

Follows a repository of its own, puts N states one transaction at a time and says each commit
once its transaction has ended; then publishes an adapter from the last state, and counts in a
shared failure how often it did.
"""

from __future__ import annotations

import sys

from code2lora.state_store import Store
from tests.state_store.samples import (
    CHECKPOINT,
    REPOSITORY,
    commit_id,
    new_adapter,
    new_state,
    register,
)


def write(store: Store, name: str, n: int) -> None:
    """Put n states on the branch `name`, reading back as a second user of the store would."""
    register(store)
    anchor = store.add_anchor(REPOSITORY, CHECKPOINT, commit_id(0, name), "active")
    latest = store.latest_state(anchor.id)
    start = 0 if latest is None else latest.info.step + 1
    for step in range(start, start + n):
        info = store.put_state(anchor.id, new_state(step, name, size=4096))
        assert store.find_state(REPOSITORY, CHECKPOINT, info.commit) is not None
        store.record_failure(REPOSITORY, "count", "every process adds one for each of its states")
        if step % 10 == 9:
            store.add_adapter(new_adapter(info.id, f"/adapters/{name}/{step}"))
        print(info.commit, flush=True)


if __name__ == "__main__":
    with Store.open(sys.argv[1]) as opened:
        write(opened, sys.argv[2], int(sys.argv[3]))
