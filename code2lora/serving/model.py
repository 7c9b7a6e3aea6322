"""Turn a model directory into a decoder and a tokenizer that are ready to complete code.

Reads   config.json, generation_config.json, tokenizer.json, tokenizer_config.json and
        safetensors weights in one local directory; never the network, never code or pickles
        from the directory.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from code2lora.errors import UserError


@dataclass(frozen=True, slots=True)
class ControlTokens:
    """The ids of the tokens that structure a prompt; None where the tokenizer lacks one."""

    fim_prefix: int | None
    fim_suffix: int | None
    fim_middle: int | None
    fim_pad: int | None
    repo_name: int | None
    file_sep: int | None

    @classmethod
    def find(cls, tokenizer: Tokenizer) -> ControlTokens:
        """Look every token up by its name, as Qwen2.5-Coder names them."""
        return cls(*(tokenizer.token_to_id(control_text(f.name)) for f in fields(cls)))

    @property
    def known(self) -> frozenset[int]:
        """The ids that exist."""
        return frozenset(i for f in fields(self) if (i := getattr(self, f.name)) is not None)


def control_text(name: str) -> str:
    """Return how a control token is written in text: ``<|fim_prefix|>`` for ``fim_prefix``."""
    return f"<|{name}|>"


_END_OF_TEXT = control_text("endoftext")


@dataclass(frozen=True)
class BaseModel:
    """A frozen decoder with its tokenizer."""

    module: torch.nn.Module
    """The Hugging Face decoder, in evaluation mode."""
    tokenizer: Tokenizer
    control: ControlTokens
    end_ids: frozenset[int]
    """Each ends the completion when decoded: end of text, chat, FIM and repository tokens."""
    begin_ids: tuple[int, ...]
    """What the tokenizer puts before every text; mostly nothing."""
    separator_id: int | None
    """Stands between documents, so it may stand for an empty prompt."""
    context_tokens: int
    """Longest sequence the model was made for: prompt and completion together."""
    structural: re.Pattern[str]
    """Finds the names of control tokens in text."""
    device: torch.device
    dtype: torch.dtype
    chat_template: str | None = None
    """How a conversation is written for this model; None: it was not made to chat."""

    @classmethod
    def load(
        cls,
        base_dir: Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        threads: int = 0,
    ) -> BaseModel:
        """Load a decoder and its tokenizer from a local directory.

        dtype: None for bfloat16 on CUDA and float32 elsewhere
        threads: compute threads of this process; 0 leaves torch's choice

        Raises UserError when the directory is not a whole, known decoder with a tokenizer.
        """
        if threads > 0:
            torch.set_num_threads(threads)
        place = resolve_device(device)
        kind = dtype or (torch.bfloat16 if place.type == "cuda" else torch.float32)
        config = _read_json(base_dir, "config.json")
        _check_architecture(base_dir, config)
        tokenizer = _load_tokenizer(base_dir)
        ends = _configured_ends(base_dir, config, tokenizer)
        module = _load_weights(base_dir, kind).to(place)
        _check_vocabulary(base_dir, tokenizer, module)
        control = ControlTokens.find(tokenizer)
        end_ids = frozenset(ends) | control.known | _special_ids(tokenizer)
        return cls(
            module=module,
            tokenizer=tokenizer,
            control=control,
            end_ids=end_ids,
            begin_ids=tuple(tokenizer.encode("").ids[:1]),
            separator_id=ends[0] if ends else None,
            context_tokens=_context_tokens(base_dir, module),
            structural=_structural(tokenizer, end_ids),
            device=place,
            dtype=kind,
            chat_template=_chat_template(base_dir),
        )

    @property
    def n_ids(self) -> int:
        """Token ids that the decoder knows, from 0 on."""
        module: Any = self.module
        return int(module.get_input_embeddings().weight.shape[0])

    def encode(self, text: str) -> list[int]:
        """Return the ids of a prompt in which control tokens may be written out."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of text; the name of a control token in it stays mere text."""
        ids: list[int] = []
        start = 0
        for match in self.structural.finditer(text):
            cut = match.start() + 1  # a name in two parts is no longer a name
            ids += self.encode(text[start:cut])
            start = cut
        return ids + self.encode(text[start:])

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, control tokens included."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False))


