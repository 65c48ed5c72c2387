"""torchtitan on a CPU: what it takes for granted of an accelerator, put there before it is loaded.

    python -m tests.integrations.torchtitan_cpu example FILE
    python -m tests.integrations.torchtitan_cpu train '{"watched": true, ...}'

Programs of their own, because torch is changed for the whole process. torchtitan chooses its device
when it is imported, asks its memory, times out by `torch.distributed.set_timeout`, which torch
2.13.0 for CPUs has not, and its flex attention and fused AdamW run on accelerators only.
"""

from __future__ import annotations

import hashlib
import json
import os
import runpy
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch._utils

ROOT = Path(__file__).parent.parent.parent


def pretend() -> None:
    """Let torchtitan take the CPU for its accelerator."""
    device: Any = torch.cpu
    torch._utils._get_available_device_type = lambda: "cpu"
    device.get_device_name = lambda _=None: "cpu"
    device.get_device_properties = lambda _=None: SimpleNamespace(total_memory=2**30)
    device.memory_stats = lambda _=None: {}
    device.reset_peak_memory_stats = device.empty_cache = lambda _=None: None
    device.current_device = lambda: 0
    distributed: Any = torch.distributed
    if not hasattr(distributed, "set_timeout"):
        distributed.set_timeout = lambda *_: None


def alone() -> None:
    """Be a job of one process, unless a launcher has made one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = {"LOCAL_RANK": 0, "RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}
    for name, value in (job | {"MASTER_PORT": port}).items():
        os.environ.setdefault(name, str(value))


def for_a_cpu(config: Any) -> Any:
    """The same job without what only accelerators have."""
    from torchtitan.models.common.attention import FlexAttention, ScaledDotProductAttention

    for _, _, parent, name in list(config.model_spec.traverse(FlexAttention.Config)):
        plain = ScaledDotProductAttention.Config()
        if isinstance(name, str):
            setattr(parent, name, plain)
        else:
            parent[name] = plain
    config.optimizer.implementation = "for-loop"
    config.training.disable_cuda_graphs = True
    return config


def run_example(path: str) -> None:
    """Run an example as it stands, but for what `for_a_cpu` changes."""
    from foreshock.monitor.integrations.torchtitan import ForeshockTrainer

    build = ForeshockTrainer.Config.build

    def built(config: Any, **given: Any) -> Any:
        return build(for_a_cpu(config), **given)

    ForeshockTrainer.Config.build = built
    runpy.run_path(path, run_name="__main__")


def job(options: dict[str, Any]) -> Any:
    """The example's model and data, as the options say."""
    from torchtitan.distributed.activation_checkpoint import SelectiveAC
    from torchtitan.models.llama3.config_registry import llama3_debugmodel

    example = runpy.run_path(str(ROOT / "examples" / "torchtitan_llama.py"))
    config = for_a_cpu(llama3_debugmodel())
    config.tokenizer, config.dataloader = (
        example["NoText"].Config(),
        example["RandomTokens"].Config(),
    )
    training, parts = config.training, options.get("parts", 1)
    training.local_batch_size, training.seq_len = 2, 32
    training.global_batch_size = 2 * parts * int(os.environ["WORLD_SIZE"])
    training.steps = options.get("steps", 24)
    training.mixed_precision_param = "float32"
    config.debug.seed = 0
    # Shards without TorchTitan's types for tensors of several meshes, which want an accelerator.
    config.parallelism.spmd_backend = "partial_dtensor"
    config.validator.enable = False
    config.activation_checkpoint = SelectiveAC.Config() if options.get("selective") else None
    config.checkpoint.enable = "checkpoints" in options
    config.dump_folder = options.get("checkpoints", "unused")
    return config


def logged() -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm as torchtitan logs them from now on."""
    from torchtitan.components.metrics import MetricsProcessor

    numbers: list[tuple[int, float, float]] = []
    log = MetricsProcessor.log

    def kept(self: Any, step: int, loss: float, most: float, norm: float, **more: Any) -> None:
        numbers.append((step, loss, norm))
        log(self, step, loss, most, norm, **more)

    MetricsProcessor.log = kept
    return numbers


def train(options: dict[str, Any]) -> None:
    """Train; what came of it as JSON in the file `result`.

    Args:
        options: All but `result` optional: watched, watch (fields of `WatchConfig`), steps, parts
            (micro-batches), checkpoints (folder), selective (activation checkpoints).
    """
    from torch.distributed.fsdp import FSDPModule

    from foreshock.monitor.integrations.torchtitan import watched

    numbers, config = logged(), job(options)
    if options.get("watched"):
        config = watched(config, **options.get("watch", {}))
    trainer = config.build()
    for module in trainer.model_parts[0].modules():
        if isinstance(module, FSDPModule):
            # Gloo has no sum with a factor.
            module.set_force_sum_reduction_for_comms(True)
    digest = hashlib.sha256()
    try:
        trainer.train()
        for parameter in trainer.model_parts[0].parameters():
            held = parameter.detach()
            local = held.to_local() if hasattr(held, "to_local") else held
            digest.update(local.contiguous().view(torch.uint8).numpy().tobytes())
    finally:
        trainer.close()
    result = {"losses": numbers, "digest": digest.hexdigest()}
    Path(options["result"]).write_text(json.dumps(result))


if __name__ == "__main__":
    pretend()
    alone()
    if sys.argv[1] == "example":
        run_example(sys.argv[2])
    else:
        train(json.loads(sys.argv[2]))
