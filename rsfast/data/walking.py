"""The files in the class folders of a split: what is walked into, and what is passed over.

Each class visits a folder once, however many links lead to it, and never a folder in which it lies
itself. Hidden files and folders, and those that systems leave behind, are no part of a data set.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

__all__ = [
    "Folder",
    "Note",
    "Walk",
    "files_below",
    "is_folder",
    "is_hidden",
    "walk",
    "walk_below",
]

# Left behind by systems of files, of archives and of servers; compared in lower case.
_SYSTEM = {
    "#recycle",
    "#snapshot",
    "$recycle.bin",
    "@eadir",
    "@recycle",
    "__macosx",
    "desktop.ini",
    "lost+found",
    "system volume information",
    "thumbs.db",
}
_HIDDEN = "hidden, or left by a system: no part of the data set"
_Identity = tuple[int, int]  # device and inode


class Folder(NamedTuple):
    """A folder that was visited.

    Attributes:
        path: relative to the split's folder.
        files: names, sorted.
        mtime_ns: time of modification.
    """

    path: str
    files: list[str]
    mtime_ns: int


class Note(NamedTuple):
    """What is to be said of a file or folder: kind (of a finding of the check), path, reason."""

    kind: str
    path: str
    reason: str


@dataclass(slots=True)
class Walk:
    """What lies in a split.

    Attributes:
        class_names: sub-folder names, sorted.
        folders: that were visited, those of a class one after the other, each before its own.
        notes: on what was passed over ("unused"), and on folders of two classes ("odd").
    """

    class_names: tuple[str, ...] = ()
    folders: list[Folder] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is no part of a data set."""
    return name.startswith(".") or name.lower() in _SYSTEM


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder, or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def files_below(root: Path) -> list[str]:
    """Paths of the files in a folder and below, relative to it, sorted.

    Hidden ones are passed over, and each folder is visited once, however many links lead to it.

    Raises:
        ValueError: naming the folder that cannot be read.
    """
    files, visited = [], {_identity(os.stat(root))}

    def refuse(error: OSError) -> None:
        raise ValueError(f"folder {error.filename} must be readable: {error.strerror}") from error

    for folder, inner, names in os.walk(root, onerror=refuse, followlinks=True):
        kept = []
        for name in sorted(inner):
            identity = _identity(os.stat(os.path.join(folder, name)))
            if not is_hidden(name) and identity not in visited:
                visited.add(identity)
                kept.append(name)
        inner[:] = kept
        where = os.path.relpath(folder, root)
        files += [os.path.normpath(os.path.join(where, n)) for n in names if not is_hidden(n)]
    return sorted(files)


def walk(root: Path, extensions: Sequence[str]) -> Walk:
    """Visits the class folders of a split, with their sub-folders and what links lead to.

    A folder that lies in one class and is linked to from another counts for both.

    Args:
        root: the split's folder, absolute.
        extensions: of images, in lower case. Other hidden files are passed over without a note.

    Raises:
        OSError: if a folder cannot be read.
    """
    found = Walk()
    real = Path(os.path.realpath(root))
    above = {_identity(os.stat(folder)) for folder in (real, *real.parents)}
    names = []
    for name in sorted(entry.name for entry in os.scandir(root) if is_folder(entry)):
        if is_hidden(name):
            found.notes.append(Note("unused", name, _HIDDEN))
        elif _identity(os.stat(root / name)) in above:
            found.notes.append(Note("unused", name, "link to a folder in which it lies"))
        else:
            names.append(name)
    found.class_names = tuple(names)
    first_in: dict[_Identity, str] = {}
    for name in names:
        visited = _visit(root, name, above, extensions, found)
        for identity, path in visited.items():
            if identity in first_in:
                reason = f"folder of two classes: its images are those of {first_in[identity]}, too"
                found.notes.append(Note("odd", path, reason))
            else:
                first_in[identity] = path
    return found


def walk_below(root: Path, extensions: Sequence[str]) -> Walk:
    """Visits a folder and all below, as :func:`walk` does those of one class; it names no classes.

    Raises:
        OSError: if a folder cannot be read.
    """
    found = Walk()
    above = {_identity(os.stat(folder)) for folder in Path(os.path.realpath(root)).parents}
    _visit(root, "", above, extensions, found)
    return found


def _visit(
    root: Path, name: str, above: set[_Identity], extensions: Sequence[str], found: Walk
) -> dict[_Identity, str]:
    """Adds the folders of one class; which they are, and where each lies."""
    visited: dict[_Identity, str] = {}
    folders = []
    inner, linked = [name], list[str]()
    while inner or linked:
        # Links come last, so that a folder of the class goes by its own name.
        path = inner.pop() if inner else linked.pop(0)
        stat = os.stat(root / path)
        identity = _identity(stat)
        if identity in above or identity in visited:
            where = visited.get(identity)
            reason = f"link to {where}" if where else "link to a folder in which it lies"
            found.notes.append(Note("unused", path, f"{reason}, which is visited once"))
            continue
        visited[identity] = path
        files = []
        with os.scandir(root / path) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                inner_folder = is_folder(entry)
                inside = os.path.join(path, entry.name)
                if is_hidden(entry.name):
                    if inner_folder or entry.name.lower().endswith(tuple(extensions)):
                        found.notes.append(Note("unused", inside, _HIDDEN))
                elif not inner_folder:
                    files.append(entry.name)
                else:
                    (linked if entry.is_symlink() else inner).append(inside)
        folders.append(Folder(path, files, stat.st_mtime_ns))
    found.folders += sorted(folders, key=lambda folder: folder.path.split(os.sep))
    return visited


def _identity(stat: os.stat_result) -> _Identity:
    return stat.st_dev, stat.st_ino
