"""What importing rsfast does and does not do."""

from __future__ import annotations

import subprocess
import sys


def test_import_is_quick_needs_no_extras_and_does_not_start_cuda() -> None:
    code = """
import sys
import rsfast
import rsfast.data.__main__
assert "torch" not in sys.modules, "torch is loaded before it is needed"
import rsfast.models, rsfast.losses, rsfast.engine, rsfast.data, rsfast.optim, rsfast.checkpoint
import rsfast.kernels, rsfast.train, rsfast.evaluate
import torch
assert not torch.cuda.is_initialized()
for module in sys.modules:
    assert not module.startswith(("nvidia.dali", "apex")), module
assert rsfast.create_model is rsfast.models.create_model
assert set(rsfast.__all__) <= set(dir(rsfast))
for name in rsfast.__all__:
    getattr(rsfast, name)
try:
    rsfast.nothing
except AttributeError as error:
    assert "nothing" in str(error)
else:
    raise AssertionError("an unknown name must not resolve")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
