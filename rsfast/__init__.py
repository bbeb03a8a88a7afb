"""rsfast: train one image classifier that switches its input resolution at run time.

The public names load on first use, so that `import rsfast` is quick and never starts CUDA.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_SOURCES = {
    "Pyramid": "rsfast.pyramid",
    "RSNet": "rsfast.models",
    "convert": "rsfast.models",
    "create_model": "rsfast.models",
    "load_pretrained": "rsfast.models",
}
_MODULES = (
    "checkpoint",
    "data",
    "deploy",
    "engine",
    "kernels",
    "losses",
    "models",
    "optim",
    "pyramid",
)

__all__ = ["Pyramid", "RSNet", "convert", "create_model", "load_pretrained", *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _SOURCES:
        return getattr(importlib.import_module(_SOURCES[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"rsfast.{name}")
    raise AttributeError(f"module 'rsfast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
