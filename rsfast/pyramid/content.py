"""The pixels behind a pyramid, which may be computed only when somebody reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

__all__ = ["Content", "Pending"]


class Pending(Protocol):
    """What is to be computed when somebody reads the rows."""

    @property
    def num_channels(self) -> int:
        """C of the rows."""

    @property
    def like(self) -> Tensor:
        """A tensor of the dtype and device that the rows will have."""

    def compute(self) -> Content:
        """The rows."""


class Content:
    """The pixels behind a pyramid: packed, by level, or pending. It never changes its values.

    Attributes:
        rows: [M, *channels] contiguous; None if not packed.
        parts: the rows of each level in a tensor of its own; None if packed.
        pending: what computes one of them when it is asked for; None once it has.
        handed_on: the rows as their last reader hands them on, see
            :mod:`rsfast.pyramid.pixelwise`; None if none does.
    """

    __slots__ = ("__weakref__", "handed_on", "parts", "pending", "rows")

    def __init__(
        self,
        rows: Tensor | None = None,
        parts: Sequence[Tensor] | None = None,
        pending: Pending | None = None,
    ) -> None:
        self.rows = rows
        self.parts = None if parts is None else tuple(parts)
        self.pending = pending
        self.handed_on: Tensor | None = None

    def get(self) -> Content:
        """Itself, computed."""
        if self.pending is not None:
            made = self.pending.compute()
            self.rows, self.parts, self.pending = made.rows, made.parts, None
        return self

    @property
    def sample(self) -> Tensor:
        """A tensor of its dtype, device and channels; computes it."""
        self.get()
        if self.rows is not None:
            return self.rows
        assert self.parts
        return self.parts[0]
