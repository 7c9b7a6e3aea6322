"""What a checkpoint says about itself: read strictly from JSON, written canonically. No torch here.

An unknown key, a missing key or a value of the wrong type is a `UserError` that names the key.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from code2lora.errors import UserError
from code2lora.hypernetwork.projections import ATTENTION_TARGETS, TARGETS

_T = TypeVar("_T")

CHECKPOINT_VERSION = 1
"""The one layout of `config.json` and `model.safetensors` that this package reads and writes."""

EXACT_MATCH = "exact_match_minus"
"""Key of `CheckpointConfig.metrics`: how many more assertions the own adapter writes exactly
than each row that it was compared with, as a share with `mean`, `low` and `high`."""

GRADIENTS_FILE = "gradients.json"
"""What makes a directory an encoder of the recipe `gradients`."""
KEYS_FILE = "keys.safetensors"
"""Its tensors."""

Reader = Literal["paper", "lines", "gradients"]
"""Which encoder reads a text."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Which text is encoded, how its vectors are pooled, and which commits advance the state."""

    diff: Reader
    snapshot: Reader
    rules: str
    """Name of the file rules (`history.rules`) that choose what is read."""
    snapshot_rules: str | None = None
    """The same for snapshots; None for the rules of the diffs."""
    stream: Literal["commits", "assertions"] = "commits"
    """Name of the stream (`history.stream`) that says which commits are steps of the state."""

    @property
    def adds_up(self) -> bool:
        """Whether the features of a commit are made of those of each file's change alone."""
        return self.diff == "gradients"

    def diff_width(self, width: int) -> int:
        """Return the length of a diff's features for an encoder of this width."""
        return width + 2 if self.diff == "gradients" else 2 * width

    def file_width(self, width: int) -> int:
        """Return the length of one file's features for an encoder of this width."""
        return width + 1 if self.snapshot == "gradients" else width

    def snapshot_width(self, width: int) -> int:
        """Return the length of a snapshot's features for an encoder of this width."""
        if self.snapshot == "gradients":
            return width + 1
        return width if self.snapshot == "lines" else 2 * width


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The encoder that a checkpoint was trained behind."""

    id: str
    """Where it came from, such as `Qwen/Qwen3-Embedding-0.6B`; information only."""
    width: int
    """Length of one text vector."""
    recipe: Recipe
    fingerprint: str | None = None
    """`encoder_fingerprint` of its directory; None accepts any encoder of this width."""


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """The decoder that the adapters are for."""

    id: str
    """Its name, written into adapters as `base_model_name_or_path`."""
    n_layers: int
    dims: dict[str, tuple[int, int]]
    """Module type -> (d_in, d_out)."""
    revision: str | None = None
    """Commit of the model repository that it was published in."""
    fingerprint: str | None = None
    """`base_fingerprint` of its directory; None checks the dimensions alone."""


@dataclass(frozen=True, kw_only=True)
class GruConfig:
    """Widths of the commit GRU."""

    diff_width: int
    snapshot_width: int
    hidden_width: int


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """The projections whose gradients are kept, and the size of what is kept of each."""

    layers: tuple[int, ...]
    outputs: dict[str, int]
    """Module type -> d_out, which is as many rows as its blocks have."""
    n_keys: int
    """R, directions at a projection's inputs: the columns of a block."""

    @property
    def places(self) -> list[tuple[int, str]]:
        """(layer, module type) of each block, in the order in which they stand in a vector."""
        return [(layer, target) for layer in self.layers for target in sorted(self.outputs)]

    @property
    def sizes(self) -> list[int]:
        """The length of each block, in that order."""
        return [self.outputs[target] * self.n_keys for _, target in self.places]

    @property
    def width(self) -> int:
        """W, the length of all blocks together."""
        return sum(self.sizes)


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """What the memory of a repository's gradients keeps."""

    width: int
    """W, of the blocks."""
    half_life: float
    """Commits after which what a commit wrote counts half among what is recent."""
    recency: float
    """How far the adapter goes from the mean gradient to the recent one, 0 to 1."""
    horizon: float
    """Thousands of characters written lately at which it goes half as far."""


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """Which LoRA head, and its sizes."""

    kind: Literal["paper", "factorized", "memory"]
    context_width: int
    trunk_width: int
    rank: int
    alpha: float
    n_tasks: int = 0
    """Rows of the paper head's task embedding; 0 leaves it out."""
    task_width: int = 0
    blocks: BlockConfig | None = None
    """What the memory head's context is made of."""


