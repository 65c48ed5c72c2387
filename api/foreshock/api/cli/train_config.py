"""From `foreshock train`'s options to a run: a recipe or a file, then settings one by one."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from foreshock.trainer.recipes import RECIPES
from foreshock.trainer.settings import overridden, parsed, run_from, settings

if TYPE_CHECKING:
    from foreshock.trainer.config import RunConfig

__all__ = ["field_lines", "recipe_lines", "run_config"]


def run_config(
    recipe: str | None,
    *,
    file: Path | None = None,
    assignments: Sequence[str] = (),
    steps: int | None = None,
    seed: int | None = None,
    name: str | None = None,
    data: Path | None = None,
) -> RunConfig:
    """The run that the options describe; what is more specific wins.

    Args:
        recipe: Name of a recipe; None where a file is given.
        file: JSON or TOML with settings, over those of the recipe.
        assignments: NAME=VALUE, over the file.
        steps: Over all of them, like the next four.
        seed: None takes the file's, else 0.
        name: Run name.
        data: Folder of text.

    Raises:
        ValueError: No such recipe or setting, or a value that is not allowed.
    """
    if recipe is None and file is None:
        raise ValueError("name a recipe, or give --from-config; foreshock train --list lists them")
    config = None
    if recipe is not None:
        config = replace(_recipe(recipe)(seed or 0), name=f"{recipe.replace('_', '-')}-{seed or 0}")
    if file is not None:
        try:
            config = run_from(parsed(file.read_text(), file.suffix), config)
        except (OSError, ValueError) as error:
            raise ValueError(f"{file}: {error}") from error
    assert config is not None
    if seed is not None and file is not None:
        config = replace(config, seed=seed)
    # With the others: a source that needs a path is checked together with it.
    folder = [] if data is None else [f"data.folder={data}"]
    config = overridden(config, [*assignments, *folder])
    config = replace(config, name=name or config.name, steps=steps or config.steps)
    return config


def _recipe(recipe: str) -> Callable[[int], RunConfig]:
    known = {key.replace("_", "-"): make for key, make in RECIPES.items()}
    key = recipe.replace("_", "-")
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0].replace('-', '_')}?" if near else ""
        raise ValueError(f"There is no recipe {recipe!r}.{hint} There are {', '.join(RECIPES)}.")
    return known[key]


def recipe_lines() -> Iterator[str]:
    """Every recipe with what it is."""
    longest = max(map(len, RECIPES))
    for name, make in RECIPES.items():
        yield f"{name:{longest}}  {(inspect.getdoc(make) or '').splitlines()[0]}"


def field_lines(config: RunConfig | None = None) -> Iterator[str]:
    """Every setting: name, value or default, what is allowed, what it means.

    Args:
        config: Whose values to show; None shows the defaults.
    """
    values = {} if config is None else _flat(config.as_dict())
    for setting in settings():
        value = values.get(setting.name, setting.default)
        yield f"{setting.name} = {value}"
        yield f"    {setting.meaning} ({setting.allowed})"


def _flat(values: dict[str, object], prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found
