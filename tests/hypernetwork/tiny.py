"""The smallest models that still have every part, drawn from a seed. Every axis differs in size."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen2Model

from code2lora.history.model import Diff, FileChange, Snapshot, SourceFile
from code2lora.hypernetwork.config import (
    BaseConfig,
    CheckpointConfig,
    EncoderConfig,
    GruConfig,
    HeadConfig,
    Recipe,
    decoder_dims,
)
from code2lora.hypernetwork.encoder_lines import LinesEncoder
from code2lora.hypernetwork.lora import Lora
from code2lora.hypernetwork.projections import TARGETS

torch.set_num_threads(1)

VOCABULARY = 300
N_LAYERS = 2
RANK = 5
ALPHA = 8.0
LINES = Recipe(diff="lines", snapshot="lines", rules="source")
PAPER = Recipe(diff="paper", snapshot="paper", rules="paper")

CORPUS = [
    "def parse(line):\n    return line.split(',')\n",
    "class Store:\n    def __init__(self, path):\n        self.path = path\n",
    "import os\n\n\nfor name in os.listdir('.'):\n    print(name)\n",
]


def decoder_config() -> Qwen2Config:
    return Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=6,
        max_position_embeddings=64,
    )


def decoder(seed: int = 0) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(decoder_config()).eval()


def base_config() -> BaseConfig:
    n_layers, dims = decoder_dims(decoder_config().to_dict())
    return BaseConfig(id="tiny", n_layers=n_layers, dims=dims)


def tokenizer() -> Tokenizer:
    """A byte-level BPE of exactly VOCABULARY ids, that ends every sequence with `<end>`."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 1,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    made.train_from_iterator(CORPUS * 3, trainer)
    made.add_special_tokens(["<end>"])
    made.post_processor = processors.TemplateProcessing(
        single="$A <end>", special_tokens=[("<end>", made.token_to_id("<end>"))]
    )
    return made


def lines_encoder(width: int = 7, seed: int = 1) -> LinesEncoder:
    made = tokenizer()
    torch.manual_seed(seed)
    return LinesEncoder(made, torch.randn(made.get_vocab_size(), width), LINES)


def save_transformer_encoder(path: Path, seed: int = 2) -> None:
    """Write a sentence-transformers directory around a random Qwen2 of width 12."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    made = tokenizer()
    parts = path.with_name(path.name + "-parts")
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<end>", eos_token="<end>", padding_side="left"
    )
    wrapped.save_pretrained(parts)
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=made.get_vocab_size(),
        hidden_size=12,
        intermediate_size=14,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=4096,
    )
    Qwen2Model(config).save_pretrained(parts)
    transformer = Transformer(str(parts))
    pooling = Pooling(12, pooling_mode="lasttoken")
    model = SentenceTransformer(modules=[transformer, pooling], device="cpu")
    model.save(str(path), create_model_card=False)


def checkpoint_config(kind: str = "factorized", *, width: int = 7) -> CheckpointConfig:
    hidden = 11
    return CheckpointConfig(
        family="gru",
        base=base_config(),
        encoder=EncoderConfig(id="tiny-static", width=width, recipe=LINES),
        gru=GruConfig(diff_width=2 * width, snapshot_width=width, hidden_width=hidden),
        head=HeadConfig(
            kind=kind,  # type: ignore[arg-type]
            context_width=hidden,
            trunk_width=9,
            rank=RANK,
            alpha=ALPHA,
        ),
    )


def random_lora(
    *, n: int | None = None, n_layers: int = N_LAYERS, rank: int = RANK, seed: int = 3
) -> Lora:
    """Return weights large enough to change every logit; `n` adds a batch axis."""
    generator = torch.Generator().manual_seed(seed)
    batch = () if n is None else (n,)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*batch, n_layers, *shape, generator=generator) * 0.2

    dims = base_config().dims
    return Lora(
        a={t: draw(rank, dims[t][0]) for t in TARGETS},
        b={t: draw(dims[t][1], rank) for t in TARGETS},
        rank=rank,
        alpha=ALPHA,
    )


def change(
    path: str, added: str = "", removed: str = "", *, status: str = "M", old: str | None = None
) -> FileChange:
    lines = [f"--- a/{old or path}\n", f"+++ b/{path}\n", "@@ -1 +1 @@\n"]
    lines += [f"-{line}\n" for line in removed.splitlines()]
    lines += [f"+{line}\n" for line in added.splitlines()]
    patch = "".join(lines)
    return FileChange(
        path=path, old_path=old, status=status, added=added, removed=removed, patch=patch
    )


def diff(*changes: FileChange) -> Diff:
    return Diff(commit="c" * 40, parent="p" * 40, changes=changes, skipped=())


def snapshot(**files: str) -> Snapshot:
    """`snapshot(a="text")` has one file, `a.py`."""
    made = tuple(SourceFile(path=f"{n}.py", blob=n, text=t) for n, t in sorted(files.items()))
    return Snapshot(commit="c" * 40, files=made, skipped=())