@dataclass(frozen=True, kw_only=True)
class AuditTest:
    """One question of an audit: a mean over repositories, in nats a token, and its 95 % interval.

    Negative figures speak for the own adapter.
    """

    passed: bool | None
    """None when it could not be asked; the figures are None then too."""
    mean: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class AuditRecord:
    """Whether the adapters know their repositories, as `train audit` found."""

    verdict: Literal["passed", "failed", "incomplete"]
    """Incomplete: nothing failed, but something that must be asked could not be."""
    tests: dict[str, AuditTest]
    n_repositories: int
    n_items: int
    settings: str
    """Digest of the settings of the audit: equal digests were asked the same."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """All of `config.json`."""

    family: Literal["gru", "static", "memory"]
    base: BaseConfig
    encoder: EncoderConfig
    head: HeadConfig
    gru: GruConfig | None = None
    """Of the family `gru` alone."""
    memory: MemoryConfig | None = None
    """Of the family `memory` alone."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """Held-out figures at publication; information only."""
    audit: AuditRecord | None = None
    """None when no audit was made."""
    version: int = CHECKPOINT_VERSION

    def canonical(self) -> str:
        """Return the one JSON text of this configuration: sorted keys, fixed separators."""
        return _canonical(dataclasses.asdict(self))

    def identity(self) -> str:
        """Return the canonical JSON text of all but what was measured on the checkpoint.

        A figure that is added later leaves the states that were computed with it valid.
        """
        values = dataclasses.asdict(self)
        return _canonical({key: values[key] for key in values.keys() - {"metrics", "audit"}})


def parse_config(values: object, *, where: str) -> CheckpointConfig:
    """Return the configuration that a parsed `config.json` holds.

    where: the file's name for messages. Raises UserError naming the key that is wrong.
    """
    if isinstance(values, Mapping) and values.get("version", CHECKPOINT_VERSION) != (
        CHECKPOINT_VERSION
    ):
        raise UserError(
            f"{where} has version {values['version']!r}, expected {CHECKPOINT_VERSION}",
            hint="upgrade code2lora, or use a checkpoint made for this version",
        )
    config: CheckpointConfig = _read(CheckpointConfig, values, where, "")
    if set(config.base.dims) != set(TARGETS):
        raise UserError(
            f"{where}: base.dims names {', '.join(sorted(config.base.dims))}, "
            f"expected {', '.join(TARGETS)}"
        )
    for name, part in (("gru", config.gru), ("memory", config.memory)):
        if (part is None) == (config.family == name):
            raise UserError(f"{where}: {name} must be given for family {name!r}, and only for it")
    if (config.head.blocks is None) == (config.head.kind == "memory"):
        raise UserError(f"{where}: head.blocks must be given for head 'memory', and only for it")
    return config


def read_strictly(kind: type[_T], values: object, *, where: str) -> _T:
    """Return a dataclass from parsed JSON. Raises UserError naming the key that is wrong."""
    found: _T = _read(kind, values, where, "")
    return found


def decoder_dims(config: Mapping[str, Any]) -> tuple[int, dict[str, tuple[int, int]]]:
    """Return (n_layers, module type -> (d_in, d_out)) of a Qwen2/Llama-like decoder.

    config: its `config.json`, or `PretrainedConfig.to_dict()`.
    Raises UserError when it does not describe such a decoder.
    """
    try:
        hidden = int(config["hidden_size"])
        inner = int(config["intermediate_size"])
        n_heads = int(config["num_attention_heads"])
        n_layers = int(config["num_hidden_layers"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"the base model's configuration lacks a usable {error}",
            hint="use a decoder with the projections q, k, v, o, gate, up and down",
        ) from error
    head = int(config.get("head_dim") or hidden // n_heads)
    query = n_heads * head
    key = int(config.get("num_key_value_heads") or n_heads) * head
    return n_layers, {
        "down_proj": (inner, hidden),
        "gate_proj": (hidden, inner),
        "k_proj": (hidden, key),
        "o_proj": (query, hidden),
        "q_proj": (hidden, query),
        "up_proj": (hidden, inner),
        "v_proj": (hidden, key),
    }


def block_of(target: str) -> str:
    """Return the name of the decoder layer's part that holds a projection."""
    return "self_attn" if target in ATTENTION_TARGETS else "mlp"


