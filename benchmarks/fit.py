"""Time a training step against the released loop's order of work, with random weights.

    python -m benchmarks.fit --size cpu                 a few seconds on one core
    python -m benchmarks.fit --size full                Qwen2.5-Coder-1.5B's shapes, on a GPU
    python -m benchmarks.fit --size full --json figures.json

Both train the same GRU and head with AdamW on rows of the same length, which ask for the same few
tokens. The released loop takes one repository at a time: a GRU step, one adapter, one row through
the decoder with the logits of all its tokens, and an optimizer step for every commit. Ours takes a
window of commits of several repositories, every row with the adapter of its own state, several
rows in one pass, logits of the asked tokens alone, and one optimizer step for all. Each measurement
has a process of its own, so that the peaks of memory are its own too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from code2lora.adapters.layout import AdapterMetadata
from code2lora.adapters.publish import publish
from code2lora.hypernetwork.config import BaseConfig, decoder_dims
from code2lora.hypernetwork.gru_family import GruFamily
from code2lora.hypernetwork.heads import first
from code2lora.hypernetwork.inject import LoraSlots
from code2lora.training.fitting.items import IGNORED, Item
from code2lora.training.fitting.learner import Learner, LearnerConfig, build_frozen_learner
from code2lora.training.fitting.memory import peak_bytes
from code2lora.training.fitting.objective import freeze
from code2lora.training.fitting.optimizer import build_optimizer
from code2lora.training.fitting.schedule import FitConfig
from code2lora.training.fitting.step import learn
from code2lora.training.fitting.windows import Window, WindowConfig

HeadKind = Literal["paper", "factorized"]
HEADS: tuple[HeadKind, ...] = ("paper", "factorized")
KINDS = ("ours", "released", "parts", "encoder")


@dataclass(frozen=True)
class Size:
    """Shapes of everything."""

    decoder: dict[str, Any]
    encoder: dict[str, Any]
    n_tokens: int
    """Of a row."""
    n_asked: int
    features: int
    hidden: int
    trunk: int
    rank: int
    repositories: int
    commits: int
    """Of our windows."""
    rows_per_state: int
    rows_per_pass: int
    checkpointing: bool
    released_commits: int
    """Commits of a measured stretch of the released loop."""
    encoder_windows: int
    """Of 512 tokens, in one batch."""


SIZES = {
    "cpu": Size(
        decoder={
            "vocab_size": 32_768,
            "hidden_size": 128,
            "intermediate_size": 352,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
        encoder={
            "vocab_size": 4096,
            "hidden_size": 128,
            "intermediate_size": 352,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
        },
        n_tokens=256,
        n_asked=12,
        features=128,
        hidden=256,
        trunk=128,
        rank=16,
        repositories=4,
        commits=16,
        rows_per_state=4,
        rows_per_pass=8,
        checkpointing=False,
        released_commits=4,
        encoder_windows=8,
    ),
    "full": Size(
        decoder={
            "vocab_size": 151_936,
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "max_position_embeddings": 32_768,
        },
        encoder={
            "vocab_size": 151_669,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
        n_tokens=2048,
        n_asked=12,
        features=2048,
        hidden=2048,
        trunk=1024,
        rank=16,
        repositories=8,
        commits=16,
        rows_per_state=8,
        rows_per_pass=8,
        checkpointing=True,
        released_commits=8,
        encoder_windows=64,
    ),
}


@dataclass(frozen=True)
class Bench:
    """What a measurement needs."""

    size: Size
    head: HeadKind
    device: torch.device
    repeat: int

    def seconds(self, call: Callable[[], object]) -> float:
        """Return the median time of a call, after one that is not measured."""
        times = []
        for _ in range(self.repeat + 1):
            self._wait()
            began = time.perf_counter()
            call()
            self._wait()
            times.append(time.perf_counter() - began)
        return statistics.median(times[1:])

    def build_decoder(self) -> Any:
        """Return the decoder; bfloat16 on a GPU, as in training."""
        from transformers import Qwen2Config, Qwen2ForCausalLM

        config = Qwen2Config(**self.size.decoder)
        config._attn_implementation = "eager" if self.device.type == "cpu" else "sdpa"
        with self.device:
            model: Any = Qwen2ForCausalLM(config)
        dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        return model.to(dtype).eval().requires_grad_(False)

    def build_learner(self) -> Learner:
        """Return a GRU family on frozen features."""
        n_layers, dims = decoder_dims(self.size.decoder)
        learner = build_frozen_learner(
            self.config().learner,
            BaseConfig(id="random", n_layers=n_layers, dims=dims),
            self.size.features,
            self.size.features,
            seed=0,
        )
        return learner.to(self.device)

    def config(self) -> FitConfig:
        """Return the settings of our step."""
        size = self.size
        return FitConfig(
            learner=LearnerConfig(
                encoder="frozen",
                hidden_width=size.hidden,
                head=self.head,
                trunk_width=size.trunk,
                rank=size.rank,
                alpha=2.0 * size.rank,
            ),
            windows=WindowConfig(repositories=size.repositories, commits=size.commits),
            margin_rows=0,
            rows_per_pass=size.rows_per_pass,
            checkpointing=size.checkpointing,
        )

    def item(self) -> Item:
        """Return a row of random tokens."""
        ids = torch.randint(0, self.size.decoder["vocab_size"], (self.size.n_tokens,)).tolist()
        return Item(ids=tuple(ids), n_given=self.size.n_tokens - self.size.n_asked)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def measure_ours(bench: Bench) -> dict[str, float]:
    """Return tasks per second of a step of `fit` and the memory that it takes."""
    size, config = bench.size, bench.config()
    learner = bench.build_learner()
    base = freeze(
        bench.build_decoder(),
        autocast=True,
        n_lanes=torch.get_num_threads(),
        rows_per_pass=config.rows_per_pass,
        checkpointing=config.checkpointing,
    )
    optimizer = build_optimizer(learner, config)
    windows = [
        Window(
            place=place,
            repository=place,
            snapshot=torch.randn(size.features),
            diffs=tuple(torch.randn(size.commits, size.features)),
            items=tuple(bench.item() for _ in range(size.rows_per_state)),
            targets=(),
            positions=(size.commits,) * size.rows_per_state,
            taught=(None,) * size.rows_per_state,
        )
        for place in range(size.repositories)
    ]

    def step() -> None:
        learn(learner, base, windows, {}, config, 0)
        nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimizer.step()

    if torch.get_num_threads() > 1 and bench.device.type == "cpu":
        torch.set_num_threads(1)  # each lane has a core
    seconds = bench.seconds(step)
    n_tasks = size.repositories * size.rows_per_state
    return {"tasks_per_s": n_tasks / seconds, "peak_gib": peak_bytes(bench.device) / 2**30}


def measure_released(bench: Bench) -> dict[str, float]:
    """Return the same of the released loop's order of work."""
    size = bench.size
    learner, model = bench.build_learner(), bench.build_decoder()
    slots = LoraSlots(model)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=5e-5)
    diffs = torch.randn(size.released_commits, 1, size.features, device=bench.device)
    rows = [bench.item() for _ in range(size.rows_per_state)]
    autocast = torch.autocast(bench.device.type, torch.bfloat16, enabled=bench.device.type == "cpu")

    def commit(hidden: Tensor, diff: Tensor) -> Tensor:
        family: Any = learner.family
        after: Tensor = family.advance_states(hidden, diff[:, None])[:, 1]
        lora = first(family.lora(after))
        pairs = [*lora.a.values(), *lora.b.values()]
        leaves = {id(pair): pair.detach().requires_grad_() for pair in pairs}
        held = type(lora)(
            a={t: leaves[id(v)] for t, v in lora.a.items()},
            b={t: leaves[id(v)] for t, v in lora.b.items()},
            rank=lora.rank,
            alpha=lora.alpha,
        )
        for row in rows:
            ids = torch.tensor([row.ids], device=bench.device)
            labels = ids.clone()
            labels[:, : row.n_given] = IGNORED
            with slots.use(held), autocast:
                loss = model(input_ids=ids, labels=labels, use_cache=False).loss
                torch.autograd.backward(loss * row.n_asked)
        torch.autograd.backward(pairs, [leaves[id(pair)].grad for pair in pairs])
        nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return after.detach()

    def stretch() -> None:
        hidden = torch.zeros(1, size.hidden, device=bench.device)
        for diff in diffs:
            hidden = commit(hidden, diff)

    seconds = bench.seconds(stretch)
    n_tasks = size.released_commits * size.rows_per_state
    return {"tasks_per_s": n_tasks / seconds, "peak_gib": peak_bytes(bench.device) / 2**30}


