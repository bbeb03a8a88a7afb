"""What the machine is and what its card reaches: `python -m bench.first_day.card`."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.models import roofline
from bench.support.results_file import Results
from bench.support.timing import DEVICE, ON_GPU

__all__ = ["main"]

_REPORTS = {
    "packages.txt": [sys.executable, "-m", "pip", "freeze"],
    "nvidia_smi.txt": ["nvidia-smi", "-q"],
    "topology.txt": ["nvidia-smi", "topo", "-m"],
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="bench.first_day.card", description=__doc__)
    parser.add_argument("--output", type=Path, help="folder of the results")
    args = parser.parse_args(argv)
    results = Results(args.output, "card", DEVICE)
    for name, command in _REPORTS.items():
        if ON_GPU or command[0] != "nvidia-smi":
            said = subprocess.run(command, capture_output=True, text=True)
            (results.folder / name).write_text(said.stdout + said.stderr)
    roofline.measure_card(results)
    results.finish(
        ["bench.first_day.card", *(sys.argv[1:] if argv is None else argv)],
        "A copy's bytes, read and written, per second; the rate of a large matrix product.",
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
