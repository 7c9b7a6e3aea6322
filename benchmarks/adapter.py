"""Time the way from a commit's features to a live adapter, with random weights on the CPU.

    python -m benchmarks.adapter                      6 layers of width 256, factorized head
    python -m benchmarks.adapter --geometry 1.5b      Qwen2.5-Coder-1.5B's geometry
    python -m benchmarks.adapter --head paper         the paper's head (679 M parameters at 1.5b)

Steps: one GRU step, state to LoRA weights, publishing a directory, loading it, swapping it in,
and what the adapter adds to the forward pass of one token.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

import torch

from code2lora.adapters.layout import AdapterMetadata
from code2lora.adapters.load import load
from code2lora.adapters.publish import publish
from code2lora.hypernetwork.config import BaseConfig, GruConfig, HeadConfig, decoder_dims
from code2lora.hypernetwork.gru_family import GruFamily
from code2lora.hypernetwork.heads import build_head
from code2lora.hypernetwork.inject import LoraSlots

ALPHA = 32.0
RANK = 16


@dataclass(frozen=True)
class Geometry:
    """A decoder's sizes and those of the hypernetwork before it."""

    decoder: dict[str, Any]
    features: int
    hidden: int
    trunk: int
    runnable: bool
    """Small enough to time its forward pass too."""


GEOMETRIES = {
    "small": Geometry(
        decoder={
            "vocab_size": 8192,
            "hidden_size": 256,
            "intermediate_size": 704,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
        features=512,
        hidden=512,
        trunk=256,
        runnable=True,
    ),
    "1.5b": Geometry(
        decoder={
            "vocab_size": 151936,
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
        },
        features=2048,
        hidden=2048,
        trunk=1024,
        runnable=False,
    ),
}


def build_family(geometry: Geometry, kind: Literal["factorized", "paper"]) -> GruFamily:
    """Return a family with random weights and no encoder, which nothing here asks for."""
    n_layers, dims = decoder_dims(geometry.decoder)
    base = BaseConfig(id="random", n_layers=n_layers, dims=dims)
    head = HeadConfig(
        kind=kind,
        context_width=geometry.hidden,
        trunk_width=geometry.trunk,
        rank=RANK,
        alpha=ALPHA,
    )
    gru = GruConfig(
        diff_width=geometry.features,
        snapshot_width=geometry.features,
        hidden_width=geometry.hidden,
    )
    no_encoder: Any = None
    family = GruFamily(no_encoder, gru, build_head(head, base))
    return family.eval().requires_grad_(False)


def build_decoder(geometry: Geometry) -> Any:
    """Return the decoder; one too large to run has no weights and only takes adapters."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    with torch.device("cpu" if geometry.runnable else "meta"):
        model: Any = Qwen2ForCausalLM(Qwen2Config(**geometry.decoder))
    return model.eval()


def median_ms(call: Callable[[], object], repeat: int) -> float:
    """Return the median wall time of a call, in milliseconds, after one unmeasured call."""
    call()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def measure(geometry: Geometry, kind: Literal["factorized", "paper"], repeat: int) -> list[str]:
    """Return the table's lines."""
    family = build_family(geometry, kind)
    model = build_decoder(geometry)
    slots = LoraSlots(model)
    features = torch.randn(geometry.features)
    state = family.advance(family.initial(torch.randn(geometry.features)), features)
    lora = family.adapter(state)
    n_layers = geometry.decoder["num_hidden_layers"]
    numbers = count()

    def publish_next(root: Path) -> Path:
        # another commit every time, because an identical adapter is not written twice
        metadata = AdapterMetadata(
            repository="a" * 32,
            commit=f"{next(numbers):040x}"[::-1],
            state_sha256="0" * 64,
            checkpoint="0" * 64,
            base_model="random",
        )
        return publish(lora, metadata, root, n_layers=n_layers).path

    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        path = publish_next(Path(folder))
        size = sum(file.stat().st_size for file in path.iterdir())
        rows = [
            ("GRU step", median_ms(lambda: family.advance(state, features), repeat)),
            ("state to LoRA", median_ms(lambda: family.adapter(state), repeat)),
            ("publish", median_ms(lambda: publish_next(Path(folder)), repeat)),
            ("load", median_ms(lambda: load(path), repeat)),
            ("swap", median_ms(lambda: slots.set(lora), repeat)),
        ]
        if geometry.runnable:
            rows += forward_rows(model, slots, lora, repeat)
    n_parameters = sum(parameter.numel() for parameter in family.parameters())
    lines = [f"parameters {n_parameters / 1e6:10.1f} M", f"directory  {size / 1e6:10.1f} MB"]
    return lines + [f"{name:<28}{value:10.3f} ms" for name, value in rows]


def forward_rows(model: Any, slots: LoraSlots, lora: Any, repeat: int) -> list[tuple[str, float]]:
    """Return the time of one token's forward pass without and with an adapter."""
    ids = torch.zeros(1, 1, dtype=torch.int64)
    slots.set(None)
    plain = median_ms(lambda: model(input_ids=ids), repeat)
    slots.set(lora)
    adapted = median_ms(lambda: model(input_ids=ids), repeat)
    return [("forward, no adapter", plain), ("forward, adapter", adapted)]


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--geometry", choices=sorted(GEOMETRIES), default="small")
    parser.add_argument("--head", choices=["factorized", "paper"], default="factorized")
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--threads", type=int, default=0, help="0 lets torch choose")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"geometry {options.geometry}, head {options.head}, {torch.get_num_threads()} threads")
    for line in measure(GEOMETRIES[options.geometry], options.head, options.repeat):
        print(line)


if __name__ == "__main__":
    main()
