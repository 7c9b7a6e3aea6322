"""What is kept of a base model's gradients, and how much is read to choose it. No torch here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class KeysConfig:
    """Which gradients are kept, and how much is read to choose the keys."""

    first_layer_share: float = 0.3
    """Share of the layers, from the lowest, whose gradients are left out."""
    targets: tuple[str, ...] = ("o_proj", "down_proj")
    """Module types; those that write into the residual stream."""
    n_keys: int = 16
    """R, the rank of the adapters too."""
    files: int = 32
    """Files of each repository that are read for the keys, at most."""
    excerpt_tokens: int = 256
    file_excerpts: int = 2
    snapshot_files: int = 64
    diff_files: int = 4
    diff_excerpts: int = 1
    """These five are what the encoder reads later; see `GradientsConfig`."""
