"""Extent: the height or width of a pyramid, a number for each level."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["Extent", "extent_of", "of_level"]


class Extent:
    """Heights, widths, or numbers computed from them, where levels differ in them.

    Arithmetic works level by level. A question (a comparison, `bool`, `int`) has an answer if all
    levels give the same one; otherwise the network's code would have to do one thing for one level
    and another thing for the next.

    Attributes:
        values: the number of each level.

    Raises:
        ValueError: from a question that levels answer differently.
    """

    __slots__ = ("values",)

    def __init__(self, values: Sequence[float]) -> None:
        self.values = tuple(values)

    def map(self, f: Callable[[Any], Any]) -> Any:
        """`f` of each level: an Extent, or one number if all levels have the same."""
        return extent_of([f(value) for value in self.values])

    def _with(self, other: Any, f: Callable[[Any, Any], Any]) -> Any:
        others = other.values if isinstance(other, Extent) else (other,) * len(self.values)
        if not all(isinstance(value, int | float) for value in others):
            return NotImplemented
        return extent_of([f(a, b) for a, b in zip(self.values, others, strict=True)])

    def _agree(self, answer: Any, question: str) -> Any:
        if isinstance(answer, Extent):
            raise ValueError(
                f"the network asks {question} of its maps' size, and its levels, of "
                f"{self.values} pixels, answer differently"
            )
        return answer

    def __repr__(self) -> str:
        return f"Extent{self.values}"

    def __neg__(self) -> Any:
        return self.map(operator.neg)

    def __ceil__(self) -> Any:
        return self.map(math.ceil)

    def __floor__(self) -> Any:
        return self.map(math.floor)

    def __round__(self, digits: int | None = None) -> Any:
        return self.map(lambda value: round(value, digits))

    def __int__(self) -> int:
        raise self._no_number()

    def __index__(self) -> int:
        raise self._no_number()

    def __float__(self) -> float:
        raise self._no_number()

    def _no_number(self) -> ValueError:
        return ValueError(
            f"the network needs one number where its levels have {self.values} pixels"
        )

    def __bool__(self) -> bool:
        return self._agree(self.map(bool), "whether there is any")

    def __hash__(self) -> int:
        return hash(self.values)


def _arithmetic(name: str, f: Callable[[Any, Any], Any]) -> None:
    def forward(self: Extent, other: Any) -> Any:
        return self._with(other, f)

    def reflected(self: Extent, other: Any) -> Any:
        return self._with(other, lambda a, b: f(b, a))

    setattr(Extent, f"__{name}__", forward)
    setattr(Extent, f"__r{name}__", reflected)


def _comparison(name: str, sign: str) -> None:
    f = getattr(operator, name)

    def compare(self: Extent, other: Any) -> Any:
        answer = self._with(other, f)
        return answer if answer is NotImplemented else self._agree(answer, f"{sign} {other}")

    setattr(Extent, f"__{name}__", compare)


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    _arithmetic(_name, getattr(operator, _name))
for _name, _sign in (("eq", "=="), ("ne", "!="), ("lt", "<"), ("le", "<="), ("gt", ">")):
    _comparison(_name, _sign)
_comparison("ge", ">=")


def extent_of(values: Sequence[Any]) -> Any:
    """An Extent, or the one value that all levels have."""
    same = all(value == values[0] for value in values)
    return values[0] if same else Extent(values)


def of_level(argument: Any, level: int) -> Any:
    """An argument of a torch function as one level has it: extents become numbers."""
    if isinstance(argument, Extent):
        return argument.values[level]
    if isinstance(argument, list | tuple):
        return type(argument)(of_level(part, level) for part in argument)
    return argument
