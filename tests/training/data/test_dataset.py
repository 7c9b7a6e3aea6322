from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from code2lora.history.open import open_history
from code2lora.history.rules import FileRules
from code2lora.hypernetwork.encoder_lines import LinesEncoder
from code2lora.training.data.bags import (
    count_tokens,
    encode,
    encode_dense,
    inverse_document_frequency,
    random_table,
)
from code2lora.training.data.dataset import LINES, RepositoryData, load_repositories
from code2lora.training.data.mining import MineConfig, Repository, mine
from code2lora.training.data.shards import read_shards
from tests.gitrepo import GitRepo

WIDTH = 7


@pytest.fixture
def encoder(tokenizer: Tokenizer) -> LinesEncoder:
    generator = torch.Generator().manual_seed(3)
    table = torch.randn(tokenizer.get_vocab_size(), WIDTH, generator=generator)
    return LinesEncoder(tokenizer, table, LINES)


def test_bags_give_the_vectors_of_the_exported_encoder(
    encoder: LinesEncoder, tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer

    texts = ["def anchor_1(amber):\n    return 1\n", "", "amber amber amber\n\n\n\tamber"]
    bags = count_tokens(encoder, texts)
    encoder.save(tmp_path / "encoder")
    exported = SentenceTransformer(str(tmp_path / "encoder"), device="cpu")
    expected = torch.from_numpy(exported.encode(texts))

    ours = encode(encoder.table, [bags.mean(row) for row in range(len(texts))])

    torch.testing.assert_close(ours, expected)
    assert not ours[1].any()


def test_told_snapshots_and_diffs_have_the_vectors_that_the_family_reads(
    encoder: LinesEncoder, repositories: list[Repository], data: list[RepositoryData]
) -> None:
    """What is trained on and what is used later must be the same features."""
    rules = FileRules.named("source")
    history = open_history(repositories[0].git_dir)
    commits = list(history.first_parents(history.resolve("HEAD")))[::-1]
    repository = data[0]

    weights = repository.snapshot_weights(repository.files(4), len(encoder.table))
    expected = encoder.read_snapshot(history.snapshot(commits[4].id, rules)).features
    torch.testing.assert_close(encode_dense(encoder.table, weights[None])[0], expected)

    for index in range(1, len(commits)):
        added, removed = repository.diff_weights(index, frozenset())
        both = encode(encoder.table, [added, removed]).flatten()
        (reading,) = encoder.read_diffs([history.diff(commits[index].id, rules)])
        torch.testing.assert_close(both, reading.features)
    history.close()


def test_what_is_told_without_a_file_is_what_a_repository_without_it_would_tell(
    encoder: LinesEncoder, repositories: list[Repository], data: list[RepositoryData]
) -> None:
    rules = FileRules.named("source")
    history = open_history(repositories[1].git_dir)
    commits = list(history.first_parents(history.resolve("HEAD")))[::-1]
    whole = history.snapshot(commits[4].id, rules)
    path = whole.files[0].path
    held_out = frozenset({path})

    told = data[1].snapshot_weights(data[1].told_files(4, held_out), len(encoder.table))
    others = tuple(file for file in whole.files if file.path != path)
    expected = encoder.read_snapshot(dataclasses.replace(whole, files=others)).features
    torch.testing.assert_close(encode_dense(encoder.table, told[None])[0], expected)

    n_changed = 0
    for index in range(1, len(commits)):
        diff = history.diff(commits[index].id, rules)
        kept = tuple(change for change in diff.changes if change.path != path)
        n_changed += len(kept) < len(diff.changes)
        (reading,) = encoder.read_diffs([dataclasses.replace(diff, changes=kept)])
        found = encode(encoder.table, list(data[1].diff_weights(index, held_out))).flatten()
        torch.testing.assert_close(found, reading.features)
    assert n_changed
    history.close()


def test_a_renamed_file_stays_held_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    repo = GitRepo(tmp_path / "repo")
    text = "".join(f"anchor_{i} = almond({i})\n" for i in range(12))
    repo.commit({"secret.py": text, "open.py": "amber = 1\n"})
    repo.commit({"secret.py": None, "moved.py": text})
    repo.commit({"moved.py": text + "arrow = 2\n"})
    mine([Repository("test/renamed", repo.path / ".git")], tmp_path / "mined", MineConfig())
    (data,) = load_repositories(read_shards(tmp_path / "mined"), tokenizer)

    held_out = frozenset({"secret.py"})
    assert data.changes(1, held_out) == []
    held_out = data.follow(1, held_out)

    assert held_out == {"secret.py", "moved.py"}
    assert data.changes(2, held_out) == []


def test_a_held_out_file_is_in_nothing_that_is_told(data: list[RepositoryData]) -> None:
    for repository in data:
        path = repository.files(4)[0].path
        held_out = frozenset({path})

        told = repository.told_files(4, held_out)

        assert len(told) == len(repository.files(4)) - 1
        assert path not in {file.path for file in told}
        for index in range(1, repository.n_commits):
            assert path not in {change.path for change in repository.changes(index, held_out)}


def test_commit_targets_come_after_the_state_and_file_targets_from_held_out_files(
    data: list[RepositoryData],
) -> None:
    for repository in data:
        later = repository.commit_targets(5, 7)
        assert later
        assert {target.index for target in later} <= {5, 6, 7}
        held_out = {repository.files(4)[1].path}
        asked = repository.file_targets(4, held_out)
        assert asked
        assert {target.path for target in asked} == held_out


def test_stored_bags_are_read_back(
    mined: Path, tokenizer: Tokenizer, data: list[RepositoryData], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("code2lora.training.data.dataset.count_tokens", None)

    again = load_repositories(read_shards(mined), tokenizer)

    for before, after in zip(data, again, strict=True):
        np.testing.assert_array_equal(before.file_bags.ids, after.file_bags.ids)
        np.testing.assert_array_equal(before.added_bags.counts, after.added_bags.counts)


def test_a_common_token_weighs_less_than_a_rare_one(encoder: LinesEncoder) -> None:
    bags = count_tokens(encoder, ["return amber", "return basket", "return goblet"])
    idf = inverse_document_frequency([bags], len(encoder.table))
    everywhere = encoder.tokens("return").tolist()
    rare = set(encoder.tokens("return amber").tolist()) - set(
        encoder.tokens("return basket goblet").tolist()
    )

    assert all(idf[i] == 0 for i in everywhere)
    assert rare
    assert all(idf[i] == pytest.approx(np.log(4 / 2)) for i in rare)
    table = random_table(idf, 64, torch.Generator().manual_seed(1))
    assert not table[everywhere].any()
