"""Measure what adapters cost a completion, what sharing passes gains, and how long a swap takes.

    python benchmarks/serving.py MODEL_DIR [--part cost|share|swap] [--rank 16] [--json]

cost    the same prompts with the base model and with an adapter, alone, in one engine and in turns
share   8 requests at once over 4 repositories: our engine over its own HTTP-free interface, and
        transformers' `generate` with PEFT, one request after another and as one mixed batch
swap    a new generation from its directory to ready, alone and while others complete

Both sides of a comparison meet the same machine: quote the ratios, not the times. Where other
programs compete for the machine, CPU time says more than the clock. Reads a model directory and
Python's own source for prompts; writes adapters into a temporary directory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from code2lora.adapters.layout import AdapterMetadata
from code2lora.adapters.publish import publish
from code2lora.hypernetwork.config import decoder_dims
from code2lora.hypernetwork.lora import Lora
from code2lora.serving.adapter_cache import LoadedAdapter
from code2lora.serving.completion import AdapterIdentity, CompletionRequest
from code2lora.serving.engine import Engine
from code2lora.serving.model import BaseModel

N_REQUESTS, N_REPOSITORIES = 8, 4
N_SWAPS = 100


@dataclass(frozen=True)
class Compared:
    """One quantity for a reference and for what is measured; medians over the rounds."""

    reference: float
    measured: float
    ratio: float
    """Median of the paired rounds' measured / reference."""
    ratio_low: float
    """Quartile below."""
    ratio_high: float
    """Quartile above."""


@dataclass(frozen=True)
class Cost:
    """An adapter against the base model, one request at a time."""

    tokens_per_s: Compared
    first_token_ms: Compared
    cpu_ms: Compared
    """CPU time of a whole completion, all threads."""


@dataclass(frozen=True)
class Shared:
    """Our engine against transformers and PEFT; tokens a second of all requests together."""

    against_sequential: Compared
    against_mixed_batch: Compared


