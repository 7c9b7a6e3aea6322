"""A commit's state is the same where it was trained on and where the daemon keeps it.

Training reads parquet tables and advances whole batches; the daemon reads git and advances one
commit at a time. Both are asked here for the states of the same repository under the same model.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from code2lora.daemon.absorbing import Absorber
from code2lora.history import open_history
from code2lora.history.model import Commit, History
from code2lora.history.stream import StreamName
from code2lora.hypernetwork.checkpoint import LoadedFamily, build_family
from code2lora.hypernetwork.config import Recipe
from code2lora.hypernetwork.encoder import load_encoder
from code2lora.hypernetwork.encoder_lines import LinesEncoder
from code2lora.hypernetwork.family import State
from code2lora.hypernetwork.identity import encoder_fingerprint
from code2lora.hypernetwork.state import unpack
from code2lora.state_store import Store
from code2lora.training.data.dataset import RepositoryData, load_embedded, load_repositories
from code2lora.training.data.embedding import EmbedConfig, embed_mined
from code2lora.training.data.mining import MineConfig, Repository, mine
from code2lora.training.data.shards import Shard, read_shards
from code2lora.training.evaluation.told import told_texts
from code2lora.training.fitting.inputs import LexicalInputs, opening, statistics_sample
from code2lora.training.fitting.items import ItemBuilder, ItemConfig
from code2lora.training.fitting.learner import Learner, told_states
from code2lora.training.fitting.windows import WindowConfig, WindowSampler
from tests.gitrepo import GitRepo
from tests.history.walks import make_test
from tests.hypernetwork import test_encoder_gradients as gradients
from tests.hypernetwork import test_memory_family as memory
from tests.hypernetwork import tiny
from tests.training import worlds

NAME = "test/parity"


def _mine_config(stream: StreamName, commits: int = 0) -> MineConfig:
    if stream == "commits":
        return MineConfig(commits=commits, anchor_every=3, rules="source", target_every=1)
    return MineConfig(
        stream=stream,
        commits=commits,
        anchor_every=3,
        kinds=("assertion",),
        rules="paper",
        snapshot_rules="paper-snapshot",
    )


@pytest.fixture
def repo(repo: GitRepo) -> GitRepo:
    """Steps, commits between them, a rename, a merge, a deletion; it begins with no step."""
    library = "def total(value):\n    return value + 1\n"
    repo.commit({"lib.py": library, "README.md": "# Totals\n\nAdds numbers up.\n"})
    repo.commit({"tests/test_total.py": make_test(1, 2), "lib.py": library + "\nONE = 1\n"})
    repo.commit({"lib.py": library + "\nTWO = 2\n"})
    repo.commit({"tests/test_total.py": make_test(1, 2, 3)})
    repo.commit({"lib.py": None, "total.py": library + "\nTWO = 2\n"})
    repo.switch("side", create=True)
    repo.commit({"tests/test_side.py": make_test(7), "side.py": "SIDE = 7\n"})
    repo.switch("main")
    repo.commit({"README.md": "# Totals\n\nAdds up what is given.\n"})
    repo.merge("side")
    repo.commit({"total.py": library + "\nTHREE = 3\n", "side.py": None})
    repo.commit({"tests/test_total.py": make_test(1, 2, 4), "more.py": "def more(): return 4\n"})
    return repo


def _mined(repo: GitRepo, out_dir: Path, config: MineConfig) -> Shard:
    (result,) = mine([Repository(NAME, repo.path / ".git")], out_dir, config)
    assert result.status == "mined", result.reason
    (shard,) = read_shards(out_dir)
    return shard


def _encoder_dir(kind: str, tmp_path: Path) -> Path:
    path = tmp_path / "encoder"
    if kind == "paper":
        tiny.save_transformer_encoder(path)
    elif kind == "gradients":
        gradients.encoder(excerpt_tokens=40).save(path)
        tiny.decoder().save_pretrained(tmp_path / "base")
        tiny.tokenizer().save(str(tmp_path / "base" / "tokenizer.json"))
    else:
        tiny.lines_encoder().save(path)
    return path


def _model(encoder_dir: Path, recipe: Recipe) -> LoadedFamily:
    """Return a model of random weights, centred on something, behind an encoder on the disk."""
    base = encoder_dir.parent / "base"
    encoder = load_encoder(encoder_dir, recipe, dtype=torch.float32, base=base)  # as `embed` did
    config = tiny.checkpoint_config("paper", width=encoder.width)
    if recipe.adds_up:
        config = memory.config(recipe)
        family = build_family(config, encoder)
        family.train(False).requires_grad_(False)
        fingerprint = encoder_fingerprint(encoder_dir, recipe)
        return LoadedFamily(family, config, "f" * 64, fingerprint)
    assert config.gru is not None
    widths = {
        "diff_width": recipe.diff_width(encoder.width),
        "snapshot_width": recipe.snapshot_width(encoder.width),
    }
    config = replace(
        config,
        encoder=replace(config.encoder, width=encoder.width, recipe=recipe),
        gru=replace(config.gru, **widths),
    )
    torch.manual_seed(3)
    family = build_family(config, encoder)
    for name, statistic in family.named_buffers():
        if name.endswith("_mean"):
            statistic.copy_(0.1 * torch.randn_like(statistic))
    family.train(False).requires_grad_(False)
    return LoadedFamily(family, config, "f" * 64, encoder_fingerprint(encoder_dir, recipe))


def _recipe(kind: str, shard: Shard) -> Recipe:
    settings = shard.manifest["settings"]
    return Recipe(
        diff=kind,  # type: ignore[arg-type]
        snapshot=kind,  # type: ignore[arg-type]
        rules=settings["rules"],
        snapshot_rules=settings["snapshot_rules"],
        stream=settings["stream"],
    )


def _stored(model: LoadedFamily, repo: GitRepo, commits: Sequence[str], home: Path) -> Tensor:
    """Return the states that the daemon stores for commits, from an anchor at the first on."""
    with (
        closing(open_history(repo.path)) as history,
        closing(Store.open(f"sqlite:///{home / 'state.db'}")) as store,
    ):
        repository = store.add_repository("a" * 32, path=str(repo.path), name=NAME)
        store.register_checkpoint(
            model.fingerprint,
            encoder_fingerprint=model.encoder_fingerprint,
            name="tiny",
            base_model="tiny",
            config={},
        )
        anchor = store.add_anchor(repository.id, model.fingerprint, commits[0], "active")
        absorber, line = Absorber(store, model), _line(history, repo.head, commits[0])
        start = absorber.initial(history, anchor, line[0])
        absorber.advance(history, start, line[1:])
        found = [store.state_at(anchor.id, commit) for commit in commits]
        assert {state.info.provisional for state in found if state is not None} == {False}
        return torch.stack([_flat(unpack(state.state)) for state in found if state is not None])


def _flat(state: State) -> Tensor:
    """Return a stored state as training has it: the parts of a memory stand in this order."""
    return torch.cat([state[name] for name in ("h", "mean", "recent", "sizes") if name in state])


def _line(history: History, head: str, first: str) -> list[Commit]:
    commits = list(history.first_parents(head))[::-1]
    return commits[[commit.id for commit in commits].index(first) :]


@dataclass(frozen=True)
class Both:
    """One repository as training has it, and a model for each side."""

    repo: GitRepo
    shard: Shard
    data: RepositoryData
    learner: Learner
    model: LoadedFamily

    def check(self, anchor: int, home: Path, *, tolerance: float) -> Tensor:
        """Compare the states from an anchor to the end, and return training's."""
        commits = self.shard.table("commits")["commit"][anchor:]
        with torch.no_grad():
            told = told_states(self.learner, self.data, anchor, self.data.n_commits - 1)
        stored = _stored(self.model, self.repo, commits, home)
        assert stored.shape == told.shape
        torch.testing.assert_close(told, stored, rtol=tolerance, atol=tolerance)
        return told


