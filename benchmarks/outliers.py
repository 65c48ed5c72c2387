"""How far outliers and attention logits grow at high rates, and what FP8 attention makes of them.

    python -m benchmarks.outliers [--rates 2e-3 8e-3] [--seeds 2] [--steps 600] [--decay-weights 0]
        [--only llama3 fog_opt] [--precisions bf16 FP8 FP8DPA] [--history 16] [--folder DIR]

Every architecture in every precision, all rates and seeds of one as a stack, so that a small model
can be trained long. Loss is the mean of the last 20 steps; `gap` its distance to BF16's with the
same seed and rate (mean of the seeds, standard error); `rise` by how much the loss (means of 20)
ever lay above its lowest before, after the warm-up, the worst seed; `logit` the largest attention
logit of the last steps in any layer, by seed.

Kurtosis is that of the last 20 steps: of the residual stream, queries and keys (before their
rotation), the input of the QKV GEMM and that of the last GEMM of the feed-forward, as it is cast.
Per place: mean over layers, pooled over all elements; that of FOG's mean over sequences; the worst
layer's, pooled. Seeds are put together by the mean of the logarithms. The second table has
Llama 3's value in the same precision and at the same rate over each architecture's.

With `--folder` what each stack gave is kept there, and what is there already is not trained again:
parts can be trained one after the other and put into one table; `--held` prints that of what there
is.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from benchmarks.side_by_side import row
from foreshock.trainer.blocks.parts import Tap
from foreshock.trainer.config import (
    Architecture,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    PrecisionConfig,
    RunConfig,
    ScheduleConfig,
)
from foreshock.trainer.data import batch, corpus_of
from foreshock.trainer.model import Decoder
from foreshock.trainer.optimizer import clip_gradients, make_optimizer, set_learning_rate
from foreshock.trainer.precision import AttentionCore, GemmLinear
from foreshock.trainer.schedule import learning_rate
from foreshock.trainer.stacked import stacked_model
from foreshock.trainer.stacked_optimizer import StackedAdamW

LAST: Final = 20
WARMUP: Final = 50
PLACES: Final = ("residual", "query, key", "QKV input", "MLP hidden")
KINDS: Final = ("pooled", "sequence", "worst")
Values = npt.NDArray[np.float64]


def kurtosis(x: Tensor, models: int, *, heads: bool) -> tuple[Tensor, Tensor]:
    """N sum x^4 / (sum x^2)^2, pooled, and FOG's mean over sequences; both (models,).

    Args:
        x: (*lead, B, T, F), or heads (prod(lead) B, T, H, K).
        models: prod(lead).
        heads: Which of them it is.
    """
    sequences = x.reshape(models, -1, math.prod(x.shape[-3 if heads else -2 :]))
    return _ratio(sequences.reshape(models, -1)), _ratio(sequences).mean(-1)


def _ratio(x: Tensor) -> Tensor:
    squares = x.double().square()
    return squares.shape[-1] * squares.square().sum(-1) / squares.sum(-1).square()


class Outliers:
    """Hooks on a stack: kurtosis per place and layer, and the largest logit, while `on`."""

    def __init__(self, model: nn.Module, models: int) -> None:
        self.models, self.on = models, False
        self.logs: dict[tuple[str, str, str], list[Values]] = {}
        self.logit: Values = np.zeros(models)
        places = {"residual": "residual", "query": "query, key", "key": "query, key"}
        endings = {".qkv": "QKV input", ".down": "MLP hidden"}
        for name, module in model.named_modules():
            if isinstance(module, Tap) and module.role in places:
                module.register_forward_hook(self._watcher(places[module.role], name))
            elif isinstance(module, GemmLinear):
                for ending, place in endings.items():
                    if name.endswith(ending):
                        module.register_forward_hook(self._watcher(place, name))
            elif isinstance(module, AttentionCore):
                module.register_forward_pre_hook(self._largest_logit)

    def _watcher(self, place: str, name: str) -> Any:
        def see(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if self.on:
                heads = place == "query, key"
                found = kurtosis(args[0].detach(), self.models, heads=heads)
                for kind, value in zip(KINDS, found, strict=False):
                    self.logs.setdefault((place, kind, name), []).append(value.numpy())

        return see

    def _largest_logit(self, core: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self.on:
            assert isinstance(core, AttentionCore)
            q, k = (x.detach() for x in args[:2])
            k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
            largest = (q @ k.transpose(-1, -2) * core.scale).tril().abs()
            found = largest.reshape(self.models, -1).amax(-1).double().numpy()
            self.logit = np.maximum(self.logit, found)

    def values(self) -> dict[tuple[str, str], Values]:
        """(place, kind) to one value per model."""
        found = {}
        for place in PLACES:
            for kind in KINDS[:2]:
                layers = [
                    np.mean(v, 0) for (p, k, _), v in self.logs.items() if (p, k) == (place, kind)
                ]
                found[place, kind] = np.mean(layers, 0)
                if kind == "pooled":
                    found[place, "worst"] = np.max(layers, 0)
        return found


@dataclass(frozen=True, slots=True)
class Outcome:
    """One architecture in one precision: a value per run of the stack, each of shape (E,)."""

    losses: Values
    kurtosis: Mapping[tuple[str, str], Values]
    logit: Values

    @property
    def first(self) -> Values:
        """Mean loss of the first steps."""
        found: Values = self.losses[:LAST].mean(0)
        return found

    @property
    def last(self) -> Values:
        """Mean loss of the last steps."""
        found: Values = self.losses[-LAST:].mean(0)
        return found

    @property
    def rise(self) -> Values:
        """Largest mean of 20 steps over the lowest before it; infinite for a loss that is NaN."""
        whole = len(self.losses) // LAST * LAST
        means = (
            self.losses[:whole].reshape(-1, LAST, self.losses.shape[1]).mean(1)[WARMUP // LAST :]
        )
        risen = (means - np.minimum.accumulate(means)).max(0)
        return np.where(np.isfinite(risen), risen, np.inf)


def train(configs: Sequence[RunConfig]) -> Outcome:
    """Train runs, watched at their end: as a stack, or one by one where they cannot be stacked."""
    first = configs[0]
    if first.model.architecture == "fog_moe":
        if len(configs) > 1:
            return _together([train([config]) for config in configs])
        model, update = _alone(first)
    else:
        model, update = _stacked(configs)
    corpus = corpus_of(first.data)
    outliers = Outliers(model, len(configs))
    losses = []
    for step in range(first.steps):
        model.begin_step(step, [None] * len(configs))
        outliers.on = step >= first.steps - LAST and step % 4 == 0
        tokens = torch.stack([batch(corpus, c.data, c.seed, step) for c in configs])
        tokens = tokens.view(*model.lead, *tokens.shape[1:])
        loss = model(tokens[..., :-1], tokens[..., 1:])
        torch.autograd.backward(loss.sum())
        update(step)
        losses.append(loss.detach().double().reshape(-1).numpy())
    return Outcome(np.array(losses), outliers.values(), outliers.logit)


Update = Callable[[int], object]
"""Takes the number of a step whose gradients are there."""


def _stacked(configs: Sequence[RunConfig]) -> tuple[Decoder, Update]:
    model = stacked_model(configs)
    optimizer = StackedAdamW(model, [c.optimizer for c in configs])

    def update(step: int) -> None:
        optimizer.step(torch.tensor([learning_rate(c, step) for c in configs]))

    return model, update


def _alone(config: RunConfig) -> tuple[Decoder, Update]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = Decoder(config.model, config.precision)
    optimizer = make_optimizer(model, config.optimizer)

    def update(step: int) -> None:
        set_learning_rate(optimizer, learning_rate(config, step))
        clip_gradients(model, config.optimizer.clip, optimizer)
        optimizer.step()
        optimizer.zero_grad()

    return model, update


def _together(outcomes: Sequence[Outcome]) -> Outcome:
    kurtosis = {
        key: np.concatenate([o.kurtosis[key] for o in outcomes]) for key in outcomes[0].kurtosis
    }
    losses = np.concatenate([o.losses for o in outcomes], 1)
    return Outcome(losses, kurtosis, np.concatenate([o.logit for o in outcomes]))


def configs_of(
    architecture: Architecture, precision: PrecisionConfig, options: argparse.Namespace
) -> list[RunConfig]:
    """One per rate and seed, rates outside."""
    return [
        RunConfig(
            name="outliers",
            model=ModelConfig(
                architecture=architecture,
                width=options.width,
                layers=options.layers,
                heads=options.heads,
            ),
            precision=precision,
            optimizer=OptimizerConfig(learning_rate=rate, weight_decay=options.decay_weights),
            schedule=ScheduleConfig(warmup_steps=WARMUP),
            data=DataConfig(sequence_length=options.length, batch_size=options.batch),
            steps=options.steps,
            seed=seed,
        )
        for rate, seed in itertools.product(options.rates, range(options.seeds))
    ]


def precisions(history: int) -> dict[str, PrecisionConfig]:
    """Linear layers in BF16, in FP8, and in FP8 with attention's own products."""
    return {
        "bf16": PrecisionConfig(backend="bf16"),
        "FP8": PrecisionConfig(history=history),
        "FP8DPA": PrecisionConfig(history=history, attention="fp8"),
    }