@dataclass(frozen=True)
class Swap:
    """Milliseconds from a directory to ready."""

    idle_p50: float
    idle_p95: float
    busy_p50: float
    busy_p95: float
    n: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is measured."""

    rank: int
    n_prompt_tokens: int
    n_tokens: int
    n_rounds: int


def main() -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a model directory, or that of a decoder alone")
    parser.add_argument("--part", choices=["cost", "share", "swap"], action="append")
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
    # without end tokens every completion has the same length
    model = replace(model, end_ids=frozenset())
    plan = Plan(
        rank=options.rank,
        n_prompt_tokens=options.prompt_tokens,
        n_tokens=options.tokens,
        n_rounds=options.rounds,
    )
    parts: dict[str, Callable[[], Any]] = {
        "cost": lambda: cost(model, plan),
        "share": lambda: share(model, base, plan),
        "swap": lambda: swap(model, plan),
    }
    found = {name: asdict(parts[name]()) for name in options.part or parts}
    setting = {**asdict(plan), "threads": torch.get_num_threads(), "device": options.device}
    print(json.dumps({"setting": setting, **found}, indent=2) if options.json else table(found))


# -- what an adapter costs ------------------------------------------------------------------------


def cost(model: BaseModel, plan: Plan) -> Cost:
    """Complete in turns with the base model and an adapter, without remembered prefixes."""
    engine = Engine(model, prefix_bytes=0)
    adapter = engine.place(AdapterIdentity(None, None, "random"), random_lora(model, plan.rank, 0))
    requests = prompts(model, plan, plan.n_rounds)
    rounds: list[list[tuple[float, float]]] = []
    for i, request in enumerate([requests[0], *requests]):
        order: list[LoadedAdapter | None] = [None, adapter]
        runs = {run is None: timed(engine, request, run) for run in order[:: 1 if i % 2 else -1]}
        if i:  # the first round warms up
            rounds.append(list(zip(runs[True], runs[False], strict=True)))
    engine.close()
    return Cost(*(compared(pairs) for pairs in zip(*rounds, strict=True)))


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


# -- what sharing passes gains --------------------------------------------------------------------


def share(model: BaseModel, base: Path, plan: Plan) -> Shared:
    """Complete the same 8 prompts over 4 adapters in three ways, in turns."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [publish_adapter(Path(folder), model, plan.rank, i) for i in range(N_REPOSITORIES)]
        peft = load_peft(base, paths, model)
        engine = Engine(model, prefix_bytes=0)
        adapters = [engine.adapter(path) for path in paths]
        requests = prompts(model, plan, N_REQUESTS)
        ids = [model.encode_text(request.prompt)[-plan.n_prompt_tokens :] for request in requests]
        ways: list[Callable[[], None]] = [
            lambda: together(engine, requests, adapters),
            lambda: one_by_one(peft, ids, plan.n_tokens),
            lambda: mixed_batch(peft, ids, plan.n_tokens),
        ]
        rates = [tokens_per_s(ways, i, plan) for i in range(max(3, plan.n_rounds // 4) + 1)][1:]
        engine.close()
    return Shared(
        against_sequential=compared([(one, ours) for ours, one, _ in rates]),
        against_mixed_batch=compared([(batch, ours) for ours, _, batch in rates]),
    )


def tokens_per_s(ways: Sequence[Callable[[], None]], turn: int, plan: Plan) -> list[float]:
    """Return each way's tokens a second, beginning with another one every turn."""
    rates = [0.0] * len(ways)
    for k in range(len(ways)):
        i = (turn + k) % len(ways)
        began_s = time.perf_counter()
        ways[i]()
        rates[i] = N_REQUESTS * plan.n_tokens / (time.perf_counter() - began_s)
    return rates


def together(
    engine: Engine, requests: Sequence[CompletionRequest], adapters: Sequence[LoadedAdapter]
) -> None:
    """Have the engine complete all at once."""
    left = threading.Semaphore(0)
    failed: list[Exception] = []

    def on_done(result: object) -> None:
        if isinstance(result, Exception):
            failed.append(result)
        left.release()

    for i, request in enumerate(requests):
        engine.submit(request, adapters[i % len(adapters)], on_done=on_done)
    for _ in requests:
        left.acquire()
    assert not failed, failed


def load_peft(base: Path, paths: Sequence[Path], model: BaseModel) -> Any:
    """Return the decoder with all adapters, as transformers and PEFT load it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        decoder: Any = AutoModelForCausalLM.from_pretrained(
            base, local_files_only=True, dtype=model.dtype
        )
        wrapped: Any = PeftModel.from_pretrained(decoder, str(paths[0]), adapter_name="r0")
        for i, path in enumerate(paths[1:], start=1):
            wrapped.load_adapter(str(path), adapter_name=f"r{i}")
    return wrapped.to(model.device).eval()


@torch.inference_mode()
def one_by_one(peft: Any, ids: Sequence[list[int]], n_tokens: int) -> None:
    """Generate for each request with its adapter set."""
    for i, prompt in enumerate(ids):
        peft.set_adapter(f"r{i % N_REPOSITORIES}")
        generate(peft, torch.tensor([prompt], device=peft.device), n_tokens)


@torch.inference_mode()
def mixed_batch(peft: Any, ids: Sequence[list[int]], n_tokens: int) -> None:
    """Generate for all requests in one batch that names an adapter for each row."""
    longest = max(map(len, ids))
    padded = [[0] * (longest - len(prompt)) + prompt for prompt in ids]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in ids]
    names = [f"r{i % N_REPOSITORIES}" for i in range(len(ids))]
    device = peft.device
    generate(
        peft,
        torch.tensor(padded, device=device),
        n_tokens,
        attention_mask=torch.tensor(mask, device=device),
        adapter_names=names,
    )


def generate(peft: Any, ids: torch.Tensor, n_tokens: int, **options: Any) -> None:
    """Generate greedily, exactly so many tokens."""
    options.setdefault("attention_mask", torch.ones_like(ids))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.generate(
            input_ids=ids,
            max_new_tokens=n_tokens,
            min_new_tokens=n_tokens,
            do_sample=False,
            pad_token_id=0,
            **options,
        )


# -- how long a swap takes ------------------------------------------------------------------------


def swap(model: BaseModel, plan: Plan) -> Swap:
    """Bring in one new generation after another, first alone and then beside completions."""
    engine = Engine(model)
    requests = prompts(model, replace(plan, n_tokens=32), N_REQUESTS)
    with tempfile.TemporaryDirectory() as folder:
        paths = [publish_adapter(Path(folder), model, plan.rank, i) for i in range(2 * N_SWAPS + 1)]
        engine.adapter(paths.pop())
        idle = [engine.adapter(path).swap_ms for path in paths[:N_SWAPS]]
        ended = threading.Event()

        def keep_busy(request: CompletionRequest) -> None:
            while not ended.is_set():
                engine.complete(request)

        busy = []
        with ThreadPoolExecutor(4) as pool:
            for request in requests[:4]:
                pool.submit(keep_busy, request)
            for path in paths[N_SWAPS:]:
                busy.append(engine.adapter(path).swap_ms)
                time.sleep(0.01)
            ended.set()
    engine.close()
    return Swap(*percentiles(idle), *percentiles(busy), n=N_SWAPS)


def percentiles(values: Sequence[float]) -> tuple[float, float]:
    """Return the median and the 95th percentile."""
    cuts = statistics.quantiles(values, n=20)
    return statistics.median(values), cuts[-1]


# -- what is measured with ------------------------------------------------------------------------


def prompts(model: BaseModel, plan: Plan, n: int) -> list[CompletionRequest]:
    """Return stretches of Python source of the wanted length in tokens."""
    ids = model.encode_text(Path(argparse.__file__).read_text(encoding="utf-8"))
    size = plan.n_prompt_tokens
    starts = [i * (len(ids) - size) // n for i in range(n)]
    texts = [model.decode(ids[start : start + size]) for start in starts]
    return [CompletionRequest(prompt=text, suffix="", max_tokens=plan.n_tokens) for text in texts]


def random_lora(model: BaseModel, rank: int, seed: int) -> Lora:
    """Return a pair of its own for every layer; what it says does not matter."""
    config: Any = model.module.config
    n_layers, dims = decoder_dims(config.to_dict())
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(n_layers, *shape, generator=random) * 0.01

    return Lora(
        a={t: draw(rank, d_in) for t, (d_in, _) in dims.items()},
        b={t: draw(d_out, rank) for t, (_, d_out) in dims.items()},
        rank=rank,
        alpha=2.0 * rank,
    )


def publish_adapter(root: Path, model: BaseModel, rank: int, number: int) -> Path:
    """Write an adapter directory as the daemon writes it."""
    config: Any = model.module.config
    origin = AdapterMetadata(
        repository="a" * 32,
        commit=f"{number + 1:012x}" + "0" * 28,
        state_sha256="0" * 64,
        checkpoint="0" * 64,
        base_model="random",
    )
    lora = random_lora(model, rank, number)
    return publish(lora, origin, root, n_layers=config.num_hidden_layers).path


def compared(pairs: Sequence[tuple[float, float]]) -> Compared:
    """Return medians of (reference, measured) pairs and the quartiles of their ratios."""
    low, middle, high = statistics.quantiles([new / old for old, new in pairs], n=4)
    return Compared(
        reference=statistics.median(old for old, _ in pairs),
        measured=statistics.median(new for _, new in pairs),
        ratio=middle,
        ratio_low=low,
        ratio_high=high,
    )


def table(found: dict[str, dict[str, Any]]) -> str:
    """Return the figures as lines for people."""
    lines = []
    for part, values in found.items():
        lines.append(f"{part:22}{'reference':>10}{'measured':>10}{'ratio':>8}   quartiles")
        for name, row in values.items():
            if isinstance(row, dict):
                lines.append(
                    f"  {name:20}{row['reference']:10.1f}{row['measured']:10.1f}"
                    f"{row['ratio']:8.3f}   {row['ratio_low']:.3f} to {row['ratio_high']:.3f}"
                )
            else:
                lines.append(f"  {name:20}{row:20.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
