"""Copy a published adapter to a place of the user's choosing, in the layout of other programs."""

from __future__ import annotations

import shutil
from pathlib import Path

from code2lora.adapters.files import placed_directory, placed_file
from code2lora.adapters.layout import FILES, read_metadata
from code2lora.errors import UserError

FORMATS = ("peft", "gguf", "mlx")
"""`peft` and `mlx` are directories, `gguf` is a file."""

GGUF_DTYPES = ("f16", "f32", "bf16")
"""What the numbers of a GGUF file may be."""


def export(
    path: Path,
    destination: Path,
    format: str = "peft",
    *,
    base_dir: Path | None = None,
    dtype: str = "f16",
    force: bool = False,
) -> Path:
    """Write an adapter directory's adapter to `destination` and return it.

    base_dir: the base model that the adapter is for; needed for `gguf`
    dtype: of the numbers in a `gguf`; the others keep the adapter's
    force: replace an earlier export of the same format

    It appears whole or not at all. Raises UserError when the format is unknown, the adapter is
    damaged or not one of ours, or the destination exists or cannot be written.
    """
    if format not in FORMATS:
        raise UserError(f"the format is {format!r}, expected one of: {', '.join(FORMATS)}")
    if format == "gguf":
        _export_gguf(path, destination, base_dir, dtype, force)
    elif format == "mlx":
        _export_mlx(path, destination, force)
    else:
        _export_peft(path, destination, force)
    return destination


def _export_peft(path: Path, destination: Path, force: bool) -> None:
    read_metadata(path)
    with placed_directory(destination, force=force, replaceable=FILES) as folder:
        for name in FILES:
            shutil.copyfile(path / name, folder / name)


def _export_mlx(path: Path, destination: Path, force: bool) -> None:
    # here, since numpy takes a tenth of a second to import and most commands need none
    from code2lora.adapters.arrays import read_arrays
    from code2lora.adapters.mlx import MLX_FILES, write_mlx

    adapter = read_arrays(path)
    with placed_directory(destination, force=force, replaceable=MLX_FILES) as folder:
        write_mlx(adapter, folder)


def _export_gguf(
    path: Path, destination: Path, base_dir: Path | None, dtype: str, force: bool
) -> None:
    from code2lora.adapters.arrays import read_arrays
    from code2lora.adapters.gguf_adapter import write_adapter_gguf
    from code2lora.adapters.gguf_format import require_architecture

    if base_dir is None:
        raise AssertionError("a GGUF file is for a base model")
    require_architecture(base_dir)
    adapter = read_arrays(path)
    with placed_file(destination, force=force) as file:
        write_adapter_gguf(adapter, file, dtype=dtype)