def _both(repo: GitRepo, kind: str, config: MineConfig, home: Path) -> Both:
    shard = _mined(repo, home / "mined", config)
    encoder_dir, recipe = _encoder_dir(kind, home), _recipe(kind, shard)
    model, learner = _model(encoder_dir, recipe), Learner(_model(encoder_dir, recipe).family)
    if kind != "lines":
        embed_mined(home / "mined", encoder_dir, EmbedConfig(), base=home / "base")
        (data,) = load_embedded([shard], model.encoder_fingerprint)
    else:
        assert isinstance(model.family.encoder, LinesEncoder)
        (data,) = load_repositories([shard], model.family.encoder.tokenizer)
    return Both(repo, shard, data, learner, model)


ITEMS = ItemConfig(max_tokens=24, prefix_tokens=8, suffix_tokens=4)
TOLERANCE = {"lines": 1e-6, "paper": 2e-3, "gradients": 5e-4}
"""What was embedded is stored in half precision."""


@pytest.mark.parametrize("kind", ["lines", "paper", "gradients"])
@pytest.mark.parametrize("stream", ["commits", "assertions"])
def test_training_tells_the_states_that_the_daemon_stores(
    repo: GitRepo, tmp_path: Path, stream: StreamName, kind: str
) -> None:
    both = _both(repo, kind, _mine_config(stream), tmp_path)

    assert both.data.n_commits == (9 if stream == "commits" else 4)
    assert both.data.opens == (stream == "assertions")
    first = both.check(0, tmp_path, tolerance=TOLERANCE[kind])
    assert (first[1:] - first[:-1]).abs().amax(1).min() > 10 * TOLERANCE[kind]
    later = tmp_path / "later"
    later.mkdir()
    both.check(both.data.anchors[1], later, tolerance=TOLERANCE[kind])


