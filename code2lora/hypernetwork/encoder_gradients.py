"""Recipe `gradients`: how the base model itself would have to change to write a text.

For a projection with weight W (d_out, d_in), the gradient of the base model's loss, averaged over
the text's tokens and seen through fixed keys (R, d_in):

    block = dL/dW keys^T      (d_out, R)

That is the gradient in B at the first step of training a LoRA on the text, with A the keys.
What the base already knows hardly moves it, so what every repository has in common weighs little
and a repository's own names weigh much. Averages add up: a commit adds those of what it wrote.

    file, snapshot   [a block for each projection ...; thousands of characters]           W + 1
    diff             [the same of the added lines; thousands of removed characters]       W + 2

A text is read in a few excerpts, and a snapshot in a few dozen files, but they weigh what the
whole of them weighs. Reads a directory with `gradients.json` and `keys.safetensors`.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from code2lora.errors import UserError
from code2lora.history.model import Diff, Snapshot, SourceFile
from code2lora.hypernetwork.config import (
    GRADIENTS_FILE,
    KEYS_FILE,
    BlockConfig,
    Recipe,
    read_strictly,
)
from code2lora.hypernetwork.family import Reading
from code2lora.hypernetwork.identity import base_fingerprint
from code2lora.hypernetwork.inject import projections

_CHARS_PER_TOKEN = 3
"""Of source code, about; decides how many excerpts a text has."""
_LONGEST_TOKEN_CHARS = 12
"""More characters than tokens have on average anywhere, so that an excerpt fills its tokens."""
_PATH_SHARE = 8
"""The path may take one token in so many of an excerpt."""
_LOGIT_ROWS = 512
"""Tokens whose logits are in memory at once."""
_ROWS = 16
"""Excerpts that are read together."""
_FILE_SEP = "<|file_sep|>"
_END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True, kw_only=True)
class GradientsConfig:
    """All of `gradients.json`: which gradients are taken, and of how much text."""

    blocks: BlockConfig
    base_fingerprint: str | None = None
    """`base_fingerprint` of the decoder whose gradients they are; None checks its shape alone."""
    excerpt_tokens: int = 256
    """Tokens of one excerpt, its path included."""
    file_excerpts: int = 2
    """Excerpts of one file, at most, evenly spaced."""
    snapshot_files: int = 64
    """Files of a snapshot that are read, at most; digests of their paths choose them."""
    diff_files: int = 6
    """The same for a diff, of those with added lines; the ones with most of them."""
    diff_excerpts: int = 1
    """Excerpts of one file's added lines, at most."""


