"""Which published models can be pulled: repositories of the hub, each at one commit. No torch here.

A commit id names the content of a repository for good, so what is pulled tomorrow is what was
pulled today. Where the digest of a large file is known from elsewhere it is stated as well, and
the hub has to agree.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from code2lora.errors import UserError
from code2lora.hypernetwork.config import Recipe

DECODER_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
)
ENCODER_FILES = (
    *DECODER_FILES,
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "[0-9]_*/config.json",
    "[0-9]_*/model.safetensors",
    "[0-9]_*/tokenizer.json",
)
"""A sentence-transformers directory keeps its modules in folders `1_Pooling` and the like."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Some files of one repository of the hub, at one commit."""

    repository: str
    """`owner/name`."""
    revision: str
    """The full commit id."""
    files: tuple[str, ...]
    """Patterns; what none of them matches is not fetched. A slash is matched by a slash alone."""
    n_bytes: int
    """About what they come to; a repository that lists much more is refused."""
    licence: str
    sha256: Mapping[str, str] = field(default_factory=dict)
    """File -> its digest, or a pattern of it."""

    @property
    def max_bytes(self) -> int:
        """What the files may come to."""
        return self.n_bytes + self.n_bytes // 16 + (1 << 24)

    def wants(self, path: str) -> bool:
        """Tell whether a file of the repository is to be fetched."""
        return any(
            fnmatchcase(path, pattern) and path.count("/") == pattern.count("/")
            for pattern in self.files
        )


@dataclass(frozen=True, kw_only=True)
class Pullable:
    """A model that can be pulled: three repositories, and how they go together."""

    name: str
    summary: str
    base: Source
    encoder: Source
    hypernetwork: Source
    """A released checkpoint, one torch archive, which is converted."""
    recipe: Recipe
    """How the released checkpoint's encoder reads; the archive does not say."""

    @property
    def parts(self) -> dict[str, Source]:
        """The sources by the part of the model that they are."""
        return {"base": self.base, "encoder": self.encoder, "hypernetwork": self.hypernetwork}

    @property
    def n_bytes(self) -> int:
        """About what is downloaded."""
        return sum(source.n_bytes for source in self.parts.values())


_QWEN_CODER = Source(
    repository="Qwen/Qwen2.5-Coder-1.5B",
    revision="df3ce67c0e24480f20468b6ef2894622d69eb73b",
    files=(*DECODER_FILES, "LICENSE"),
    n_bytes=3_100_000_000,
    licence="apache-2.0",
)
_QWEN_EMBEDDING = Source(
    repository="Qwen/Qwen3-Embedding-0.6B",
    revision="97b0c614be4d77ee51c0cef4e5f07c00f9eb65b3",
    files=ENCODER_FILES,
    n_bytes=1_208_000_000,
    licence="apache-2.0",
    sha256={
        "model.safetensors": "0437e45c94563b09e13cb7a64478fc406947a93cb34a7e05870fc8dcd48e23fd",
        "tokenizer.json": "def76fb086971c7867b829c23a26261e38d9d74e02139253b38aeb9df8b4b50a",
    },
)
_RELEASED_RECIPE = Recipe(
    diff="paper",
    snapshot="paper",
    rules="paper",
    snapshot_rules="paper-snapshot",
    stream="assertions",
)

_MODELS = (
    Pullable(
        name="qwen2.5-coder-1.5b",
        summary="Code2LoRA-Evo as released: a GRU over commits, rank 16",
        base=_QWEN_CODER,
        encoder=_QWEN_EMBEDDING,
        hypernetwork=Source(
            repository="code2lora/code2lora-gru",
            revision="26460cba5f0de9b708277488ae0b1a826435961e",
            files=("code2lora_gru.pt",),
            n_bytes=2_850_700_000,
            licence="as its card says",
        ),
        recipe=_RELEASED_RECIPE,
    ),
    Pullable(
        name="qwen2.5-coder-1.5b-static",
        summary="Code2LoRA-Static as released: the newest snapshot alone, rank 16",
        base=_QWEN_CODER,
        encoder=_QWEN_EMBEDDING,
        hypernetwork=Source(
            repository="code2lora/code2lora-direct",
            revision="2728b3136eec8a448db64cde95f5f307acba9bef",
            files=("code2lora_direct.pt",),
            n_bytes=2_716_377_741,
            licence="as its card says",
            sha256={"code2lora_direct.pt": "a781a7e5*6c09"},
        ),
        recipe=_RELEASED_RECIPE,
    ),
)
CATALOGUE: Mapping[str, Pullable] = {model.name: model for model in _MODELS}


def find_pullable(name: str) -> Pullable:
    """Return the entry of a name. Raises UserError that suggests the nearest one."""
    if name in CATALOGUE:
        return CATALOGUE[name]
    near = difflib.get_close_matches(name, CATALOGUE, n=1, cutoff=0.5)
    raise UserError(
        f"there is no model {name!r} to pull; there are: {', '.join(CATALOGUE)}",
        hint=f"did you mean `code2lora models pull {near[0]}`?"
        if near
        else "`code2lora models available` lists them",
    )
