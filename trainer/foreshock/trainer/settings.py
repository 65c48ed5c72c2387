"""A run's settings by their dotted names: explained, read from text, set one by one.

Names, types and defaults come from the dataclasses of `config`, explanations from their docstrings,
so that nothing is said twice. Works without torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Literal

from foreshock.trainer.config import RunConfig
from foreshock.trainer.faults import BadBatch, LearningRateRamp, OutlierRamp, ScaleFault

__all__ = ["Setting", "overridden", "parsed", "run_from", "settings"]

_FAULTS: Final[Mapping[str, Any]] = {
    of.__name__: of for of in (LearningRateRamp, ScaleFault, OutlierRamp, BadBatch)
}


@dataclasses.dataclass(frozen=True, slots=True)
class Setting:
    """One field of a run's configuration.

    Attributes:
        name: Dotted, such as optimizer.learning_rate.
        default: Its default; None may also mean that there is none.
        allowed: Values or type, in words.
        meaning: From the docstring of its class.
    """

    name: str
    default: object
    allowed: str
    meaning: str


def settings(of: type = RunConfig, prefix: str = "") -> Iterator[Setting]:
    """Every setting of a run but its fault, which is for sweeps, in the order of the classes."""
    hints, meanings = typing.get_type_hints(of), _meanings(of)
    for field in dataclasses.fields(of):
        hint, name = hints[field.name], f"{prefix}{field.name}"
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from settings(hint, f"{name}.")
        elif field.name != "fault":
            default = None if field.default is dataclasses.MISSING else field.default
            yield Setting(name, default, _allowed(hint), meanings.get(field.name, ""))


def overridden(config: RunConfig, assignments: Sequence[str]) -> RunConfig:
    """A configuration with some settings changed, all at once, then checked.

    Args:
        config: Where to start.
        assignments: Such as optimizer.learning_rate=3e-3; None, true and false are read as such.

    Raises:
        ValueError: No such setting, not a value of its type, or one that is not allowed.
    """
    values: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"{assignment!r} is no setting; write NAME=VALUE")
        inner = values
        *path, last = name.strip().split(".")
        for part in path:
            inner = inner.setdefault(part, {})
            if not isinstance(inner, dict):
                raise ValueError(f"{name} is set, and so is a part of it")  # noqa: TRY004
        inner[last] = text.strip()
    changed: RunConfig = _changed(config, values, "", from_text=True)
    return changed


def run_from(values: Mapping[str, Any], base: RunConfig | None = None) -> RunConfig:
    """A run from nested plain data, as a JSON or TOML file gives it; what is missing is `base`'s.

    Args:
        values: As `RunConfig.as_dict`; a fault is {"kind": "LearningRateRamp", "start": 150, ...}.
        base: None takes the defaults.

    Raises:
        ValueError: As `overridden`.
    """
    changed: RunConfig = _changed(base or RunConfig(name="run"), values, "", from_text=False)
    return changed


def _changed(config: Any, values: Mapping[str, Any], prefix: str, *, from_text: bool) -> Any:
    hints = typing.get_type_hints(type(config))
    changes: dict[str, Any] = {}
    for name, value in values.items():
        full = f"{prefix}{name}"
        if name not in hints:
            raise ValueError(_unknown(full))
        if name == "fault" and not prefix:
            changes[name] = _fault(value)
        elif dataclasses.is_dataclass(hints[name]):
            if not isinstance(value, Mapping):
                raise ValueError(f"{full} has settings of its own: {full}.NAME")
            changes[name] = _changed(getattr(config, name), value, f"{full}.", from_text=from_text)
        elif isinstance(value, Mapping):
            raise ValueError(f"{full} has no settings of its own")
        else:
            changes[name] = _value(value, hints[name], full, from_text=from_text)
    return dataclasses.replace(config, **changes)


def _unknown(name: str) -> str:
    known = [s.name for s in settings()]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"there is no setting {name!r}.{hint} foreshock train --fields lists them."


def _fault(value: object) -> Any:
    if value is None:
        return None
    if not isinstance(value, Mapping) or value.get("kind") not in _FAULTS:
        raise ValueError(f"fault is {value!r}; allowed: a table with kind = {', '.join(_FAULTS)}")
    of = _FAULTS[str(value["kind"])]
    rest = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items() if k != "kind"}
    try:
        return of(**rest)
    except TypeError as error:
        known = ", ".join(f.name for f in dataclasses.fields(of))
        raise ValueError(f"fault {value['kind']} has {known}: {error}") from error


def _value(value: Any, hint: Any, name: str, *, from_text: bool) -> Any:
    for option in _options(hint):
        fits, read = _read(value, option, from_text=from_text)
        if fits:
            return read
    raise ValueError(f"{name} is {value!r}; allowed: {_allowed(hint)}")


def _options(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        # None first: the text None is meant as that where it is allowed.
        return tuple(sorted(typing.get_args(hint), key=lambda option: option is not type(None)))
    return (hint,)


def _read(value: Any, option: Any, *, from_text: bool) -> tuple[bool, Any]:
    """Whether a value is of a type, and the value."""
    if option is type(None):
        return value is None or (from_text and value in ("None", "none", "null")), None
    if typing.get_origin(option) is Literal:
        return value in typing.get_args(option), value
    if option is bool:
        words = {"true": True, "false": False} if from_text else {}
        return isinstance(value, bool) or str(value).lower() in words, words.get(
            str(value).lower(), value
        )
    if option in (int, float):
        return _number(value, option, from_text=from_text)
    return option is str and isinstance(value, str), value


def _number(value: Any, option: type, *, from_text: bool) -> tuple[bool, Any]:
    if from_text:
        try:
            return True, option(value)
        except ValueError:
            return False, None
    fits = isinstance(value, int | option) and not isinstance(value, bool)
    return fits, option(value) if fits else None


def _allowed(hint: Any) -> str:
    names = {int: "whole number", float: "number", bool: "true or false", str: "text"}
    parts = []
    for option in _options(hint):
        if typing.get_origin(option) is Literal:
            parts += [str(choice) for choice in typing.get_args(option)]
        else:
            parts.append("None" if option is type(None) else names.get(option, str(option)))
    return ", ".join(parts)


def _meanings(of: type) -> dict[str, str]:
    """Explanations of the Attributes section of a class's docstring."""
    text = inspect.getdoc(of) or ""
    _, _, section = text.partition("Attributes:\n")
    found: dict[str, str] = {}
    entry = re.compile(r"^    ([a-z][a-z0-9_]*(?:, [a-z][a-z0-9_]*)*): (.*(?:\n {8}.*)*)", re.M)
    for match in entry.finditer(section):
        for name in match[1].split(", "):
            found[name] = " ".join(match[2].split())
    return found


def parsed(text: str, suffix: str) -> Mapping[str, Any]:
    """Nested data from the text of a JSON or TOML file.

    Raises:
        ValueError: Another suffix, or the text is not of its kind, or no table.
    """
    if suffix == ".toml":
        import tomllib

        return tomllib.loads(text)
    if suffix != ".json":
        raise ValueError(f"a configuration ends in .json or .toml, not {suffix or 'nothing'!r}")
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("a configuration is a table of settings")  # noqa: TRY004
    return found