@torch.inference_mode()
def measure_parts(bench: Bench) -> dict[str, float]:
    """Return the times, in milliseconds, of the way from a commit to its adapter's files."""
    learner = bench.build_learner().eval()
    family = learner.family
    assert isinstance(family, GruFamily)
    features = torch.randn(bench.size.features)
    state = family.initial(features)
    lora = family.adapter(state)
    numbers = count()
    with tempfile.TemporaryDirectory() as folder:

        def publish_next() -> None:
            # another commit every time, because an identical adapter is not written twice
            metadata = AdapterMetadata(
                repository="a" * 32,
                commit=f"{next(numbers):040x}"[::-1],
                state_sha256="0" * 64,
                checkpoint="0" * 64,
                base_model="random",
            )
            n_layers = bench.size.decoder["num_hidden_layers"]
            publish(lora.to("cpu", torch.float32), metadata, Path(folder), n_layers=n_layers)

        return {
            "gru_step_ms": 1000 * bench.seconds(lambda: family.advance(state, features)),
            "state_to_adapter_ms": 1000 * bench.seconds(lambda: family.adapter(state)),
            "publish_ms": 1000 * bench.seconds(publish_next),
            "parameters_m": sum(p.numel() for p in family.parameters()) / 1e6,
        }


@torch.inference_mode()
def measure_encoder(bench: Bench) -> dict[str, float]:
    """Return how many windows of 512 tokens an encoder of these shapes reads in a second."""
    from transformers import Qwen3Config, Qwen3Model

    config = Qwen3Config(**bench.size.encoder)
    with bench.device:
        model: Any = Qwen3Model(config)
    model = model.to(torch.float32 if bench.device.type == "cpu" else torch.bfloat16).eval()
    n = bench.size.encoder_windows
    ids = torch.randint(0, config.vocab_size, (n, 512), device=bench.device)
    seconds = bench.seconds(lambda: model(input_ids=ids, use_cache=False))
    return {"windows_per_s": n / seconds, "peak_gib": peak_bytes(bench.device) / 2**30}


