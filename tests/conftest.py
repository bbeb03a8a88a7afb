"""Applies to every test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="session")
def _cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Indexes and generated images go to a temporary folder, never to the user's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RSFAST_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
