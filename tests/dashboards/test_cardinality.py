"""100 runs of 4,000 series each, through a real service into a real Prometheus: what it stores."""

from __future__ import annotations

import shutil

import pytest

from foreshock.api.exposition import LAYER_STATISTICS
from tests.dashboards.prometheus import labels, running_prometheus, wait
from tests.dashboards.service import running_service
from tests.dashboards.synthetic import ROLES, SyntheticRun

RUNS = 100
LAYERS = tuple(f"blocks.{block}.mlp.down" for block in range(267))


@pytest.mark.long
@pytest.mark.timeout(400)
@pytest.mark.debian
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed")
def test_what_prometheus_stores_does_not_grow_with_the_layers(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    assert len(LAYERS) * len(ROLES) * len(LAYER_STATISTICS) >= 4000
    with (
        running_service(tmp_path_factory.mktemp("service")) as service,
        running_prometheus(tmp_path_factory.mktemp("prometheus"), service) as prometheus,
    ):
        for number in range(RUNS):
            SyntheticRun(service.client, f"run-{number}", layers=LAYERS).send(1)
        count = "count(count by (project, run) (foreshock_kurtosis))"
        wait("all runs", lambda: prometheus.ask(count) == {labels(): RUNS}, 120)
        (stored,) = prometheus.ask('sum(scrape_samples_scraped{job="foreshock"})').values()
        of_layers = prometheus.ask('count({__name__=~"foreshock_layer_.+"})')
    assert of_layers == {labels(): RUNS * len(ROLES) * len(LAYER_STATISTICS) * 5}
    assert stored < 200 * RUNS
