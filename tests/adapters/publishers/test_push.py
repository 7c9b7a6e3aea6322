"""A generation arrives at each kind of target, and every refusal says what to do."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from code2lora.adapters.publish import publish
from code2lora.adapters.publishers.http import read_key
from code2lora.adapters.publishers.llamacpp import with_adapter
from code2lora.adapters.publishers.lora_api import TRIES
from code2lora.adapters.publishers.places import Generation
from code2lora.adapters.publishers.push import push
from code2lora.adapters.publishers.target import Target
from code2lora.errors import UserError
from tests.adapters.publishers.servers import (
    MistralStub,
    OllamaStub,
    RouterStub,
    VllmStub,
    read_preset,
    serving,
)
from tests.adapters.test_publish import METADATA
from tests.hypernetwork import tiny

Make = Callable[..., Generation]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Publish another generation."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"model_type": "qwen2"}))

    def made(number: int = 1, *, rank: int = 8) -> Generation:
        lora = tiny.random_lora(seed=number, rank=rank)
        metadata = replace(METADATA, commit=f"{number:040x}")
        written = publish(lora, metadata, tmp_path / "root", n_layers=2)
        return Generation(
            path=written.path,
            number=number,
            commit=metadata.commit,
            sha256=written.sha256,
            base_dir=base,
        )

    return made


@pytest.fixture
def vllm() -> Iterator[VllmStub]:
    stub = VllmStub()
    with serving(stub):
        yield stub


def refusal(target: Target, generation: Generation, **options: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        push(target, generation, name=target.name, **options)
    assert caught.value.hint
    return caught.value


# -- vLLM, mistral.rs -------------------------------------------------------------------------


def test_vllm_swaps_in_place_by_a_new_path(vllm: VllmStub, make: Make) -> None:
    target = Target(kind="vllm", destination=vllm.url, name="app")
    for number in (1, 2):
        generation = make(number)
        push(target, generation, name="app")
        assert vllm.adapters == {"app": str(generation.path)}
        assert vllm.requests[-1] == (
            "POST",
            "/v1/load_lora_adapter",
            {"lora_name": "app", "lora_path": str(generation.path), "load_inplace": True},
        )
    assert len({request[2]["lora_path"] for request in vllm.requests}) == 2


def test_vllm_refusals(vllm: VllmStub, make: Make) -> None:
    target = Target(kind="vllm", destination=vllm.url, name="app")
    error = refusal(target, make(1, rank=32))
    assert error.message == (
        f"vllm {vllm.url} did not take the adapter: 400, LoRA rank 32 is greater than 16."
    )
    error = refusal(replace(target, name="base-model"), make(1))
    assert error.message.endswith("400, The lora adapter name 'base-model' is a base model.")
    vllm.allows_updates = False
    error = refusal(target, make(1))
    assert error.hint == ("start vLLM with `--enable-lora` and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1")
    assert vllm.adapters == {}


def test_a_text_answer_is_told_in_one_line(vllm: VllmStub, make: Make) -> None:
    vllm.answers = [(500, "Internal\nServer   Error" + "!" * 1000)]
    error = refusal(Target(kind="vllm", destination=vllm.url, name="app"), make())
    assert "500, Internal Server Error!!!" in error.message and len(error.message) < 400


def test_the_key_is_sent_and_never_told(vllm: VllmStub, make: Make, tmp_path: Path) -> None:
    vllm.key = "sk-very-secret"
    file = tmp_path / "key"
    file.write_text("sk-very-secret\n")
    file.chmod(0o600)
    target = Target(kind="vllm", destination=vllm.url, name="app", key_file=str(file))
    push(target, make(), name="app", key=read_key(target, {}))
    by_variable = replace(target, key_file=None, key_env="MY_KEY")
    push(by_variable, make(), name="app", key=read_key(by_variable, {"MY_KEY": vllm.key}))
    error = refusal(target, make(), key="sk-wrong")
    assert "401, Unauthorized" in error.message and "key-file" in str(error.hint)
    assert "sk-" not in f"{target.text} {target!r} {error.message} {error.hint}"


def test_keys_that_are_not_used(tmp_path: Path) -> None:
    file = tmp_path / "key"
    target = Target(kind="vllm", destination="http://[::1]", name="a", key_file=str(file))
    with pytest.raises(UserError, match="cannot be read"):
        read_key(target, {})
    file.write_text("sk-secret")
    file.chmod(0o644)
    with pytest.raises(UserError, match="others can read the key"):
        read_key(target, {})
    file.chmod(0o600)
    for text in ("", "two\nlines", "sk\x00", "schlüssel"):
        file.write_text(text)
        with pytest.raises(UserError, match="the key is empty or not one line of plain text"):
            read_key(target, {})
    with pytest.raises(UserError, match="the key in MY_KEY, which is not set"):
        read_key(replace(target, key_file=None, key_env="MY_KEY"), {})


@pytest.mark.parametrize("status", [429, 409, 503])
def test_a_busy_server_is_asked_again(make: Make, tmp_path: Path, status: int) -> None:
    stub, waits = MistralStub(tmp_path / "root"), []
    busy = {"error": {"message": "another load is in progress", "code": "lora_load_busy"}}
    with serving(stub):
        target = Target(kind="mistralrs", destination=stub.url, name="app")
        stub.answers = [(status, busy)] * 3
        push(target, make(), name="app", wait=waits.append)
        assert list(stub.adapters) == ["app"]
        assert len(waits) == 3
        if status == 429:
            assert min(waits) >= 1.0  # as Retry-After asked
        else:
            assert waits[0] < waits[1] < waits[2]
        stub.answers = [(status, busy)] * TRIES
        error = refusal(target, make(2), wait=waits.append)
        assert f"{status}, another load is in progress" in error.message
        assert len(waits) == 3 + TRIES - 1


def test_waits_differ_between_clients(vllm: VllmStub, make: Make) -> None:
    waits: list[float] = []
    for _ in range(3):
        vllm.answers = [(503, "")]
        push(
            Target(kind="vllm", destination=vllm.url, name="a"), make(), name="a", wait=waits.append
        )
    assert len(set(waits)) == 3


def test_mistral_rs_refusals(make: Make, tmp_path: Path) -> None:
    stub = MistralStub(tmp_path / "elsewhere")
    with serving(stub):
        target = Target(kind="mistralrs", destination=stub.url, name="app")
        error = refusal(target, make())
        assert error.message.endswith("403, outside the adapter root")
        assert error.hint == (
            "start mistral.rs with `--enable-lora`, MISTRALRS_ALLOW_RUNTIME_LORA_UPDATING=1 and "
            f"MISTRALRS_LORA_ADAPTER_ROOT={tmp_path / 'root'}"
        )
        unavailable = {"error": {"message": "no LoRA", "code": "lora_runtime_unavailable"}}
        stub.answers = [(409, unavailable)]
        assert "`--enable-lora`" in str(refusal(target, make()).hint)  # and is not asked again


# -- what any server may do -------------------------------------------------------------------


def test_nobody_answers(make: Make) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    error = refusal(Target(kind="vllm", destination=url, name="app"), make())
    assert error.message.startswith(f"vllm {url} does not answer: ")


def test_a_server_that_hangs_is_left(make: Make) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        error = refusal(Target(kind="vllm", destination=url, name="app"), make(), timeout_s=0.1)
    assert error.message == f"vllm {url} does not answer: timed out"


def test_what_is_no_http_is_told(make: Make) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65_536)
                connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        error = refusal(Target(kind="vllm", destination=url, name="app"), make())
        thread.join()
    assert "does not answer: " in error.message


def test_redirects_are_not_followed(vllm: VllmStub, make: Make) -> None:
    vllm.answers = [(307, "")]
    error = refusal(Target(kind="vllm", destination=vllm.url, name="app"), make())
    assert "307" in error.message and vllm.requests == []


def test_a_damaged_adapter_is_not_pushed(vllm: VllmStub, make: Make) -> None:
    generation = make()
    weights = generation.path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    error = refusal(Target(kind="vllm", destination=vllm.url, name="app"), generation)
    assert error.message == f"the adapter {generation.path} is gone or has changed"
    assert vllm.requests == []


# -- directory --------------------------------------------------------------------------------


@pytest.mark.parametrize("format_", ["peft", "gguf"])
def test_a_directory_keeps_the_newest(make: Make, tmp_path: Path, format_: str) -> None:
    if format_ == "gguf":
        pytest.importorskip("gguf")
    folder = tmp_path / "copies"
    target = Target(kind="directory", destination=str(folder), name="app", format=format_, keep=2)
    generations = [make(number) for number in range(1, 5)]
    for generation in generations:
        push(target, generation, name="app")
        push(target, generation, name="app")  # again changes nothing
    ending = ".gguf" if format_ == "gguf" else ""
    kept = [f"{g.entry('app')}{ending}" for g in generations[2:]]
    assert sorted(path.name for path in folder.iterdir()) == kept
    assert kept[0].startswith("app-00000003-000000000000-")


def test_only_copies_of_this_name_are_pruned(make: Make, tmp_path: Path) -> None:
    folder = tmp_path / "copies"
    folder.mkdir()
    others = ["app", "app-1", "application-00000001-000000000000-000000000000", "notes.txt"]
    for name in others:
        (folder / name).write_text("mine")
    (folder / "app-00000001-000000000000-000000000000").symlink_to(tmp_path)
    target = Target(kind="directory", destination=str(folder), name="app", keep=1)
    for number in (1, 2):
        push(target, make(number), name="app")
        push(replace(target, name="app-b"), make(number), name="app-b")
    names = {path.name for path in folder.iterdir()}
    assert names == {
        *others,
        "app-00000001-000000000000-000000000000",
        make(2).entry("app"),
        make(2).entry("app-b"),
    }


def test_a_lost_count_of_generations_prunes_by_age(make: Make, tmp_path: Path) -> None:
    """The numbers begin again with a new database."""
    folder = tmp_path / "copies"
    target = Target(kind="directory", destination=str(folder), name="app", keep=1)
    push(target, make(41), name="app")
    push(target, make(1), name="app")
    assert [path.name for path in folder.iterdir()] == [make(1).entry("app")]


@pytest.mark.parametrize(("mode", "file_mode"), [(0o755, 0o644), (0o700, 0o600), (0o750, 0o640)])
def test_copies_are_as_readable_as_their_directory(
    make: Make, tmp_path: Path, mode: int, file_mode: int
) -> None:
    folder = tmp_path / "copies"
    folder.mkdir()
    folder.chmod(mode)
    push(Target(kind="directory", destination=str(folder), name="app"), make(), name="app")
    [copy] = folder.iterdir()
    assert stat.S_IMODE(copy.stat().st_mode) == mode
    assert {stat.S_IMODE(file.stat().st_mode) for file in copy.iterdir()} == {file_mode}


def test_a_directory_that_cannot_be_made(make: Make, tmp_path: Path) -> None:
    target = Target(kind="directory", destination=str(tmp_path / "no" / "where"), name="app")
    with pytest.raises(UserError, match=r"cannot write into .*: No such file or directory"):
        push(target, make(), name="app")


# -- llama.cpp --------------------------------------------------------------------------------

PRESET = """version = 1

