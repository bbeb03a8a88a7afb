"""Reading files that `torch.save` wrote, without running anything that is in them."""

from __future__ import annotations

import argparse
import io
import pickle
import re
import struct
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from rsfast.files.seal import is_sealed, read_whole

__all__ = ["load_dict", "load_dict_from", "unwrapped_name"]

_NUMBERS = "?bhilqBHILQefd"  # numpy's letters of the types that hold numbers
_REFUSED = re.compile(r"GLOBAL ([\w.]+)")


def load_dict(path: str | Path) -> dict[str, Any]:
    """Reads a dict of tensors and plain values onto the CPU.

    Plain are Python's own values, numpy's numbers, argparse.Namespace, and paths.

    Raises:
        ValueError: if the file is missing, damaged, or holds anything else, which is named.
        OSError: if it cannot be read, which says nothing of what is in it.
    """
    path = Path(path)
    return load_dict_from(read_whole(path), path)


def load_dict_from(data: bytes, path: Path) -> dict[str, Any]:
    """As :func:`load_dict`, out of the bytes of the file at `path`."""
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"checkpoint {path} {_why_refused(data, error)}") from error
    except Exception as error:  # a damaged pickle can make a harmless function raise anything
        if not isinstance(error, _OF_DAMAGE):
            raise
        raise ValueError(f"checkpoint {path} is damaged: {_first_sentence(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"checkpoint {path} must hold a dict, got {type(content).__name__}")
    return content


def unwrapped_name(name: str) -> str:
    """A parameter's name without what DataParallel and torch.compile put into it."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


def _why_refused(data: bytes, error: pickle.UnpicklingError) -> str:
    """What a file that is no dict of plain values is."""
    found = _REFUSED.search(str(error))
    if found is None or is_sealed(data) is False:
        return "is damaged or not a checkpoint: it is no file of tensors and plain values"
    return (
        f"holds a {found[1]}, which is neither a tensor nor a plain value, and to read it could "
        f"run code: save the network's state_dict() alone with the program that wrote the file"
    )


def _first_sentence(error: Exception) -> str:
    """PyTorch appends paragraphs of advice on how to load files unsafely."""
    return (str(error) or type(error).__name__).splitlines()[0].split(". ")[0]


class _NumberType:
    """In place of numpy.dtype, which can also be of objects, and be changed by what a file says."""

    def __init__(self, text: str, *_: object) -> None:
        if np.dtype(text).char not in _NUMBERS:
            raise pickle.UnpicklingError(f"GLOBAL numpy.dtype of {text!r}")
        self.dtype = np.dtype(text)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


def _number(kind: _NumberType, data: bytes) -> Any:
    """In place of numpy's own scalar: a number of Python."""
    return np.frombuffer(data, kind.dtype, count=1)[0].item()


def _path(*parts: str) -> str:
    return str(PurePosixPath(*parts))


# What may be called while a file is read, under the names that files have for it.
_HARMLESS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    argparse.Namespace,
    (_NumberType, "numpy.dtype"),
    (_number, "numpy.core.multiarray.scalar"),
    (_number, "numpy._core.multiarray.scalar"),
    *(
        (_path, f"{module}.{system}Path")
        for module in ("pathlib", "pathlib._local")
        for system in ("Posix", "PurePosix", "Windows", "PureWindows")
    ),
]
_OF_DAMAGE = (
    AttributeError,
    EOFError,
    IndexError,
    KeyError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)
