from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from code2lora.errors import UserError
from code2lora.serving.app import create_app
from code2lora.serving.engine import Engine
from code2lora.serving.model import BaseModel
from tests.serving.tiny import Provider, Registry, publish_adapter, save_base, serving


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    save_base(path)
    return path


@pytest.fixture(scope="session")
def model(base_dir: Path) -> BaseModel:
    """Without hooks; the engine has a model of its own."""
    return BaseModel.load(base_dir)


@pytest.fixture(scope="session")
def engine(base_dir: Path) -> Engine:
    return Engine(BaseModel.load(base_dir))


@pytest.fixture(scope="session")
def adapter_paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return publish_adapter(root, 0), publish_adapter(root, 1)


@pytest.fixture(scope="module")
def registry(engine: Engine, adapter_paths: tuple[Path, Path]) -> Registry:
    return Registry(engine, adapter_paths)


@pytest.fixture(scope="module")
def server(engine: Engine, registry: Registry) -> Iterator[Path]:
    """The socket of a server that is ready, with one route of the daemon's kind."""

    async def shout(request: Request) -> JSONResponse:
        content = await request.json()
        if "fail" in content:
            raise UserError("it cannot be shouted", hint="whisper")
        return JSONResponse({"heard": content["say"].upper()})

    extra = [Route("/daemon/shout", shout, methods=["POST"])]
    app = create_app(Provider(engine), registry, extra_routes=extra, max_body_bytes=100_000)
    with serving(app) as path:
        yield path
