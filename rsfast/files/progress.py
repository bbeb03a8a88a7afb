"""How far a command is: a bar on a terminal, a line now and then in a file."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

__all__ = ["progress"]

_SECONDS = 30.0  # between two lines
_LINE = (
    "{desc}: {percentage:.0f}%, {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
)


def progress(iterable: Iterable[Any] | None = None, *, lines: str = "timed", **options: Any) -> Any:
    """A bar of tqdm where stderr is a terminal. Elsewhere each state that it shows is a line of its
    own: a bar redraws itself with carriage returns, of which a log keeps every one.

    Args:
        iterable: what is counted, if that is the same.
        lines: "timed", every half a minute and at the end, or "asked", when `refresh` or
            `set_postfix_str` is called.
        options: of tqdm.
    """
    if sys.stderr.isatty():
        return tqdm(iterable, **options)
    return _Lines(iterable, lines=lines, **options)


class _Lines(tqdm):
    """Prints where tqdm would draw."""

    disable: bool
    monitor_interval = 0  # no thread that redraws

    def __init__(self, iterable: Iterable[Any] | None, *, lines: str, **options: Any) -> None:
        self._shown = -1
        self._at_end = lines == "timed"
        super().__init__(
            iterable,
            **options,
            mininterval=_SECONDS if lines == "timed" else float("inf"),
            miniters=1,
            delay=1e-9,  # nothing is shown before there is something to show
            bar_format=_LINE,
        )

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """One line, unless it is that of before."""
        if self.n != self._shown:
            self._shown = self.n
            print(self, file=sys.stderr, flush=True)
        return True

    def close(self) -> None:
        """Says how it ended, if nothing has yet."""
        if not self.disable:
            self.disable = True
            self._decr_instances(self)
            if self._at_end and self.n:
                self.display()
