"""Megatron-LM: results of its Tensor Metrics as scalars of a watched run.

    observer = build_tensor_metric_observer(specs, result_sink=TensorMetricSink(w))

Written against the published signature of the sink, (metric, results, iteration), where a metric
has a name and a result a value with a tensor and sites, and perhaps a label. No release of
megatron-core has the interface yet, 0.16.1 included, and Megatron is not imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from foreshock.monitor.session import Watch

__all__ = ["TensorMetricSink"]


class _Site(Protocol):
    @property
    def name(self) -> str: ...


class _Value(Protocol):
    @property
    def tensor(self) -> torch.Tensor: ...
    @property
    def sites(self) -> Sequence[_Site]: ...


class _Result(Protocol):
    @property
    def label(self) -> object: ...
    @property
    def value(self) -> _Value: ...


class _Metric(Protocol):
    @property
    def name(self) -> str: ...


class TensorMetricSink:
    """Takes results where Megatron commits them: after backward, before the optimizer's step.

    Scalars are named as in Megatron's own log, tensor-metrics/METRIC/RESULT, and belong to the step
    in progress. A result of more than one element is no scalar and is left out.

    Args:
        watch: Of the same training.
    """

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def __call__(self, metric: _Metric, results: Sequence[_Result], iteration: int) -> None:
        """Record the results of one metric; no value is waited for."""
        for index, result in enumerate(results):
            if result.value.tensor.numel() == 1:
                name = f"tensor-metrics/{metric.name}/{_name(result, index)}"
                self._watch.log(**{name: result.value.tensor.detach()})


def _name(result: _Result, index: int) -> str:
    if result.label is not None:
        return str(result.label)
    sites = result.value.sites
    return sites[0].name if len(sites) == 1 else f"result-{index}"
