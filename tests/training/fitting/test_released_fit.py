"""A data set of the released layout, with the vectors that it came with, is fitted and measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from code2lora.training import run
from code2lora.training.audit.stage import audit_model
from code2lora.training.data import shards
from code2lora.training.data.dataset import load_embedded
from code2lora.training.data.features import RELEASED_FILE
from code2lora.training.data.mining import MineConfig, Repository, mine
from code2lora.training.data.released import export_released
from code2lora.training.data.released_import import import_released
from code2lora.training.evaluation.stage import Measuring
from code2lora.training.recipe import Recipe, parse_recipe
from code2lora.training.split import bucket
from tests.gitrepo import GitRepo
from tests.history.walks import make_test

RECIPE = """
[mine]
stream = "assertions"
rules = "paper"
snapshot_rules = "paper-snapshot"
commits = 0
kinds = ["assertion"]
[fit]
max_steps = 3
margin_rows = 2
margin_weight = 0.0
monitor_every = 2
monitor_items = 1
autocast_bf16 = false
tensorboard = false
[fit.learner]
encoder = "frozen"
head = "paper"
hidden_width = 14
trunk_width = 10
rank = 3
carry = 0.0
centre = false
[fit.windows]
repositories = 2
commits = 4
states = 2
restart_share = 0.0
from_first = true
assertion_share = 1.0
file_item_share = 0.0
nearest = 0
horizon = 0
far_gap = 1
[fit.items]
max_tokens = 40
prefix_tokens = 16
suffix_tokens = 6
[evaluate]
held_out_share = 0.0
recent_commits = 3
replay_commits = 1_000_000
file_items = 0
commit_items = 0
assertion_items = 2
prompt_tokens = 64
max_new_tokens = 4
resamples = 20
[audit]
held_out_share = 0.0
items = 4
freshness = [2]
recent_commits = 3
replay_commits = 1_000_000
resamples = 20
"""
N_STEPS = 10
WIDTH = 6


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return parse_recipe(RECIPE, where="test")


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two repositories to train on and two to choose by, exported with vectors and read back."""
    root = tmp_path_factory.mktemp("released-fit")
    train = [f"o/n{i}" for i in range(40) if bucket(f"o/n{i}") < 8][:2]
    held_out = [f"o/n{i}" for i in range(80) if bucket(f"o/n{i}") == 8][:2]
    repositories = []
    for name in (*train, *held_out):
        repo = GitRepo(root / name.replace("/", "-"))
        own = 10 * len(repositories)
        for n in range(N_STEPS):
            tests = make_test(*range(own, own + n + 1), name=f"of_{own}")
            repo.commit({"lib.py": f"TOTAL = {own + n}\n" * 3, "tests/test_lib.py": tests})
        repositories.append(Repository(name, repo.path / ".git"))
    config = MineConfig(
        stream="assertions",
        commits=0,
        kinds=("assertion",),
        rules="paper",
        snapshot_rules="paper-snapshot",
    )
    mine(repositories, root / "mined", config)
    rng = np.random.default_rng(1)
    for shard in shards.read_shards(root / "mined"):
        vectors = {
            "diffs": rng.standard_normal((N_STEPS, WIDTH)).astype(np.float16),
            "snapshots": rng.standard_normal((N_STEPS, WIDTH)).astype(np.float16),
            "snapshot_indices": np.arange(N_STEPS, dtype=np.int64),
        }
        (shard.path / RELEASED_FILE).write_bytes(save(vectors))
    export_released(root / "mined", root / "data", with_vectors=True)
    import_released(root / "data", root / "imported")
    return root / "imported"


def test_snapshots_that_came_as_vectors_are_anchors_and_the_first_opens(imported: Path) -> None:
    for data in load_embedded(shards.read_shards(imported), None):
        assert data.anchors == list(range(N_STEPS))
        assert data.opens
        assert data.files(3) == []


def test_an_imported_data_set_is_fitted_and_measured(
    recipe: Recipe, imported: Path, decoder: run.Decoder, tmp_path: Path
) -> None:
    out_dir = tmp_path / "model"

    result = run.fit(recipe, imported, decoder, out_dir, features="released")
    measuring = Measuring(suites=("cross-repo", "in-repo"), rows=("pretrained", "evo", "wrong"))
    found = run.evaluate(recipe, imported, decoder, out_dir, measuring)

    assert result.finished and result.best_own_minus_wrong is not None
    audited = audit_model(recipe, imported, decoder, out_dir)
    assert audited.audit.n_repositories == 2
    for suite in ("cross-repo", "in-repo"):
        rows = found.content["suites"][suite]["strata"]["all"]
        assert rows.keys() == {"pretrained", "evo", "wrong"}
        assert rows["evo"]["columns"]["nll"]["mean"] != rows["pretrained"]["columns"]["nll"]["mean"]
