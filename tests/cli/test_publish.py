"""`publish`: the list in git configuration, pushing now, and what it says of failures."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from code2lora.adapters.layout import AdapterMetadata
from code2lora.adapters.publish import publish
from code2lora.settings import Settings
from code2lora.state_store.records import Adapter, NewAdapter
from tests.adapters.publishers.servers import VllmStub, serving
from tests.cli.conftest import CHECKPOINT, Known, Run
from tests.hypernetwork import tiny


@pytest.fixture
def live(known: Known) -> Adapter:
    """The live adapter, as a directory that servers can read."""
    commit = known.repo.git("rev-parse", "HEAD~2")
    state = known.store.find_state(known.repository_id, CHECKPOINT, commit)
    assert state is not None
    metadata = AdapterMetadata(
        repository=known.repository_id,
        commit=commit,
        state_sha256="5" * 64,
        checkpoint=CHECKPOINT,
        base_model="tiny-base",
    )
    lora = tiny.random_lora(rank=8)
    written = publish(lora, metadata, known.settings.adapters_dir, n_layers=2)
    return known.store.publish(
        known.worktree.id,
        NewAdapter(
            state_id=state.info.id,
            path=str(written.path),
            sha256=written.sha256,
            n_bytes=written.n_bytes,
            generate_ms=1.0,
            write_ms=1.0,
        ),
    )


def configured(known: Known) -> list[str]:
    listed = known.repo.git("config", "--local", "--list").splitlines()
    key = "code2lora.publish="
    return [line.removeprefix(key) for line in listed if line.startswith(key)]


def test_from_adding_to_removing(
    code2lora: Run, known: Known, live: Adapter, here: Path, tmp_path: Path
) -> None:
    empty = code2lora("publish", "list")
    assert (empty.status, empty.out) == (0, "")
    assert empty.err == "adapters are pushed nowhere: `code2lora publish add --help`\n"
    stub = VllmStub()
    with serving(stub):
        added = code2lora("publish", "add", "vllm", stub.url)
        line = f"vllm {stub.url} name=repo"
        assert (added.status, added.out) == (0, f"{line}\n")
        assert added.err == (
            "the next adapter goes there; `code2lora publish now` pushes the live one\n"
        )
        copies = tmp_path / "copies"
        code2lora("publish", "add", "directory", copies, "--keep", 2, "--name", "app")
        assert configured(known) == [line, f"directory {copies} name=app keep=2"]
        pushed = code2lora("publish", "now")
        assert (pushed.status, pushed.err) == (0, "")
        assert pushed.out == (
            f"vllm {stub.url} has generation 2 as repo\n"
            f"directory {copies} has generation 2 as app\n"
        )
        assert stub.adapters == {"repo": live.path}
        listed = json.loads(code2lora("publish", "list", "--json").out)
        assert listed[0].pop("pushed_at")
        assert listed[0] == {
            "publisher": line,
            "label": f"vllm {stub.url}",
            "confirmed": True,
            "name": "repo",
            "generation": 2,
            "commit": live.commit,
            "error": None,
            "hint": None,
        }
        stub.allows_updates = False
        failed = code2lora("publish", "now", "1")
        assert (failed.status, failed.out) == (1, "")
        assert failed.err == (
            f"error: vllm {stub.url} did not take the adapter: 404, Not Found\n"
            "hint: start vLLM with `--enable-lora` and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1\n"
        )
    rows = code2lora("publish", "list").out.splitlines()
    assert rows[0].split() == ["DESTINATION", "NAME", "GENERATION", "PUSHED", "STATE"]
    assert rows[1].split()[:5] == ["1", "vllm", stub.url, "repo", "2"]
    assert rows[1].endswith("did not take the adapter: 404, Not Found")
    assert rows[2].endswith("ok")
    assert "did not take the adapter" in code2lora("status").out
    removed = code2lora("publish", "remove", stub.url)
    assert (removed.status, removed.out) == (0, f"{line}\n")
    assert configured(known) == [f"directory {copies} name=app keep=2"]
    assert known.store.failures(known.repository_id) == []
    assert json.loads(code2lora("publish", "remove", "1", "--json").out)["removed"]
    assert configured(known) == []
    assert [path.name[:12] for path in copies.iterdir()] == ["app-00000002"]


def test_pushing_as_json(
    code2lora: Run, known: Known, live: Adapter, here: Path, tmp_path: Path
) -> None:
    code2lora("publish", "add", "directory", tmp_path / "no" / "where")
    done = code2lora("publish", "now", "--json")
    assert done.status == 1
    [push] = json.loads(done.out)
    assert push["error"] == f"cannot write into {tmp_path}/no/where: No such file or directory"
    assert (push["generation"], push["commit"]) == (2, live.commit)


def test_paths_are_made_absolute(code2lora: Run, known: Known, here: Path) -> None:
    url = "http://127.0.0.1:8080"
    done = code2lora(
        "publish", "add", "llamacpp", url, "--preset", "m.ini", "--model", "m.gguf", "--json"
    )
    assert json.loads(done.out) == {
        "publisher": f"llamacpp {url} name=repo preset={here}/m.ini model={here}/m.gguf",
        "name": "repo",
    }
    done = code2lora("publish", "add", "ollama", url, "--model", "qwen2.5-coder:1.5b-base")
    assert done.out == f"ollama {url} name=repo model=qwen2.5-coder:1.5b-base\n"


def test_what_adding_refuses(code2lora: Run, known: Known, here: Path) -> None:
    done = code2lora("publish", "add", "vllm", "http://gpu.lan:8000")
    assert (done.status, done.out) == (1, "")
    assert done.err == (
        "error: gpu.lan is another machine, which would be told this adapter's name and path\n"
        "hint: `--host gpu.lan` allows it\n"
    )
    done = code2lora("publish", "add", "vllm", "http://gpu.lan:8000", "--host", "gpu.lan")
    assert done.out == "vllm http://gpu.lan:8000 name=repo host=gpu.lan\n"
    assert code2lora("publish", "add", "scp", "x").status == 2
    assert len(configured(known)) == 1


def test_what_came_with_the_repository_waits_for_a_word(
    code2lora: Run, known: Known, live: Adapter, here: Path, tmp_path: Path
) -> None:
    line = f"directory {tmp_path / 'copies'} name=repo"
    known.repo.git("config", "--local", "--add", "code2lora.publish", line)
    done = code2lora("publish", "now")
    assert done.status == 1 and "but was not added here" in done.err
    assert not (tmp_path / "copies").exists()
    listed = code2lora("publish", "list").out
    assert "was not added here" in listed
    assert code2lora("publish", "add", "directory", tmp_path / "copies").status == 0
    assert configured(known) == [line]
    assert code2lora("publish", "now").status == 0


def test_a_malformed_line_is_shown_and_can_be_removed(
    code2lora: Run, known: Known, live: Adapter, here: Path
) -> None:
    known.repo.git("config", "--local", "--add", "code2lora.publish", "scp \x1b[31m")
    listed = code2lora("publish", "list")
    assert listed.status == 0 and "\x1b" not in listed.out
    assert code2lora("publish", "remove", "1").status == 0
    assert configured(known) == []


def test_nothing_to_push(code2lora: Run, known: Known, here: Path) -> None:
    done = code2lora("publish", "now")
    assert (done.status, done.err) == (
        1,
        "error: adapters are pushed nowhere\nhint: `code2lora publish add --help`\n",
    )
    code2lora("publish", "add", "directory", "/srv/a")
    done = code2lora("publish", "remove", "9")
    assert done.err == (
        "error: '9' is neither a number of the list nor a destination in it\n"
        "hint: `code2lora publish list`\n"
    )
    known.store.set_live(known.worktree.id, None)
    done = code2lora("publish", "now")
    assert done.err == f"error: {here} has no adapter yet\nhint: `code2lora refresh {here}`\n"


def test_no_daemon_is_needed_and_a_dead_server_is_told(
    code2lora: Run, known: Known, live: Adapter, here: Path, home: Settings
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    code2lora("publish", "add", "mistralrs", url)
    done = code2lora("publish", "now")
    assert done.status == 1
    assert done.err.startswith(f"error: mistralrs {url} does not answer: ")
    assert done.err.endswith("hint: start the server, then `code2lora publish now`\n")
