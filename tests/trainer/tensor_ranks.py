"""Two processes that cut a model's blocks between them; run by test_tensor_parallel and on GPUs.

    python -m tests.trainer.tensor_ranks CASES RANK RANKS PORT FOLDER

Each case asserts by itself; `trained` also writes FOLDER/NAME-RANK.json for who compares.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from foreshock.monitor.operands import Operand
from foreshock.monitor.record import table_to_records
from foreshock.trainer.blocks import Block
from foreshock.trainer.config import (
    Architecture,
    ExecutionConfig,
    ModelConfig,
    PrecisionConfig,
    RunConfig,
    ScalingName,
    WireName,
)
from foreshock.trainer.fp8lm.transport import Transport
from foreshock.trainer.loop import CheckpointPolicy, train
from foreshock.trainer.model import Decoder
from foreshock.trainer.parallel import TensorParallel, cut_model
from foreshock.trainer.precision import Fp8Linear, GemmLinear, quantize
from foreshock.trainer.recipes import debug_cpu
from foreshock.trainer.watched import watched

NCCL = os.environ.get("RANKS_OVER") == "nccl"
DEVICE = torch.device("cuda" if NCCL else "cpu")
ROOT = Path(__file__).parents[2]
ARCHITECTURES: tuple[Architecture, ...] = (
    "llama3",
    "llama3_smooth_swiglu",
    "op",
    "fog_max",
    "fog_flash",
    "fog_swiglu",
)
STEPS = 6
STOP = 3


class ExactLinear(GemmLinear):
    """The product in the type of its operands: nothing is rounded but sums."""

    def operand(self, role: str) -> Operand:
        return Operand("fp32", None)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.gemm_weight())


def sizes(architecture: Architecture) -> ModelConfig:
    return ModelConfig(
        architecture=architecture, width=32, layers=2, heads=4, kv_heads=2, vocabulary=64
    )


def texts() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, 64, (3, 17), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    return tokens[:, :-1], tokens[:, 1:]


def model_of(architecture: Architecture, precision: PrecisionConfig) -> Decoder:
    torch.manual_seed(0)
    return Decoder(sizes(architecture), precision)


def in_float64(architecture: Architecture) -> Decoder:
    model = model_of(architecture, PrecisionConfig(backend="bf16"))
    for name, layer in model.linears().items():
        exact = ExactLinear(layer.in_features, layer.out_features, lead=())
        exact.weight = layer.weight
        model.set_submodule(name, exact)
    return model.double().to(DEVICE)


def gradients(model: Decoder, cut: TensorParallel | None) -> dict[str, Tensor]:
    """Whole gradients of the mean loss by name."""
    if cut is not None:
        cut.reduce_gradients()
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        at = None if cut is None else cut.cuts.get(name)
        whole = parameter.grad if at is None or cut is None else cut.whole(parameter.grad, at)
        found[name] = whole
    return found


def exact(folder: Path) -> None:
    """Loss, logits, every gradient and their norm are those of a lone process, to summation."""
    inputs, targets = texts()
    for architecture in ARCHITECTURES:
        lone = in_float64(architecture)
        expected = lone(inputs, targets)
        expected.backward()
        wanted = gradients(lone, None)
        norm = nn.utils.get_total_norm(list(wanted.values()))
        for sequence in (False, True):
            model = in_float64(architecture)
            cut = cut_model(model, Transport(), sequence=sequence, form="exact")
            assert model.linears()["blocks.0.mlp.down"].in_features < sizes(architecture).width * 3
            loss = model(inputs, targets)
            torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(model(inputs), lone(inputs), rtol=1e-10, atol=1e-10)
            loss.backward()
            found = gradients(model, cut)
            for name, value in wanted.items():
                close = torch.allclose(found[name], value, rtol=1e-9, atol=1e-11)
                assert close, f"{architecture} {name} sequence={sequence}"
            torch.testing.assert_close(cut.gradient_norm(), norm, rtol=1e-9, atol=0)


def casts(folder: Path) -> None:
    """Codes are those of a cast of the whole under its own scale, bit for bit."""
    inputs, targets = texts()
    ways: tuple[tuple[ScalingName, WireName], ...] = (
        ("current", "fp8"),
        ("delayed", "fp8"),
        ("current", "exact"),
    )
    for scaling, form in ways:
        precision = PrecisionConfig(scaling=scaling, attention="fp8")
        lone = model_of("fog_swiglu", precision)
        model = model_of("fog_swiglu", precision)
        cut = cut_model(model, Transport(), sequence=True, form=form)
        model.to(DEVICE)
        seen: dict[str, list[Tensor]] = {}
        for number, block in enumerate(model.blocks):
            assert isinstance(block, Block)
            for name in ("attention", "mlp"):
                _spy(block.get_submodule(name), f"blocks.{number}.{name}", seen, cut)
        for _ in range(2):
            model(inputs, targets).backward()
        for name, (whole, scale, read) in seen.items():
            reader = "attention.qkv" if name.endswith("attention") else "mlp.gate"
            layer = model.get_submodule(f"{name.rsplit('.', 1)[0]}.{reader}")
            assert isinstance(layer, Fp8Linear)
            if scaling == "current":
                assert torch.equal(scale, scale_of_whole(whole)), (name, form)
            wanted = quantize(whole, scale, "e4m3")
            assert torch.equal(wanted, quantize(read, scale, "e4m3")), (name, form)
        for name, layer in model.linears().items():
            assert isinstance(layer, Fp8Linear)
            other = lone.get_submodule(name)
            assert isinstance(other, Fp8Linear)
            if scaling == "current":
                used = layer.scaling_of("weight").used.cpu()
                assert torch.equal(used, scale_of_whole(other.weight)), name
            for role in ("input", "weight", "grad_output"):
                mine = layer.scaling_of(role).used
                total = mine.clone()
                dist.all_reduce(total, op=dist.ReduceOp.MAX)
                assert torch.equal(mine, total), (name, role, scaling, form)


def scale_of_whole(x: Tensor) -> Tensor:
    """Current scaling's; torch turns a number / a tensor into a product, off by a last bit."""
    amax = x.detach().abs().max()
    return torch.full_like(amax, 448.0) / amax


