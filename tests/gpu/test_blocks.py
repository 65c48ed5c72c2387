"""Block formats on a GPU: the CPU's sums, and no wait for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from foreshock.monitor.blocks import block_sums, histogram
from foreshock.monitor.statistics import SUM_FIELDS
from foreshock.monitor.whatif import WHAT_IF_FORMATS, what_if_rows

pytestmark = pytest.mark.gpu

FORMATS = [*WHAT_IF_FORMATS]


def tensor(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(shape, generator=generator)
    x = x * torch.exp(4 * torch.randn(*shape[:-1], 1, generator=generator))
    x[0, :40] = 0.0
    x[-1, 3] = float("nan")
    return x


@pytest.fixture
def strict() -> Iterator[Callable[[], None]]:
    """Starts refusing anything that waits for the device."""

    def start() -> None:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")

    yield start
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("role", ["input", "weight"])
@pytest.mark.parametrize("shape", [(300, 512), (3, 77, 200), (2, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sums_are_those_of_the_cpu(
    role: str, shape: tuple[int, ...], dtype: torch.dtype, strict: Callable[[], None]
) -> None:
    x = tensor(*shape).to(dtype)
    on_gpu = x.cuda()
    strict()
    found = what_if_rows(on_gpu, role, FORMATS)
    row, exponents = block_sums(on_gpu, format="e4m3", granularity="row")
    counts = histogram(on_gpu)
    torch.cuda.set_sync_debug_mode("default")
    wanted = what_if_rows(x, role, FORMATS)
    found.append(("e4m3", "row", row, exponents))
    wanted.append(("e4m3", "row", *block_sums(x, format="e4m3", granularity="row")))
    exact = [SUM_FIELDS.index(n) for n in ("flushed", "subnormal", "overflow", "numel", "zeros")]
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours[:2] == theirs[:2]
        torch.testing.assert_close(ours[2].cpu(), theirs[2], rtol=1e-5, atol=1e-12)
        assert torch.equal(ours[2].cpu()[exact], theirs[2][exact]), ours[:2]
        if ours[3] is not None and theirs[3] is not None:
            assert torch.equal(ours[3].cpu(), theirs[3])
    assert torch.equal(counts.cpu(), histogram(x))


def test_a_capture_replays() -> None:
    x = tensor(64, 256).cuda()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        what_if_rows(x, "input", FORMATS)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = what_if_rows(x, "input", FORMATS)
    x.mul_(8.0)
    graph.replay()
    for ours, theirs in zip(found, what_if_rows(x, "input", FORMATS), strict=True):
        torch.testing.assert_close(ours[2], theirs[2], rtol=1e-6, atol=1e-12)
