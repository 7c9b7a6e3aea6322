"""What `/metrics` tells of repositories, as Prometheus's own parser reads it."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from code2lora.daemon.gauges import GainGauges
from code2lora.settings import Settings
from code2lora.state_store import Store
from tests.cli.conftest import Known
from tests.gitrepo import GitRepo


def test_the_gain_and_what_serves(tmp_path: Path, repo: GitRepo) -> None:
    settings = Settings(
        config_dir=tmp_path / "c", state_dir=tmp_path / "s", data_dir=tmp_path / "d"
    )
    settings.prepare()
    with Store.open(settings.resolved_database_url) as store:
        known = Known(settings, store, repo)
        GitRepo(tmp_path / "other").commit({"a.py": "x = 1\n"})
        registry = CollectorRegistry()
        registry.register(GainGauges(settings, store))

        def told() -> dict[tuple[str, ...], float]:
            text = generate_latest(registry).decode()
            return {
                (sample.name, *(v for k, v in sample.labels.items() if k != "repository")): (
                    sample.value
                )
                for family in text_string_to_metric_families(text)
                for sample in family.samples
            }

        assert told() == {}, "there is no state yet"
        commit = repo.commit({"a.py": "x = 1\n"})
        known.absorb([commit])
        uses = {
            ("code2lora_serves", use): float(use == "own") for use in ("own", "generic", "base")
        }
        assert told() == uses

        known.score([f"{n:040x}" for n in range(12)], use="generic", base=0.25, generic=-0.125)

        found = told()
        assert found["code2lora_serves", "generic"] == 1.0
        assert found["code2lora_serves", "own"] == 0.0
        assert found["code2lora_gain_commits",] == 12.0
        assert found["code2lora_gain_nats_per_token", "base"] == pytest.approx(0.25)
        assert found["code2lora_gain_nats_per_token", "generic"] == pytest.approx(-0.125)
        assert found["code2lora_gain_standard_error", "base"] == pytest.approx(0.0, abs=1e-9)
