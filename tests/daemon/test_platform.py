"""Service definitions say what the service managers read."""

from __future__ import annotations

import configparser
import plistlib
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest

from code2lora.daemon.platform import launchd_plist, notify_service_manager, systemd_unit

COMMAND = ["/opt/my env/bin/python", "-m", "code2lora.daemon", "run"]
ENVIRONMENT = {"CODE2LORA_STATE_DIR": '/a "b"/$c%d'}


def test_the_systemd_unit_quotes_command_and_environment() -> None:
    unit = systemd_unit(COMMAND, ENVIRONMENT)

    parsed = configparser.RawConfigParser(strict=True)
    parsed.read_string(unit)
    service = parsed["Service"]
    assert service["ExecStart"] == '"/opt/my env/bin/python" "-m" "code2lora.daemon" "run"'
    assert service["Environment"] == r'"CODE2LORA_STATE_DIR=/a \"b\"/$$c%%d"'
    assert service["Type"] == "notify"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / "code2lora.service"
    unit.write_text(systemd_unit(["/bin/true"], ENVIRONMENT))

    subprocess.run(["systemd-analyze", "verify", str(unit)], check=True, capture_output=True)


def test_the_launchd_plist_reads_back() -> None:
    plist = plistlib.loads(launchd_plist(COMMAND, ENVIRONMENT))

    assert plist["ProgramArguments"] == COMMAND
    assert plist["EnvironmentVariables"] == ENVIRONMENT
    assert plist["KeepAlive"] == {"SuccessfulExit": False}


def test_the_service_manager_hears_us() -> None:
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(folder / "n"))
        notify_service_manager("READY=1", str(folder / "n"))
        assert manager.recv(100) == b"READY=1"
    shutil.rmtree(folder)
    notify_service_manager("READY=1", None)  # nobody to tell
