"""What the type of a setting does not say: its choices, its bounds, and whether it may change."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

__all__ = [
    "LARGEST",
    "OnResume",
    "Rule",
    "check",
    "check_task_settings",
    "cut",
    "is_count",
    "rules_of",
    "setting",
]

LARGEST = 2**31 - 1  # of any count
OnResume = Literal["never", "at an epoch", "freely"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """Of one setting; what is None limits nothing.

    Attributes:
        choices: the values it may have.
        forms: what the help lists in place of choices.
        at_least: the smallest value.
        below: what the value must be less than; goes with `at_least`.
        check: raises ValueError for a value that it must not have.
        on_resume: whether a run's continuation may have another value: "never", "at an epoch" (if
            it goes on from the start of one) or "freely".
        only: the one task that it is a setting of; it has its default for others.
    """

    choices: tuple[str, ...] | None = None
    forms: tuple[str, ...] | None = None
    at_least: int | None = None
    below: int | None = None
    check: Callable[[Any], object] | None = None
    on_resume: OnResume = "never"
    only: str | None = None


def setting(
    default: Any,
    *,
    choices: Sequence[str] | None = None,
    forms: Sequence[str] | None = None,
    at_least: int | None = None,
    below: int | None = None,
    check: Callable[[Any], object] | None = None,
    on_resume: OnResume = "never",
    only: str | None = None,
) -> Any:
    """A field of a dataclass with a default and a :class:`Rule`, whose attributes these are.

    A setting whose default is None may be None whatever its rule.
    """
    rule = Rule(
        choices=None if choices is None else tuple(choices),
        forms=None if forms is None else tuple(forms),
        at_least=at_least,
        below=below,
        check=check,
        on_resume=on_resume,
        only=only,
    )
    return dataclasses.field(default=default, metadata={"rule": rule})


def rules_of(config: Any) -> dict[str, Rule]:
    """Name -> rule of every setting of a dataclass or an instance of one."""
    free = Rule()
    return {field.name: field.metadata.get("rule", free) for field in dataclasses.fields(config)}


def check(config: Any) -> None:
    """Refuses values that a dataclass's types allow and its rules do not.

    Raises:
        ValueError: naming the setting, the rule and the value.
    """
    fields = dataclasses.fields(config)
    rules = rules_of(config)
    for field in fields:
        _check_sense(field.name, getattr(config, field.name))
    for field in fields:
        value = getattr(config, field.name)
        if value is not None or field.default is not None:
            _check_rule(field.name, value, rules[field.name])


def check_task_settings(config: Any, task: str) -> None:
    """Refuses settings of another task that do not have their default.

    Args:
        config: a dataclass.
        task: what it is for.

    Raises:
        ValueError: naming the setting, the task that it is of, and the value.
    """
    rules = rules_of(config)
    for field in dataclasses.fields(config):
        only, value = rules[field.name].only, getattr(config, field.name)
        if only not in (None, task) and value != field.default:
            raise ValueError(
                f"{field.name} is a setting of {only}, got {cut(repr(value))} for the task "
                f"{task}: leave it away"
            )


def _check_rule(name: str, value: Any, rule: Rule) -> None:
    if rule.choices is not None and value not in rule.choices:
        raise ValueError(f"{name} must be one of {rule.choices}, got {value!r}")
    if rule.at_least is not None:
        if rule.below is not None:
            if not rule.at_least <= value < rule.below:
                raise ValueError(f"{name} must be in [{rule.at_least}, {rule.below}), got {value}")
        elif value < rule.at_least:
            bound = f"be at least {rule.at_least}" if rule.at_least else "not be negative"
            raise ValueError(f"{name} must {bound}, got {value}")
    if rule.check is not None:
        rule.check(value)


def _check_sense(name: str, value: Any) -> None:
    """Refuses what a type allows and no setting means."""
    if isinstance(value, tuple):
        for part in value:
            _check_sense(name, part)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value}")
    elif isinstance(value, int) and abs(value) > LARGEST:
        raise ValueError(f"{name} must be at most {LARGEST}, got {cut(str(value))}")
    elif isinstance(value, str) and (not value or "\0" in value):
        raise ValueError(f"{name} must be text that is not empty, without null, got {value!r}")


def cut(text: str) -> str:
    """As much of a wrong value as a sentence has room for."""
    return text if len(text) <= 40 else f"{text[:40]}..."


def is_count(text: str) -> bool:
    """Whether the text is a number from 0 that a step or minute can have."""
    return text.isascii() and text.isdecimal() and len(text) <= len(str(LARGEST))
