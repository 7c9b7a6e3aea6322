"""`code2lora train`: from repositories to a model, in stages that can be cut off and resumed."""

from __future__ import annotations

import click

from code2lora.cli.options import GuessingGroup, examples
from code2lora.cli.train.all import all_stages
from code2lora.cli.train.audit import audit
from code2lora.cli.train.base import base
from code2lora.cli.train.baselines import baselines
from code2lora.cli.train.bundle import bundle
from code2lora.cli.train.clone import clone
from code2lora.cli.train.dataset import dataset
from code2lora.cli.train.embed import embed
from code2lora.cli.train.evaluate import evaluate
from code2lora.cli.train.fit import fit
from code2lora.cli.train.keys import keys
from code2lora.cli.train.mine import mine


@click.group(
    "train",
    cls=GuessingGroup,
    epilog=examples(
        ("code2lora train all --out made", "all stages, from public repositories"),
        ("code2lora train base --out base", "a small decoder from installed packages"),
        ("code2lora train mine src/* --out mined", "tasks from the histories of repositories"),
        (
            "code2lora train fit --mined mined --base base/export --out m --features encoder",
            "a hypernetwork",
        ),
        ("code2lora train evaluate --mined mined --base base/export --out m", "held-out figures"),
        ("code2lora train audit --mined mined --base base/export --out m", "knows it anything?"),
    ),
)
def train() -> None:
    """Train, measure and audit a model of your own.

    Needs `pip install 'code2lora-daemon[train]'`. ^C stops at the next whole step; the same
    command goes on from there.
    """


for _command in (
    *(all_stages, clone, mine, dataset, base, keys, embed),
    *(fit, baselines, evaluate, audit, bundle),
):
    train.add_command(_command)
