"""Turn a catalogue entry into a model directory: fetch, convert, check, and only then show it.

Reads   the hub (`hub.py`).
Writes  <models>/.pull-<name>/ while it goes on, then <models>/<name>/ in one rename:
        base/, encoder/, hypernetwork/, MODEL_CARD.md and sources.json, which says where every
        file came from.

A run that was cut off goes on where it was. torch is imported when everything has arrived.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from code2lora.errors import UserError
from code2lora.hypernetwork.catalogue import Pullable
from code2lora.hypernetwork.hub import Hub, Listing
from code2lora.hypernetwork.models import ModelPaths, resolve_model

SOURCES_FILE = "sources.json"

_MARGIN_BYTES = 256_000_000
"""Left free on the disk."""

Progress = Callable[[float, str], None]
"""Called with the share that is done, 0 to 1, and what is being done."""


@dataclass(frozen=True)
class Pulled:
    """What became of a pull."""

    name: str
    path: Path
    status: Literal["pulled", "kept"]
    """`kept`: just this model was there already."""
    n_bytes: int
    """Of the model directory."""


def free_bytes(path: Path) -> int:
    """Return how much room there is for an ordinary user."""
    return shutil.disk_usage(path).free


def pull(
    entry: Pullable,
    models_dir: Path,
    *,
    hub: Hub | None = None,
    free: Callable[[Path], int] = free_bytes,
    progress: Progress | None = None,
) -> Pulled:
    """Fetch a model, unless it is there, and return where it lies.

    free: tells how much room there is on a folder's disk
    Raises UserError when the hub fails or sends what was not expected, when there is no room, when
    another directory has the name, or when the parts do not fit together.
    """
    tell = progress or (lambda _share, _said: None)
    final = models_dir / entry.name
    try:
        models_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        with FileLock(models_dir / f".pull-{entry.name}.lock", timeout=0):
            if _is_there(entry, final):
                return Pulled(entry.name, final, "kept", _size(final))
            staging = _staging(models_dir, entry.name)
            _fetch_all(entry, hub or Hub(), staging, free, tell)
            tell(0.97, "converting and checking")
            _assemble(entry, staging)
            _show(staging / "model", final)
            shutil.rmtree(staging)
    except Timeout as error:
        raise UserError(
            f"{entry.name} is being pulled by another process", hint="wait for it"
        ) from error
    except OSError as error:
        raise UserError(
            f"cannot write to {models_dir}: {error.strerror or error}",
            hint="make room or give yourself access; the same command goes on",
        ) from error
    tell(1.0, "done")
    return Pulled(entry.name, final, "pulled", _size(final))


def read_sources(model: Path) -> dict[str, Any]:
    """Return what a model directory says of where its parts came from; empty for one of our own."""
    try:
        values = json.loads((model / SOURCES_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(
            f"{model / SOURCES_FILE} cannot be read: {error}",
            hint=f"`code2lora models remove {model.name}`, then pull it again",
        ) from error
    return values if isinstance(values, dict) else {}


def find_pulled(name: str, models_dir: Path) -> list[Path]:
    """Return the folders of a model below `models_dir`: itself, and what a cut-off pull left.

    Raises UserError when there is none; a bundled model is part of the package and is none.
    """
    hint = "`code2lora models` lists them; only what lies in the models' folder can be removed"
    if not name or name.startswith(".") or Path(name).name != name:
        raise UserError(f"{name!r} is not the name of a pulled model", hint=hint)
    places = (models_dir / name, models_dir / f".pull-{name}")
    found = [path for path in places if path.is_dir() and not path.is_symlink()]
    if not found:
        raise UserError(f"there is no model {name!r} in {models_dir}", hint=hint)
    return found


def remove(folders: Sequence[Path]) -> None:
    """Delete what `find_pulled` found. Raises UserError when that is not allowed."""
    for folder in folders:
        gone = folder.with_name(f".removed-{folder.name}")
        try:
            # at once out of sight, so that nobody meets half a model
            os.replace(folder, gone)
            shutil.rmtree(gone)
        except OSError as error:
            raise UserError(f"cannot delete {folder}: {error.strerror or error}") from error


def _is_there(entry: Pullable, final: Path) -> bool:
    """Tell whether a name is taken by just this model.

    Raises UserError when it is taken by one that was not pulled.
    """
    if not final.exists() and not final.is_symlink():
        return False
    sources = read_sources(final) if final.is_dir() else {}
    if not sources:
        raise UserError(
            f"{final} is in the way: it was not pulled",
            hint=f"rename it, or `code2lora models remove {final.name}`",
        )
    try:
        resolve_model(str(final), final.parent)
    except UserError:
        return False
    return all(
        isinstance(sources.get(part), Mapping) and sources[part].get("revision") == source.revision
        for part, source in entry.parts.items()
    )


def _staging(models_dir: Path, name: str) -> Path:
    """Return the folder in which the model is put together, private to the user."""
    staging = models_dir / f".pull-{name}"
    if staging.is_symlink():
        raise UserError(f"{staging} is a symbolic link", hint="remove it, then pull again")
    staging.mkdir(mode=0o700, exist_ok=True)
    return staging


def _fetch_all(
    entry: Pullable, hub: Hub, staging: Path, free: Callable[[Path], int], tell: Progress
) -> None:
    """Bring all files below the staging folder and write `sources.json` there."""
    tell(0.0, f"asking {hub.endpoint}")
    listings = {part: hub.list(source) for part, source in entry.parts.items()}
    total = sum(listing.n_bytes for listing in listings.values())
    # The released checkpoint lies there twice for a while: as it came, and converted.
    needed = total + listings["hypernetwork"].n_bytes + _MARGIN_BYTES - _size(staging)
    available = free(staging)
    if available < needed:
        raise UserError(
            f"{entry.name} needs {needed / 1e9:.1f} GB more, "
            f"but {available / 1e9:.1f} GB are free on the disk of {staging.parent}",
            hint="make room, or set CODE2LORA_DATA_DIR to a place on another disk",
        )
    done = 0
    sources: dict[str, Any] = {}
    for part, listing in listings.items():
        digests = {}
        for file in listing.files:
            said = f"{listing.source.repository}: {file.path}"

            def arrived(n_bytes: int, said: str = said) -> None:
                nonlocal done
                done += n_bytes
                tell(0.95 * done / max(total, 1), said)

            digests[file.path] = hub.fetch(
                listing.source, file, _folder(staging, part), staging / "partial", arrived
            )
        _expect_only(_folder(staging, part), digests)
        sources[part] = _origin(listing, digests)
    _write_json(staging / SOURCES_FILE, sources)


def _folder(staging: Path, part: str) -> Path:
    return staging / "released" if part == "hypernetwork" else staging / "model" / part


def _expect_only(folder: Path, files: Mapping[str, str]) -> None:
    """Remove what an earlier run left there and this one did not fetch."""
    for path in sorted(folder.rglob("*")):
        if not path.is_dir() and path.relative_to(folder).as_posix() not in files:
            path.unlink()


def _origin(listing: Listing, digests: Mapping[str, str]) -> dict[str, Any]:
    source = listing.source
    return {
        "repository": source.repository,
        "revision": source.revision,
        "licence": listing.licence or source.licence,
        "sha256": dict(sorted(digests.items())),
    }


def _assemble(entry: Pullable, staging: Path) -> None:
    """Convert the released checkpoint, load the model once, and write what describes it."""
    from code2lora.hypernetwork.checkpoint import load_family
    from code2lora.hypernetwork.config import BaseConfig, EncoderConfig, decoder_dims
    from code2lora.hypernetwork.identity import base_fingerprint, encoder_fingerprint
    from code2lora.hypernetwork.released import convert_released

    model = staging / "model"
    n_layers, dims = decoder_dims(_read_json(model / "base" / "config.json"))
    base = BaseConfig(
        id=entry.base.repository,
        n_layers=n_layers,
        dims=dims,
        revision=entry.base.revision,
        fingerprint=base_fingerprint(model / "base"),
    )
    encoder = EncoderConfig(
        id=entry.encoder.repository,
        width=_encoder_width(model / "encoder"),
        recipe=entry.recipe,
        fingerprint=encoder_fingerprint(model / "encoder", entry.recipe),
    )
    (archive,) = (file for file in (staging / "released").rglob("*") if file.is_file())
    convert_released(archive, model / "hypernetwork", base=base, encoder=encoder)
    os.replace(staging / SOURCES_FILE, model / SOURCES_FILE)
    (model / "MODEL_CARD.md").write_text(_card(entry, read_sources(model)), encoding="utf-8")
    paths = ModelPaths(
        entry.name,
        model / "base",
        model / "encoder",
        model / "hypernetwork",
        model / "MODEL_CARD.md",
    )
    check_adapter(load_family(paths).family, entry.name)


def check_adapter(family: Any, name: str) -> None:
    """Compute one adapter. Raises UserError when it is not finite or all zeros."""
    import torch

    config = family.encoder.recipe
    width = config.snapshot_width(family.encoder.width)
    lora = family.adapter(family.initial(torch.ones(width) / width**0.5))
    weights = [*lora.a.values(), *lora.b.values()]
    if not all(bool(torch.isfinite(w).all()) for w in weights):
        raise UserError(f"the adapters of {name} are not finite", hint="pull the model again")
    if not any(bool(w.any()) for w in weights):
        raise UserError(f"the adapters of {name} are all zeros", hint="pull the model again")


def _encoder_width(encoder: Path) -> int:
    width = _read_json(encoder / "config.json").get("hidden_size")
    if not isinstance(width, int):
        raise UserError(f"{encoder / 'config.json'} does not say its hidden_size")
    return width


def _show(model: Path, final: Path) -> None:
    """Put a whole model in its place; an older one of ours makes room first."""
    old = final.with_name(f".old-{final.name}")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(model, final)
    shutil.rmtree(old, ignore_errors=True)


def _card(entry: Pullable, sources: Mapping[str, Any]) -> str:
    rows = "\n".join(
        f"| {part} | [{of['repository']}](https://huggingface.co/{of['repository']}) "
        f"| `{of['revision']}` | {of['licence']} |"
        for part, of in sources.items()
    )
    return f"""# {entry.name}

{entry.summary}.

| part | repository | commit | licence |
|---|---|---|---|
{rows}

The decoder and the encoder are as published. The hypernetwork was published as a torch archive,
which was read as tensors alone and written as safetensors; its numbers are unchanged. Every file's
digest is in `{SOURCES_FILE}`.

Others trained these weights. Whether their adapters know the repository that they are for has not
been measured here: `code2lora train audit` does.
"""


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} cannot be read: {error}", hint="pull the model again") from error
    if not isinstance(values, dict):
        raise UserError(f"{file} holds no object", hint="pull the model again")
    return values


def _write_json(file: Path, values: object) -> None:
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, file)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
