"""The manifest of converted shards: what each holds, so that a missing one is noticed."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from rsfast.data.cache import cache_root, file_stat, load_arrays, save_arrays
from rsfast.data.damage import DamagedArchivesError
from rsfast.files.progress import progress

__all__ = ["MANIFEST", "changed_shards", "check_manifest", "load_manifest", "save_manifest"]

_LOG = logging.getLogger(__name__)
MANIFEST = "manifest.json"
_FORMAT = "rsfast-shards-1"


def load_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder of shards; None where there is none of ours.

    Raises:
        ValueError: if it is damaged.
    """
    file = folder / MANIFEST
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} must be the manifest of shards: {error}") from error
    ours = isinstance(content, dict) and content.get("format") == _FORMAT
    return content if ours else None


def save_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Writes it whole or not at all.

    Raises:
        OSError: if the folder cannot be written.
    """
    partial = folder / f".{MANIFEST}.partial"
    partial.write_text(json.dumps({"format": _FORMAT, **content}, indent=1) + "\n", "utf-8")
    os.replace(partial, folder / MANIFEST)


def check_manifest(folder: Path, files: Sequence[str]) -> None:
    """Refuses shards that are not those of the manifest beside them.

    A pattern may name a part of them: then only that is compared.

    Raises:
        ValueError: naming a shard that is missing, of another size, or not in the manifest.
    """
    manifest = load_manifest(folder)
    if manifest is None:
        return
    if not manifest["complete"]:
        raise ValueError(
            f"data folder {folder} holds a conversion that was interrupted: run it again"
        )
    listed = {shard["name"]: shard["bytes"] for shard in manifest["shards"]}
    wrong = {}
    for file in files:
        name, size = os.path.basename(file), os.path.getsize(file)
        if listed.get(name) != size:
            wanted = f"{listed[name]} bytes" if name in listed else "not in it"
            wrong[file] = (
                f"shard {file} must be as {folder / MANIFEST} says ({wanted}), got {size} bytes: "
                f"convert again, or remove the manifest"
            )
    if wrong:
        raise DamagedArchivesError(wrong)
    on_disk = {entry.name for entry in os.scandir(folder)}
    if missing := sorted(set(listed) - on_disk):
        raise ValueError(
            f"data folder {folder} must hold the {len(listed)} shards of its {MANIFEST}, found no "
            f"{missing[0]}"
        )


def changed_shards(folder: Path, files: Sequence[str], *, workers: int = 8) -> list[str]:
    """The shards whose content is not that which the manifest beside them names by its SHA-256.

    All of them are read, unless the cache folder knows the answer for the files as they are.

    Args:
        folder: of the manifest; without a whole one there is nothing to compare.
        files: absolute paths. One that cannot be read is not judged.
        workers: threads, each with a file at a time.

    Raises:
        ValueError: if the manifest is damaged.
    """
    manifest = load_manifest(folder)
    if manifest is None or not manifest["complete"]:
        return []
    wanted = {shard["name"]: shard["sha256"] for shard in manifest["shards"]}
    listed = [file for file in files if os.path.basename(file) in wanted]
    hashes = [wanted[os.path.basename(file)] for file in listed]
    key = hashlib.sha256(repr([listed, hashes, [file_stat(file) for file in listed]]).encode())
    kept = cache_root() / "hashes" / f"{key.hexdigest()[:32]}.npz"
    stored = load_arrays(kept, "same")
    if stored is not None and stored[0].shape == (len(listed),):
        same = stored[0].tolist()
    else:
        found = _hashes(listed, workers)
        same = [ours in (theirs, "") for ours, theirs in zip(found, hashes, strict=True)]
        if all(found):
            _keep(kept, same)
    return [file for file, is_same in zip(listed, same, strict=True) if not is_same]


def _hashes(files: Sequence[str], workers: int) -> list[str]:
    with ThreadPoolExecutor(workers) as pool:
        found = pool.map(_sha256, files)
        return list(progress(found, total=len(files), desc="comparing shards", unit="shard"))


def _sha256(file: str) -> str:
    """Of the content; nothing if the file cannot be read."""
    try:
        with open(file, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError:
        return ""


def _keep(file: Path, same: Sequence[bool]) -> None:
    try:
        save_arrays(file, same=np.array(same, dtype=bool))
    except OSError as error:  # a read-only home only costs the next check time
        _LOG.warning("comparison of the shards with their manifest not cached: %s", error)
