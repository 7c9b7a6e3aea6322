"""Push one generation to one target."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from code2lora.adapters.prune import is_intact
from code2lora.adapters.publishers.http import TIMEOUT_S, Server
from code2lora.adapters.publishers.llamacpp import push_llamacpp
from code2lora.adapters.publishers.lora_api import push_lora_api
from code2lora.adapters.publishers.ollama import push_ollama
from code2lora.adapters.publishers.places import Generation, place, prune_copies
from code2lora.adapters.publishers.target import Target
from code2lora.errors import UserError


def push(
    target: Target,
    generation: Generation,
    *,
    name: str,
    key: str | None = None,
    timeout_s: float = TIMEOUT_S,
    wait: Callable[[float], None] = time.sleep,
) -> None:
    """Have a target serve or hold a generation under a name.

    key: what the server's requests carry, from `http.read_key`
    wait: sleeps for some seconds
    Raises UserError when it does not, Unavailable where it may at another time; what it served or
    held before then stays.
    """
    if not is_intact(generation.path, generation.sha256):
        raise UserError(
            f"the adapter {generation.path} is gone or has changed",
            hint="`code2lora refresh` makes it again",
        )
    server = Server(target, key, timeout_s)
    if target.kind in ("vllm", "mistralrs"):
        push_lora_api(server, name, generation.path, wait)
    elif target.kind == "llamacpp":
        push_llamacpp(server, name, generation)
    elif target.kind == "ollama":
        push_ollama(server, name, generation)
    else:
        _push_directory(target, generation, name)


def _push_directory(target: Target, generation: Generation, name: str) -> None:
    folder = Path(target.destination)
    copy = place(generation, folder, name, target.format or "peft")
    prune_copies(folder, name, keep=target.keep, current=copy)
