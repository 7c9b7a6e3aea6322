"""Load, once and when first needed, what the worker works with: hypernetwork, reconciler, decoder.

A refresh needs no decoder and a completion of the base model no hypernetwork, so each is loaded on
its own.
"""

from __future__ import annotations

import logging
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import torch

from code2lora.daemon.reconciler import Reconciler
from code2lora.errors import UserError
from code2lora.hypernetwork.checkpoint import LoadedFamily, load_family
from code2lora.hypernetwork.models import ModelPaths, resolve_model
from code2lora.serving.adapter_cache import LoadedAdapter
from code2lora.serving.completion import AdapterIdentity
from code2lora.serving.engine import Engine
from code2lora.serving.model import BaseModel, resolve_device
from code2lora.settings import Settings
from code2lora.state_store import Store

log = logging.getLogger(__name__)


class Models:
    """The worker's models. Thread-safe; what failed to load is tried again at the next call."""

    def __init__(self, settings: Settings, store: Store) -> None:
        self._settings = settings
        self._store = store
        self._lock = threading.RLock()
        # Another one, so that no refresh waits while the decoder is loaded.
        self._engine_lock = threading.RLock()
        self._loader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="load")
        self._loading: Future[Engine] | None = None

    def reconciler(self) -> Reconciler:
        """Return the reconciler. Raises UserError when the hypernetwork cannot be loaded."""
        with self._lock:
            return self._reconciler

    def checkpoint(self) -> LoadedFamily:
        """Return the loaded hypernetwork. Raises UserError when it cannot be loaded."""
        with self._lock:
            return self._checkpoint

    def loaded_engine(self) -> Engine:
        """Return the completion engine, loading it first if need be.

        Raises UserError when the decoder cannot be loaded.
        """
        with self._engine_lock:
            return self._engine

    def generic_adapter(self) -> LoadedAdapter:
        """Return the adapter of the mean repository, loading what it takes first.

        Raises UserError when the hypernetwork or the decoder cannot be loaded.
        """
        checkpoint = self.checkpoint()
        identity = AdapterIdentity(None, None, f"generic-{checkpoint.fingerprint[:12]}")
        return self.loaded_engine().placed(
            identity, lambda: (identity, checkpoint.family.generic())
        )

    def prepare(self, adapter: Path | None) -> None:
        """Have a new adapter ready before anybody asks for it, if completions are served now."""
        loading = self._loading
        if adapter is None or loading is None or not loading.done() or loading.exception():
            return
        try:
            loading.result().adapter(adapter)
        except UserError as error:  # whoever asks for it is told
            log.warning("the new adapter cannot be served: %s", error)

    # -- serving.app.EngineProvider -----------------------------------------------------------

    @property
    def model_id(self) -> str:
        """The model's name as clients see it."""
        return f"code2lora/{self._paths.name}"

    def engine(self) -> Engine | None:
        """Return the engine, or None while it loads in the background; never waits.

        Raises UserError when it could not be loaded; the next call tries again.
        """
        if self._loading is None:
            self._loading = self._loader.submit(self.loaded_engine)
        if not self._loading.done():
            return None
        loading = self._loading
        if loading.exception() is not None:
            self._loading = None
        return loading.result()

    @cached_property
    def _paths(self) -> ModelPaths:
        return resolve_model(self._settings.model, self._settings.models_dir)

    @cached_property
    def _device(self) -> torch.device:
        return resolve_device(self._settings.device)

    @cached_property
    def _checkpoint(self) -> LoadedFamily:
        return load_family(self._paths, self._device)

    @cached_property
    def _reconciler(self) -> Reconciler:
        return Reconciler(self._settings, self._store, self._paths.name, self._checkpoint)

    @cached_property
    def _engine(self) -> Engine:
        return Engine(BaseModel.load(self._paths.base, device=self._device))