def geometric(values: Values) -> float:
    """Geometric mean; NaN if one is."""
    return math.exp(float(np.mean(np.log(values))))


Found = dict[tuple[str, str], Outcome]


def losses_table(found: Found, options: argparse.Namespace) -> None:
    """First table: losses, gaps, rises and logits."""
    row("architecture", "rate", "precision", "first loss", "last loss", "gap", "rise", "logit")
    row(*["---"] * 8)
    for place, rate in enumerate(options.rates):
        part = slice(place * options.seeds, (place + 1) * options.seeds)
        for (architecture, precision), outcome in found.items():
            twin = found.get((architecture, "bf16"))
            gap = "-"
            if twin is not None and precision != "bf16":
                gaps = outcome.last[part] - twin.last[part]
                error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
                gap = f"{gaps.mean():+.3f} ± {error:.3f}"
            losses = (f"{outcome.first[part].mean():.3f}", f"{outcome.last[part].mean():.3f}")
            row(
                architecture,
                f"{rate:g}",
                precision,
                *losses,
                gap,
                f"{outcome.rise[part].max():.2f}",
                ", ".join(f"{logit:.3g}" for logit in outcome.logit[part]),
            )


def kurtosis_table(found: Found, options: argparse.Namespace) -> None:
    """Second table: kurtosis, mean over layers / per sequence / worst layer, and Llama 3's over."""
    row("architecture", "rate", "precision", *PLACES)
    row(*["---"] * (3 + len(PLACES)))
    for index, rate in enumerate(options.rates):
        part = slice(index * options.seeds, (index + 1) * options.seeds)
        for (architecture, precision), outcome in found.items():
            llama = found.get(("llama3", precision))
            cells = []
            for place in PLACES:
                values = [geometric(outcome.kurtosis[place, kind][part]) for kind in KINDS]
                cell = " / ".join(f"{value:.3g}" for value in values)
                if llama is not None and architecture != "llama3":
                    above = [geometric(llama.kurtosis[place, kind][part]) for kind in KINDS]
                    factors = [a / b for a, b in zip(above, values, strict=True)]
                    cell += " (x " + ", ".join(f"{factor:.2g}" for factor in factors) + ")"
                cells.append(cell)
            row(architecture, f"{rate:g}", precision, *cells)


