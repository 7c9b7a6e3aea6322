"""Push to vLLM and mistral.rs, which load a PEFT directory by its path and swap it in place.

Both cache by (name, path), so what makes a push right is that a generation's path is new and never
changes: the server loads the new weights before it lets go of the old, and requests under way end
on what they began with. The server reads the directory itself, so it must see the same path.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from code2lora.adapters.publishers.http import Answer, Server, Unavailable
from code2lora.errors import UserError

TRIES = 6
_FIRST_WAIT_S = 0.2
_LONGEST_WAIT_S = 5.0

_HINTS = {
    "vllm": "start vLLM with `--enable-lora` and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1",
    "mistralrs": "start mistral.rs with `--enable-lora`, "
    "MISTRALRS_ALLOW_RUNTIME_LORA_UPDATING=1 and MISTRALRS_LORA_ADAPTER_ROOT={root}",
}


def push_lora_api(server: Server, name: str, path: Path, wait: Callable[[float], None]) -> None:
    """Have the server serve an adapter directory under a name, in place of what it had there.

    wait: sleeps for some seconds; used while the server loads another adapter
    Raises UserError when it does not, Unavailable when it may later.
    """
    content = {"lora_name": name, "lora_path": str(path), "load_inplace": True}
    for attempt in range(TRIES):
        answer = server.post("/v1/load_lora_adapter", content)
        if answer.status == 200:
            return
        if not _is_passing(answer) or attempt == TRIES - 1:
            break
        wait(_wait_s(answer, attempt))
    raise _refused(server, answer, path)


def _is_passing(answer: Answer) -> bool:
    """Tell whether the same request may succeed in a moment."""
    # 429: another load is under way. 409: somebody else swapped, or a file changed, meanwhile.
    return answer.status in (409, 429, 503) and answer.code != "lora_runtime_unavailable"


def _wait_s(answer: Answer, attempt: int) -> float:
    """Return a wait that grows, and that differs between clients that were refused together."""
    base_s = min(_FIRST_WAIT_S * 2.0**attempt, _LONGEST_WAIT_S)
    if answer.retry_after_s is not None:
        base_s = min(max(base_s, answer.retry_after_s), _LONGEST_WAIT_S)
    return base_s * random.uniform(1.0, 1.5)


def _refused(server: Server, answer: Answer, path: Path) -> UserError:
    target = server.target
    hint = "the server's log says more; `code2lora publish now` tries again"
    if answer.status == 401:
        hint = "`--key-file` or `--key-env` of `code2lora publish add` names the server's key"
    elif answer.status in (403, 404, 405) or answer.code == "lora_runtime_unavailable":
        hint = _HINTS[target.kind].format(root=path.parent.parent)
    kind = Unavailable if _is_passing(answer) or answer.status >= 500 else UserError
    return kind(
        f"{target.label} did not take the adapter: {answer.status}, {answer.message}", hint=hint
    )
