"""Code2LoRA: every commit refreshes a LoRA adapter that knows the repository.

The rooms, and which may import which, are drawn in ``docs/architecture.md``.
"""

__version__ = "0.1.0"