def place_of(configs: Sequence[RunConfig], folder: Path) -> Path:
    """Where a stack's outcome is kept: by all that influences its runs."""
    digest = hashlib.sha256("".join(c.fingerprint() for c in configs).encode()).hexdigest()
    return folder / f"{digest[:24]}.npz"


def kept(configs: Sequence[RunConfig], folder: Path | None) -> Outcome:
    """What the runs gave, from the folder if it is there, else by training them."""
    if folder is None:
        return train(configs)
    path = place_of(configs, folder)
    if not path.exists():
        outcome = train(configs)
        folder.mkdir(parents=True, exist_ok=True)
        named = {"|".join(key): value for key, value in outcome.kurtosis.items()}
        arrays: dict[str, Any] = named | {"losses": outcome.losses, "logit": outcome.logit}
        np.savez(path, **arrays)
    with np.load(path) as held:
        kurtosis = {(place, kind): held[f"{place}|{kind}"] for place in PLACES for kind in KINDS}
        return Outcome(held["losses"], kurtosis, held["logit"])


def every(options: argparse.Namespace) -> Iterator[tuple[Architecture, str]]:
    """Stacks in the order in which they train: an architecture's precisions side by side."""
    yield from itertools.product(options.only, options.precisions)


def told(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rates", type=float, nargs="*", default=[2e-3, 8e-3])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--decay-weights", type=float, default=0.1, help="AdamW's weight decay")
    parser.add_argument("--history", type=int, default=16, help="of amax, in delayed scaling")
    parser.add_argument("--only", nargs="*", default=list(get_args(Architecture)))
    parser.add_argument("--precisions", nargs="*", default=["bf16", "FP8", "FP8DPA"])
    parser.add_argument("--folder", type=Path, help="keep what stacks give, and go on from it")
    parser.add_argument("--held", action="store_true", help="train nothing: what --folder holds")
    options = parser.parse_args(arguments)
    if options.held and options.folder is None:
        parser.error("--held needs --folder")
    if options.steps < 2 * WARMUP:
        parser.error(f"--steps is {options.steps}; allowed: {2 * WARMUP} or more")
    return options


def main() -> None:
    """Print both tables."""
    options = told()
    torch.set_num_threads(1)
    found: Found = {}
    began = time.process_time()
    for architecture, precision in every(options):
        recipe = precisions(options.history)[precision]
        configs = configs_of(architecture, recipe, options)
        if options.held and not place_of(configs, options.folder).exists():
            continue
        found[architecture, precision] = outcome = kept(configs, options.folder)
        losses = ", ".join(f"{loss:.3f}" for loss in outcome.last)
        seconds = time.process_time() - began
        print(f"{seconds:.0f} s {architecture} {precision}: {losses}", flush=True)
    losses_table(found, options)
    kurtosis_table(found, options)


if __name__ == "__main__":
    main()
