"""Where things live and how the parts behave: read once at the edge, passed down from there.

Reads `config.toml` in the user's config directory and `CODE2LORA_*` in the environment (the
environment wins). Directories are made 0700 by `prepare`, files are written 0600 by their owners.

Plain dataclasses and not a settings library, whose import alone would be a third of the time that
`code2lora status` may take.
"""

from __future__ import annotations

import math
import os
import stat
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from platformdirs import user_config_path, user_data_path, user_state_path

from code2lora.errors import UserError

APP_NAME = "code2lora"

LOOPBACK_ADDRESS = "127.0.0.1"
EDITOR_PORT = 8712
"""What `http_port` is set to when an editor is set up."""

_VARIABLE = "CODE2LORA_"
_BESIDE_STATE = Path()


def config_file() -> Path:
    """Return the path of `config.toml`, honouring `CODE2LORA_CONFIG_DIR`."""
    override = os.environ.get("CODE2LORA_CONFIG_DIR")
    return (_home(override) if override else user_config_path(APP_NAME)) / "config.toml"


def _number(default: float, **bound: float) -> Any:
    return field(default=default, metadata=bound)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings of one user on one machine. ValueError says what is wrong with a value."""

    config_dir: Path = field(default_factory=lambda: user_config_path(APP_NAME))
    """Holds `config.toml`, so only `CODE2LORA_CONFIG_DIR` can say where it is."""
    state_dir: Path = field(default_factory=lambda: user_state_path(APP_NAME))
    """Holds the database, the inbox and the logs."""
    data_dir: Path = field(default_factory=lambda: user_data_path(APP_NAME))
    """Holds published adapters and downloaded models."""
    # Not XDG_RUNTIME_DIR: a daemon started by an editor's or cron's git lacks that variable, and
    # would listen where no terminal looks.
    runtime_dir: Path = _BESIDE_STATE
    """Holds the worker's socket and the supervisor's pid; by default `run` in `state_dir`."""
    database_url: str | None = field(default=None, repr=False)  # may hold a password
    """Any SQLAlchemy URL; None means SQLite in `state_dir`."""
    model: str = "mini"
    """Name of a bundled or pulled model, or the path of a model directory."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps`."""
    threads: int = _number(0, at_least=0)
    """Compute threads of the model worker; 0 lets torch choose."""
    idle_exit_s: float = _number(300.0, above=0)
    """The model worker exits after this long without work, so that its memory is free again."""
    sweep_s: float = _number(120.0, above=0)
    """Every repository's HEAD is looked at this often even when no hook fires."""
    debounce_s: float = _number(0.05, at_least=0)
    """Pokes of one repository within this time are one refresh."""
    backfill_commits: int = _number(200, at_least=0)
    """How many commits before HEAD `init` replays in the background."""
    keep_adapters: int = _number(5, at_least=1)
    """Newest adapter directories kept for each repository; older ones are regenerated on demand."""
    keep_states: int = _number(64, at_least=1)
    """Newest states kept for each line of history where they are large; of the older ones only some
    are, and the rest is computed again from git on demand."""
    score_commits: int = _number(16, at_least=0, at_most=1000)
    """How many commits back from HEAD are scored when nothing else is to be done; 0 scores none."""
    gain_commits: int = _number(50, at_least=1, at_most=10_000)
    """The running gain is that of so many of the last scored commits."""
    gate: str = field(default="on", metadata={"one_of": ("on", "off")})
    """`on`: the generic adapter or the base serves where the running gain shows it to be better;
    `off`: the repository's own adapter serves in any case."""
    http_port: int = _number(0, at_least=0, at_most=65535)
    """TCP port of 127.0.0.1 on which editors find the worker, such as 8712; 0 opens none."""
    http_auth: str = field(default="token", metadata={"one_of": ("token", "none")})
    """`token`: what asks over TCP must carry the token of `http_token_file`; `none`: need not."""
    log_level: str = field(
        default="INFO", metadata={"one_of": ("DEBUG", "INFO", "WARNING", "ERROR")}
    )

    def __post_init__(self) -> None:
        """Place the runtime directory beside the state, unless it has a place of its own."""
        if self.runtime_dir == _BESIDE_STATE:
            object.__setattr__(self, "runtime_dir", self.state_dir / "run")

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
    def http_token_file(self) -> Path:
        """Holds what must be sent over TCP; for the user's eyes alone."""
        return self.state_dir / "http-token"

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


