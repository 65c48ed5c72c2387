"""A whole watch over rows on a device, beside the same watch without: the same records.

In Triton's interpreter the rows are those of a CPU; what else differs on a device (parameters and
probes belong to the cadence) is set by hand.
"""

from __future__ import annotations

import pytest
import torch

from foreshock.monitor.device_rows import DeviceRows
from foreshock.monitor.record import StepRecord
from foreshock.monitor.sampling import Cadence
from foreshock.monitor.session import Watch
from foreshock.monitor.settings import WatchSettings
from tests.gpu.devices import DEVICE, INTERPRETED
from tests.monitor.models import Recorder, batches, row, tiny

# It comes with torch's CUDA builds only.
pytest.importorskip("triton")
from foreshock.monitor import kernels

pytestmark = pytest.mark.gpu
STEPS = 3
MOMENTS = ("rms", "kurtosis", "kurtosis_sequence_mean", "channel_kurtosis", "top_channel_share")
EXACT = ("numel", "observations", "amax", "nonfinite_count", "zero_ratio", "min_nonzero")


def records(device: torch.device, cadence: Cadence) -> list[StepRecord]:
    model, _ = tiny(0, dropout=0.0)
    model.to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    recorder = Recorder()
    settings = WatchSettings(run="r", cadence=cadence, sinks=(recorder,), spool=None, probe=False)
    watch = Watch(model, optimizer, settings)
    for step in range(STEPS):
        for tokens in batches(step, 2):
            given = tokens.to(device)
            _, loss = model(given[:, :-1], given[:, 1:])
            assert loss is not None
            (loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert watch.close(60)
    assert watch.errors == 0
    assert [record.step for record in recorder.records] == list(range(STEPS))
    return recorder.records


@pytest.mark.parametrize(
    "cadence",
    [
        pytest.param(Cadence(1, 1), id="every"),
        pytest.param(Cadence(2, 1), id="every_second"),
        pytest.param(Cadence(1, 2), id="details_every_second"),
    ],
)
def test_the_records_are_those_without_rows(
    cadence: Cadence, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = records(torch.device("cpu"), cadence)
    if INTERPRETED:
        monkeypatch.setattr(
            DeviceRows, "on", lambda device, **rest: DeviceRows(device, kernels, **rest)
        )
        monkeypatch.setattr(Watch, "_reads_parameters", lambda _, s: s.measured and s.detailed)
    found = records(DEVICE, cadence)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.scalars["loss"] == pytest.approx(theirs.scalars["loss"], rel=1e-5)
        assert ours.scalars["grad_norm"] == pytest.approx(theirs.scalars["grad_norm"], rel=1e-4)
        in_detail = cadence.measures(ours.step) and cadence.details(ours.step)
        assert ("param_norm" in ours.scalars) == in_detail
        assert ("update_ratio" in ours.scalars) == in_detail
        assert [t.identity for t in ours.tensors] == [t.identity for t in theirs.tensors]
        assert bool(ours.tensors) == cadence.measures(ours.step)
        for its in theirs.tensors:
            mine = row(ours, its.identity.layer, its.identity.role)
            for name in EXACT:
                same = pytest.approx(getattr(its, name), rel=1e-4)
                assert getattr(mine, name) == same, (name, its.identity)
            for name in MOMENTS:
                wanted = getattr(its, name)
                if wanted is None or ("channel" in name and not cadence.details(ours.step)):
                    assert getattr(mine, name) is None
                else:
                    assert getattr(mine, name) == pytest.approx(wanted, rel=1e-3), name
