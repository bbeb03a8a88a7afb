"""The manifest of converted shards: what each holds, so that a missing one is noticed."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["MANIFEST", "check_manifest", "load_manifest", "save_manifest"]

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
    for file in files:
        name, size = os.path.basename(file), os.path.getsize(file)
        if listed.get(name) != size:
            wanted = f"{listed[name]} bytes" if name in listed else "not in it"
            raise ValueError(
                f"shard {file} must be as {folder / MANIFEST} says ({wanted}), got {size} bytes: "
                f"convert again, or remove the manifest"
            )
    on_disk = {entry.name for entry in os.scandir(folder)}
    if missing := sorted(set(listed) - on_disk):
        raise ValueError(
            f"data folder {folder} must hold the {len(listed)} shards of its {MANIFEST}, found no "
            f"{missing[0]}"
        )