def resolve_device(name: torch.device | str) -> torch.device:
    """Return the device that `auto`, `cpu`, `cuda`, `cuda:1` or `mps` means on this machine.

    Raises UserError when this machine has no such device.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"this machine has no device {str(name)!r}",
            hint="set `device` to auto, cpu, cuda or mps",
        ) from error
    return device


def _read_json(base_dir: Path, name: str, *, required: bool = True) -> dict[str, Any]:
    path = base_dir / name
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        if not required:
            return {}
        raise UserError(
            f"{base_dir} is not a model directory: it has no {name}",
            hint="give the directory of a Hugging Face decoder",
        ) from error
    except (OSError, ValueError) as error:
        raise _damaged(base_dir, f"{name} cannot be read") from error
    if not isinstance(content, dict):
        raise _damaged(base_dir, f"{name} is not a JSON object")
    return content


def _damaged(base_dir: Path, why: str) -> UserError:
    return UserError(
        f"the model in {base_dir} is damaged or incomplete: {why}",
        hint="download or copy the model again",
    )


def _check_architecture(base_dir: Path, config: dict[str, Any]) -> None:
    kind = config.get("model_type")
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(
            f"{base_dir} holds a model of type {kind!r}, not a decoder that is known here",
            hint="use a decoder such as Qwen2 or Llama",
        )


def _load_tokenizer(base_dir: Path) -> Tokenizer:
    path = base_dir / "tokenizer.json"
    if not path.is_file():
        # transformers would make an empty tokenizer instead of failing
        raise _damaged(base_dir, "tokenizer.json is missing")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for any malformed file
        raise _damaged(base_dir, "tokenizer.json cannot be read") from error


def _load_weights(base_dir: Path, dtype: torch.dtype) -> torch.nn.Module:
    loader: Any = AutoModelForCausalLM
    try:
        with _quiet_transformers():
            module, report = loader.from_pretrained(
                str(base_dir),
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=dtype,
                ignore_mismatched_sizes=True,  # reported below, where the message can say which
                output_loading_info=True,
            )
    except Exception as error:  # a foreign directory can fail in any layer below
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise _damaged(base_dir, reason) from error
    # transformers would go on with random numbers in place of either
    absent = sorted(report["missing_keys"])
    if absent:
        raise _damaged(base_dir, f"{len(absent)} tensors are missing, the first is {absent[0]}")
    other = sorted(report["mismatched_keys"])
    if other:
        name, stored, expected = other[0]
        raise _damaged(
            base_dir, f"{name} has shape {tuple(stored)}, config.json asks for {tuple(expected)}"
        )
    decoder: torch.nn.Module = module.eval().requires_grad_(False)
    return decoder


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep the loading report and the progress bar off the terminal: problems become errors."""
    log: Any = transformers_logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity(log.CRITICAL)
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()


def _check_vocabulary(base_dir: Path, tokenizer: Tokenizer, module: Any) -> None:
    highest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    rows = module.get_input_embeddings().weight.shape[0]
    if highest < 0:
        raise _damaged(base_dir, "its tokenizer has no tokens")
    if highest >= rows:
        raise _damaged(
            base_dir, f"its tokenizer counts to id {highest}, the model knows {rows} tokens"
        )


def _context_tokens(base_dir: Path, module: Any) -> int:
    config = module.config
    length = getattr(config, "max_position_embeddings", None)
    if not isinstance(length, int) or length < 8:
        raise _damaged(base_dir, f"max_position_embeddings is {length!r}")
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    if isinstance(window, int) and "sliding_attention" in kinds:
        return min(length, window)  # so far every layer sees everything
    return length


def _configured_ends(base_dir: Path, config: dict[str, Any], tokenizer: Tokenizer) -> list[int]:
    """Return the end-of-sequence ids that the directory names, the document separator first."""
    ids = [tokenizer.token_to_id(_END_OF_TEXT)]
    token = _read_json(base_dir, "tokenizer_config.json", required=False).get("eos_token")
    text = token.get("content") if isinstance(token, dict) else token
    if isinstance(text, str):
        ids.append(tokenizer.token_to_id(text))
    generation = _read_json(base_dir, "generation_config.json", required=False)
    for source in (config, generation):
        value = source.get("eos_token_id")
        ids.extend(value if isinstance(value, list) else [value])
    return list(dict.fromkeys(i for i in ids if isinstance(i, int)))


def _chat_template(base_dir: Path) -> str | None:
    """Return the template, which has a file of its own in newer directories."""
    try:
        return (base_dir / "chat_template.jinja").read_text(encoding="utf-8")
    except FileNotFoundError:
        template = _read_json(base_dir, "tokenizer_config.json", required=False).get(
            "chat_template"
        )
    except (OSError, ValueError) as error:
        raise _damaged(base_dir, "chat_template.jinja cannot be read") from error
    return template if isinstance(template, str) else None


def _special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the added tokens that mark structure, such as the turns of a chat."""
    return frozenset(i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special)


def _structural(tokenizer: Tokenizer, ids: frozenset[int]) -> re.Pattern[str]:
    """Return what finds these tokens' names in text; it matches nothing when there are none."""
    names = sorted(name for i in ids if (name := tokenizer.id_to_token(i)))
    return re.compile("|".join(map(re.escape, names)) or r"(?!)")