; what all share
[*]
c = 4096

[other]
model = /models/other.gguf
lora = /keep/me.gguf

[ app ] ; ours
# the base
model = /models/mini.gguf
lora = /old.gguf
c = 2048

[last]
model = /models/last.gguf"""


def test_only_the_adapter_of_the_section_changes() -> None:
    text = with_adapter(PRESET, "app", Path("/new/a b.gguf"), None)
    assert text == PRESET.replace("lora = /old.gguf\n", "").replace(
        "[ app ] ; ours\n", "[ app ] ; ours\nlora = /new/a b.gguf\n"
    )
    assert with_adapter(text, "app", Path("/new/a b.gguf"), None) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "[app]\nmodel = /m.gguf\nlora = /l.gguf\n"),
        ("[*]\nc = 1", "[*]\nc = 1\n\n[app]\nmodel = /m.gguf\nlora = /l.gguf\n"),
        ("[*]\nc = 1\n", "[*]\nc = 1\n\n[app]\nmodel = /m.gguf\nlora = /l.gguf\n"),
        ("[app]", "[app]\nlora = /l.gguf\n"),
        ("[app]\r\nmodel = /x\r\n", "[app]\r\nlora = /l.gguf\r\nmodel = /x\r\n"),
        ("[app]\nLLAMA_ARG_LORA = /x\n", "[app]\nlora = /l.gguf\n"),
    ],
)
def test_sections_that_are_added_or_completed(text: str, expected: str) -> None:
    found = with_adapter(text, "app", Path("/l.gguf"), "/m.gguf")
    assert found == expected
    assert read_preset(found)["app"]["lora"] == "/l.gguf"


def test_a_missing_section_needs_a_base() -> None:
    assert with_adapter("[*]\n", "app", Path("/l.gguf"), None) is None


def test_the_router_reloads_with_the_new_file(make: Make, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    real = tmp_path / "real.ini"
    real.write_text(PRESET)
    real.chmod(0o640)
    preset = tmp_path / "models.ini"
    preset.symlink_to(real)
    stub = RouterStub(preset)
    with serving(stub):
        target = Target(
            kind="llamacpp", destination=stub.url, name="app", preset=str(preset), keep=2
        )
        for number in (1, 2, 3):
            push(target, make(number), name="app")
            lora = Path(stub.models["app"]["lora"])
            assert lora == tmp_path / "code2lora-adapters" / f"{make(number).entry('app')}.gguf"
            assert lora.read_bytes()[:4] == b"GGUF"
    assert preset.is_symlink() and stat.S_IMODE(real.stat().st_mode) == 0o640
    assert stub.models["other"] == {"model": "/models/other.gguf", "lora": "/keep/me.gguf"}
    assert len(list((tmp_path / "code2lora-adapters").iterdir())) == 2


def test_a_router_that_is_down_finds_it_at_its_start(make: Make, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    preset = tmp_path / "models.ini"
    stub = RouterStub(preset)
    with serving(stub):
        target = Target(
            kind="llamacpp",
            destination=stub.url,
            name="app",
            preset=str(preset),
            model="/models/mini.gguf",
            keep=1,
        )
        push(target, make(1), name="app")
    error = refusal(target, make(2))
    assert "does not answer" in error.message
    assert read_preset(preset.read_text())["app"]["lora"].endswith(f"{make(2).entry('app')}.gguf")
    # the running server, if it is only slow, still has the old file
    assert len(list((tmp_path / "code2lora-adapters").iterdir())) == 2


def test_router_refusals(make: Make, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    preset = tmp_path / "models.ini"
    preset.write_text("[*]\n")
    stub = RouterStub(preset)
    with serving(stub):
        target = Target(kind="llamacpp", destination=stub.url, name="app", preset=str(preset))
        assert refusal(target, make()).message == f"{preset} has no section [app]"
        assert preset.read_text() == "[*]\n"
        preset.write_text("[app]\nmodel = /m.gguf\n")
        stub.answers = [(404, {"error": {"message": "File Not Found", "code": 404}})]
        error = refusal(target, make())
        assert error.message.endswith("did not reload its presets: 404, File Not Found")
        preset.write_bytes(b"[app]\n\xff\n")
        assert "cannot be read" in refusal(target, make()).message


# -- Ollama -----------------------------------------------------------------------------------


def test_ollama_gets_a_blob_and_a_model(make: Make) -> None:
    pytest.importorskip("gguf")
    stub = OllamaStub(("base:1",))
    with serving(stub):
        target = Target(kind="ollama", destination=stub.url, name="app", model="base:1")
        push(target, make(), name="app")
        push(target, make(), name="app")
        assert [request[:2] for request in stub.requests[3:]] == [
            ("HEAD", stub.requests[0][1]),  # which is there already
            ("POST", "/api/create"),
        ]
        [digest] = stub.blobs
        assert stub.blobs[digest][:4] == b"GGUF"
        assert digest == f"sha256:{hashlib.sha256(stub.blobs[digest]).hexdigest()}"
        assert stub.models["app"] == {
            "model": "app",
            "from": "base:1",
            "adapters": {"adapter.gguf": digest},
            "stream": False,
        }
        missing = replace(target, model="other:1")
        error = refusal(missing, make())
        assert "did not make the model app: 400, pull model manifest" in error.message
        assert error.hint is not None and error.hint.startswith("`ollama pull other:1`")
        stub.answers = [(200, ""), (200, {"status": "unsupported architecture"})]
        assert "unsupported architecture" in refusal(target, make()).message


def test_nothing_of_ours_stays_in_the_temporary_directory(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    stub = OllamaStub(())
    with serving(stub):
        refusal(Target(kind="ollama", destination=stub.url, name="app", model="x"), make())
    assert os.listdir(folder) == []
