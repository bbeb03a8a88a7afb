"""Where generated and derived data are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_root"]


def cache_root() -> Path:
    """`$RSFAST_CACHE`, else `$XDG_CACHE_HOME/rsfast`, else `~/.cache/rsfast`; may not exist.

    An empty variable counts as unset.
    """
    if own := os.environ.get("RSFAST_CACHE"):
        return Path(own)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "rsfast"
    return Path.home() / ".cache" / "rsfast"