def _spy(module: nn.Module, name: str, seen: dict[str, list[Tensor]], cut: TensorParallel) -> None:
    """Note the whole input, the scale that its readers used and what they read."""
    held: list[Tensor] = []

    def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        own = inputs[0].detach().contiguous()
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own)
        held[:] = [torch.cat(parts, -2)]

    def read(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(layer, Fp8Linear)
        scale = layer.scaling_of("input").used.clone()
        seen[name] = [held[0], scale, inputs[0].detach().clone()]

    module.register_forward_pre_hook(before, prepend=True)
    reader = "qkv" if name.endswith("attention") else "gate"
    module.get_submodule(reader).register_forward_hook(read, prepend=True)


def bytes_sent(folder: Path) -> None:
    """What went through the collectives: a byte, two or four an element of what is gathered."""
    inputs, targets = texts()
    sent = {}
    forms: tuple[WireName, ...] = ("exact", "bfloat16", "fp8")
    for form in forms:
        model = model_of("fog_max", PrecisionConfig(scaling="current"))
        transport = Transport()
        cut_model(model, transport, sequence=True, form=form)
        model.to(DEVICE)
        transport.bytes_sent = 0
        model(inputs, targets)
        sent[form] = transport.bytes_sent
    elements = 3 * 8 * 32
    gathers = sums = 4
    # Of every shared scale 4 bytes: 6 GEMM operands a block, and one more an fp8 gather.
    scales = 2 * 6 * 4 + 4
    assert sent["exact"] == (gathers + sums) * elements * 4 + scales, sent
    assert sent["bfloat16"] == (gathers + sums) * elements * 2 + scales, sent
    assert sent["fp8"] == gathers * elements + sums * elements * 2 + scales + gathers * 4, sent


def refused(folder: Path) -> None:
    for architecture in ("olmo2", "fog_moe", "llama3_smooth_swiglu_token"):
        model = model_of(architecture, PrecisionConfig(backend="bf16"))
        with pytest.raises(ValueError, match=architecture):
            cut_model(model, Transport(), sequence=True, form="exact")


def run_of(form: WireName | None, *, sequence: bool = True) -> RunConfig:
    base = debug_cpu(seed=5)
    execution = ExecutionConfig()
    if form is not None:
        execution = ExecutionConfig(tensor_parallel=2, sequence_parallel=sequence, wire=form)
    execution = replace(execution, device="cuda" if NCCL else "cpu")
    precision = PrecisionConfig(scaling="current")
    return replace(base, steps=STEPS, tensor_every=1, precision=precision, execution=execution)


def trained_as(
    config: RunConfig, folder: Path, name: str, *, resume: Path | None = None
) -> dict[str, object]:
    """Losses and norms of a run, and the statistics of its first record."""
    seen: dict[str, list[float]] = {}

    def keep(batch: pa.RecordBatch) -> None:
        for record in table_to_records(pa.Table.from_batches([batch])):
            if record.step == (STOP if resume else 0):
                for t in record.tensors:
                    key = f"{t.identity.layer} {t.identity.role}"
                    seen[key] = [float(t.rms or 0), float(t.amax or 0), float(t.numel or 0)]

    count = [0]

    def stop() -> bool:
        count[0] += 1
        return name.startswith("half") and count[0] == STOP

    policy = None
    if name.startswith("half") or resume is not None:
        policy = CheckpointPolicy(folder=resume or folder / name, resume=resume is not None)
    spool = folder / f"spool-{name}"
    result = train(
        config, watch=watched(config, spool=spool, sinks=[keep]), checkpoints=policy, stop=stop
    )
    steps = [[s.loss, s.grad_norm] for s in result.steps]
    return {"steps": steps, "seen": seen}


def trained(folder: Path) -> None:
    """Runs over both ways of the stream and all wires; one stops, and goes on from a lone run's."""
    found = {
        "fp8": trained_as(run_of("fp8"), folder, "fp8"),
        "whole": trained_as(run_of("exact", sequence=False), folder, "whole"),
        "half": trained_as(run_of("exact"), folder, "half"),
        "resumed": trained_as(run_of("exact"), folder, "resumed", resume=folder / "lone"),
    }
    (folder / f"trained-{dist.get_rank()}.json").write_text(json.dumps(found))


CASES: dict[str, Callable[[Path], None]] = {
    case.__name__: case for case in (exact, casts, bytes_sent, refused, trained)
}


def run(folder: Path, *cases: str, ranks: int = 2, **more: str) -> None:
    """Let processes go through the cases; raises with their output if one fails."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])} | more
    command = [sys.executable, "-m", "tests.trainer.tensor_ranks", ",".join(cases)]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(ranks), str(port), str(folder)],
            cwd=ROOT,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    errors = [process.communicate(timeout=180)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * ranks, "\n".join(errors)


def main() -> None:
    cases, rank, ranks = sys.argv[1].split(","), int(sys.argv[2]), int(sys.argv[3])
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[4]}
    torch.set_num_threads(1)
    if NCCL:
        torch.cuda.set_device(rank)
        os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("nccl" if NCCL else "gloo", rank=rank, world_size=ranks)
    for case in cases:
        CASES[case](Path(sys.argv[5]))
    dist.barrier()
    sys.stderr.flush()
    # All is written. Gloo's threads may still run when Python ends, which then aborts now and then.
    os._exit(0)


if __name__ == "__main__":
    main()
