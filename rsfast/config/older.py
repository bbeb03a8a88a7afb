"""Settings that an older rsfast did not write, and what it did without them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rsfast.models.registry import check_task

__all__ = ["completed"]

# Where today's default is something else.
_YOUNGER: dict[str, Any] = {"ema_warmup": False}


def completed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a run, with those that are younger than it as it was trained.

    A run without averaged weights was trained as with any `ema_warmup`, so as with the default.
    """
    younger = _YOUNGER if settings.get("ema_decay") else {}
    if "arch" in settings:
        younger = {"task": check_task(settings["arch"]), **younger}
    return {**younger, **settings}
