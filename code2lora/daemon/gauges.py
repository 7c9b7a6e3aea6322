"""What `/metrics` tells of the repositories: their running gain, and what serves them."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from code2lora.daemon.gain import USES, Gain, Mean, standing
from code2lora.settings import Settings
from code2lora.state_store import Store


class GainGauges(Collector):
    """Reads the state store whenever somebody asks."""

    def __init__(self, settings: Settings, store: Store) -> None:
        self._settings = settings
        self._store = store

    def describe(self) -> Iterable[Metric]:
        """Return the gauges without values, so that registering them reads nothing."""
        return _families()

    def collect(self) -> Iterable[Metric]:
        """Return the gauges of every repository that has an adapter."""
        gain, error, commits, serves = families = _families()
        for repository in self._store.repositories():
            newest = self._store.recent_states(repository.id, limit=1)
            if not newest:
                continue
            now = standing(self._settings, self._store, repository.id, newest[0].checkpoint)
            for use in USES:
                serves.add_metric([repository.id, use], use == now.use)
            if now.gain is None:
                continue
            commits.add_metric([repository.id], now.gain.n_commits)
            for over, mean in _means(now.gain).items():
                gain.add_metric([repository.id, over], mean.mean)
                if mean.error is not None:
                    error.add_metric([repository.id, over], mean.error)
        return families


def _means(gain: Gain) -> dict[str, Mean]:
    return {"base": gain.over_base, "generic": gain.over_generic}


def _families() -> tuple[GaugeMetricFamily, ...]:
    return (
        GaugeMetricFamily(
            "code2lora_gain_nats_per_token",
            "What the own adapter saves on lines that it was not told yet, over base and generic.",
            labels=["repository", "over"],
        ),
        GaugeMetricFamily(
            "code2lora_gain_standard_error",
            "Standard error of the gain, over commits.",
            labels=["repository", "over"],
        ),
        GaugeMetricFamily(
            "code2lora_gain_commits", "Scored commits in the gain.", labels=["repository"]
        ),
        GaugeMetricFamily(
            "code2lora_serves",
            "1 for what serves a repository: its own adapter, the generic one or the base.",
            labels=["repository", "use"],
        ),
    )
