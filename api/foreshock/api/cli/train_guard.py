"""`foreshock train --guard`: a policy from YAML, and the shipped forecaster as the scorer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from foreshock.monitor.guard.policy import GuardPolicy

if TYPE_CHECKING:
    from foreshock.monitor.guard.runtime import Entry
    from foreshock.trainer.guarded import Guarded

__all__ = ["make_guarded", "read_guard_policy"]


def read_guard_policy(given: str) -> GuardPolicy:
    """`default`, or a YAML file with some of the policy's attributes.

    Raises:
        ValueError: Not readable, not YAML, or not a policy; says which.
    """
    if given == "default":
        return GuardPolicy()
    import yaml

    path = Path(given)
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--guard: cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--guard: {path} is not YAML: {str(error).splitlines()[0]}") from None
    if found is None:
        return GuardPolicy()
    if not isinstance(found, dict):
        text = f"--guard: {path} holds no names with values, such as advise: true"
        raise ValueError(text)  # noqa: TRY004 - what is wrong is a file's content
    try:
        return GuardPolicy.from_mapping(found)
    except ValueError as error:
        raise ValueError(f"--guard: {path}: {error}") from None


def make_guarded(given: str) -> Guarded:
    """A guard with the forecaster that comes with the package; it says on stderr what it does.

    Raises:
        ValueError: The policy cannot be used.
    """
    policy = read_guard_policy(given)
    from foreshock.api.scorer import LocalScorer
    from foreshock.api.suspicion import suspect_of
    from foreshock.trainer.guarded import Guarded

    return Guarded(LocalScorer(), policy, diagnose=suspect_of, on_entry=_say)


def _say(entry: Entry) -> None:
    typer.echo(f"guard, step {entry.step}: {entry}", err=True)
