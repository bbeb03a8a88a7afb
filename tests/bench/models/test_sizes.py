"""The table of sizes in the documentation, and the files that it is of."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from bench.models.sizes import rows, size_of
from lq_helpers import quantised_network
from rsfast import checkpoint, create_model
from rsfast.models import RSNet

DOC = Path(__file__).parents[3] / "docs" / "deploy.md"


def test_the_documentation_has_the_computed_sizes() -> None:
    text = DOC.read_text()
    for row in rows():
        assert f"{row}\n" in text, "python -m bench.models.sizes prints the table"


def tensors_of(path: Path) -> int:
    return sum(tensor.nbytes for tensor in load_file(path).values())


def test_computed_sizes_are_those_of_files(tmp_path: Path) -> None:
    networks: list[tuple[RSNet, object]] = [
        (quantised_network(3, 2), checkpoint.save_packed),
        (create_model("resnet18", (32, 16), 3), checkpoint.save_weights),
    ]
    for model, write in networks:
        assert callable(write)
        write(model, torch.ones(2), tmp_path / "a.safetensors")
        whole = (tmp_path / "a.safetensors").stat().st_size
        assert size_of(model).total == tensors_of(tmp_path / "a.safetensors")
        assert whole - size_of(model).total < 30_000, "of the header"
