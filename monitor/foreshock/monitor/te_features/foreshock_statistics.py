"""The debug feature that nvdlfw_inspect loads from this folder by path.

A thin end: everything it is told goes to `foreshock.monitor.te_exact`.
"""

from __future__ import annotations

from typing import Any

import torch
from nvdlfw_inspect.registry import Registry, api_method
from transformer_engine.debug.features.api import TEConfigAPIMapper

from foreshock.monitor import te_exact


@Registry.register_feature(namespace="transformer_engine")
class ForeshockStatistics(TEConfigAPIMapper):  # type: ignore[misc]
    """Foreshock's statistics of the exact operands of every GEMM.

    Config: `tensors` (activation, weight, gradient) and `freq`, in debug iterations.
    """

    @api_method  # type: ignore[untyped-decorator]
    def inspect_tensor_enabled(
        self, config: dict[str, Any], layer_name: str, tensor_name: str, iteration: int
    ) -> tuple[bool, int | None]:
        """Asked per tensor in every iteration in which the layer is looked at."""
        return te_exact.enabled(layer_name, tensor_name, iteration, int(config.get("freq", 1)))

    @api_method  # type: ignore[untyped-decorator]
    def inspect_tensor(  # noqa: PLR0913 - the library's signature
        self,
        config: dict[str, Any],
        layer_name: str,
        tensor_name: str,
        iteration: int,
        tp_group: Any,
        tensor: torch.Tensor,
        rowwise_quantized_tensor: Any = None,
        columnwise_quantized_tensor: Any = None,
        quantizer: Any = None,
    ) -> None:
        """Told of a tensor before its GEMM and after its cast."""
        te_exact.inspect(layer_name, tensor_name, tensor, quantizer)
