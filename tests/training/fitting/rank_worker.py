"""One of several processes that train together: `python -m tests.training.fitting.rank_worker`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from code2lora.training.data.dataset import LINES, load_repositories
from code2lora.training.data.shards import read_shards
from code2lora.training.fitting.fit import FitRun, fit
from code2lora.training.fitting.items import ItemBuilder, ItemConfig
from code2lora.training.fitting.learner import LearnerConfig, build_learner
from code2lora.training.fitting.objective import freeze
from code2lora.training.fitting.schedule import FitConfig
from code2lora.training.fitting.windows import WindowConfig
from tests.training import worlds

CONFIG = FitConfig(
    learner=LearnerConfig(encoder_width=12, hidden_width=14, trunk_width=10, rank=3, alpha=6.0),
    windows=WindowConfig(repositories=5, commits=3, states=2, horizon=6, taught_share=0.7),
    items=ItemConfig(max_tokens=40, prefix_tokens=16, suffix_tokens=6),
    max_steps=5,
    learning_rate=1e-2,
    warmup_steps=2,
    length_power=0.5,
    margin_rows=6,
    distillation_weight=0.3,
    teacher_tokens=16,
    settle_every=2,
    autocast_bf16=False,
    tensorboard=False,
)


def train(mined: Path, out_dir: Path, *, stop_after: int | None = None) -> list[float]:
    """Train below a folder, save the learner there, and return the losses of the steps."""
    tokenizer = worlds.make_tokenizer()
    model, base = worlds.make_base(tokenizer)
    data = load_repositories(read_shards(mined), tokenizer)
    run = FitRun(
        CONFIG,
        out_dir / "run",
        learner=build_learner(CONFIG.learner, base, tokenizer, LINES, data, seed=1),
        base=freeze(model, autocast=False),
        builder=ItemBuilder(tokenizer, CONFIG.items),
        repositories=[*data, *data],
    )
    losses: list[float] = []
    result = fit(
        run,
        progress=lambda now: losses.append(now.loss + now.margin_loss + now.distillation),
        stop=lambda: stop_after is not None and len(losses) >= stop_after,
    )
    if result.finished:
        save_file(run.learner.state_dict(), out_dir / f"learner-{_rank()}.safetensors")
    return losses


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def main() -> None:
    """Train twice: at once, and in two pieces."""
    from accelerate import PartialState

    torch.set_num_threads(1)
    PartialState(cpu=True)
    mined, out_dir = map(Path, sys.argv[1:])
    losses = train(mined, out_dir / "whole")
    resumed = train(mined, out_dir / "cut", stop_after=2)
    resumed += train(mined, out_dir / "cut")
    if _rank() == 0:
        lines = [" ".join(f"{loss:.9f}" for loss in each) for each in (losses, resumed)]
        (out_dir / "losses.txt").write_text("\n".join(lines))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