class GradientsEncoder:
    """A frozen base decoder that is asked for gradients and changed by none of them."""

    def __init__(
        self,
        base: Any,
        tokenizer: Tokenizer,
        keys: Mapping[str, Tensor],
        config: GradientsConfig,
        recipe: Recipe,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """base: a Hugging Face decoder, float32, on its device
        keys: `key_name(...)` -> (R, d_in), float32; longer keys make larger blocks
        dtype: what matrix products are taken in

        Raises UserError when the keys are not those that the configuration names, or do not fit
        the decoder.
        """
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.recipe = recipe
        self.config = config
        self.width = config.blocks.width
        self.keys = {name: keys[name] for name in sorted(keys)}
        self._dtype = dtype
        self._lock = threading.Lock()  # repositories are refreshed side by side, over one decoder
        self._base = base.eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self._head = base.get_output_embeddings().weight
        self._taps = _taps(base, self.keys, config.blocks)

    @classmethod
    def load(
        cls,
        path: Path,
        base: Path,
        recipe: Recipe,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> GradientsEncoder:
        """Return the encoder in a directory, over the base model in another.

        dtype: what matrix products are taken in; None takes what is fast on the device
        Raises UserError when a file is damaged, or the base is not the one it was made for.
        """
        config, keys = _read(path)  # before the base, which takes longer
        if config.base_fingerprint not in (None, base_fingerprint(base)):
            raise UserError(
                f"the encoder in {path} was made for another base model than {base}",
                hint="use the base model that it was made for, or `code2lora train keys`",
            )
        model, tokenizer = _load_base(base)
        dtype = dtype or _fast_dtype(torch.device(device))
        return cls(model.to(device), tokenizer, keys, config, recipe, dtype)

    @classmethod
    def over(cls, path: Path, base: Any, tokenizer: Tokenizer, recipe: Recipe) -> GradientsEncoder:
        """Return the encoder in a directory, over its base model that is in memory already.

        Raises UserError when a file is damaged, or the shapes do not fit.
        """
        config, keys = _read(path)
        return cls(base, tokenizer, keys, config, recipe)

    def save(self, path: Path) -> None:
        """Write a directory that `load` reads; the configuration comes last."""
        path.mkdir(parents=True, exist_ok=True)
        temporary = path / (KEYS_FILE + ".tmp")
        save_file({name: t.contiguous().cpu() for name, t in self.keys.items()}, temporary)
        temporary.chmod(0o644)
        os.replace(temporary, path / KEYS_FILE)
        text = json.dumps(asdict(self.config), indent=2, sort_keys=True) + "\n"
        (path / GRADIENTS_FILE).write_text(text, encoding="utf-8")

    def diff_key(self, diff: Diff) -> str:
        """Return the digest of what is read of the added lines, and of how much is removed."""
        digest = hashlib.sha256()
        for path, text in _told_changes(diff, self.config.diff_files):
            for part in (path, text):
                data = part.encode("utf-8", "surrogatepass")
                digest.update(len(data).to_bytes(8, "little"))
                digest.update(data)
        digest.update(f"{_n_added(diff)} {_n_removed(diff)}".encode())
        return digest.hexdigest()

    def read_diffs(self, diffs: Sequence[Diff], *, across: bool = False) -> list[Reading]:
        """Return the features of each diff, (W + 2,), of which half precision keeps every bit."""
        told = [_told_changes(diff, self.config.diff_files) for diff in diffs]
        groups = [list(chain(*told))] if across else told
        parts = chain(*(self._read(group, self.config.diff_excerpts) for group in groups))
        readings = []
        for diff, texts in zip(diffs, told, strict=True):
            mine = [next(parts) for _ in texts]
            mean = self.pool_files(_stacked(mine, self.width + 1))
            amounts = torch.tensor([_n_added(diff) / 1000, _n_removed(diff) / 1000])
            features = _rounded(torch.cat([mean[:-1], amounts]))
            readings.append(Reading(features, sum(part.n_tokens for part in mine)))
        return readings

    def told(self, files: Sequence[SourceFile]) -> Sequence[SourceFile]:
        """Return the files of a snapshot that are read."""
        return told_files(files, self.config.snapshot_files)

    def file_key(self, file: SourceFile) -> str:
        """Return the digest of the file's path and blob id."""
        return file_key(file.path, file.blob)

    def read_files(self, files: Sequence[SourceFile], *, across: bool = False) -> list[Reading]:
        """Return the features of each file, (W + 1,)."""
        texts = [(file.path, file.text) for file in files]
        groups = [texts] if across else [[text] for text in texts]
        return list(chain(*(self._read(group, self.config.file_excerpts) for group in groups)))

    def pool_files(self, vectors: Tensor) -> Tensor:
        """Return the features of some files together, (W + 1,), from (n, W + 1)."""
        return pooled(vectors)

    def read_snapshot(self, snapshot: Snapshot) -> Reading:
        """Return the features of a snapshot, (W + 1,); the last number counts all its files."""
        readings = self.read_files(self.told(snapshot.files), across=True)
        features = self.pool_files(_stacked(readings, self.width + 1))
        features[-1] = sum(len(file.text) for file in snapshot.files) / 1000
        return Reading(features, sum(reading.n_tokens for reading in readings))

    def gradients(self, rows: Sequence[Sequence[int]], n_given: Sequence[int]) -> Tensor:
        """Return (len(rows), W): each row's gradient, summed over its asked tokens.

        n_given: how many of the first tokens of each row are given and not asked for
        """
        tokens, asked = padded(rows, n_given, self._base.device)
        cast = torch.autocast(tokens.device.type, self._dtype, enabled=self._dtype != torch.float32)
        with self._lock, _tapped(self._taps, len(rows)) as cores, torch.enable_grad(), cast:
            hidden = self._base.model(input_ids=tokens, use_cache=False)[0][:, :-1]  # (N, T-1, D)
            slope = self._slope(hidden.detach(), tokens[:, 1:], asked[:, 1:])
            found = torch.autograd.grad(hidden, cores, slope)
        return torch.cat([core.flatten(1) for core in found], dim=1).float().cpu()

    @torch.no_grad()
    def _slope(self, hidden: Tensor, targets: Tensor, asked: Tensor) -> Tensor:
        """Return dL/d hidden, of its shape: zero where nothing is asked."""
        slope = torch.zeros_like(hidden)
        places = asked.nonzero(as_tuple=True)
        for start in range(0, len(places[0]), _LOGIT_ROWS):
            rows = tuple(place[start : start + _LOGIT_ROWS] for place in places)
            shares = torch.softmax((hidden[rows] @ self._head.T).float(), dim=-1)  # (n, V)
            shares[torch.arange(len(shares)), targets[rows]] -= 1.0
            slope[rows] = (shares.to(self._head.dtype) @ self._head).to(hidden.dtype)
        return slope

    def _read(self, texts: Sequence[tuple[str, str]], most: int) -> list[Reading]:
        """Return the features of each (path, text), (W + 1,). most: excerpts of one text

        Excerpts of like length are read together, and what is read together decides the last bits.
        """
        rows = [
            (i, *excerpt)
            for i, text in enumerate(texts)
            for excerpt in excerpts(self._tokenizer, *text, self.config.excerpt_tokens, most)
        ]
        rows.sort(key=lambda row: len(row[1]))
        sums = torch.zeros(len(texts), self.width)
        counts = torch.zeros(len(texts))
        for start in range(0, len(rows), _ROWS):
            part = rows[start : start + _ROWS]
            owners = torch.tensor([owner for owner, _, _ in part])
            given = [n for _, _, n in part]
            sums.index_add_(0, owners, self.gradients([row for _, row, _ in part], given))
            asked = [len(row) - n for _, row, n in part]
            counts.index_add_(0, owners, torch.tensor(asked, dtype=torch.float32))
        means = sums / counts.clamp(min=1)[:, None]
        sizes = torch.tensor([[len(text) / 1000] for _, text in texts]).view(-1, 1)
        features = torch.cat([means, sizes], dim=1)
        return [Reading(row.clone(), int(n)) for row, n in zip(features, counts, strict=True)]


def excerpts(
    tokenizer: Tokenizer, path: str, text: str, size: int, most: int
) -> list[tuple[list[int], int]]:
    """Return evenly spaced rows of a text's tokens, each with how many of them are given.

    What is given is the path; what the base model makes of the rest is what counts.
    size: tokens of a row; most: rows
    """
    begin = (tokenizer.token_to_id(name) for name in (_FILE_SEP, _END_OF_TEXT))
    path_ids: list[int] = tokenizer.encode(f"{path}\n", add_special_tokens=False).ids
    head = [next((i for i in begin if i is not None), 0), *path_ids[: size // _PATH_SHARE]]
    n = min(most, -(-len(text) // (size * _CHARS_PER_TOKEN)))
    found = []
    for i in range(n):
        start = text.rfind("\n", 0, len(text) * i // n) + 1
        part = text[start : start + size * _LONGEST_TOKEN_CHARS]
        ids: list[int] = tokenizer.encode(part, add_special_tokens=False).ids
        if ids:
            found.append(([*head, *ids[: size - len(head)]], len(head)))
    return found


def pooled(vectors: Tensor) -> Tensor:
    """Return the mean of texts, weighed by their sizes, and the sum of these: (n, W + 1)."""
    sizes = vectors[:, -1:]
    mean = (vectors[:, :-1] * sizes).sum(0) / sizes.sum().clamp(min=1e-6)
    return torch.cat([mean, sizes.sum(0)])


def pooled_changes(vectors: Tensor, most: int) -> Tensor:
    """Return the features of a diff, (W + 2,), from (n, W + 2): those of its files' changes alone.

    most: `GradientsConfig.diff_files`
    """
    chosen = vectors[:, -2].argsort(descending=True, stable=True)[:most]
    mean = pooled(vectors[chosen, :-1])
    return torch.cat([mean[:-1], vectors[:, -2:].sum(0)])


def told_files(files: Sequence[SourceFile], most: int) -> list[SourceFile]:
    """Return the files of a snapshot that are read, in path order.

    A file is chosen by its path alone, so two snapshots of one repository show the same ones.
    """
    ranked = sorted(files, key=lambda file: _digest(file.path))[:most]
    return sorted(ranked, key=lambda file: file.path)


def file_key(path: str, blob: str) -> str:
    """Return the digest of a file's path and blob id."""
    return hashlib.sha256(f"{blob}\0{path}".encode("utf-8", "surrogatepass")).hexdigest()


def key_name(layer: int, target: str) -> str:
    """Return the name of the keys that a projection's gradient is seen through."""
    return f"{layer}.{target}"


def _read(path: Path) -> tuple[GradientsConfig, dict[str, Tensor]]:
    """Return what an encoder's directory holds. Raises UserError when it is wrong."""
    file = path / GRADIENTS_FILE
    hint = "fetch the model again"
    try:
        values = json.loads(file.read_text("utf-8"))
        keys = load_file(path / KEYS_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"the encoder in {path} is damaged: {error}", hint=hint) from error
    return read_strictly(GradientsConfig, values, where=str(file)), keys


@dataclass(frozen=True)
class _Tap:
    """A projection whose gradient is wanted."""

    module: nn.Module
    n_outputs: int
    keys: Tensor
    """(R, d_in)"""


def _taps(base: nn.Module, keys: Mapping[str, Tensor], blocks: BlockConfig) -> list[_Tap]:
    hint = "use the base model that the encoder was made for"
    modules = projections(base)
    taps = []
    for layer, target in blocks.places:
        module: Any = modules.get((layer, target))
        found = keys.get(key_name(layer, target))
        if module is None or found is None:
            raise UserError(
                f"the encoder has no keys for {target} in layer {layer} of this base model",
                hint=hint,
            )
        sizes = (tuple(found.shape), blocks.outputs[target])
        expected = ((blocks.n_keys, module.in_features), module.out_features)
        if sizes != expected:
            raise UserError(
                f"the encoder's {target} in layer {layer} has keys {sizes[0]} and {sizes[1]} "
                f"outputs, expected {expected[0]} and {expected[1]}",
                hint=hint,
            )
        taps.append(_Tap(module, module.out_features, found.to(module.weight)))
    return taps


@contextmanager
def _tapped(taps: Sequence[_Tap], n_rows: int) -> Iterator[list[Tensor]]:
    """Put a zero matrix (n_rows, d_out, R) behind the keys of each projection.

    It changes nothing that is computed, and its gradient is the block that is wanted.
    """
    cores, handles = [], []
    for tap in taps:
        core = tap.keys.new_zeros(n_rows, tap.n_outputs, len(tap.keys)).requires_grad_(True)
        cores.append(core)
        handles.append(tap.module.register_forward_hook(_hook(tap, core)))
    try:
        yield cores
    finally:
        for handle in handles:
            handle.remove()


def _hook(tap: _Tap, core: Tensor) -> Any:
    def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        low = inputs[0] @ tap.keys.T  # (N, T, R)
        return output + low @ core.transpose(1, 2)

    return add


def padded(
    rows: Sequence[Sequence[int]], n_given: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the tokens (N, T), int64, and which of them are asked for, (N, T) bool."""
    longest = max(len(row) for row in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
    asked = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, (row, n) in enumerate(zip(rows, n_given, strict=True)):
        tokens[i, : len(row)] = torch.tensor(row)
        asked[i, n : len(row)] = True
    return tokens.to(device), asked.to(device)


def _told_changes(diff: Diff, most: int) -> list[tuple[str, str]]:
    """Return (path, added lines) of the files that are read, those with most of them, in order."""
    added = [(change.path, change.added) for change in diff.changes if change.added]
    ranked = sorted(added, key=lambda each: (-len(each[1]), each[0]))[:most]
    return sorted(ranked)


def _stacked(readings: Sequence[Reading], width: int) -> Tensor:
    """Return the features of each reading, (n, width); n may be 0."""
    return torch.stack([r.features for r in readings]) if readings else torch.zeros(0, width)


def _rounded(features: Tensor) -> Tensor:
    """Return what half precision keeps of features, float32: they are long, and kept as that.

    So they are trained on, too. What is too large for it stays finite.
    """
    largest = torch.finfo(torch.float16).max
    return features.clamp(-largest, largest).half().float()


def _n_added(diff: Diff) -> int:
    return sum(len(change.added) for change in diff.changes)


def _n_removed(diff: Diff) -> int:
    return sum(len(change.removed) for change in diff.changes)


def _digest(path: str) -> bytes:
    return hashlib.sha256(path.encode("utf-8", "surrogatepass")).digest()


def _fast_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 where there are instructions for it, which halve the time, else float32."""
    if device.type != "cpu":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    able: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.9 has none
    return torch.bfloat16 if able.get("avx512_bf16") or able.get("amx_bf16") else torch.float32


def _load_base(path: Path) -> tuple[Any, Tokenizer]:
    # Late, because it takes seconds, and only this recipe needs it.
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
        return model, Tokenizer.from_file(str(path / "tokenizer.json"))
    # two libraries raise whatever they met
    except Exception as error:
        raise UserError(
            f"the base model in {path} cannot be loaded: {error}", hint="fetch the model again"
        ) from error
