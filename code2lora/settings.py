"""Where things live and how the parts behave: read once at the edge, passed down from there.

Reads `config.toml` in the user's config directory and `CODE2LORA_*` in the environment (the
environment wins). Directories are made 0700 by `prepare`, files are written 0600 by their owners.
"""

from __future__ import annotations

import os
import stat
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from platformdirs import user_config_path, user_data_path, user_state_path
from pydantic import Field, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from code2lora.errors import UserError

APP_NAME = "code2lora"


def config_file() -> Path:
    """Return the path of `config.toml`, honouring `CODE2LORA_CONFIG_DIR`."""
    override = os.environ.get("CODE2LORA_CONFIG_DIR")
    return (_home(override) if override else user_config_path(APP_NAME)) / "config.toml"


class Settings(BaseSettings):
    """All settings of one user on one machine."""

    model_config = SettingsConfigDict(
        env_prefix="CODE2LORA_",
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
    )

    config_dir: Path = Field(default_factory=lambda: user_config_path(APP_NAME))
    """Holds `config.toml`, so only `CODE2LORA_CONFIG_DIR` can say where it is."""
    state_dir: Path = Field(default_factory=lambda: user_state_path(APP_NAME))
    """Holds the database, the inbox and the logs."""
    data_dir: Path = Field(default_factory=lambda: user_data_path(APP_NAME))
    """Holds published adapters and downloaded models."""
    # Not XDG_RUNTIME_DIR: a daemon started by an editor's or cron's git lacks that variable, and
    # would listen where no terminal looks.
    runtime_dir: Path = Field(default_factory=lambda known: known["state_dir"] / "run")
    """Holds the worker's socket and the supervisor's pid; may vanish at reboot."""
    database_url: str | None = Field(default=None, repr=False)  # may hold a password
    """Any SQLAlchemy URL; None means SQLite in `state_dir`."""
    model: str = "mini"
    """Name of a bundled or pulled model, or the path of a model directory."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps`."""
    threads: int = Field(default=0, ge=0)
    """Compute threads of the model worker; 0 lets torch choose."""
    idle_exit_s: float = Field(default=300.0, gt=0)
    """The model worker exits after this long without work, so that its memory is free again."""
    sweep_s: float = Field(default=120.0, gt=0)
    """Every repository's HEAD is looked at this often even when no hook fires."""
    debounce_s: float = Field(default=0.05, ge=0)
    """Pokes of one repository within this time are one refresh."""
    backfill_commits: int = Field(default=200, ge=0)
    """How many commits before HEAD `init` replays in the background."""
    keep_adapters: int = Field(default=5, ge=1)
    """Newest adapter directories kept for each repository; older ones are regenerated on demand."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"

    @field_validator("config_dir", "state_dir", "data_dir", "runtime_dir")
    @classmethod
    def _is_one_place(cls, path: Path) -> Path:
        path = _home(path)
        if not path.is_absolute():  # the daemon's current directory is not the user's
            raise ValueError("should be an absolute path")
        return path

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Return the sources, strongest first: arguments, environment, `config.toml`.

        Raises UserError when the file sets what only the environment can.
        """
        file = config_file()
        toml = TomlConfigSettingsSource(settings_cls, toml_file=file)
        if "config_dir" in toml.toml_data:
            raise UserError(
                f"{file}: config_dir says where this file is, so it cannot be set in it",
                hint="set the variable CODE2LORA_CONFIG_DIR",
            )
        return init_settings, env_settings, toml

    @property
    def resolved_database_url(self) -> str:
        """The SQLAlchemy URL of the state store."""
        return self.database_url or f"sqlite:///{self.state_dir / 'state.db'}"

    @property
    def inbox(self) -> Path:
        """The directory whose files hooks append to and the supervisor watches."""
        return self.state_dir / "inbox"

    @property
    def log_dir(self) -> Path:
        """Where the supervisor and the worker log."""
        return self.state_dir / "logs"

    @property
    def adapters_dir(self) -> Path:
        """The root of published adapter directories, one folder per repository id."""
        return self.data_dir / "adapters"

    @property
    def models_dir(self) -> Path:
        """The root of downloaded models."""
        return self.data_dir / "models"

    @property
    def socket(self) -> Path:
        """The Unix socket on which the model worker answers."""
        return self.runtime_dir / "worker.sock"

    @property
    def pid_file(self) -> Path:
        """The running supervisor's pid, for the hook's cheap liveness test; information only."""
        return self.runtime_dir / "supervisor.pid"

    def prepare(self) -> None:
        """Create the directories, private to the user.

        Raises UserError when one cannot be created, or is there but open to other users' files.
        """
        for path in (
            self.state_dir,
            self.inbox,
            self.log_dir,
            self.data_dir,
            self.adapters_dir,
            self.runtime_dir,
        ):
            try:
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
                found = path.stat()
            except OSError as error:
                raise UserError(
                    f"cannot create {path}: {error.strerror}",
                    hint="choose another place with CODE2LORA_STATE_DIR, CODE2LORA_DATA_DIR "
                    "or CODE2LORA_RUNTIME_DIR",
                ) from error
            _check_private(path, found)


def load_settings() -> Settings:
    """Return the settings in force.

    Raises UserError that names the key, and the file or the variable that it is wrong in.
    """
    file = config_file()
    try:
        return Settings()
    except ValidationError as error:
        raise _explain(file, error.errors()[0]) from error
    except OSError as error:
        raise UserError(
            f"cannot read {file}: {error.strerror}", hint="give yourself access to it, or delete it"
        ) from error
    except ValueError as error:  # from the parser or the decoder
        raise UserError(f"{file} is not valid TOML: {error}", hint=f"mend {file}") from error


def _explain(file: Path, problem: Any) -> UserError:
    """Return what to tell the user about the first thing that pydantic found wrong."""
    key = str(problem["loc"][0])
    if problem["type"] == "extra_forbidden":
        nearest = get_close_matches(key, Settings.model_fields, n=1)
        keys = ", ".join(sorted(Settings.model_fields))
        return UserError(
            f"{file}: unknown key {key!r}",
            hint=f"did you mean {nearest[0]!r}?" if nearest else f"the keys are {keys}",
        )
    variable = f"CODE2LORA_{key.upper()}"
    place = variable if os.environ.get(variable) else f"{file}: {key}"
    expected = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return UserError(
        f"{place} is {str(problem['input'])!r}, but {expected}",
        hint=f"mend the variable {variable}" if place == variable else f"mend {file}",
    )


def _home(path: str | Path) -> Path:
    """Return a path with `~` resolved; one of an unknown user stays as it is."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def _check_private(path: Path, found: os.stat_result) -> None:
    """Refuse a directory, such as /tmp, in which anybody could have planted what we open."""
    if os.name == "posix" and found.st_uid != os.geteuid():
        raise UserError(
            f"{path} belongs to another user",
            hint="run as that user, or choose another place with CODE2LORA_STATE_DIR and "
            "CODE2LORA_DATA_DIR",
        )
    if os.name == "posix" and found.st_mode & stat.S_IWOTH:
        raise UserError(
            f"{path} can be written by other users, but should be yours alone",
            hint=f"`chmod 700 '{path}'`, or choose another place",
        )
