"""Facts about a GPU, from a stand-in for nvidia-smi."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rsfast.runtime import environment

UUID = "8f6d5c21-0000-4000-8000-0123456789ab"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The commands that were run."""
    commands: list[tuple[str, ...]] = []

    def run(command: tuple[str, ...], **_: Any) -> SimpleNamespace:
        commands.append(command)
        known = f"--id=GPU-{UUID}" in command
        return SimpleNamespace(stdout="580.1, 700.00 W, 1980 MHz, 2619 MHz\n" if known else "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100")
    return commands


def test_the_commit_is_that_of_the_clone() -> None:
    root = Path(__file__).parents[2]
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    expected = found if (root / ".git").exists() else None
    assert environment.describe(torch.device("cpu"))["commit"] == expected


@pytest.mark.parametrize("prefix", ["", "GPU-"])
def test_the_gpu_is_asked_for_by_its_uuid(
    monkeypatch: pytest.MonkeyPatch, asked: list[tuple[str, ...]], prefix: str
) -> None:
    properties = SimpleNamespace(uuid=prefix + UUID)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    facts = environment.describe(torch.device("cuda", 1))
    assert facts["driver"] == "580.1"
    assert facts["power_limit"] == "700.00 W"
    assert facts["clock_memory"] == "2619 MHz"
    assert [command[0] for command in asked].count("nvidia-smi") == 1


def test_what_nvidia_smi_does_not_know_is_none(
    monkeypatch: pytest.MonkeyPatch, asked: list[tuple[str, ...]]
) -> None:
    properties = SimpleNamespace(uuid="another")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    facts = environment.describe(torch.device("cuda"))
    assert (facts["driver"], facts["clock_sm"]) == (None, None)
