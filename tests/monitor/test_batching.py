"""Stacks of small tensors give each tensor the sums it would have had alone."""

from __future__ import annotations

import pytest
import torch

import foreshock.monitor.batching as batching_module
from foreshock.monitor.batching import BatchedSums
from foreshock.monitor.operands import Operand
from foreshock.monitor.statistics import packed_sums


def test_each_tensor_gets_its_own_sums_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching_module, "_STACK_TENSORS", 3)
    generator = torch.Generator().manual_seed(0)
    cases = []
    for index in range(20):
        shape = ((2, 5, 4), (5, 4), (7,), (0, 4))[index % 4]
        scale = None if index % 3 == 0 else torch.tensor(float(index))
        dtype = (torch.float32, torch.bfloat16, torch.float64)[index % 3]
        name = ("e4m3", "e5m2")[index % 2]
        x = torch.randn(shape, generator=generator).mul(index).to(dtype)
        cases.append((x, Operand(name, scale)))
    sums = BatchedSums()
    for _ in range(2):
        for x, operand in cases:
            before = x.clone()
            sums.add(before, operand)
            # What counts is the value when it passed by.
            before.zero_()
        taken = sums.take()
        assert len(taken) == len(cases)
        for (x, operand), (packed, channels) in zip(cases, taken, strict=True):
            expected = packed_sums(x, format=operand.format, scale=operand.scale)
            torch.testing.assert_close(packed, expected[0], rtol=0, atol=0)
            torch.testing.assert_close(channels, expected[1], rtol=0, atol=0)
    assert sums.take() == []


def test_large_tensors_are_measured_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching_module, "_LARGEST_IN_STACK", 10)
    sums = BatchedSums()
    sums.add(torch.ones(11), Operand("fp32", None))
    assert sums._stacks == {}
    assert float(sums.take()[0][0][0]) == 11


def test_a_format_that_cannot_be_measured_is_refused_by_itself() -> None:
    sums = BatchedSums()
    sums.add(torch.ones(2), Operand("e4m3", None))
    with pytest.raises(ValueError, match="per block"):
        sums.add(torch.ones(2), Operand("nvfp4", None))
    assert len(sums.take()) == 1