def test_the_first_step_of_a_history_is_told_as_a_snapshot_and_as_a_diff(
    repo: GitRepo, tmp_path: Path
) -> None:
    both = _both(repo, "lines", _mine_config("assertions"), tmp_path)
    learner, data = both.learner, both.data

    with torch.no_grad():
        states = told_states(learner, data, 0, 0)
        alone = learner.start([learner.inputs.snapshot(data, 0, ())])
        by_diff = learner.family.advance_states(
            alone, learner.inputs.diff_features([learner.inputs.diff(data, 0, ())])[None]
        )

    assert not torch.allclose(states, alone, atol=1e-3)
    torch.testing.assert_close(states, by_diff[0, 1:])


def test_a_history_that_is_cut_off_begins_at_an_anchor_there_too(
    repo: GitRepo, tmp_path: Path
) -> None:
    """Steps that are not mined were taken all the same, so the first mined one opens nothing."""
    both = _both(repo, "lines", _mine_config("assertions", commits=3), tmp_path)

    assert both.data.n_commits == 3
    assert not both.data.opens
    assert 0 not in both.shard.table("changes")["index"]
    both.check(0, tmp_path, tolerance=TOLERANCE["lines"])


def test_windows_begin_with_the_state_that_is_stored(repo: GitRepo, tmp_path: Path) -> None:
    for value in range(10, 16):
        repo.commit({"tests/test_total.py": make_test(value), "more.py": f"MORE = {value}\n"})
    both = _both(repo, "paper", _mine_config("assertions"), tmp_path)
    config = WindowConfig(repositories=1, commits=2, states=2, restart_share=1.0, horizon=2)
    builder = ItemBuilder(worlds.make_tokenizer(), ITEMS)
    inputs = both.learner.inputs
    sampler = WindowSampler([both.data], builder, config, inputs=inputs, seed=1)

    windows = [sampler.windows(step)[0] for step in range(12)]

    begun = {bool(window.opening is not None): window for window in windows}
    assert begun.keys() == {True, False}  # the history's first snapshot, and a later one
    opened = begun[True]
    with torch.no_grad():
        hidden = both.learner.states([opened, begun[False]], {})
        told = told_states(both.learner, both.data, 0, len(opened.diffs))
    torch.testing.assert_close(hidden[0, : len(told)], told)


def test_statistics_are_of_the_states_that_are_told(repo: GitRepo, tmp_path: Path) -> None:
    both = _both(repo, "lines", _mine_config("assertions"), tmp_path)

    sample = statistics_sample(both.learner.inputs, [both.data])

    anchors = [anchor for anchor in both.data.anchors if anchor < both.data.n_train]
    assert [each is not None for each in sample.openings] == [anchor == 0 for anchor in anchors]
    assert len(sample.diffs) == both.data.n_train  # the whole first tree is one of them
    with torch.no_grad():
        started = both.learner.start(sample.snapshots, sample.openings)
        told = [told_states(both.learner, both.data, anchor, anchor)[0] for anchor in anchors]
    torch.testing.assert_close(started, torch.stack(told))


def test_a_copy_of_a_held_out_file_is_not_told_by_the_first_diff(
    tmp_path: Path, repo: GitRepo
) -> None:
    repo.commit({"one.py": "SECRET = 1\n", "two.py": "SECRET = 1\n", "lib.py": "x = 1\n"})
    other = GitRepo(tmp_path / "other")
    secret = "SECRET = 1\n" * 3
    files = {"one.py": secret, "two.py": secret, "lib.py": "x = 1\n", "README.md": "# Read me\n"}
    other.commit({**files, "tests/test_a.py": make_test(1)})
    both = _both(other, "lines", _mine_config("assertions"), tmp_path)
    inputs, held_out = both.learner.inputs, frozenset({"one.py"})
    assert isinstance(inputs, LexicalInputs)

    added, _ = opening(inputs, both.data, 0, held_out)
    everything, _ = opening(inputs, both.data, 0, frozenset())

    secret_ids = set(inputs.encoder.tokens(secret).tolist())
    shown = {path for path in told_texts(both.data, both.shard.table("changes"), 0, 0, held_out)}
    assert shown == {"lib.py", "README.md", "tests/test_a.py"}
    assert secret_ids <= set(everything[0].tolist())
    assert not secret_ids <= set(added[0].tolist())
