"""The state store: everything the daemon and the command line ask of the database.

    with Store.open("sqlite:////home/me/.local/state/code2lora/state.db") as store:
        store.add_repository(id, path="/src/project", name="project")

Every method is one transaction. Each returns values from `records`, which stay valid after it;
LookupError says that what a writer refers to was deleted meanwhile by another process.
"""

from __future__ import annotations

from code2lora.state_store.adapters import Adapters
from code2lora.state_store.anchors import Anchors
from code2lora.state_store.journal import Journal
from code2lora.state_store.repositories import Repositories
from code2lora.state_store.scores import Scores
from code2lora.state_store.states import States
from code2lora.state_store.thinning import Thinning


class Store(Repositories, Anchors, States, Thinning, Adapters, Scores, Journal):
    """One open state store; each base class holds the methods for one kind of row."""
