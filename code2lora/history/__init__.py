"""Read git: first-parent walks, diffs, snapshots, and which files count.

Reads the object database and the references, never the index or the working tree, and runs
nothing that a repository configures (no textconv, external diff or filters). It knows nothing of
models or of the database; it never writes to a repository except its own `code2lora.*` git
configuration.
"""

from code2lora.history.open import open_history

__all__ = ["open_history"]
