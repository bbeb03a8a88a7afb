"""What one run says of the goals: one file against separate ones. Pure functions of its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Verdict", "as_table", "judge", "names", "share_of_rate"]


@dataclass(frozen=True, slots=True)
class Goal:
    """A quantity of one implementation, at most so many times that of another."""

    quantity: str  # "latency", "memory" or "disk"
    ours: str
    rival: str
    limit: float | None  # None: one by the number of resolutions


_GOALS = (
    *(
        Goal("latency", f"rsfast_{how}_fast", f"separate_{how}", 1.03)
        for how in ("ort_fp32", "ort_int8", "openvino_fp32", "openvino_bf16")
    ),
    *(Goal("disk", f"rsfast_ort_{p}_fast", f"separate_ort_{p}", None) for p in ("fp32", "int8")),
    Goal("latency", "rsfast_ort_fp32_small", "separate_ort_fp32", 1.12),
    Goal("latency", "rsfast_ort_int8_small", "separate_ort_int8", 1.20),
    *(
        Goal("memory", f"rsfast_ort_{p}_small", f"separate_ort_{p}", 1 / 3)
        for p in ("fp32", "int8")
    ),
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """A goal and what was found.

    Attributes:
        quantity: that is compared.
        ours, rival: implementations.
        threads: of both.
        ratios: resolution -> ours by the rival's; of memory and disk the only key is 0.
        limit: that no ratio may exceed, both to three decimals, of disk to two: a file for all
            holds the batch norms of all, too.
    """

    quantity: str
    ours: str
    rival: str
    threads: int
    ratios: Mapping[int, float]
    limit: float

    @property
    def worst(self) -> int:
        """The resolution with the largest ratio."""
        return max(self.ratios, key=lambda r: self.ratios[r])

    @property
    def met(self) -> bool:
        """Whether the worst ratio is within the limit."""
        return round(self.ratios[self.worst], self.digits) <= round(self.limit, self.digits)

    @property
    def digits(self) -> int:
        """Decimals that count."""
        return 2 if self.quantity == "disk" else 3


def names(quantity: str, arch: str, threads: int, impl: str, resolution: int) -> str:
    """The name of a row: of latency and switch by resolution, of disk without threads."""
    if quantity in ("latency", "switch"):
        return f"{quantity}/{arch}/b1/t{threads}/{impl}/{resolution}"
    return (
        f"{quantity}/{arch}/{impl}"
        if quantity == "disk"
        else f"{quantity}/{arch}/t{threads}/{impl}"
    )


def judge(
    rows: Sequence[Mapping[str, Any]], arch: str, resolutions: Sequence[int], threads: Sequence[int]
) -> list[Verdict]:
    """Compares rows of one run; goals of implementations that did not run are left out.

    Args:
        rows: of summary.json.
        arch: of the names of rows.
        resolutions: in pixels.
        threads: that were measured.
    """
    values = {row["name"]: row["value"] for row in rows}
    found = []
    for goal in _GOALS:
        places = resolutions if goal.quantity == "latency" else (0,)
        for count in threads[:1] if goal.quantity == "disk" else threads:
            pairs = {
                r: tuple(names(goal.quantity, arch, count, i, r) for i in (goal.ours, goal.rival))
                for r in places
            }
            if not all(name in values for pair in pairs.values() for name in pair):
                continue
            ratios = {r: values[ours] / values[rival] for r, (ours, rival) in pairs.items()}
            limit = 1 / len(resolutions) if goal.limit is None else goal.limit
            verdict = Verdict(goal.quantity, goal.ours, goal.rival, count, ratios, limit)
            found.append(verdict)
    return found


def as_table(verdicts: Sequence[Verdict], resolutions: Sequence[int]) -> str:
    """Markdown: a line per verdict, with the ratio at every resolution."""
    heads = ["", "of", "threads", *(f"{r} px" for r in resolutions), "worst", "limit", ""]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for v in verdicts:
        by_size = v.quantity == "latency"
        cells = [f"{v.quantity} of {v.ours}", v.rival]
        cells.append("" if v.quantity == "disk" else str(v.threads))
        cells += [f"{v.ratios[r]:.3f}" if by_size else "" for r in resolutions]
        worst = f"{v.ratios[v.worst]:.{v.digits}f}"
        cells.append(f"{worst} at {v.worst} px" if by_size else worst)
        cells += [f"{v.limit:.{v.digits}f}", "met" if v.met else "**missed**"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def share_of_rate(multiply_adds: int, latency_ms: float, rate_g: float) -> float:
    """Percent of a measured rate that an inference reaches.

    Args:
        multiply_adds: of its convolutions and linear layers; each is two operations.
        latency_ms: that it takes.
        rate_g: 10**9 operations per second of a large matrix product.
    """
    return 100 * 2 * multiply_adds / (latency_ms / 1e3) / (rate_g * 1e9)
