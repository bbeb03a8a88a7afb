"""Where generated and derived data are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_root"]


def cache_root() -> Path:
    """`$RSFAST_CACHE`, else `$XDG_CACHE_HOME/rsfast`, else `~/.cache/rsfast`; may not exist."""
    if "RSFAST_CACHE" in os.environ:
        return Path(os.environ["RSFAST_CACHE"])
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "rsfast"
