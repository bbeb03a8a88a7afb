"""The files of a run folder that people read: log.jsonl, summary.csv, TensorBoard, accuracy.png."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from rsfast.files.seal import write_whole
from rsfast.files.tables import as_csv, read_log, read_rows

__all__ = ["RunLog"]


class RunLog:
    """Writes what happens in a run; made on rank 0 only.

    A resumed run drops the lines that were written after the checkpoint it continues from, so
    that the files read as if nothing had happened.

    Args:
        folder: of the run; exists.
        resolutions: trained ones, for the columns of the summary.
        epochs_done: so many whole epochs are kept from an earlier start.
        steps_done: and so many steps, since the beginning of the run; None if the epoch under way
            starts again, perhaps with steps of another size.
        draw_epochs: draws accuracy.png, of the summary's rows, the resolutions and the folder.
    """

    def __init__(
        self,
        folder: Path,
        resolutions: Sequence[int],
        epochs_done: int,
        steps_done: int | None,
        draw_epochs: Callable[[Sequence[Mapping[str, Any]], Sequence[int], Path], None],
    ) -> None:
        self._folder = folder
        self._resolutions = resolutions
        self._draw_epochs = draw_epochs
        summary = folder / "summary.csv"
        rows = read_rows(summary) if summary.exists() else []
        self._rows: list[dict[str, Any]] = [r for r in rows if int(r["epoch"]) <= epochs_done]
        kept = [
            text
            for text, line in read_log(folder / "log.jsonl")
            if _was_before(line, epochs_done, steps_done)
        ]
        write_whole(folder / "log.jsonl", ["".join(kept).encode()])
        self._lines = open(folder / "log.jsonl", "a", buffering=1)  # noqa: SIM115 (kept open)
        # Only a resumed run has events to purge; a purge step in a fresh one would hide step 0.
        purge = steps_done + 1 if steps_done else None
        self._board = SummaryWriter(str(folder), purge_step=purge)

    def write(self, event: str, **values: Any) -> None:
        """One line of log.jsonl; JSON has no number for what is not finite, so that is null."""
        values = {k: None if _is_infinite(v) else v for k, v in values.items()}
        self._lines.write(json.dumps({"event": event, **values}) + "\n")

    def step(self, step: int, **values: float) -> None:
        """Losses and speed of the steps up to and without `step`."""
        self.write("step", step=step, **values)
        for name, value in values.items():
            self._board.add_scalar(f"train/{name}", value, step)

    def epoch(self, step: int, row: dict[str, Any]) -> None:
        """One row of summary.csv, which ends an epoch at `step`; redraws accuracy.png."""
        self.write("epoch", step=step, **row)
        for name, value in row.items():
            if name != "epoch":
                self._board.add_scalar(f"epoch/{name}", value, step)
        self._board.flush()
        self._rows.append(row)
        write_whole(self._folder / "summary.csv", [as_csv(self._rows).encode()])
        self._draw_epochs(self._rows, self._resolutions, self._folder)

    def close(self) -> None:
        """Flushes and closes the files."""
        self._board.close()
        self._lines.close()


def _was_before(line: dict[str, Any], epochs_done: int, steps_done: int | None) -> bool:
    # At the end of an epoch, its last step may be done and its validation not.
    if line["event"] == "epoch" or (steps_done is None and "epoch" in line):
        return line["epoch"] <= epochs_done
    return steps_done is None or line.get("step", 0) <= steps_done


def _is_infinite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
