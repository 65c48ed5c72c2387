"""AdamW of FP8-LM's levels: FP8 gradients, FP8 and FP16 moments, FP16 or FP8 weights.

A torch optimizer. Arithmetic is float32, one matrix at a time; nothing waits for a device. Gains
and biases keep float32 states. What it does not do: L2 regularisation (weight decay is decoupled).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from foreshock.monitor.operands import Observer, Operand
from foreshock.trainer.fp8lm.adamw import Hyper, updated
from foreshock.trainer.fp8lm.exchange import GradientExchange
from foreshock.trainer.fp8lm.scaled import Scaled
from foreshock.trainer.fp8lm.sharding import Sharding
from foreshock.trainer.fp8lm.states import StateCodec
from foreshock.trainer.fp8lm.transport import Transport
from foreshock.trainer.fp8lm.weights import ScaledWeight
from foreshock.trainer.states_config import CommunicationConfig, StatesConfig

__all__ = ["Fp8AdamW"]


class Fp8AdamW(torch.optim.Optimizer):
    """AdamW whose states, gradients and weights have few bits.

    Matrices among the parameters should be `ScaledWeight`s (`scale_weights` makes them); plain ones
    are updated as they are. From O1 on the gradients of matrices live here and not in `.grad`: see
    `clip_gradients`. At O3 over several processes each owns a part of the states (ZeRO), and every
    step ends with a gather of FP8 weights; `full_state_dict` then puts all parts together, for any
    number of processes.

    Parameters of FSDP2 (DTensors) are updated shard by shard; their gradients come in `.grad`, as
    FSDP2 has reduced them.

    Args:
        params: As any torch optimizer's.
        lr: Learning rate; as torch's AdamW, like the next three.
        betas: Of the moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled.
        states: Formats.
        communication: How gradients are reduced.
        group: Data-parallel processes; None takes the default group, or none.

    Raises:
        ValueError: states.level is O0, or a value is out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        states: StatesConfig,
        communication: CommunicationConfig | None = None,
        group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        if states.level == "O0":
            raise ValueError("level O0 is torch.optim.AdamW; Fp8AdamW takes O1, O2 or O3")
        Hyper(lr=lr, beta1=betas[0], beta2=betas[1], eps=eps, weight_decay=weight_decay)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self.states_config = states
        self._steps = 0
        self._observer: Observer | None = None
        self._every = [p for g in self.param_groups for p in g["params"] if p.requires_grad]
        matrices = [p for p in self._every if _is_matrix(p) and not _is_sharded(p)]
        dense = [p for p in self._every if not _is_matrix(p) and not _is_sharded(p)]
        self.transport = Transport(group)
        ranks = self.transport.ranks if states.level == "O3" else 1
        self._sharding = Sharding(
            matrices, ranks, self.transport.rank if ranks > 1 else 0, states.block
        )
        self.exchange = GradientExchange(
            matrices,
            dense,
            states,
            communication or CommunicationConfig(),
            self.transport,
            self._sharding.parts if ranks > 1 else None,
            [p for p in self._every if _is_sharded(p)],
        )
        self._codecs = {
            "exp_avg": _moment(states.exp_avg_format, states),
            "exp_avg_sq": _moment(states.exp_avg_sq_format, states),
            "master_weight": StateCodec(states.master_format, self._sharding.block),
        }

    @torch.no_grad()
    def set_masters(self, values: Mapping[nn.Parameter, Tensor]) -> None:
        """Start O3's masters from these values, and not from what the FP8 weights kept of them."""
        codec = self._codecs["master_weight"]
        for parameter, value in values.items():
            if self._has_master(parameter) and self._sharding.owns(parameter):
                local = _local_part(parameter, value.float())
                parts = codec.encode(self._sharding.own(parameter, local))
                self._set(self.state[parameter], "master_weight", parts)

    def observe_with(self, observer: Observer | None) -> None:
        """Show every low-precision tensor of a step, before its cast, to a monitor."""
        self._observer = observer
        self.exchange.observer = observer

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients, those in FP8 too."""
        super().zero_grad(set_to_none)
        self.exchange.clear()

    def clip_gradients(self, limit: float | None) -> Tensor:
        """Reduce gradients if that is not done, and scale them to a global L2 norm of `limit`.

        FP8 gradients are scaled through their scales: no code changes.

        Returns:
            The norm before clipping, 0-dim, alike on every process; NaN or infinite if they are.
        """
        return self.exchange.clip(limit)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; gradients are reduced first if that is not done.

        A step whose gradients are not finite on any process changes nothing, not even the step
        count, unless `skip_nonfinite` is off. What no process has a gradient for stays as it is.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.exchange.reduce()
        self._steps += 1
        for group in self.param_groups:
            hyper = Hyper.of(group)
            for parameter in group["params"]:
                gradient = self._gradient_of(parameter)
                if gradient is not None:
                    self._update(parameter, gradient, hyper)
        if self._sharding.shards:
            self._sharding.gather(self.transport, self._new_weight, self._observer)
        return loss

    def _gradient_of(self, parameter: nn.Parameter) -> Tensor | None:
        if _is_sharded(parameter):
            grad = parameter.grad
            return None if grad is None else grad.to_local()  # type: ignore[attr-defined]
        found = self.exchange.gradient(parameter)
        return found.values() if isinstance(found, Scaled) else found

    def _update(self, parameter: nn.Parameter, gradient: Tensor, hyper: Hyper) -> None:
        keep = self.exchange.applies(parameter)
        state = self.state[parameter]
        local = _local(parameter)
        before = self._weight(parameter, local, state)
        # Of a bf16 model, plain gradients are bf16.
        gradient = gradient.float().view(before.shape)
        if "step" not in state:
            state["step"] = torch.zeros((), device=local.device)
        names = ("exp_avg", "exp_avg_sq")
        codecs = {name: self._codec(parameter, name) for name in names}
        exp_avg, exp_avg_sq = (self._read(state, name, codecs[name], before) for name in names)
        step = state["step"] + 1
        weight, *moved = updated(before, gradient, exp_avg, exp_avg_sq, step, hyper)
        for name, value in zip(names, moved, strict=True):
            self._write(parameter, state, name, value, keep)
        _keep(state["step"], step, keep)
        self._write_weight(parameter, local, state, weight, keep)

    def _codec(self, parameter: nn.Parameter, name: str) -> StateCodec:
        return self._codecs[name] if _is_matrix(parameter) else StateCodec("fp32")

    def _has_master(self, parameter: nn.Parameter) -> bool:
        return self.states_config.level == "O3" and _is_matrix(parameter)

    def _weight(self, parameter: nn.Parameter, local: Tensor, state: dict[str, Any]) -> Tensor:
        """float32 values of what this process updates of a parameter."""
        codec = self._codecs["master_weight"]
        if not self._has_master(parameter):
            return local.plain() if isinstance(local, ScaledWeight) else local.float()
        if "master_weight" not in state:
            plain = local.plain() if isinstance(local, ScaledWeight) else local.float()
            self._set(state, "master_weight", codec.encode(self._sharding.own(parameter, plain)))
        return codec.decode(_parts(state, "master_weight"))

    def _write_weight(
        self,
        parameter: nn.Parameter,
        local: Tensor,
        state: dict[str, Any],
        value: Tensor,
        keep: Tensor | None,
    ) -> None:
        if self._has_master(parameter):
            self._write(parameter, state, "master_weight", value, keep)
            if not self._sharding.shards:
                master = self._codecs["master_weight"].decode(_parts(state, "master_weight"))
                local.copy_(master.view(local.shape))
            return
        if not isinstance(local, ScaledWeight):
            _keep(local, value.to(local.dtype), keep)
            return
        codec = StateCodec(_format(local), local.run)
        previous = None if local.run else local.scale_inv.reciprocal()
        parts = codec.encode(value, previous, self._noise(parameter))
        self._show(parameter, "master_weight", value, codec, parts)
        _keep(local.codes, parts["codes"], keep)
        if "scale" in parts:
            _keep(local.scale_inv, parts["scale"].reciprocal(), keep)

    def _new_weight(self, parameter: nn.Parameter) -> Tensor:
        """float32 master of what this process owns of a parameter, for the gather."""
        state = self.state[parameter]
        return self._weight(parameter, _local(parameter), state)

    def _noise(self, parameter: nn.Parameter) -> torch.Generator | None:
        if not (self.states_config.stochastic_rounding and _is_matrix(parameter)):
            return None
        index = next(i for i, p in enumerate(self._every) if p is parameter)
        generator = torch.Generator(_local(parameter).device)
        seed = self.states_config.rounding_seed * 1_000_003 + self._steps
        return generator.manual_seed(seed * 65_537 + index)

    def _read(self, state: dict[str, Any], name: str, codec: StateCodec, like: Tensor) -> Tensor:
        if name not in state:
            self._set(state, name, codec.encode(torch.zeros_like(like)))
        return codec.decode(_parts(state, name))

    def _write(
        self,
        parameter: nn.Parameter,
        state: dict[str, Any],
        name: str,
        value: Tensor,
        keep: Tensor | None,
    ) -> None:
        codec = self._codec(parameter, name)
        one_scale = codec.scaled and not codec.block
        previous = state[f"{name}_scale"] if one_scale else None
        noise = self._noise(parameter) if name == "master_weight" else None
        parts = codec.encode(value, previous, noise)
        if _is_matrix(parameter):
            self._show(parameter, name, value, codec, parts)
        for part, new in parts.items():
            _keep(state[name if part == "codes" else f"{name}_{part}"], new, keep)

    def _set(self, state: dict[str, Any], name: str, parts: Mapping[str, Tensor]) -> None:
        for part, value in parts.items():
            state[name if part == "codes" else f"{name}_{part}"] = value

    def _show(
        self,
        parameter: nn.Parameter,
        role: str,
        value: Tensor,
        codec: StateCodec,
        parts: Mapping[str, Tensor],
    ) -> None:
        if self._observer is None:
            return
        if codec.format in ("e4m3", "e5m2") and not codec.block:
            self._observer(parameter, role, value, Operand(codec.format, parts["scale"]), None)
        elif codec.format == "e4m3" and codec.block == 128 and not codec.expansion:
            operand = Operand("block128_e4m3", None, "block")
            self._observer(parameter, role, value, operand, None)
        else:
            # What is kept, zeros that the cast made included: such formats have no cast to show.
            name = codec.format if codec.format in ("fp16", "bf16") else "fp32"
            self._observer(parameter, role, codec.decode(parts), Operand(name, None), None)

    def state_dict(self) -> dict[str, Any]:
        """torch's, with mu and the counter that stochastic rounding draws by."""
        found: dict[str, Any] = super().state_dict()
        extra = {"steps": self._steps, "mu": self.exchange.state_dict()}
        return found | {"fp8lm": extra}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on exactly: every code and scale as it was saved.

        Raises:
            ValueError: Parameter groups differ, or the states are of another number of processes.
        """
        groups, extra = state_dict["param_groups"], state_dict["fp8lm"]
        # torch would cast every state to the parameter's own type.
        super().load_state_dict({"state": {}, "param_groups": groups})
        ids = [i for group in groups for i in group["params"]]
        own = [p for group in self.param_groups for p in group["params"]]
        for saved, parameter in zip(ids, own, strict=True):
            values = state_dict["state"].get(saved)
            if values:
                device = _local(parameter).device
                self.state[parameter] = {k: v.to(device, copy=True) for k, v in values.items()}
        self._steps = extra["steps"]
        self.exchange.load_state_dict(extra["mu"])

    def full_state_dict(self) -> dict[str, Any]:
        """`state_dict` with the parts of all processes put together; all have to call it."""
        found = self.state_dict()
        if self._sharding.shards:
            found["state"] = self._sharding.whole_states(
                found["state"], self._every, self.transport.group
            )
        return found

    def load_full_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take this process's part of a `full_state_dict`, of any number of processes."""
        if self._sharding.shards:
            states = self._sharding.own_states(state_dict["state"], self._every)
            state_dict = state_dict | {"state": states}
        self.load_state_dict(state_dict)

    @property
    def bytes(self) -> dict[str, int]:
        """Memory of this process's weights, gradients held and states."""
        weights = 0
        for parameter in self._every:
            local = _local(parameter)
            weights += local.bytes if isinstance(local, ScaledWeight) else _size(local)
        states = sum(
            _size(value)
            for state in self.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        )
        return {"weights": weights, "gradients": self.exchange.bytes, "states": states}


