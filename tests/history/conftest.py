"""Every case that reads a repository runs on both backends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from code2lora.history.open import Backend, open_history
from code2lora.history.reader import GitHistory

Open = Callable[[Path], GitHistory]


@pytest.fixture(params=["pygit2", "git"])
def backend(request: pytest.FixtureRequest) -> Backend:
    chosen: Backend = request.param
    return chosen


@pytest.fixture
def opened(backend: Backend) -> Iterator[Open]:
    """Open histories with the backend of this case and close them after it."""
    yield from _opener(backend)


@pytest.fixture
def opened_any() -> Iterator[Open]:
    """Open histories with the backend that the program would choose."""
    yield from _opener(None)


def _opener(backend: Backend | None) -> Iterator[Open]:
    made: list[GitHistory] = []

    def open_one(path: Path) -> GitHistory:
        made.append(open_history(path, backend=backend))
        return made[-1]

    yield open_one
    for history in made:
        history.close()