MEASURES: dict[str, Callable[[Bench], dict[str, float]]] = {
    "ours": measure_ours,
    "released": measure_released,
    "parts": measure_parts,
    "encoder": measure_encoder,
}


def run_in_process(options: argparse.Namespace, kind: str, head: str) -> dict[str, float]:
    """Return one measurement, taken by a process of its own."""
    command = [sys.executable, "-m", "benchmarks.fit", "--size", options.size, "--kind", kind]
    command += ["--head", head, "--device", options.device, "--repeat", str(options.repeat)]
    command += ["--threads", str(options.threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:  # out of memory, say; the others are measured all the same
        return {"failed": float(done.returncode)}
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Print a table of every measurement and return it."""
    found: dict[str, dict[str, float]] = {}
    for kind in KINDS:
        for head in HEADS if kind != "encoder" else HEADS[:1]:
            name = kind if kind == "encoder" else f"{kind}, {head} head"
            found[name] = run_in_process(options, kind, head)
            cells = "  ".join(f"{key} {value:,.2f}" for key, value in found[name].items())
            print(f"{name:<26}{cells}", flush=True)
    for head in HEADS:
        ours, released = (found[f"{kind}, {head} head"] for kind in ("ours", "released"))
        if "failed" not in ours | released:
            ratio = ours["tasks_per_s"] / released["tasks_per_s"]
            found[f"ours / released, {head} head"] = {"tasks_per_s": ratio}
            print(f"ours / released, {head} head: {ratio:.2f} times the tasks per second")
    return found


def main() -> None:
    """Print one table, or with --kind one measurement as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", choices=sorted(SIZES), default="cpu")
    parser.add_argument("--device", default="", help="the default: cpu, and cuda for full")
    parser.add_argument("--kind", choices=KINDS)
    parser.add_argument("--head", choices=HEADS, default="paper")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="on the CPU")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    options.device = options.device or ("cuda" if options.size == "full" else "cpu")
    if options.kind is None:
        print(f"size {options.size} on {options.device}, torch {torch.__version__}")
        found = compare(options)
        if options.json:
            options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        return
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    bench = Bench(SIZES[options.size], options.head, torch.device(options.device), options.repeat)
    print(json.dumps(MEASURES[options.kind](bench)))


if __name__ == "__main__":
    main()
