"""Checkpoints under their public name; :mod:`rsfast.training.checkpoint` is the implementation."""

from rsfast.training.checkpoint import load_model, load_state, save, save_weights
from rsfast.training.packed import save_packed

__all__ = ["load_model", "load_state", "save", "save_packed", "save_weights"]
