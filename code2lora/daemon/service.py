"""Have the system start the daemon at login: a systemd user unit or a launchd agent."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path

from code2lora.daemon.control import run_command
from code2lora.daemon.platform import service_commands, service_definition, service_file
from code2lora.errors import UserError


def install_service(home: Path, env: Mapping[str, str]) -> Path:
    """Write the service definition and switch it on. Returns the file's path.

    Raises UserError when the service manager refuses; the file is left for a look.
    """
    path = service_file(home)
    path.parent.mkdir(parents=True, exist_ok=True)
    ours = {key: value for key, value in env.items() if key.startswith("CODE2LORA_")}
    path.write_bytes(service_definition(run_command(), ours))
    switch_on, _ = service_commands(path)
    _call(switch_on, f"wrote {path}, but the service manager refused it")
    return path


def remove_service(home: Path) -> bool:
    """Switch the service off and delete its definition; False when there is none."""
    path = service_file(home)
    if not path.exists():
        return False
    _, switch_off = service_commands(path)
    _call(switch_off, "the service manager would not stop the service")
    path.unlink()
    return True


def _call(command: list[str], complaint: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{complaint}: {error}", hint=f"run `{' '.join(command)}`") from error
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1:] or [f"status {done.returncode}"]
        raise UserError(f"{complaint}: {reason[0]}", hint=f"run `{' '.join(command)}`")
