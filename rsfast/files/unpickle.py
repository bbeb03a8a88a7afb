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
        reason = "is a folder: name a file in it" if Path(path).is_dir() else "does not exist"
        raise ValueError(f"checkpoint {path} {reason}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"checkpoint {path} is damaged or not a checkpoint: it is no file of tensors and plain "
            f"values"
        ) from error
    except (EOFError, OSError, RuntimeError, ValueError, KeyError, struct.error) as error:
        raise ValueError(f"checkpoint {path} is damaged: {_first_sentence(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"checkpoint {path} must hold a dict, got {type(content).__name__}")
    return content


def _first_sentence(error: Exception) -> str:
    """PyTorch appends paragraphs of advice on how to load files unsafely."""
    return (str(error) or type(error).__name__).splitlines()[0].split(". ")[0]