def _canonical(values: dict[str, Any]) -> str:
    recipe = recipe_values(values["encoder"]["recipe"])
    head = {name: value for name, value in values["head"].items() if value is not None}
    values = values | {"encoder": values["encoder"] | {"recipe": recipe}, "head": head}
    if values["memory"] is None:
        del values["memory"]
    return json.dumps(values, sort_keys=True, separators=(",", ":"))


def recipe_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe's values without those that checkpoints have not always named.

    Left out where they say what goes without saying, or older checkpoints would change their
    fingerprints, and every state computed with them would be lost.
    """
    implied = {"snapshot_rules": None, "stream": "commits"}
    return {name: value for name, value in values.items() if (name, value) not in implied.items()}


def _read(kind: Any, value: object, where: str, key: str) -> Any:
    """Return `value` as `kind`, a dataclass, a literal, a union, a dict, a tuple or a scalar."""
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, value, where, key)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        if value not in arguments:
            expected = ", ".join(sorted(arguments))
            raise UserError(f"{where}: {key} is {value!r}, expected one of: {expected}")
        return value
    if origin in (Union, types.UnionType):
        rest = next(argument for argument in arguments if argument is not type(None))
        return None if value is None else _read(rest, value, where, key)
    if origin is dict and isinstance(value, Mapping):
        return {
            str(name): _read(arguments[1], item, where, f"{key}.{name}")
            for name, item in value.items()
        }
    if origin is tuple and arguments[1:] == (...,) and isinstance(value, list | tuple):
        return tuple(_read(arguments[0], item, where, key) for item in value)
    if origin is tuple and isinstance(value, list | tuple) and len(value) == len(arguments):
        return tuple(
            _read(part, item, where, key) for part, item in zip(arguments, value, strict=True)
        )
    if kind is Any:
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    is_kind = isinstance(kind, type) and isinstance(value, kind)
    if is_kind and (kind is bool or not isinstance(value, bool)):  # True is an int to Python alone
        return value
    expected = kind.__name__ if isinstance(kind, type) and origin is None else str(kind)
    raise UserError(f"{where}: {key} is {value!r}, expected {expected}")


def _read_dataclass(kind: Any, value: object, where: str, key: str) -> Any:
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: {key or 'the file'} is {value!r}, expected an object")
    prefix = f"{key}." if key else ""
    fields = {item.name: item for item in dataclasses.fields(kind)}
    for name in value:
        if name not in fields:
            near = difflib.get_close_matches(str(name), fields, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else None
            raise UserError(f"{where}: unknown key {prefix}{name}", hint=hint)
    for name, item in fields.items():
        needed = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if needed and name not in value:
            raise UserError(f"{where}: missing key {prefix}{name}")
    hints = get_type_hints(kind)
    return kind(
        **{name: _read(hints[name], value[name], where, f"{prefix}{name}") for name in value}
    )
