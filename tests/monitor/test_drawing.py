"""`draw` against a real service: what stands in the figure is what the API answers."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm
from matplotlib.lines import Line2D

from foreshock.monitor.client import Client, MissingPackage, NotFound, draw
from foreshock.monitor.record import StepRecord, TensorIdentity, TensorStatistics
from tests.api.live_helpers import record, wait_until
from tests.api.service import Service, new_launch

STEPS = 80
LAYERS = ("blocks.0.mlp.up", "blocks.1.mlp.down", "blocks.2.mlp.up")


def full(step: int) -> StepRecord:
    """The loss is lost at the end; the last layer's kurtosis grows by a thousand, one is gone."""
    loss = math.nan if step >= STEPS - 2 else 4.0 - 0.02 * step
    numbers = {LAYERS[0]: 3.0, LAYERS[1]: None if step % 2 else 3.5, LAYERS[2]: 3.0 * 1.1**step}
    tensors = tuple(
        TensorStatistics(
            identity=TensorIdentity(layer, "input", "e4m3"), numel=64, amax=1.0, kurtosis=kurtosis
        )
        for layer, kurtosis in numbers.items()
    )
    return replace(record(step, loss), tensors=tensors)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    service = Service(tmp_path_factory.mktemp("drawn"))
    service.start()
    with Client(service.url) as made:
        launch, bare = new_launch(), new_launch()
        made.announce("llama", launch, layers=LAYERS)
        made.put_batch("llama", f"{launch}-0-0", [full(step) for step in range(STEPS)])
        made.announce("bare", bare)
        made.put_batch("bare", f"{bare}-0-0", [record(step) for step in range(3)])
        for run, last in (("llama", STEPS - 1), ("bare", 2)):
            wait_until(lambda run=run, last=last: made.risk(run).step == last, 60)  # type: ignore[misc]
            wait_until(lambda run=run, last=last: len(made.risk_history(run).step) == last + 1, 60)  # type: ignore[misc]
        yield made
    assert service.stop() == 0, service.log


def line(axes: Axes, label: str) -> Line2D:
    (found,) = (made for made in axes.get_lines() if made.get_label() == label)
    return found


def test_loss_and_risk_are_the_apis(client: Client) -> None:
    figure = draw("llama", client=client)
    loss_axes, _, risk_axes, *_ = figure.axes
    series = client.series("llama", "loss")
    drawn = line(loss_axes, "loss")
    np.testing.assert_array_equal(drawn.get_xdata(), series.index)
    np.testing.assert_array_equal(drawn.get_ydata(), series["mean"])
    lost = line(loss_axes, "loss not finite")
    assert list(np.asarray(lost.get_xdata())) == [STEPS - 2, STEPS - 1]
    history = client.risk_history("llama")
    risk = line(risk_axes, "risk within 100 steps")
    np.testing.assert_array_equal(risk.get_xdata(), history.step)
    np.testing.assert_array_equal(risk.get_ydata(), history.probability[100])
    (alarm,) = (made for made in risk_axes.patches if made.get_label() == "alarm")
    assert alarm.get_extents().x0 < alarm.get_extents().x1
    assert history.state.index("firing") == STEPS - 2


def test_the_heatmap_is_the_apis(client: Client) -> None:
    figure = draw("llama", client=client, statistic="kurtosis")
    heat = client.heatmap("llama", "kurtosis")
    axes = figure.axes[1]
    (mesh,) = (made for made in axes.collections if isinstance(made, QuadMesh))
    array = mesh.get_array()
    assert array is not None
    drawn = np.ma.getdata(array)
    np.testing.assert_array_equal(drawn, heat.values)
    assert isinstance(mesh.norm, LogNorm)
    assert [label.get_text() for label in axes.get_yticklabels()] == list(LAYERS)
    assert axes.get_ylim() == (3, 0)
    assert axes.get_xlabel() == "optimizer step"


def test_steps_between_two_measurements_are_no_gaps_but_a_pause_is(client: Client) -> None:
    launch = new_launch()
    client.announce("sparse", launch, layers=LAYERS)
    measured = {0, 4, 8, 24, 28}
    records = [full(step) if step in measured else record(step) for step in range(32)]
    client.put_batch("sparse", f"{launch}-0-0", records)
    figure = draw("sparse", client=client)
    (mesh,) = (made for made in figure.axes[1].collections if isinstance(made, QuadMesh))
    array = mesh.get_array()
    assert array is not None
    edges = np.asarray(mesh.get_coordinates())[0, :, 0]
    grey = np.ma.getmaskarray(array).all(axis=0)
    assert edges[:-1][~grey].tolist() == sorted(measured)
    # Where every fourth step was measured, nothing from step 12 to 23 is a pause.
    assert edges[:-1][grey].tolist() == list(range(12, 24))


def test_a_part_of_the_run(client: Client) -> None:
    figure = draw("llama", client=client, horizon=10, first_step=10, last_step=19)
    steps = np.asarray(line(figure.axes[0], "loss").get_xdata())
    assert list(steps) == list(range(10, 20))
    assert line(figure.axes[2], "risk within 10 steps")


def test_a_run_of_scalars_alone_is_drawn_without_a_heatmap(client: Client) -> None:
    figure = draw("bare", client=client)
    assert len(figure.axes) == 2
    picture = BytesIO()
    figure.savefig(picture, format="png")
    assert picture.getvalue().startswith(b"\x89PNG")


def test_the_service_of_the_environment(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORESHOCK_URL", client.url)
    assert draw("llama").axes[0].get_title(loc="left") == "llama (project default)"


def test_what_cannot_be_drawn(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="horizon is 7; this service has 10, 100, 1000"):
        draw("llama", client=client, horizon=7)
    with pytest.raises(NotFound):
        draw("absent", client=client)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPackage, match=r"foreshock\[notebook\]"):
        draw("llama", client=client)


def test_nothing_is_loaded_before_it_is_asked_for(tmp_path: Path) -> None:
    code = "import foreshock.monitor.client, sys; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=tmp_path).returncode == 0