SETTING_NAMES = tuple(sorted(item.name for item in fields(Settings)))


def load_settings() -> Settings:
    """Return the settings in force.

    Raises UserError that names the key, and the file or the variable that it is wrong in.
    """
    file = config_file()
    given = _read_file(file)
    values: dict[str, Any] = {}
    for item in fields(Settings):
        variable = _VARIABLE + item.name.upper()
        text = os.environ.get(variable)
        if not text and item.name not in given:
            continue
        try:
            raw = _from_text(item.type, text) if text else given[item.name]
            values[item.name] = _checked(item.type, raw, item.metadata)
        except ValueError as error:
            place = variable if text else f"{file}: {item.name}"
            raise UserError(
                f"{place} is {text or str(given[item.name])!r}, but {error}",
                hint=f"mend the variable {variable}" if text else f"mend {file}",
            ) from error
    return Settings(**values)


def _read_file(file: Path) -> dict[str, Any]:
    """Return what `config.toml` sets; nothing when there is none."""
    try:
        with file.open("rb") as stream:
            given = tomllib.load(stream)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(
            f"cannot read {file}: {error.strerror}", hint="give yourself access to it, or delete it"
        ) from error
    except ValueError as error:  # from the parser or the decoder
        raise UserError(f"{file} is not valid TOML: {error}", hint=f"mend {file}") from error
    if "config_dir" in given:
        raise UserError(
            f"{file}: config_dir says where this file is, so it cannot be set in it",
            hint="set the variable CODE2LORA_CONFIG_DIR",
        )
    for key in given:
        if key not in SETTING_NAMES:
            nearest = get_close_matches(key, SETTING_NAMES, n=1)
            keys = ", ".join(SETTING_NAMES)
            raise UserError(
                f"{file}: unknown key {key!r}",
                hint=f"did you mean {nearest[0]!r}?" if nearest else f"the keys are {keys}",
            )
    return given


def _from_text(kind: Any, text: str) -> Any:
    """Return a variable's text as the number that it is to be, or as it is."""
    numbers = {"int": int, "float": float}
    try:
        return numbers[kind](text) if kind in numbers else text
    except ValueError:
        return text  # which `_checked` refuses in its own words


def _checked(kind: Any, value: Any, limits: Mapping[str, Any]) -> Any:
    """Return a value as its kind, an annotation's text. ValueError says what it should be."""
    if kind == "int" and (not isinstance(value, int) or isinstance(value, bool)):
        raise ValueError("should be a whole number")
    if kind == "float":
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError("should be a number")
        value = float(value)
        if not math.isfinite(value):
            raise ValueError("should be a finite number")
    if kind in ("str", "str | None", "Path") and not isinstance(value, str):
        raise ValueError("should be text in quotes")
    if kind == "Path":
        value = _home(value)
        if not value.is_absolute():  # the daemon's current directory is not the user's
            raise ValueError("should be an absolute path")
    if "one_of" in limits and value not in limits["one_of"]:
        raise ValueError(f"should be one of {', '.join(limits['one_of'])}")
    if "at_least" in limits and value < limits["at_least"]:
        raise ValueError(f"should be at least {limits['at_least']}")
    if "at_most" in limits and value > limits["at_most"]:
        raise ValueError(f"should be at most {limits['at_most']}")
    if "above" in limits and value <= limits["above"]:
        raise ValueError(f"should be above {limits['above']}")
    return value


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
