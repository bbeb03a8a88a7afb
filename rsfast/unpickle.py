"""Reading files that `torch.save` wrote, without running anything that is in them."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path
from typing import Any

import torch

__all__ = ["load_dict"]


def load_dict(path: str | Path) -> dict[str, Any]:
    """Reads a dict of tensors and plain Python values onto the CPU.

    Raises:
        ValueError: if the file is missing, damaged, or holds anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"checkpoint {path} does not exist")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"checkpoint {path} is damaged or not a checkpoint: {reason}") from error
    except (EOFError, OSError, RuntimeError, ValueError, KeyError, struct.error) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"checkpoint {path} is damaged: {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"checkpoint {path} must hold a dict, got {type(content).__name__}")
    return content
