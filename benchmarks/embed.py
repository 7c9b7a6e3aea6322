"""Measure how fast diffs are embedded: windows across commits in one batch, or diff after diff.

    python -m benchmarks.embed                      a small random transformer, on the CPU
    python -m benchmarks.embed --full --device cuda --precision bfloat16
                                                    Qwen3-Embedding-0.6B's shapes

Weights are random: the time does not depend on them. The diffs are cut from Python's own source,
with lengths drawn like those of real commits (median 277 tokens, a long tail).
Both ways read the same diffs in turns, after a first round that is not counted.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

from code2lora.history.model import Diff, FileChange
from code2lora.hypernetwork.config import Recipe
from code2lora.hypernetwork.encoder_paper import DIFF_WINDOWS, PaperEncoder

RECIPE = Recipe(diff="paper", snapshot="paper", rules="paper")
MEDIAN_CHARS = 1000
SPREAD = 1.8
"""Of the logarithm of a diff's length; gives about the mean and the tail of the released data."""
MAX_CHARS = 200_000

SMALL: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 8192,
}
FULL: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_669,
}


@dataclass(frozen=True)
class Speed:
    """One way to read; medians over the rounds."""

    windows_per_s: float
    tokens_per_s: float
    seconds: float


@dataclass(frozen=True)
class Measured:
    """What one run of the benchmark found."""

    device: str
    precision: str
    n_parameters: int
    n_diffs: int
    n_windows: int
    n_tokens: int
    one_by_one: Speed
    across: Speed
    ratio: float
    """One by one / across, in time."""


def source_text() -> str:
    """Return Python's own source, some megabytes of it."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(root.glob("*.py")) + sorted(root.glob("[a-m]*/*.py"))
    return "".join(file.read_text("utf-8", "replace") for file in files[:300])


def make_diffs(text: str, n: int, seed: int = 0) -> list[Diff]:
    """Return diffs of added lines, of the lengths that commits have."""
    rng = random.Random(seed)
    diffs = []
    for i in range(n):
        length = min(MAX_CHARS, int(rng.lognormvariate(0, SPREAD) * MEDIAN_CHARS) + 100)
        start = rng.randrange(len(text) - MAX_CHARS)
        lines = text[start : start + length].split("\n")
        patch = f"diff --git a/{i}.py b/{i}.py\n@@ -1 +1,{len(lines)} @@\n+" + "\n+".join(lines)
        change = FileChange(f"{i}.py", None, "M", "", "", patch + "\n")
        diffs.append(Diff(commit=f"{i:040x}", parent=None, changes=(change,), skipped=()))
    return diffs


def make_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE that ends a text with a token of its own, as the real one does."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8191,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    made.train_from_iterator(text[:2_000_000].splitlines(keepends=True), trainer)
    made.add_special_tokens(["<end>"])
    made.post_processor = processors.TemplateProcessing(
        single="$A <end>", special_tokens=[("<end>", made.token_to_id("<end>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<end>", eos_token="<end>", padding_side="left"
    )


def make_encoder(
    sizes: dict[str, Any], text: str, device: str, precision: torch.dtype
) -> PaperEncoder:
    """Return an encoder with random weights, loaded as a real one is."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    with tempfile.TemporaryDirectory() as name:
        parts, whole = Path(name) / "parts", Path(name) / "whole"
        make_tokenizer(text).save_pretrained(parts)
        model: Any = Qwen3Model(Qwen3Config(**sizes, max_position_embeddings=32_768))
        model.to(torch.bfloat16).save_pretrained(parts)
        modules: list[Any] = [Transformer(str(parts)), Pooling(sizes["hidden_size"])]
        SentenceTransformer(modules=modules, device="cpu").save(str(whole))
        return PaperEncoder.load(whole, RECIPE, device, precision)


def seconds(call: Callable[[], object], device: str) -> float:
    """Return the wall time of a call; an accelerator has to have finished."""
    start = time.perf_counter()
    call()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def count_parameters(sizes: dict[str, Any]) -> int:
    """Return how many numbers a transformer of these sizes has."""
    with torch.device("meta"):
        return sum(p.numel() for p in Qwen3Model(Qwen3Config(**sizes)).parameters())


def measure(
    encoder: PaperEncoder,
    diffs: Sequence[Diff],
    *,
    rounds: int,
    device: str,
    precision: str,
    n_parameters: int,
) -> Measured:
    """Return the speed of both ways over the same diffs."""
    lengths = [reading.n_tokens for reading in encoder.read_diffs(diffs, across=True)]
    encoder.read_diffs(diffs[: len(diffs) // 4])
    times: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(rounds):
        for across in (False, True):
            read = partial(encoder.read_diffs, diffs, across=across)
            times[across].append(seconds(read, device))
    n_tokens = sum(lengths)
    n_windows = sum(1 for length in lengths for _ in DIFF_WINDOWS.cut(range(length)))
    speeds = {
        across: Speed(n_windows / (s := statistics.median(found)), n_tokens / s, s)
        for across, found in times.items()
    }
    return Measured(
        device=torch.cuda.get_device_name() if device.startswith("cuda") else device,
        precision=precision,
        n_parameters=n_parameters,
        n_diffs=len(diffs),
        n_windows=n_windows,
        n_tokens=n_tokens,
        one_by_one=speeds[False],
        across=speeds[True],
        ratio=speeds[False].seconds / speeds[True].seconds,
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--full", action="store_true", help="Qwen3-Embedding-0.6B's shapes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--diffs", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.manual_seed(0)
    text = source_text()
    sizes = FULL if given.full else SMALL
    encoder = make_encoder(sizes, text, given.device, getattr(torch, given.precision))
    diffs = make_diffs(text, given.diffs or (1000 if given.full else 60))
    found = measure(
        encoder,
        diffs,
        rounds=given.rounds,
        device=given.device,
        precision=given.precision,
        n_parameters=count_parameters(sizes),
    )
    if given.json:
        print(json.dumps(asdict(found), indent=2))
        return
    print(
        f"{found.n_diffs} diffs, {found.n_windows:,} windows, {found.n_tokens:,} tokens; "
        f"{found.n_parameters / 1e6:.1f} M parameters, {found.device}, {found.precision}"
    )
    for name, speed in (("one by one", found.one_by_one), ("across", found.across)):
        print(
            f"{name:<12}{speed.windows_per_s:>10,.1f} windows/s"
            f"{speed.tokens_per_s:>12,.0f} tokens/s{speed.seconds:>9.2f} s"
        )
    print(f"ratio       {found.ratio:>10.2f}")


if __name__ == "__main__":
    main()
