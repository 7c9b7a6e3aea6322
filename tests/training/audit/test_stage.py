from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from code2lora.errors import UserError
from code2lora.hypernetwork.identity import fingerprint, read_config
from code2lora.training.audit import stage as audit_stage
from code2lora.training.audit.items import AuditConfig
from code2lora.training.audit.scores import Stopped
from code2lora.training.audit.stage import audit_model
from code2lora.training.baselines.loading import Manifest, write_manifest
from code2lora.training.baselines.lora_files import write_lora
from code2lora.training.data.dataset import LINES, load_repositories
from code2lora.training.data.mining import Repository, mine
from code2lora.training.data.shards import Shard, read_shards
from code2lora.training.fitting.items import ItemConfig
from code2lora.training.fitting.learner import LearnerConfig, build_learner
from code2lora.training.publish import generic_states, publish
from code2lora.training.recipe import Recipe
from code2lora.training.run import Decoder, load_decoder
from code2lora.training.split import bucket
from tests.training import worlds

LEARNER = LearnerConfig(encoder_width=12, hidden_width=14, trunk_width=10, rank=3, alpha=6.0)
ITEMS = ItemConfig(max_tokens=48, prefix_tokens=16, suffix_tokens=8)
RECIPE = replace(
    Recipe(),
    fit=replace(Recipe().fit, items=ITEMS, n_lanes=1, autocast_bf16=False),
    audit=AuditConfig(items=4, fresh_items=2, freshness=(2,), replay_commits=4, resamples=50),
)


@pytest.fixture(scope="module")
def names() -> dict[str, list[str]]:
    """Two names each of a training and a validation repository and one of the test bucket."""
    found: dict[str, list[str]] = {"train": [], "cr_val": [], "cr_test": []}
    for i in range(60):
        split = {8: "cr_val", 9: "cr_test"}.get(bucket(f"owner/name-{i}"), "train")
        found[split].append(f"owner/name-{i}")
    return {split: every[:n] for (split, every), n in zip(found.items(), (2, 2, 1), strict=True)}


