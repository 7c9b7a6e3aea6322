"""What differs between operating systems: detaching, service files, telling the service manager."""

from __future__ import annotations

import os
import plistlib
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

SERVICE_NAME = "code2lora"
LAUNCHD_LABEL = "dev.code2lora.daemon"


def interpreter() -> str:
    """Return this environment's Python by one name, however this process was started."""
    usual = Path(sys.prefix) / "bin" / "python"
    return str(usual) if os.path.exists(usual) else sys.executable


def spawn_detached(command: Sequence[str], *, log: Path, env: Mapping[str, str]) -> int:
    """Start a process that outlives us, its output appended to `log`. Returns its pid."""
    with open(log, "ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd="/",
            env=dict(env),
            start_new_session=True,
        )
    # The child is on its own: keep the garbage collector from warning that it still runs.
    process.returncode = 0
    return process.pid


def notify_service_manager(message: str, notify_socket: str | None) -> None:
    """Send `READY=1` or `STOPPING=1` to systemd (sd_notify(3)); nothing without a socket."""
    if not notify_socket:
        return
    address = "\0" + notify_socket[1:] if notify_socket.startswith("@") else notify_socket
    # A manager that is gone is no reason to end.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel, suppress(OSError):
        channel.sendto(message.encode(), address)


def service_file(home: Path) -> Path:
    """Return where this system keeps a user's service definition."""
    if sys.platform == "darwin":
        return home / "Library" / "LaunchAgents" / f"{LAUNCHD_LABEL}.plist"
    return home / ".config" / "systemd" / "user" / f"{SERVICE_NAME}.service"


def service_definition(command: Sequence[str], environment: Mapping[str, str]) -> bytes:
    """Return the systemd user unit, or on macOS the launchd property list."""
    if sys.platform == "darwin":
        return launchd_plist(command, environment)
    return systemd_unit(command, environment).encode()


def systemd_unit(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """Return a systemd user unit (systemd.service(5)) that runs the supervisor."""
    settings = "".join(
        f"Environment={_systemd_quote(f'{key}={value}')}\n"
        for key, value in sorted(environment.items())
    )
    return (
        "[Unit]\n"
        "Description=Code2LoRA: a LoRA adapter for every commit\n\n"
        "[Service]\n"
        "Type=notify\n"
        f"ExecStart={' '.join(_systemd_quote(part) for part in command)}\n"
        f"{settings}"
        "Restart=on-failure\n"
        "Nice=10\n"
        "IOSchedulingClass=idle\n"
        "NoNewPrivileges=true\n\n"
        "[Install]\n"
        "WantedBy=default.target\n"
    )


def launchd_plist(command: Sequence[str], environment: Mapping[str, str]) -> bytes:
    """Return a launchd property list (launchd.plist(5)) for the same."""
    return plistlib.dumps(
        {
            "Label": LAUNCHD_LABEL,
            "ProgramArguments": list(command),
            "EnvironmentVariables": dict(environment),
            "RunAtLoad": True,
            "KeepAlive": {"SuccessfulExit": False},
            "ProcessType": "Background",
            "LowPriorityIO": True,
        }
    )


def service_commands(path: Path) -> tuple[list[str], list[str]]:
    """Return the commands that switch the service on and off."""
    if sys.platform == "darwin":
        domain = f"gui/{os.getuid()}"
        return (
            ["launchctl", "bootstrap", domain, str(path)],
            ["launchctl", "bootout", f"{domain}/{LAUNCHD_LABEL}"],
        )
    return (
        ["systemctl", "--user", "enable", "--now", path.name],
        ["systemctl", "--user", "disable", "--now", path.name],
    )


def _systemd_quote(text: str) -> str:
    """Quote one word for a unit file (systemd.syntax(7))."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"'
