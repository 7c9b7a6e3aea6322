"""Turn source files into a small byte-level BPE tokenizer that behaves as Qwen2's does.

Reads   texts.
Writes  a tokenizer directory: ``tokenizer.json``, ``tokenizer_config.json``,
        ``vocab.json`` and ``merges.txt`` (which converters to other formats ask for).

The rules are those of Qwen2 and only the merges are learnt, so every tool that knows the large
model's tokenizer can read the small one's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

END_OF_TEXT = "<|endoftext|>"
FIM_PREFIX = "<|fim_prefix|>"
FIM_MIDDLE = "<|fim_middle|>"
FIM_SUFFIX = "<|fim_suffix|>"
FIM_PAD = "<|fim_pad|>"
REPO_NAME = "<|repo_name|>"
FILE_SEP = "<|file_sep|>"

SPECIAL_TOKENS = (END_OF_TEXT, "<|im_start|>", "<|im_end|>")
ADDED_TOKENS = (FIM_PREFIX, FIM_MIDDLE, FIM_SUFFIX, FIM_PAD, REPO_NAME, FILE_SEP)
"""Named as in Qwen2.5-Coder, and as there not special: decoding shows them unless told not to."""

# The split of Qwen2's tokenizer.json: contractions, words, single digits, punctuation, white space.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Return a tokenizer of exactly ``vocab_size`` ids, the added tokens being the last of them.

    The same texts in the same order give the same tokenizer. Too little text to fill the
    vocabulary raises ValueError, because the model's embedding would have rows that never learn.
    """
    n_added = len(SPECIAL_TOKENS) + len(ADDED_TOKENS)
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size - n_added,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([_added(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([_added(token, special=False) for token in ADDED_TOKENS])
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"the texts give {tokenizer.get_vocab_size()} tokens, but {vocab_size} were asked for"
        )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, out_dir: Path, *, max_length: int) -> None:
    """Write a directory that ``AutoTokenizer.from_pretrained`` and model converters can read.

    max_length: the model's longest context, in tokens
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    _write(out_dir / "tokenizer.json", tokenizer.to_str(pretty=True))
    _write_json(out_dir / "tokenizer_config.json", _config(tokenizer, max_length))
    # tokenizers writes these two files itself; the model's data are the vocabulary and merges alone
    tokenizer.model.save(str(out_dir))


def load_tokenizer(out_dir: Path) -> Tokenizer:
    """Read the tokenizer of a directory that `save_tokenizer` wrote."""
    loaded: Tokenizer = Tokenizer.from_file(str(out_dir / "tokenizer.json"))
    return loaded


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of an added token; ValueError where the tokenizer has none of that name."""
    found = tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(f"the tokenizer has no token {token}")
    return found


def _added(token: str, *, special: bool) -> AddedToken:
    return AddedToken(
        token, special=special, normalized=False, lstrip=False, rstrip=False, single_word=False
    )


def _config(tokenizer: Tokenizer, max_length: int) -> dict[str, Any]:
    added = {
        str(tokenizer.token_to_id(token)): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": token in SPECIAL_TOKENS,
        }
        for token in SPECIAL_TOKENS + ADDED_TOKENS
    }
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": END_OF_TEXT,
        "errors": "replace",
        "model_max_length": max_length,
        "pad_token": END_OF_TEXT,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    _write(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
