"""The error of a split with archives that cannot be used as they are."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["DamagedArchivesError"]


class DamagedArchivesError(ValueError):
    """Some archives of a split cannot be used.

    Attributes:
        reasons: path of each -> a sentence that names it.
    """

    def __init__(self, reasons: Mapping[str, str]) -> None:
        first, *others = reasons.values()
        more = f"; {len(others)} more archives cannot be used either" if others else ""
        super().__init__(first + more)
        self.reasons = dict(reasons)
