"""A store in a real file, and in the slow tier also on a real PostgreSQL server."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from code2lora.state_store import Store
from tests.state_store.samples import Clock

BACKENDS = ("sqlite", pytest.param("postgresql", marks=pytest.mark.slow))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where an SQLite database will be."""
    return tmp_path / "state.db"


@pytest.fixture
def url(path: Path) -> str:
    """The URL of an SQLite database that does not exist yet."""
    return f"sqlite:///{path}"


@pytest.fixture(params=BACKENDS)
def any_url(request: pytest.FixtureRequest) -> str:
    """The URL of an empty database of each kind."""
    chosen: str = request.getfixturevalue("url" if request.param == "sqlite" else "postgresql_url")
    return chosen


@pytest.fixture
def store(any_url: str) -> Iterator[Store]:
    """An empty store of each kind."""
    with Store.open(any_url, clock=Clock()) as store:
        yield store


@pytest.fixture
def file_store(url: str) -> Iterator[Store]:
    """An empty store in an SQLite file, for tests that look into the file."""
    with Store.open(url, clock=Clock()) as store:
        yield store


@pytest.fixture
def postgresql_url(postgresql: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of an empty database on the server, in a session that is far from UTC."""
    import psycopg

    name = "state_store_test"
    admin: Any
    with psycopg.connect(f"host={postgresql} user=postgres", autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name}")
        admin.execute(f"ALTER DATABASE {name} SET timezone TO 'Australia/Adelaide'")
        yield f"postgresql://postgres@/{name}?host={postgresql}"
        admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """A PostgreSQL server of our own; the folder of its socket."""
    pytest.importorskip("psycopg")
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    initdb = shutil.which("initdb") or (installed and installed[-1])
    if not initdb:
        pytest.skip("PostgreSQL is not installed")
    folder = Path(tempfile.mkdtemp(prefix="c2l-pg-", dir="/tmp"))
    server: dict[str, Any] = {"cwd": folder, "stdout": subprocess.DEVNULL, "check": True}
    if os.geteuid() == 0:  # the server refuses to run as root
        account = pwd.getpwnam("postgres")
        os.chown(folder, account.pw_uid, account.pw_gid)
        server |= {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
    pg_ctl = [str(Path(initdb).resolve().with_name("pg_ctl")), "-D", str(folder / "data"), "-w"]
    create = [str(initdb), "-D", str(folder / "data"), "-U", "postgres", "-A", "trust", "-N"]
    subprocess.run(create, **server)
    options = f"-c listen_addresses='' -c fsync=off -k {folder}"
    subprocess.run([*pg_ctl, "-l", str(folder / "log"), "-o", options, "start"], **server)
    try:
        yield str(folder)
    finally:
        subprocess.run([*pg_ctl, "-m", "immediate", "stop"], **server)
        shutil.rmtree(folder, ignore_errors=True)
