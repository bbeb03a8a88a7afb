"""Small networks exported once for all tests of a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deploy_helpers import small_network
from rsfast.export.__main__ import main
from rsfast.training.checkpoint import save_weights


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a small network: tiny:network, five classes, 64, 48 and 32 pixels."""
    path = tmp_path_factory.mktemp("checkpoint") / "small.safetensors"
    model = small_network()
    save_weights(model, torch.ones(len(model.resolutions)), path)
    return path


@pytest.fixture(scope="session")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the command writes; tests that change it make a copy."""
    folder = tmp_path_factory.mktemp("exported") / "small"
    assert main([str(checkpoint), "--output", str(folder), "--arch", "tiny:network"]) == 0
    return folder
