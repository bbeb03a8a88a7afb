"""What a run ran on: written into its log, and into every benchmark result."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import rsfast

__all__ = ["describe"]

_PACKAGES = ("numpy", "pillow", "triton", "nvidia-dali-cuda130", "nvidia-dali-cuda120")
# What nvidia-smi calls the facts that torch does not know.
_NVIDIA_SMI = {
    "driver": "driver_version",
    "power_limit": "power.limit",
    "clock_sm": "clocks.current.sm",
    "clock_memory": "clocks.current.memory",
}


def describe(device: torch.device) -> dict[str, Any]:
    """Versions of rsfast and what it stands on, and the device."""
    facts: dict[str, Any] = {
        "rsfast": rsfast.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # of a class of its own, which checkpoints do not hold
    }
    for package in _PACKAGES:
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["cuda"] = torch.version.cuda
        facts["cudnn"] = torch.backends.cudnn.version()
        index = torch.cuda.current_device() if device.index is None else device.index
        for fact, query in _NVIDIA_SMI.items():
            facts[fact] = _first_line(
                "nvidia-smi", f"--id={index}", f"--query-gpu={query}", "--format=csv,noheader"
            )
    else:
        facts["cpu_threads"] = torch.get_num_threads()
    return facts


def _commit() -> str | None:
    folder = Path(__file__).resolve().parent.parent
    if not (folder / ".git").exists():
        return None
    return _first_line("git", "-C", str(folder), "rev-parse", "HEAD")


def _first_line(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.splitlines()[0] if done.stdout else None
