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
        facts |= _of_nvidia_smi(device)
    else:
        facts["cpu_threads"] = torch.get_num_threads()
    return facts


def _of_nvidia_smi(device: torch.device) -> dict[str, str | None]:
    """Each None where it does not answer."""
    # By UUID: nvidia-smi counts all GPUs of the machine, torch those that the process sees.
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    line = _first_line(
        "nvidia-smi",
        f"--id=GPU-{uuid.removeprefix('GPU-')}",
        f"--query-gpu={','.join(_NVIDIA_SMI.values())}",
        "--format=csv,noheader",
    )
    values = line.split(", ") if line else [None] * len(_NVIDIA_SMI)
    return dict(zip(_NVIDIA_SMI, values, strict=True))


def _commit() -> str | None:
    folder = Path(__file__).resolve().parents[2]  # of a clone
    if not (folder / ".git").exists():
        return None
    return _first_line("git", "-C", str(folder), "rev-parse", "HEAD")


def _first_line(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.splitlines()[0] if done.stdout else None
