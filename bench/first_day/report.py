"""The page that the first day ends with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from bench.first_day.run import outcomes
from bench.first_day.stages import Stage
from bench.first_day.verdicts import Rows, targets, verdicts

__all__ = ["write_report"]

_TAIL = 12  # lines of a failed stage's log


def write_report(stages: Sequence[Stage], folder: Path) -> str:
    """Writes report.md into the folder, and returns it.

    Args:
        stages: all there are.
        folder: that they write into.
    """
    summaries = {
        str(path.relative_to(folder).parent): json.loads(path.read_text())
        for path in sorted(folder.rglob("summary.json"))
    }
    files: dict[str, Rows] = {
        name: {row["name"]: row for row in summary["rows"]} for name, summary in summaries.items()
    }
    about = next(iter(summaries.values()), {})
    facts = [
        f"{k} {about[k]}" for k in ("gpu", "driver", "torch", "triton", "commit") if about.get(k)
    ]
    found = outcomes(stages, folder)
    lines = ["# First day", "", f"In {folder}. {', '.join(facts)}", ""]
    if any(outcome.device == "cpu" for outcome in found):
        lines += ["**Some of it ran without a GPU, at toy size: its times mean nothing.**", ""]
    each = list(zip(stages, found, strict=True))
    rest = [stage for stage, outcome in each if outcome.status in ("not run", "cut off")]
    if rest:
        limit = sum(stage.minutes for stage in rest)
        lines += [
            f"Not run yet: {', '.join(stage.name for stage in rest)}, at most {limit:.0f} minutes. "
            f"To go on: `python -m bench.first_day --output {folder}`",
            "",
        ]
    lines += ["| stage | what became of it | s | |", "|---|---|---|---|"]
    for stage, outcome in each:
        why = outcome.why or stage.about
        lines.append(f"| {outcome.name} | {outcome.status} | {outcome.seconds:.0f} | {why} |")
    for outcome in found:
        log = folder / outcome.name / "log.txt"
        if outcome.status in ("failed", "out of time") and log.exists():
            tail = log.read_text(errors="replace").splitlines()[-_TAIL:]
            lines += ["", f"End of {outcome.name}/log.txt:", "", "```", *tail, "```"]
    goals = targets(str(about.get("gpu", "")), files)
    if goals:
        lines += ["", "| goal | reached | wanted | |", "|---|---|---|---|"]
        lines += [
            f"| {what} | {value:,.2f} | {wanted:,.2f} | {'yes' if value >= wanted else 'no'} |"
            for what, value, wanted in goals
        ]
    lines += ["", "## Verdicts", "", *(f"- {line}" for line in verdicts(files) or ["none yet"]), ""]
    page = "\n".join(lines)
    (folder / "report.md").write_text(page)
    return page