def _moment(fp_format: str, states: StatesConfig) -> StateCodec:
    narrow = fp_format in ("e4m3", "e5m2")
    # Sharded in blocks, every state has to be cut where the weight is.
    block = states.block if narrow or states.level == "O3" else 0
    expansion = states.range_expansion and fp_format == "e4m3"
    return StateCodec(fp_format, block, expansion)  # type: ignore[arg-type]


def _format(weight: ScaledWeight) -> Any:
    return weight.format


def _is_matrix(parameter: Tensor) -> bool:
    return parameter.dim() >= 2


def _is_sharded(parameter: Tensor) -> bool:
    return isinstance(getattr(parameter, "_local_tensor", None), Tensor)


def _local_part(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """What of a whole tensor belongs to this process's shard of a parameter."""
    if not _is_sharded(parameter):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(value, mesh, placements, src_data_rank=None).to_local()


def _local(parameter: nn.Parameter) -> Tensor:
    local = getattr(parameter, "_local_tensor", None)
    return local if isinstance(local, Tensor) else parameter


def _parts(state: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    found = {"codes": state[name]}
    for part in ("scale", "exponent", "centre"):
        if f"{name}_{part}" in state:
            found[part] = state[f"{name}_{part}"]
    return found


_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def _keep(held: Tensor, new: Tensor, applies: Tensor | None) -> None:
    """Write new over held where the step counts: 0-dim bool, None = it does."""
    if applies is None:
        held.copy_(new)
        return
    # As integers, since not every operation knows FP8.
    kind = _SAME_SIZE[held.element_size()]
    old = held.detach()
    old.view(kind).copy_(torch.where(applies, new.contiguous().view(kind), old.view(kind)))


def _size(x: Tensor) -> int:
    return x.numel() * x.element_size()