@pytest.fixture(scope="module")
def mined(names: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("by-split")
    worlds_of = list(worlds.WORDS | worlds.MORE_WORDS)
    given = [
        Repository(name, worlds.make_repository(root, worlds_of.pop()).git_dir)
        for each in names.values()
        for name in each
    ]
    assert {result.status for result in mine(given, root / "mined", worlds.MINE)} == {"mined"}
    return root / "mined"


@pytest.fixture
def decoder(tokenizer: Tokenizer, tmp_path: Path) -> Decoder:
    model, _ = worlds.make_base(tokenizer)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save(str(tmp_path / "base" / "tokenizer.json"))
    return load_decoder(tmp_path / "base", name="tiny")


@pytest.fixture
def model(mined: Path, decoder: Decoder, tmp_path: Path) -> Path:
    """A published model whose adapters differ at random."""
    shards = [shard for shard in read_shards(mined) if shard.split == "train"]
    data = load_repositories(shards, decoder.tokenizer)
    learner = build_learner(LEARNER, decoder.config, decoder.tokenizer, LINES, data, seed=1)
    with torch.no_grad():
        learner.family.head.get_parameter("residual.weight").normal_()
        generic = generic_states(learner, data, replay_commits=2)
    publish(
        learner,
        LEARNER,
        decoder.config,
        tmp_path / "model",
        base_dir=decoder.path,
        generic=generic,
        metrics={"own_minus_wrong": -0.5},
    )
    return tmp_path / "model"


def test_the_verdict_is_in_the_file_and_in_the_checkpoint(
    model: Path, mined: Path, decoder: Decoder, names: dict[str, list[str]]
) -> None:
    before = fingerprint(model / "hypernetwork")

    result = audit_model(RECIPE, mined, decoder, model)

    content = json.loads(result.path.read_text())
    assert result.path == model / "audit.json"
    assert content == json.loads(json.dumps(result.content))
    assert content["repositories"] == content["geometry"]["names"] == sorted(names["cr_val"])
    assert content["mean"] == {"repositories": 2, "kept": 1.0}
    assert content["fingerprint"] == before
    config = read_config(model / "hypernetwork")
    assert config.audit is not None
    assert config.audit.verdict == content["verdict"] == result.audit.verdict
    assert config.audit.tests == result.audit.tests
    assert config.audit.settings == content["settings"]["digest"]
    assert config.metrics == {"own_minus_wrong": -0.5}
    assert fingerprint(model / "hypernetwork") == before, "no state is orphaned"
    assert not list(model.glob("*.tmp"))


def test_the_same_audit_writes_the_same_file(model: Path, mined: Path, decoder: Decoder) -> None:
    first_time = audit_model(RECIPE, mined, decoder, model).path.read_bytes()

    assert audit_model(RECIPE, mined, decoder, model).path.read_bytes() == first_time


def test_other_settings_have_another_digest(model: Path, mined: Path, decoder: Decoder) -> None:
    other = replace(RECIPE, audit=replace(RECIPE.audit, seed=2))

    digests = [audit_model(r, mined, decoder, model).content["settings"] for r in (RECIPE, other)]

    assert digests[0]["digest"] != digests[1]["digest"]


def test_the_test_repositories_leave_the_checkpoint_alone(
    model: Path,
    mined: Path,
    decoder: Decoder,
    names: dict[str, list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The validation ones are asked as if they were of the test bucket: it has only one here."""
    renamed = [
        replace(shard, manifest={**shard.manifest, "cross_repo_split": "cr_test"})
        if shard.name in names["cr_val"]
        else shard
        for shard in read_shards(mined)
    ]
    monkeypatch.setattr(audit_stage, "read_shards", lambda _: iter(renamed))
    before = (model / "hypernetwork" / "config.json").read_bytes()

    result = audit_model(RECIPE, mined, decoder, model, test=True)

    assert result.path == model / "audit-test.json"
    assert result.content["split"] == "cr_test"
    assert result.audit.n_repositories == 3
    assert (model / "hypernetwork" / "config.json").read_bytes() == before
    assert not (model / "audit.json").exists()


def test_a_shared_lora_is_read_from_the_baselines(
    model: Path, mined: Path, decoder: Decoder, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(0)
    learner_lora = audit_stage.load_fitted(
        audit_stage._paths(model, decoder), "cpu"
    ).family.generic()
    shared = replace(
        learner_lora,
        b={t: torch.randn(b.shape, generator=generator) for t, b in learner_lora.b.items()},
    )
    path = tmp_path / "baselines" / "shared_lora"
    write_lora(path / "adapter", shared, decoder.config)
    manifest = Manifest(
        row="shared_lora",
        base="tiny",
        base_fingerprint=decoder.config.fingerprint,
        steps=1,
        best_step=1,
        watched_nll=None,
        settings={},
    )
    write_manifest(path, manifest)

    found = audit_model(RECIPE, mined, decoder, model, shared=path.parent)

    assert found.audit.tests["own_minus_shared"].passed is not None
    assert audit_model(RECIPE, mined, decoder, model, shared=path).content == found.content
    write_manifest(path, replace(manifest, row="repository_lora"))
    with pytest.raises(UserError) as caught:
        audit_model(RECIPE, mined, decoder, model, shared=path)
    assert caught.value.message == f"{path} holds the row repository_lora, expected shared_lora"


def test_nothing_is_written_when_it_is_asked_to_stop(
    model: Path, mined: Path, decoder: Decoder
) -> None:
    before = sorted(path.name for path in model.iterdir())

    with pytest.raises(Stopped):
        audit_model(RECIPE, mined, decoder, model, stop=lambda: True)

    assert sorted(path.name for path in model.iterdir()) == before
    assert read_config(model / "hypernetwork").audit is None


def test_a_checkpoint_that_was_replaced_meanwhile_gets_no_verdict(
    model: Path, mined: Path, decoder: Decoder
) -> None:
    file = model / "hypernetwork" / "config.json"
    file_before = file.read_text()

    def replaced(done: int, total: int) -> None:
        if done == total:
            values = json.loads(file_before)
            file.write_text(json.dumps({**values, "head": {**values["head"], "alpha": 9.0}}))

    with pytest.raises(UserError) as caught:
        audit_model(RECIPE, mined, decoder, model, progress=replaced)
    assert caught.value.message == (
        f"the checkpoint in {file.parent} was replaced while it was audited"
    )
    assert read_config(file.parent).audit is None
    assert not (model / "audit.json").exists()


def test_too_few_repositories(
    model: Path, mined: Path, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def but_one(root: Path) -> list[Shard]:
        shards = list(read_shards(root))
        held_out = [shard for shard in shards if shard.split == "cr_val"]
        return [shard for shard in shards if shard not in held_out[1:]]

    monkeypatch.setattr(audit_stage, "read_shards", but_one)
    with pytest.raises(UserError) as caught:
        audit_model(RECIPE, mined, decoder, model)
    assert caught.value.message == "1 repositories to audit on, expected at least 2"
    assert caught.value.hint == "mine repositories of bucket 8"


def test_what_training_has_seen_is_not_asked(
    model: Path, mined: Path, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_stage, "read_leaks", lambda _: lambda data, target: True)

    with pytest.raises(UserError, match="0 repositories to audit on, expected at least 2"):
        audit_model(RECIPE, mined, decoder, model)
