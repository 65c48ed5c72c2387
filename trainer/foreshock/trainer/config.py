"""What a run is: frozen dataclasses, checked when they are made.

A run is a function in `recipes.py` that returns a `RunConfig`; nothing here trains.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Final, Literal, get_args

from foreshock.trainer.config_fields import LATER, later, one_of, require
from foreshock.trainer.data_config import DataConfig
from foreshock.trainer.faults import Fault, OutlierRamp, ScaleFault
from foreshock.trainer.states_config import CommunicationConfig, StatesConfig

__all__ = [
    "Architecture",
    "AttentionName",
    "Backend",
    "CommunicationConfig",
    "DataConfig",
    "EvaluationConfig",
    "ExecutionConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PrecisionConfig",
    "RunConfig",
    "ScalingName",
    "ScheduleConfig",
    "StatesConfig",
    "WireName",
]

Architecture = Literal[
    "llama3",
    "llama3_smooth_swiglu",
    "llama3_smooth_swiglu_token",
    "olmo2",
    "op",
    "fog_max",
    "fog_opt",
    "fog_flash",
    "fog_swiglu",
    "fog_moe",
]
Backend = Literal["bf16", "emulated", "native", "transformer_engine"]
ScalingName = Literal["delayed", "current", "rowwise", "block128", "mxfp8", "nvfp4"]
WireName = Literal["exact", "bfloat16", "fp8"]
AttentionName = Literal["plain", "fp8", "biased", "biased_shifted", "biased_wide"]


_SCALINGS: Final[dict[str, tuple[ScalingName, ...]]] = {
    "bf16": get_args(ScalingName),
    "emulated": get_args(ScalingName),
    "native": ("delayed", "current", "rowwise", "block128"),
    "transformer_engine": ("delayed", "current"),
}
"""What each backend computes; for bf16 the field means nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder language model.

    Attributes:
        architecture: Which blocks; what each is made of stands in `blocks/architectures.py`.
        width: Residual width d.
        layers: Number of blocks L.
        heads: Attention heads; width must divide by them.
        vocabulary: Number of tokens; 256 = bytes.
        ffn_width: Hidden width of a gated feed-forward; 0 takes 8/3 width, rounded up to 16.
            Non-gated ones (FOG) get x1.5 of it, so that parameter counts agree.
        init_std: Standard deviation of weights at initialisation.
        kv_heads: Key and value heads, each read by heads / kv_heads query heads; 0 takes as many
            as query heads.
        tied: One matrix for embedding and language model head.
        experts: Feed-forwards of fog_moe, each of the size that fog_max has; 0 takes 4.
        experts_per_token: How many of them each token goes through.
        balance: Weight of the load-balancing loss in fog_moe's gradient; the loss that is
            reported is without it.
    """

    architecture: Architecture = "llama3"
    width: int = 128
    layers: int = 4
    heads: int = 4
    vocabulary: int = 256
    ffn_width: int = 0
    init_std: float = 0.02
    kv_heads: int = later(0)
    tied: bool = later(False)
    experts: int = later(0)
    experts_per_token: int = later(2)
    balance: float = later(0.01)

    def __post_init__(self) -> None:
        known = get_args(Architecture)
        require(
            self.architecture in known,
            f"architecture is {self.architecture!r}; allowed: {', '.join(known)}",
        )
        require(self.layers > 0, f"layers is {self.layers}; allowed: 1 or more")
        require(
            self.heads > 0 and self.width % (2 * self.heads) == 0,
            f"width {self.width} does not split into {self.heads} heads of even width",
        )
        require(self.vocabulary > 1, f"vocabulary is {self.vocabulary}; allowed: 2 or more")
        require(self.init_std > 0, f"init_std is {self.init_std}; allowed: above 0")
        require(
            self.kv_heads >= 0 and self.heads % self.key_heads == 0,
            f"kv_heads is {self.kv_heads}; allowed: divisors of heads {self.heads}, 0 for as many",
        )
        self._check_experts()

    def _check_experts(self) -> None:
        require(
            self.experts == 0 or (self.architecture == "fog_moe" and self.experts > 1),
            f"experts is {self.experts} for {self.architecture}; allowed: 2 or more for fog_moe, "
            "0 elsewhere",
        )
        require(
            0 < self.experts_per_token <= self.num_experts,
            f"experts_per_token is {self.experts_per_token}; allowed: 1 to {self.num_experts}",
        )
        require(self.balance >= 0, f"balance is {self.balance}; allowed: 0 or more")

    @property
    def head_width(self) -> int:
        """Features of one head."""
        return self.width // self.heads

    @property
    def key_heads(self) -> int:
        """Number of key heads, and of value heads."""
        return self.kv_heads or self.heads

    @property
    def num_experts(self) -> int:
        """Feed-forwards of a mixture of experts."""
        return self.experts or 4

    @property
    def gated_ffn_width(self) -> int:
        """Hidden width of a gated feed-forward."""
        return self.ffn_width or -(-8 * self.width // 3 // 16) * 16

    @property
    def plain_ffn_width(self) -> int:
        """Hidden width of a feed-forward without a gate: as many weights as a gated one."""
        return self.gated_ffn_width * 3 // 2


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionConfig:
    """How the GEMMs of the blocks are computed.

    Attributes:
        backend: bf16 (bfloat16 operands, reference), emulated (low-precision operands, real
            casts, on any device), native (torch's scaled products of FP8 matrices, with FP8's
            speed on devices that have it) or transformer_engine (NVIDIA's library; CUDA only).
        scaling: What one scale covers and where it comes from. Per tensor: delayed (from an amax
            history) or current (from the tensor itself); rowwise (one per token and per output
            channel); block128 (1 x 128, weights 128 x 128), mxfp8 (32) or nvfp4 (16).
        history: Length of the amax history of delayed scaling.
        margin: Scale of delayed scaling is divided by 2^margin.
        forward_format, gradient_format: FP8 formats of inputs and weights, and of output gradients,
            where a scale covers a tensor or a row. Blocks are always E4M3, of nvfp4 E2M1.
        attention: plain (float32) or fp8 (both products forward and backward, E4M3 and E5M2, one
            scale per tensor, delayed where `scaling` is and else current). For study: biased (a
            bfloat16 output that rounds one way), mended as biased_shifted and biased_wide.
        block_scales: Scales of block128: power_of_two as Transformer Engine, or exact.
        stochastic_rounding: nvfp4 rounds output gradients up or down by chance.
        hadamard: nvfp4 mixes each 16 tokens of the weight gradient's operands by a Hadamard matrix
            with random signs.
        rounding_seed: Of those two.
        activations: Type of the residual stream and of all between the GEMMs. Weights, gradients
            of weights, losses and sums are float32 with either.
        bf16_layers: Globs of qualified names with commas between, such as
            "blocks.0.*,*.mlp.down": linear layers and attention cores that stay in 16 or 32 bits.
        bf16_first, bf16_last: So do all of the first and of the last blocks, this many.
    """

    backend: Backend = "emulated"
    scaling: ScalingName = "delayed"
    history: int = 16
    margin: int = 0
    forward_format: Literal["e4m3", "e5m2"] = "e4m3"
    gradient_format: Literal["e4m3", "e5m2"] = "e5m2"
    attention: AttentionName = later("plain")
    block_scales: Literal["power_of_two", "exact"] = later("power_of_two")
    stochastic_rounding: bool = later(False)
    hadamard: bool = later(False)
    rounding_seed: int = later(0)
    activations: Literal["float32", "bfloat16"] = later("float32")
    bf16_layers: str = later("")
    bf16_first: int = later(0)
    bf16_last: int = later(0)

    def __post_init__(self) -> None:
        require(self.history >= 1, f"history is {self.history}; allowed: 1 or more")
        one_of("backend", self.backend, get_args(Backend))
        one_of("scaling", self.scaling, get_args(ScalingName))
        one_of("attention", self.attention, get_args(AttentionName))
        one_of("block_scales", self.block_scales, ("power_of_two", "exact"))
        chance = self.stochastic_rounding or self.hadamard
        require(
            not chance or self.scaling == "nvfp4",
            f"stochastic_rounding and hadamard belong to nvfp4, scaling is {self.scaling}",
        )
        one_of("activations", self.activations, ("float32", "bfloat16"))
        for name in ("bf16_first", "bf16_last"):
            count = getattr(self, name)
            require(count >= 0, f"{name} is {count}; allowed: 0 or more")
        self._check_backend()

    def _check_backend(self) -> None:
        known = _SCALINGS[self.backend]
        require(
            self.scaling in known,
            f"scaling is {self.scaling!r} on the {self.backend} backend; allowed there: "
            f"{', '.join(known)}",
        )
        if self.backend == "native":
            require(
                self.forward_format == "e4m3",
                "no device multiplies two E5M2 matrices: forward_format is 'e5m2' on the native "
                "backend; allowed there: e4m3",
            )
            require(
                self.attention != "fp8",
                "attention is 'fp8' on the native backend, and torch has no such attention; "
                "allowed there: plain (fp8: backend emulated or transformer_engine)",
            )
        if self.backend == "transformer_engine":
            formats = (self.forward_format, self.gradient_format)
            require(
                formats in (("e4m3", "e5m2"), ("e4m3", "e4m3")),
                f"formats are {formats} on the transformer_engine backend; allowed there: e4m3 "
                "forward, e5m2 or e4m3 for gradients",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """AdamW; weight decay spares tensors of one dimension.

    Attributes:
        learning_rate: Highest of the schedule.
        beta1, beta2: Decay of the first and second moment.
        eps: Added to the square root of the second moment.
        weight_decay: Times the learning rate is what a weight loses a step.
        clip: Largest global gradient norm; None does not clip.
    """

    learning_rate: float = 2e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float | None = 1.0

    def __post_init__(self) -> None:
        require(self.learning_rate > 0, f"learning_rate is {self.learning_rate}; allowed: above 0")
        require(0 <= self.beta1 < 1, f"beta1 is {self.beta1}; allowed: [0, 1)")
        require(0 <= self.beta2 < 1, f"beta2 is {self.beta2}; allowed: [0, 1)")
        require(self.clip is None or self.clip > 0, f"clip is {self.clip}; allowed: None or > 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleConfig:
    """Warm-up, stable, decay ("1-sqrt" over the last share of the run).

    Attributes:
        warmup_steps: Linear from 0.
        decay_share: Share of all steps at the end that decay; 0 for none.
        drop_at: From this step on the rate is multiplied by `drop_to`; 0 for never.
        drop_to: By what.
    """

    warmup_steps: int = 50
    decay_share: float = 0.0
    drop_at: int = later(0)
    drop_to: float = later(1.0)

    def __post_init__(self) -> None:
        require(self.warmup_steps >= 0, f"warmup_steps is {self.warmup_steps}; allowed: 0 or more")
        require(0 <= self.decay_share <= 1, f"decay_share is {self.decay_share}; allowed: [0, 1]")
        require(self.drop_at >= 0, f"drop_at is {self.drop_at}; allowed: 0 or more")
        require(self.drop_to > 0, f"drop_to is {self.drop_to}; allowed: above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionConfig:
    """How the same mathematics is computed; no part of a run's fingerprint.

    Attributes:
        device: cpu or cuda.
        recompute: Activation checkpointing: keep the input of each block and compute the rest
            again in backward.
        deterministic: Only algorithms that repeat bit for bit; an operation without one is an
            error.
        compile: torch.compile of each block; with precision.activations bfloat16 on CUDA also of
            the loss.
        parallel: What data-parallel processes do with the model: ddp (a copy each) or fsdp2
            (parameters, gradients and optimizer states sharded).
        tensor_parallel: Over how many processes each block is cut: heads and hidden features.
            Needs torchrun with as many processes.
        sequence_parallel: Cut the residual stream between the blocks along its tokens, too.
        wire: Activations between tensor-parallel processes: exact (their own type), bfloat16, or
            fp8 (gathers send the codes that the FP8 GEMMs read, one byte each under a scale that
            all processes share; sums are bfloat16; needs sequence_parallel).
    """

    device: Literal["cpu", "cuda"] = later("cpu")
    recompute: bool = later(False)
    deterministic: bool = later(False)
    compile: bool = later(False)
    parallel: Literal["ddp", "fsdp2"] = later("ddp")
    tensor_parallel: int = later(1)
    sequence_parallel: bool = later(False)
    wire: WireName = later("exact")

    def __post_init__(self) -> None:
        for name, allowed in (
            ("device", ("cpu", "cuda")),
            ("parallel", ("ddp", "fsdp2")),
            ("wire", get_args(WireName)),
        ):
            value = getattr(self, name)
            require(value in allowed, f"{name} is {value!r}; allowed: {', '.join(allowed)}")
        cut = self.tensor_parallel > 1
        require(
            self.tensor_parallel > 0,
            f"tensor_parallel is {self.tensor_parallel}; allowed: 1 or more",
        )
        require(
            cut or not self.sequence_parallel,
            "sequence_parallel is true with tensor_parallel 1; allowed: 2 or more",
        )
        require(
            self.wire != "fp8" or self.sequence_parallel,
            "wire is fp8 without sequence_parallel, and nothing is gathered then; set it to true",
        )
        require(
            not cut or (self.parallel == "ddp" and not self.compile),
            "tensor_parallel takes execution.parallel ddp, without execution.compile",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationConfig:
    """Loss on held-out text during training; no part of a run's fingerprint.

    Attributes:
        every: Steps between two evaluations; 0 evaluates never.
        batches: Batches of `data.batch_size` sequences, always the same ones.
        cloze: Items of a multiple choice that is scored as well: which of four endings belongs to
            a held-out context? 0 scores none.
    """

    every: int = later(0)
    batches: int = later(4)
    cloze: int = later(0)

    def __post_init__(self) -> None:
        require(self.every >= 0, f"every is {self.every}; allowed: 0 or more")
        require(self.batches > 0, f"batches is {self.batches}; allowed: 1 or more")
        require(self.cloze >= 0, f"cloze is {self.cloze}; allowed: 0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """One run, whole: the same config gives the same run, bit for bit on the same machine.

    Attributes:
        name: Run name in records; does not influence the training.
        model, precision, optimizer, schedule, data, execution, evaluation: The parts.
        steps: Optimizer steps.
        seed: Of initial weights and data order.
        fault: How the run is broken on purpose, if it is.
        tensor_every: Tensor statistics at every n-th step.
        forget_optimizer_at: The moments of the optimizer are lost before this step, as in a restart
            from weights alone; 0 for never.
        states: Formats of gradients, optimizer states and weights: FP8-LM's levels.
        communication: How FP8 gradients of several processes are summed.
        initial: Checkpoint of one process whose weights the run begins with, such as a text
            model's that is to be fine-tuned; None draws them by the seed.
    """

    name: str
    model: ModelConfig = field(default_factory=ModelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    data: DataConfig = field(default_factory=DataConfig)
    steps: int = 600
    seed: int = 0
    fault: Fault | None = None
    tensor_every: int = 4
    forget_optimizer_at: int = later(0)
    states: StatesConfig = later(StatesConfig())
    communication: CommunicationConfig = later(CommunicationConfig())
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    initial: str | None = later(None)

    def __post_init__(self) -> None:
        require(
            self.evaluation.every == 0 or self.data.held_out > 0,
            "evaluation.every needs data.held_out: the share of the text to keep for it",
        )
        require(self.steps > 0, f"steps is {self.steps}; allowed: 1 or more")
        require(
            self.forget_optimizer_at >= 0
            and (self.forget_optimizer_at == 0 or self.states.level == "O0"),
            "forget_optimizer_at is 0, or a step of a run whose states.level is O0",
        )
        narrow = self.states.parameters == "bfloat16"
        require(
            not narrow or self.precision.backend != "transformer_engine",
            "states.parameters is bfloat16 with Transformer Engine's layers, which keep float32; "
            "allowed: backends bf16, emulated, native",
        )
        require(
            not narrow or self.execution.parallel == "ddp",
            "states.parameters is bfloat16 under fsdp2; allowed: execution.parallel ddp",
        )
        self._check_cut()
        require(self.tensor_every > 0, f"tensor_every is {self.tensor_every}; allowed: 1 or more")

    def _check_cut(self) -> None:
        if self.execution.tensor_parallel == 1:
            return
        require(
            self.precision.backend != "transformer_engine" and self.states.level == "O0",
            "tensor_parallel takes precision.backend bf16, emulated or native, and states.level O0",
        )
        require(
            not isinstance(self.fault, ScaleFault | OutlierRamp),
            "faults of layers (ScaleFault, OutlierRamp) are not for tensor_parallel",
        )

    def as_dict(self) -> dict[str, object]:
        """Plain data, for the run registry and checkpoints."""
        return asdict(self)

    def fingerprint(self) -> str:
        """Hex digest of everything that influences the training.

        Left out are the name, the evaluation, and how it is computed (`execution`).

        Fields that came `later` stay out while they stand at their default.

        Numbers count to nine digits: exp and log differ in the last bit between processors, and
        so would a recipe's learning rate.
        """
        values = _identifying(self)
        for name in ("name", "execution", "evaluation"):
            values.pop(name, None)
        values["fault_kind"] = None if self.fault is None else type(self.fault).__name__
        text = json.dumps(_rounded(values), sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()


def _identifying(config: object) -> dict[str, object]:
    """As `asdict`, without the fields made by `later` that stand at their default."""
    assert is_dataclass(config)
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    kept = {
        f.name: values[f.name]
        for f in fields(config)
        if not (f.metadata.get(LATER) and values[f.name] == f.default)
    }
    return {n: _identifying(v) if is_dataclass(v) else v for n, v in kept.items()}


def _rounded(value: object) -> object:
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value
