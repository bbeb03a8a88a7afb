"""Fixtures of the experiments' tests."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of what the fake module was asked for."""
    file = tmp_path / "calls"
    file.touch()
    monkeypatch.setenv("FAKE_CALLS", str(file))
    return file
