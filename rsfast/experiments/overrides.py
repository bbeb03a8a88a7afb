"""Settings that some trainings of a set have and others have not: `--for 'inet_*' lr=0.05`."""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, replace
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from rsfast.config import TrainConfig
from rsfast.experiments.sets import ExperimentSet, Training

__all__ = ["Override", "check_patterns", "parse_overrides", "with_overrides"]


class Override(NamedTuple):
    """Settings of the trainings whose name matches a pattern."""

    pattern: str
    settings: Mapping[str, Any]


def parse_overrides(given: Sequence[Sequence[str]], refused: Mapping[str, str]) -> list[Override]:
    """Overrides out of lists of a pattern and texts NAME=VALUE, VALUE as in TOML.

    Args:
        given: the lists.
        refused: settings that cannot be given, and why.

    Raises:
        ValueError: naming what cannot be read.
    """
    known = {field.name for field in fields(TrainConfig)}
    overrides = []
    for pattern, *texts in given:
        if not texts:
            raise ValueError(f"--for {pattern} must be followed by SETTING=VALUE, got nothing")
        settings: dict[str, Any] = {}
        for text in texts:
            name, sign, value = text.partition("=")
            name = name.strip().replace("-", "_")
            if not sign or name not in known:
                raise ValueError(f"--for {pattern} must give SETTING=VALUE, got {text!r}")
            if name in refused:
                raise ValueError(f"{name} cannot be given: {refused[name]}")
            settings[name] = _value(value.strip())
        overrides.append(Override(pattern, settings))
    return overrides


def with_overrides(
    which: ExperimentSet, overrides: Sequence[Override], base: TrainConfig
) -> ExperimentSet:
    """The set, with the settings of the last override that matches a training.

    Args:
        which: the set.
        overrides: in order.
        base: settings of all trainings; those that any override names are said of all of them.
    """
    named = {name for override in overrides for name in override.settings}
    common = {name: getattr(base, name) for name in sorted(named)}

    def changed(training: Training) -> Training:
        settings = {**common, **training.settings}
        for override in overrides:
            if fnmatchcase(training.name, override.pattern):
                settings |= override.settings
        return Training(training.name, settings)

    methods = [
        replace(
            method,
            cells={r: replace(c, training=changed(c.training)) for r, c in method.cells.items()},
        )
        for method in which.methods
    ]
    return replace(which, methods=methods)


def check_patterns(overrides: Sequence[Override], names: Collection[str]) -> None:
    """Refuses a pattern that none of the trainings matches.

    Raises:
        ValueError: naming it, and what there is.
    """
    for pattern, _ in overrides:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"--for must name trainings of the sets, of {', '.join(names)}, got {pattern!r}"
            )


def _value(text: str) -> Any:
    """As in TOML; what is none of its values is a text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
