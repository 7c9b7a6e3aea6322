"""Push to Ollama: upload the adapter as a GGUF blob and make the model of this name anew with it.

Ollama reloads a model whose adapter has another digest at its next request.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path

from code2lora.adapters.export import export
from code2lora.adapters.publishers.http import Answer, Server
from code2lora.adapters.publishers.places import Generation
from code2lora.errors import UserError

_FILE = "adapter.gguf"


def push_ollama(server: Server, name: str, generation: Generation) -> None:
    """Have Ollama's model of this name be the base with a generation.

    Raises UserError when it refuses, such as when it lacks the base.
    """
    with tempfile.TemporaryDirectory(prefix="code2lora-") as folder:
        file = Path(folder) / _FILE
        export(generation.path, file, "gguf", base_dir=generation.base_dir)
        with file.open("rb") as stream:
            digest = f"sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}"
        blob = f"/api/blobs/{digest}"
        if server.send("HEAD", blob).status != 200:
            _require(server, server.send("POST", blob, file), 201, "take the adapter")
    content = {
        "model": name,
        "from": server.target.model,
        "adapters": {_FILE: digest},
        "stream": False,
    }
    answer = server.post("/api/create", content)
    _require(server, answer, 200, f"make the model {name}")
    if _status(answer) != "success":
        raise _refused(server, answer, f"make the model {name}")


def _status(answer: Answer) -> object:
    try:
        return json.loads(answer.text)["status"]
    except (ValueError, KeyError, TypeError):
        return None


def _require(server: Server, answer: Answer, status: int, what: str) -> None:
    if answer.status != status:
        raise _refused(server, answer, what)


def _refused(server: Server, answer: Answer, what: str) -> UserError:
    return UserError(
        f"{server.target.label} did not {what}: {answer.status}, {answer.message}",
        hint=f"`ollama pull {server.target.model}` fetches the base, if that is what it lacks",
    )
