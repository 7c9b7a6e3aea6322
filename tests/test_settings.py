"""Settings: where they come from, which one wins, and what a wrong one is told."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from code2lora.errors import UserError
from code2lora.settings import SETTING_NAMES, Settings, config_file, load_settings


@pytest.fixture(autouse=True)
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A config.toml of our own, and no variable but the one that says where it is."""
    for name in list(os.environ):
        if name.startswith("CODE2LORA_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("CODE2LORA_CONFIG_DIR", str(tmp_path))
    yield tmp_path / "config.toml"


def refusal() -> tuple[str, str | None]:
    """Return the message and the hint with which the settings are refused."""
    with pytest.raises(UserError) as caught:
        load_settings()
    return caught.value.message, caught.value.hint


def test_without_a_file_the_defaults_hold(config: Path) -> None:
    settings = load_settings()

    assert config_file() == config and not config.exists()
    assert (settings.model, settings.keep_adapters, settings.log_level) == ("mini", 5, "INFO")
    assert settings.resolved_database_url == f"sqlite:///{settings.state_dir}/state.db"
    assert settings.state_dir.name == "code2lora" and settings.state_dir.is_absolute()


def test_the_file_beats_the_defaults_and_the_environment_beats_the_file(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.write_text('keep_adapters = 7\nsweep_s = 30\nmodel = "/models/ours"\n')
    monkeypatch.setenv("CODE2LORA_SWEEP_S", "45.5")

    settings = load_settings()

    assert (settings.keep_adapters, settings.sweep_s) == (7, 45.5)
    assert settings.model == "/models/ours"


def test_every_folder_can_be_moved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("STATE", "DATA", "RUNTIME"):
        monkeypatch.setenv(f"CODE2LORA_{name}_DIR", str(tmp_path / name))

    settings = load_settings()

    assert settings.inbox == tmp_path / "STATE" / "inbox"
    assert settings.log_dir == tmp_path / "STATE" / "logs"
    assert settings.adapters_dir == tmp_path / "DATA" / "adapters"
    assert settings.models_dir == tmp_path / "DATA" / "models"
    assert settings.socket == tmp_path / "RUNTIME" / "worker.sock"
    assert settings.pid_file == tmp_path / "RUNTIME" / "supervisor.pid"


def test_the_runtime_folder_follows_the_state_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CODE2LORA_STATE_DIR", "/elsewhere")

    assert load_settings().runtime_dir == Path("/elsewhere/run")


def test_an_empty_variable_is_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = load_settings()
    for name in ("DATABASE_URL", "STATE_DIR", "KEEP_ADAPTERS", "MODEL"):
        monkeypatch.setenv(f"CODE2LORA_{name}", "")

    assert load_settings() == expected


def test_a_tilde_is_the_home_folder(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("CODE2LORA_DATA_DIR", "~/adapters")
    config.write_text('state_dir = "~/state"\n')

    settings = load_settings()

    assert (settings.state_dir, settings.data_dir) == (
        Path("/home/ada/state"),
        Path("/home/ada/adapters"),
    )


def test_a_password_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CODE2LORA_DATABASE_URL", "postgresql://me:secret@host/team")
    settings = load_settings()

    assert settings.resolved_database_url == "postgresql://me:secret@host/team"
    assert "secret" not in repr(settings)


def test_an_unknown_key_names_file_key_and_nearest_match(config: Path) -> None:
    config.write_text("keep_adapter = 3\n")

    assert refusal() == (f"{config}: unknown key 'keep_adapter'", "did you mean 'keep_adapters'?")


def test_an_unknown_key_that_is_near_to_none_gets_the_list(config: Path) -> None:
    config.write_text("[xyzzy]\nq = 1\n")

    message, hint = refusal()

    assert message == f"{config}: unknown key 'xyzzy'"
    assert hint == f"the keys are {', '.join(SETTING_NAMES)}"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("keep_adapters = 0", "keep_adapters is '0', but should be at least 1"),
        ("sweep_s = inf", "sweep_s is 'inf', but should be a finite number"),
        (
            'log_level = "LOUD"',
            "log_level is 'LOUD', but should be one of DEBUG, INFO, WARNING, ERROR",
        ),
        ('data_dir = "here"', "data_dir is 'here', but should be an absolute path"),
        ('state_dir = "~nobody-at-all/x"', "state_dir is '~nobody-at-all/x', but should be an ab"),
    ],
)
def test_a_wrong_value_in_the_file_names_file_and_key(config: Path, line: str, told: str) -> None:
    config.write_text(f"{line}\n")

    message, hint = refusal()

    assert message.startswith(f"{config}: {told}")
    assert hint == f"mend {config}"


def test_a_wrong_value_in_the_environment_names_the_variable(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.write_text("keep_adapters = 3\n")
    monkeypatch.setenv("CODE2LORA_KEEP_ADAPTERS", "few")

    assert refusal() == (
        "CODE2LORA_KEEP_ADAPTERS is 'few', but should be a whole number",
        "mend the variable CODE2LORA_KEEP_ADAPTERS",
    )


@pytest.mark.parametrize("content", [b"keep_adapters = \n", b"model = '\xff'\n"])
def test_a_file_that_is_not_toml_is_named(config: Path, content: bytes) -> None:
    config.write_bytes(content)

    message, hint = refusal()

    assert message.startswith(f"{config} is not valid TOML: ") and hint == f"mend {config}"


def test_the_file_cannot_say_where_it_is(config: Path) -> None:
    config.write_text('config_dir = "/elsewhere"\n')

    assert refusal() == (
        f"{config}: config_dir says where this file is, so it cannot be set in it",
        "set the variable CODE2LORA_CONFIG_DIR",
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_file_that_cannot_be_read_is_named(config: Path) -> None:
    config.touch(mode=0o000)

    assert refusal()[0] == f"cannot read {config}: Permission denied"


def test_settings_do_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        load_settings().model = "other"  # type: ignore[misc]


def placed(monkeypatch: pytest.MonkeyPatch, root: Path) -> Settings:
    for name in ("STATE", "DATA", "RUNTIME"):
        monkeypatch.setenv(f"CODE2LORA_{name}_DIR", str(root / name.lower()))
    return load_settings()


def test_prepare_makes_private_folders_whatever_the_umask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = placed(monkeypatch, tmp_path / "deep" / "down")
    old = os.umask(0)
    try:
        settings.prepare()
    finally:
        os.umask(old)
    settings.prepare()

    for path in (
        settings.state_dir,
        settings.inbox,
        settings.log_dir,
        settings.data_dir,
        settings.adapters_dir,
        settings.runtime_dir,
    ):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700, path


def test_prepare_refuses_a_folder_that_others_can_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = placed(monkeypatch, tmp_path)
    settings.runtime_dir.mkdir()
    settings.runtime_dir.chmod(0o1777)

    with pytest.raises(UserError) as caught:
        settings.prepare()

    assert caught.value.message == (
        f"{settings.runtime_dir} can be written by other users, but should be yours alone"
    )
    assert stat.S_IMODE(settings.runtime_dir.stat().st_mode) == 0o1777


def test_prepare_names_what_it_cannot_make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = placed(monkeypatch, tmp_path)
    settings.state_dir.write_text("in the way")

    with pytest.raises(UserError) as caught:
        settings.prepare()

    assert caught.value.message == f"cannot create {settings.state_dir}: File exists"


def test_importing_the_settings_loads_nothing_heavy() -> None:
    script = (
        "import sys, code2lora.settings\n"
        "heavy = {'pydantic', 'torch', 'numpy', 'sqlalchemy', 'yaml', 'pygit2'}\n"
        "print(sorted(heavy & sys.modules.keys()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )

    assert done.stdout == "[]\n"
