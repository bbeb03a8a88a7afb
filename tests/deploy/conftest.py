"""Applies to the tests of deployment."""

from __future__ import annotations

import pytest

from deploy_helpers import Exported, export_small


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A small network and the folder that it was exported to. Read only."""
    pytest.importorskip("onnxruntime", reason="needs ONNX Runtime")
    pytest.importorskip("onnxscript", reason="needs the exporter's onnxscript")
    folder = tmp_path_factory.mktemp("exported")
    return Exported(folder, export_small(folder))
