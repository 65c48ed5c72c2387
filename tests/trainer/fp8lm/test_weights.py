"""Parameters that are codes."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from foreshock.trainer.fp8lm import ScaledWeight, scale_weights
from foreshock.trainer.fp8lm.scaled import encode


@pytest.mark.parametrize(("fp_format", "block"), [("fp16", 0), ("e4m3", 0), ("e4m3", 16)])
def test_operations_see_the_values(fp_format: str, block: int) -> None:
    x = torch.randn(6, 10)
    weight = nn.Parameter(ScaledWeight.of(x, fp_format, block))
    values = weight.plain()  # type: ignore[attr-defined]
    tolerance = 2.0**-11 if fp_format == "fp16" else 2.0**-4
    torch.testing.assert_close(values, x, rtol=tolerance, atol=1e-3)
    inputs = torch.randn(3, 10)
    torch.testing.assert_close(functional.linear(inputs, weight), inputs @ values.T)
    torch.testing.assert_close(functional.embedding(torch.tensor([5, 1]), weight), values[[5, 1]])
    torch.testing.assert_close(weight.t() + 0, values.t())


def test_gradients_are_plain_and_whole() -> None:
    weight = nn.Parameter(ScaledWeight.of(torch.randn(4, 3), "e4m3"))
    x = torch.randn(5, 3)
    functional.linear(x, weight).sum().backward()  # type: ignore[no-untyped-call]
    assert type(weight.grad) is torch.Tensor
    torch.testing.assert_close(weight.grad, x.sum(0).expand(4, 3))


def test_what_is_shared_stays_shared() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 4), "head": nn.Linear(4, 5)})
    model["head"].weight = model["embedding"].weight
    names = scale_weights(model, "fp16")
    assert list(names) == ["embedding.weight"]
    assert model["head"].weight is model["embedding"].weight
    assert type(model["head"].bias) is nn.Parameter
    assert not isinstance(model["head"].bias, ScaledWeight)


def test_it_travels(tmp_path: Path) -> None:
    model = nn.Linear(4, 3)
    scale_weights(model, "e4m3")
    torch.save(model.state_dict(), tmp_path / "w.pt")
    loaded = torch.load(tmp_path / "w.pt", weights_only=True)["weight"]
    assert isinstance(loaded, ScaledWeight)
    assert torch.equal(loaded.plain(), model.weight.plain())  # type: ignore[attr-defined]
    twin = copy.deepcopy(model)
    assert torch.equal(twin.weight.plain(), model.weight.plain())  # type: ignore[attr-defined]
    with torch.no_grad():
        twin.weight.copy_(torch.ones(3, 4))
    assert torch.equal(twin.weight.plain(), torch.ones(3, 4))  # type: ignore[attr-defined]
    assert not torch.equal(model.weight.plain(), torch.ones(3, 4))  # type: ignore[attr-defined]


def test_memory_is_that_of_the_codes() -> None:
    weight = ScaledWeight.of(torch.randn(64, 64), "e4m3")
    assert weight.bytes == 64 * 64 + 4
    assert weight.dtype == torch.float32
    assert weight.codes.dtype == torch.float8_e4m3fn


def test_gathered_shards_keep_their_scales() -> None:
    """What FSDP2 does: rows of each process under its own scale."""
    x = torch.randn(8, 4) * torch.tensor([1.0] * 4 + [100.0] * 4)[:, None]
    shards = [ScaledWeight.of(part, "e4m3") for part in x.chunk(2)]
    sent = [shard.fsdp_pre_all_gather(None)[0] for shard in shards]
    gathered = tuple(torch.cat(parts) for parts in zip(*sent, strict=True))
    found = shards[0].fsdp_post_all_gather(gathered, None, torch.float32)
    assert found is not None
    expected = torch.cat([encode(part, "e4m3").values() for part in x.chunk(2)])
    assert torch.equal(found[0].plain(), expected)  # type: ignore[attr-defined]
    assert sum(s.numel() * s.element_size() for s in sent[0]) == 16 + 4
