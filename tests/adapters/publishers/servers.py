"""HTTP servers that keep to the documented contracts of what adapters are pushed to.

Stand-ins: they check requests as the real ones do and remember what they were given, but load
nothing. What the real ones answer was read in their sources (vLLM 0.33, mistral.rs 0.9.5, llama.cpp
0.5, Ollama).
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


class StubServer:
    """One server with its memory."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, Any]] = []
        self.key: str | None = None
        self.answers: list[tuple[int, Any]] = []
        """What to answer next instead of doing what is asked."""
        self.url = ""

    def respond(self, method: str, path: str, headers: Any, body: bytes) -> tuple[int, Any]:
        """Return status and body: text, or what is to be JSON."""
        raise NotImplementedError

    def answer(self, method: str, path: str, headers: Any, body: bytes) -> tuple[int, Any]:
        if self.key is not None and headers.get("Authorization") != f"Bearer {self.key}":
            return 401, {"error": "Unauthorized"}
        if self.answers:
            return self.answers.pop(0)
        return self.respond(method, path, headers, body)


class VllmStub(StubServer):
    """`vllm serve` with LoRA and VLLM_ALLOW_RUNTIME_LORA_UPDATING."""

    def __init__(self, *, max_rank: int = 16, allows_updates: bool = True) -> None:
        super().__init__()
        self.max_rank = max_rank
        self.allows_updates = allows_updates
        self.base = "base-model"
        self.adapters: dict[str, str] = {}

    def respond(self, method: str, path: str, headers: Any, body: bytes) -> tuple[int, Any]:
        if not self.allows_updates or path != "/v1/load_lora_adapter" or method != "POST":
            return 404, {"detail": "Not Found"}
        if headers.get("Content-Type", "").partition(";")[0] != "application/json":
            return 415, {"detail": "Unsupported Media Type: Only 'application/json' is allowed"}
        content = json.loads(body)
        self.requests.append((method, path, content))
        if not isinstance(content.get("lora_name"), str) or not content.get("lora_path"):
            return 400, _vllm_error("Both 'lora_name' and 'lora_path' must be provided.")
        name, folder = content["lora_name"], Path(content["lora_path"])
        if name in self.adapters and not content.get("load_inplace"):
            return 400, _vllm_error(f"The lora adapter '{name}' has already been loaded.")
        if name == self.base:
            return 400, _vllm_error(f"The lora adapter name '{name}' is a base model.")
        if not (folder / "adapter_config.json").is_file():
            return 404, _vllm_error(f"Loading lora {name} failed: No adapter found for {folder}")
        config = json.loads((folder / "adapter_config.json").read_text())
        if config["r"] not in RANKS or config["r"] > self.max_rank:
            return 400, _vllm_error(f"LoRA rank {config['r']} is greater than {self.max_rank}.")
        refused = config["use_dora"] or config["bias"] != "none" or config["modules_to_save"]
        if refused or not (folder / "adapter_model.safetensors").is_file():
            return 400, _vllm_error("unsupported adapter")
        self.adapters[name] = str(folder)
        return 200, f"Success: LoRA adapter '{name}' added successfully."


class MistralStub(StubServer):
    """`mistralrs serve --enable-lora`: unknown fields are refused, and a path must be inside."""

    FIELDS = frozenset(
        ("lora_name", "lora_path", "load_inplace", "expected_generation", "is_3d_lora_weight")
    )

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root
        self.adapters: dict[str, str] = {}

    def respond(self, method: str, path: str, headers: Any, body: bytes) -> tuple[int, Any]:
        if (method, path) != ("POST", "/v1/load_lora_adapter"):
            return 404, {"error": {"message": "not found", "code": "not_found"}}
        content = json.loads(body)
        self.requests.append((method, path, content))
        if not set(content) <= self.FIELDS:
            return 422, "Failed to deserialize the JSON body"
        folder = Path(content["lora_path"]).resolve()
        if not folder.is_relative_to(self.root):
            return 403, _mistral_error("adapter_path_forbidden", "outside the adapter root")
        weights = folder / "adapter_model.safetensors"
        if not weights.is_file():
            return 404, _mistral_error("adapter_path_not_found", "no such adapter")
        self.adapters[content["lora_name"]] = str(folder)
        generation = hashlib.sha256(weights.read_bytes()).hexdigest()
        return 200, {"id": content["lora_name"], "object": "lora_adapter", "generation": generation}


class RouterStub(StubServer):
    """`llama-server --models-preset FILE`: reads the presets again when told to."""

    def __init__(self, preset: Path) -> None:
        super().__init__()
        self.preset = preset
        self.models: dict[str, dict[str, str]] = {}

    def respond(self, method: str, path: str, headers: Any, body: bytes) -> tuple[int, Any]:
        self.requests.append((method, path, None))
        if (method, path) != ("GET", "/models?reload=1"):
            return 404, {"error": {"message": "File Not Found", "code": 404}}
        self.models = read_preset(self.preset.read_text())
        return 200, {"data": [{"id": name} for name in self.models]}


class OllamaStub(StubServer):
    """`ollama serve`."""

    def __init__(self, bases: tuple[str, ...]) -> None:
        super().__init__()
        self.bases = bases
        self.blobs: dict[str, bytes] = {}
        self.models: dict[str, Any] = {}

    def respond(self, method: str, path: str, headers: Any, body: bytes) -> tuple[int, Any]:
        self.requests.append((method, path, None))
        if path.startswith("/api/blobs/"):
            digest = path.removeprefix("/api/blobs/")
            if method == "HEAD":
                return (200 if digest in self.blobs else 404), ""
            if digest != f"sha256:{hashlib.sha256(body).hexdigest()}":
                return 400, {"error": "digest mismatch"}
            self.blobs[digest] = body
            return 201, ""
        if (method, path) != ("POST", "/api/create"):
            return 404, "404 page not found"
        content = json.loads(body)
        if content["from"] not in self.bases:
            return 400, {"error": "pull model manifest: file does not exist"}
        if not set(content["adapters"].values()) <= set(self.blobs):
            return 400, {"error": "blob not found"}
        self.models[content["model"]] = content
        return 200, {"status": "success"}


@contextmanager
def serving(stub: StubServer, *, port: int = 0) -> Iterator[StubServer]:
    """Serve a stub on a port of this machine; 0 takes any."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _do(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, content = stub.answer(self.command, self.path, self.headers, body)
            data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
            kind = "text/plain" if isinstance(content, str) else "application/json"
            self.send_response(status)
            if status == 429:
                self.send_header("Retry-After", "1")
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_POST = do_HEAD = _do

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    stub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def read_preset(text: str) -> dict[str, dict[str, str]]:
    """Return the sections of a preset file as llama.cpp reads it; ValueError where it would not."""
    found: dict[str, dict[str, str]] = {}
    section = "default"
    for line in text.splitlines():
        bare = line.split(";")[0].split("#")[0].strip()
        if not bare:
            continue
        if bare.startswith("[") and bare.endswith("]"):
            section = bare[1:-1].strip()
            found[section] = {}
        else:
            key, equals, value = bare.partition("=")
            if not equals:
                raise ValueError(f"no key: {line!r}")
            found.setdefault(section, {})[key.strip()] = value.strip()
    return found


def _vllm_error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "InvalidUserInput", "param": None, "code": 400}}


def _mistral_error(code: str, message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", "code": code}}
