"""Layers that stay in bfloat16, and the table of what every GEMM is computed in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from torch import nn

from foreshock.trainer.config import PrecisionConfig
from foreshock.trainer.precision.attention import AttentionCore, PlainAttention
from foreshock.trainer.precision.linear import Bf16Linear, GemmLinear

__all__ = ["describe", "leave_in_bf16"]


def leave_in_bf16(blocks: nn.ModuleList, precision: Sequence[PrecisionConfig]) -> None:
    """Replace the layers that a recipe opts out by bfloat16 ones, in place.

    Comes before weights are drawn, so that seeds mean the same with and without.

    Args:
        blocks: Of a model in which they are called `blocks`.
        precision: The recipe, or one per model of a stack, alike in what they opt out.

    Raises:
        ValueError: A glob matches nothing, there are fewer blocks, or the stack's recipes differ.
    """
    wanted = {(p.bf16_layers, p.bf16_first, p.bf16_last) for p in precision}
    if len(wanted) > 1:
        raise ValueError("one stack holds one choice of bf16_layers, bf16_first and bf16_last")
    listed, first, last = wanted.pop()
    globs = [glob.strip() for glob in listed.split(",") if glob.strip()]
    if max(first, last) > len(blocks):
        raise ValueError(
            f"bf16_first is {first} and bf16_last {last}; the model has {len(blocks)} blocks"
        )
    found = dict(_gemms(blocks))
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in found):
            raise ValueError(f"bf16_layers: {glob!r} matches no layer; layers: {', '.join(found)}")
    whole = {*range(first), *range(len(blocks) - last, len(blocks))}
    for name, module in found.items():
        hit = any(fnmatchcase(name, glob) for glob in globs)
        if hit or int(name.split(".")[1]) in whole:
            blocks.set_submodule(name.split(".", 1)[1], _in_bf16(module))


def _in_bf16(module: nn.Module) -> nn.Module:
    if isinstance(module, AttentionCore):
        return PlainAttention(scale=module.scale, lead=module.lead)
    assert isinstance(module, GemmLinear)
    return Bf16Linear(module.in_features, module.out_features, lead=module.lead)


def _gemms(blocks: nn.ModuleList) -> Iterator[tuple[str, nn.Module]]:
    for name, module in blocks.named_modules(prefix="blocks"):
        if isinstance(module, GemmLinear | AttentionCore):
            yield name, module


def describe(model: nn.Module) -> str:
    """A Markdown table of every GEMM of a model's blocks: name, sizes, product, recipe.

    The same facts as `print(model)`, a line each.
    """
    lines = ["| layer | sizes and recipe | product |", "|---|---|---|"]
    for name, module in model.named_modules():
        if isinstance(module, AttentionCore | GemmLinear):
            lines.append(f"| {name} | {_recipe(module)} | {module.product_name} |")
    return "\n".join(lines)


def _recipe(module: nn.Module) -> str:
    children = getattr(module, "scaling", None)
    scalings = children.items() if isinstance(children, nn.ModuleDict) else ()
    operands = [f"{role} {scaling.extra_repr()}" for role, scaling in scalings]
    return "; ".join([module.extra_repr(), *operands])
