"""Measure what an adapter costs a completion: tokens a second and time to the first token.

    python benchmarks/completion.py MODEL_DIR [--rank 16] [--json]

Completes the same prompts with the base model and with an adapter of every projection and layer,
in one engine and in turns, so that both meet the same machine: quote the ratios, not the times.
Where other programs compete for the machine, CPU time says more than the clock.
Reads a model directory and Python's own source for prompts; writes nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from code2lora.hypernetwork.config import decoder_dims
from code2lora.hypernetwork.lora import Lora
from code2lora.serving.adapter_cache import LoadedAdapter
from code2lora.serving.completion import AdapterIdentity, CompletionRequest
from code2lora.serving.engine import Engine
from code2lora.serving.model import BaseModel


@dataclass(frozen=True)
class Compared:
    """One quantity for the base model and with an adapter; medians over the rounds."""

    base: float
    adapter: float
    ratio: float
    """Median of the paired rounds' adapter / base."""
    ratio_low: float
    """Quartile below."""
    ratio_high: float
    """Quartile above."""


@dataclass(frozen=True)
class Measured:
    """What one run of the benchmark found."""

    n_prompt_tokens: int
    n_tokens: int
    rank: int
    n_rounds: int
    threads: int
    tokens_per_s: Compared
    first_token_ms: Compared
    cpu_ms: Compared
    """CPU time of a whole completion, all threads."""


def main() -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a model directory, or that of a decoder alone")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    base = options.model / "base" if (options.model / "base").is_dir() else options.model
    model = BaseModel.load(base, device=options.device, threads=options.threads)
    found = measure(
        model,
        rank=options.rank,
        n_prompt_tokens=options.prompt_tokens,
        n_tokens=options.tokens,
        n_rounds=options.rounds,
    )
    print(json.dumps(asdict(found), indent=2) if options.json else table(found))


def measure(
    model: BaseModel, *, rank: int, n_prompt_tokens: int, n_tokens: int, n_rounds: int
) -> Measured:
    """Complete in turns with the base model and an adapter."""
    # without end tokens every completion has the same length
    engine = Engine(replace(model, end_ids=frozenset()))
    adapter = random_adapter(engine, rank)
    requests = prompts(model, n_prompt_tokens, n_tokens, n_rounds)
    rounds: list[list[tuple[float, float]]] = []
    for i, request in enumerate([requests[0], *requests]):
        order: list[LoadedAdapter | None] = [None, adapter]
        runs = {run is None: timed(engine, request, run) for run in order[:: 1 if i % 2 else -1]}
        if i:  # the first round warms up
            rounds.append(list(zip(runs[True], runs[False], strict=True)))
    rates, firsts, cpu = (compared(pairs) for pairs in zip(*rounds, strict=True))
    return Measured(
        n_prompt_tokens=n_prompt_tokens,
        n_tokens=n_tokens,
        rank=rank,
        n_rounds=n_rounds,
        threads=torch.get_num_threads(),
        tokens_per_s=rates,
        first_token_ms=firsts,
        cpu_ms=cpu,
    )


def timed(
    engine: Engine, request: CompletionRequest, adapter: LoadedAdapter | None
) -> tuple[float, float, float]:
    """Return tokens a second after the first token, ms to the first, and CPU ms of it all."""
    began_s = time.process_time()
    done = engine.complete(request, adapter)
    cpu_ms = (time.process_time() - began_s) * 1000
    assert done.first_token_ms is not None and done.n_tokens > 1
    rate = (done.n_tokens - 1) * 1000 / (done.total_ms - done.first_token_ms)
    return rate, done.first_token_ms, cpu_ms


def prompts(
    model: BaseModel, n_prompt_tokens: int, n_tokens: int, n: int
) -> list[CompletionRequest]:
    """Return stretches of Python source of the wanted length in tokens."""
    ids = model.encode_text(Path(argparse.__file__).read_text(encoding="utf-8"))
    starts = [i * (len(ids) - n_prompt_tokens) // n for i in range(n)]
    texts = [model.decode(ids[start : start + n_prompt_tokens]) for start in starts]
    return [CompletionRequest(prompt=text, suffix="", max_tokens=n_tokens) for text in texts]


def random_adapter(engine: Engine, rank: int) -> LoadedAdapter:
    """Return an adapter with a pair of its own in every layer; what it says does not matter."""
    config = engine.model.module.config
    n_layers, dims = decoder_dims(config.to_dict())  # type: ignore[union-attr, operator]
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(n_layers, *shape, generator=random) * 0.01

    lora = Lora(
        a={t: draw(rank, d_in) for t, (d_in, _) in dims.items()},
        b={t: draw(d_out, rank) for t, (_, d_out) in dims.items()},
        rank=rank,
        alpha=2.0 * rank,
    )
    return engine.place(AdapterIdentity(None, None, "random"), lora)


def compared(pairs: Sequence[tuple[float, float]]) -> Compared:
    """Return medians of (base, adapter) pairs and the quartiles of their ratios."""
    low, middle, high = statistics.quantiles([adapter / base for base, adapter in pairs], n=4)
    return Compared(
        base=statistics.median(base for base, _ in pairs),
        adapter=statistics.median(adapter for _, adapter in pairs),
        ratio=middle,
        ratio_low=low,
        ratio_high=high,
    )


def table(found: Measured) -> str:
    """Return the figures as lines for people."""
    rows = [
        ("tokens/s", found.tokens_per_s),
        ("first token, ms", found.first_token_ms),
        ("CPU, ms", found.cpu_ms),
    ]
    lines = [
        f"prompt {found.n_prompt_tokens} tokens, completion {found.n_tokens}, rank {found.rank}, "
        f"{found.n_rounds} rounds, {found.threads} threads",
        f"{'':18}{'base':>9}{'adapter':>9}{'ratio':>8}   quartiles",
    ]
    for name, row in rows:
        lines.append(
            f"{name:18}{row.base:9.1f}{row.adapter:9.1f}{row.ratio:8.3f}   "
            f"{row.ratio_low:.3f} to {row.ratio_high:.3f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
