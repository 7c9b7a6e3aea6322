"""Publishing on a hub that runs on this machine, behind the audit."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest

from code2lora.errors import UserError
from code2lora.hypernetwork.checkpoint import build_family, save_checkpoint
from code2lora.hypernetwork.config import AuditRecord, AuditTest, CheckpointConfig
from code2lora.hypernetwork.identity import write_config
from code2lora.hypernetwork.models import ModelPaths, resolve_model
from code2lora.hypernetwork.push import plan_push, push
from tests.hypernetwork import tiny
from tests.hypernetwork.mirror import Mirror, committed, serve

# huggingface_hub's own, when it uploads without Xet
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

PASSED = AuditRecord(
    verdict="passed",
    tests={"own - wrong": AuditTest(passed=True, mean=-0.1, low=-0.2, high=-0.05)},
    n_repositories=25,
    n_items=600,
    settings="d" * 64,
)
FAILED = dataclasses.replace(
    PASSED, verdict="failed", tests={"own - wrong": AuditTest(passed=False, mean=0.0)}
)


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    with serve() as made:
        yield made


def _model(root: Path, audit: AuditRecord | None, **base: str) -> ModelPaths:
    """A model of ours, with files in its folders that nobody asked for."""
    path = root / "mine"
    tiny.decoder().save_pretrained(path / "base")
    tiny.tokenizer().save(str(path / "base" / "tokenizer.json"))
    encoder = tiny.lines_encoder()
    encoder.save(path / "encoder")
    config = dataclasses.replace(tiny.checkpoint_config(), audit=audit)
    config = dataclasses.replace(config, base=dataclasses.replace(config.base, **base))
    save_checkpoint(path / "hypernetwork", config, build_family(config, encoder).state_dict())
    (path / "MODEL_CARD.md").write_text("# mine\n\nTrained on a Tuesday.\n")
    for foreign in ("base/.env", "base/secrets.json", "hypernetwork/run.log", "encoder/x.pt"):
        (path / foreign).write_text("private")
    return resolve_model(str(path), root)


def test_push_is_one_commit_of_the_known_files(mirror: Mirror, tmp_path: Path) -> None:
    paths = _model(tmp_path, PASSED)

    plan = plan_push(paths, "me/mine", licence="mit")
    pushed = push(plan, private=True, endpoint=mirror.endpoint)

    assert (pushed.url, pushed.commit) == (f"{mirror.endpoint}/me/mine", "c" * 40)
    assert [(made["name"], made["organization"]) for made in mirror.created] == [("mine", "me")]
    (commit,) = mirror.commits
    assert commit[0]["value"]["summary"] == "Publish mine"
    files = committed(commit)
    assert set(files) == {
        "README.md",
        "hypernetwork/config.json",
        "hypernetwork/model.safetensors",
        "base/config.json",
        "base/generation_config.json",
        "base/model.safetensors",
        "base/tokenizer.json",
        "encoder/config_sentence_transformers.json",
        "encoder/model.safetensors",
        "encoder/modules.json",
        "encoder/tokenizer.json",
    }
    weights = (paths.hypernetwork / "model.safetensors").read_bytes()
    oid = hashlib.sha256(weights).hexdigest()
    assert files["hypernetwork/model.safetensors"] == oid
    assert mirror.uploads[oid] == weights
    assert files["hypernetwork/config.json"] == (paths.hypernetwork / "config.json").read_bytes()
    assert not any(data == b"private" for data in mirror.uploads.values())
    assert files["README.md"] == (
        b"---\nlicense: mit\ntags:\n- code2lora\n- lora\n---\n\n"
        b"> Conditioning audit passed: 25 repositories, 600 items, settings `dddddddddddd`.\n\n"
        b"# mine\n\nTrained on a Tuesday.\n"
    )


@pytest.mark.parametrize(
    ("audit", "why"), [(None, "was not audited"), (FAILED, "did not pass its audit")]
)
def test_push_needs_the_audit(tmp_path: Path, audit: AuditRecord | None, why: str) -> None:
    paths = _model(tmp_path, audit)

    with pytest.raises(UserError) as caught:
        plan_push(paths, "me/mine")

    assert caught.value.message == (
        f"mine {why}: nothing shows that its adapters know their repositories"
    )
    assert caught.value.hint and "--despite-audit" in caught.value.hint
    card = plan_push(paths, "me/mine", despite_audit=True).card
    warning = card.split("---\n")[2].strip().splitlines()[0]
    assert warning.startswith("> **WARNING: ")
    if audit is FAILED:
        assert "is failed**: own - wrong." in warning


def test_what_is_published_elsewhere_is_only_named(tmp_path: Path) -> None:
    paths = _model(tmp_path, PASSED, id="Qwen/Qwen2.5-Coder-1.5B", revision="a" * 40)

    plan = plan_push(paths, "me/mine")

    assert not [path for path in plan.files if path.startswith("base/")]
    assert "\nbase_model: Qwen/Qwen2.5-Coder-1.5B\n" in plan.card
    sources = {"encoder": {"repository": "x/y"}}
    (paths.hypernetwork.parent / "sources.json").write_text(json.dumps(sources))
    assert {path.partition("/")[0] for path in plan_push(paths, "me/mine").files} == {
        "hypernetwork"
    }


def test_a_pulled_model_is_not_ours_to_push(tmp_path: Path) -> None:
    paths = _model(tmp_path, PASSED)
    sources = {"hypernetwork": {"repository": "code2lora/code2lora-gru"}}
    (paths.hypernetwork.parent / "sources.json").write_text(json.dumps(sources))

    with pytest.raises(UserError) as caught:
        plan_push(paths, "me/mine")

    assert caught.value.message == (
        "mine was pulled from code2lora/code2lora-gru; others published it"
    )


def test_no_symbolic_link_is_followed(tmp_path: Path) -> None:
    paths = _model(tmp_path, PASSED)
    secret = tmp_path / "secret"
    secret.write_text("private")
    (paths.base / "vocab.json").symlink_to(secret)

    with pytest.raises(UserError) as caught:
        plan_push(paths, "me/mine")

    assert caught.value.message == f"{paths.base / 'vocab.json'} is a symbolic link"


def test_a_missing_file(tmp_path: Path) -> None:
    paths = _model(tmp_path, PASSED)
    (paths.hypernetwork / "model.safetensors").unlink()

    with pytest.raises(UserError) as caught:
        plan_push(paths, "me/mine")

    assert caught.value.message == f"{paths.hypernetwork / 'model.safetensors'} is missing"


def test_what_the_hub_refuses(mirror: Mirror, tmp_path: Path) -> None:
    plan = plan_push(_model(tmp_path, PASSED), "me/mine")
    mirror.token = "hf_secret"

    with pytest.raises(UserError) as caught:
        push(plan, endpoint=mirror.endpoint)

    assert caught.value.message == f"{mirror.endpoint} refuses me/mine: status 401"
    assert mirror.commits == [] and mirror.uploads == {}
    mirror.token, mirror.takes_uploads = None, False
    with pytest.raises(UserError) as caught:
        push(plan, endpoint=mirror.endpoint)
    assert caught.value.message.startswith("me/mine cannot be published on ")
    assert mirror.commits == []
    wrong = dataclasses.replace(plan, repository="not a name")
    with pytest.raises(UserError) as caught:
        push(wrong, endpoint=mirror.endpoint)
    assert caught.value.message.startswith("not a name cannot be published on ")


def test_the_verdict_is_read_from_the_file(tmp_path: Path) -> None:
    paths = _model(tmp_path, None)
    values = json.loads((paths.hypernetwork / "config.json").read_text())
    values["audit"] = dataclasses.asdict(PASSED)
    (paths.hypernetwork / "config.json").write_text(json.dumps(values))
    plan_push(paths, "me/mine")

    config: CheckpointConfig = dataclasses.replace(tiny.checkpoint_config(), audit=FAILED)
    write_config(paths.hypernetwork, config)

    with pytest.raises(UserError):
        plan_push(paths, "me/mine")
