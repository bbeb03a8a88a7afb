"""Where generated and derived data are kept between runs, and the record of checked files."""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = [
    "Key",
    "Record",
    "cache_root",
    "exists",
    "file_stat",
    "has_record",
    "load_arrays",
    "load_bad",
    "load_excluded",
    "load_record",
    "pack",
    "record_digest",
    "save_arrays",
    "save_excluded",
    "save_record",
    "unpack",
    "writing",
]

_LOG = logging.getLogger(__name__)
_INT64_MAX = 2**63 - 1
Key = str | Path | tuple[str, ...]  # of a split: its folder, or its archives, absolute and sorted


def cache_root() -> Path:
    """`$RSFAST_CACHE`, else `$XDG_CACHE_HOME/rsfast`, else `~/.cache/rsfast`; may not exist.

    An empty variable counts as unset.

    Raises:
        ValueError: if there is no variable and nobody knows of a home folder.
    """
    if own := os.environ.get("RSFAST_CACHE"):
        return Path(own)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "rsfast"
    try:
        return Path.home() / ".cache" / "rsfast"
    except RuntimeError as error:
        raise ValueError(
            "RSFAST_CACHE must name a folder for generated and derived data: there is no HOME, and "
            "the system does not know this user"
        ) from error


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Says what to do where something in the block cannot be written into the cache.

    Raises:
        OSError: with that sentence, in place of the block's own.
    """
    try:
        yield
    except OSError as error:
        raise OSError(
            f"cache folder {folder} must be writable: {error}; set RSFAST_CACHE to one that is"
        ) from error


def exists(path: Path) -> bool:
    """Whether something of the cache is there; what may not be looked at is not."""
    try:
        return path.exists()
    except OSError:
        return False


def save_arrays(file: Path, **arrays: Any) -> None:
    """Writes a compressed archive, which appears under its name only once it is complete.

    Raises:
        OSError: if the cache folder cannot be written.
    """
    partial = file.with_name(f".{file.stem}.partial-{os.getpid()}-{secrets.token_hex(4)}.npz")
    with writing(cache_root()):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            np.savez_compressed(partial, **arrays)
            os.replace(partial, file)
        finally:
            partial.unlink(missing_ok=True)


def load_arrays(file: Path, *names: str) -> tuple[np.ndarray, ...] | None:
    """Some arrays of an archive; None if it is absent or damaged."""
    try:
        # np.load leaves a file it cannot read open when it is given the path.
        with open(file, "rb") as stream, np.load(stream, allow_pickle=False) as stored:
            return tuple(stored[name] for name in names)
    except Exception:  # zip, zlib and npy readers raise a dozen kinds on a damaged file
        return None


def file_stat(path: str | Path) -> tuple[int, int]:
    """Size in bytes and time of modification in ns; (-1, -1) if the system does not say."""
    try:
        stat = os.stat(path)
    except OSError:
        return -1, -1
    return stat.st_size, min(stat.st_mtime_ns, _INT64_MAX)  # a broken clock's year may be 2300


@dataclass(slots=True)
class Record:
    """What a check found out about the files of one split.

    Attributes:
        paths: n paths relative to the split's folder.
        stats: [n, 2] int64, `file_stat` of each just before it was looked at.
        sizes: [n, 2] int32 height and width in pixels; 0 where no decoder could tell.
        findings: path to (kind, reason), of the files about which there is something to say.
        rules: a name for what was looked for.
    """

    paths: list[str]
    stats: np.ndarray
    sizes: np.ndarray
    findings: dict[str, tuple[str, str]]
    rules: str = ""


def has_record(key: Key) -> bool:
    """Whether a split was ever checked."""
    return exists(_record_file(key))


def record_digest(key: Key) -> str:
    """Changes with what the checks of a split have found; empty if there was none."""
    try:
        return hashlib.sha256(_record_file(key).read_bytes()).hexdigest()
    except OSError:
        return ""


def load_record(key: Key) -> Record | None:
    """The record of a split; None if there is none, or a damaged one."""
    names = ("paths", "stats", "sizes", "found_paths", "found_kinds", "found_reasons")
    arrays = load_arrays(_record_file(key), *names)
    if arrays is None:
        return None
    stats, sizes = arrays[1:3]
    try:
        paths, found, kinds, reasons = (unpack(arrays[part]) for part in (0, 3, 4, 5))
        findings = dict(zip(found, zip(kinds, reasons, strict=True), strict=True))
    except ValueError:
        return None
    if not stats.shape == sizes.shape == (len(paths), 2) or not findings.keys() <= set(paths):
        return None
    rules = load_arrays(_record_file(key), "rules")  # absent in older records
    name = "" if rules is None else rules[0].tobytes().decode(errors="replace")
    return Record(paths, stats.astype(np.int64), sizes.astype(np.int32), findings, name)


def save_record(key: Key, record: Record) -> None:
    """Keeps the record of a split.

    Raises:
        OSError: if the cache folder cannot be written.
    """
    row_of = {path: row for row, path in enumerate(record.paths) if path in record.findings}
    save_arrays(
        _record_file(key),
        paths=pack(record.paths),
        rules=np.frombuffer(record.rules.encode(), dtype=np.uint8),
        stats=record.stats,
        sizes=record.sizes,
        # Repeated apart from the others, because every start of a training reads only these.
        found_paths=pack(record.findings),
        found_stats=record.stats[[row_of[path] for path in record.findings]],
        found_kinds=pack(kind for kind, _ in record.findings.values()),
        found_reasons=pack(reason for _, reason in record.findings.values()),
    )


def load_bad(key: Key) -> dict[str, tuple[int, int]]:
    """Paths of the bad files of the last check, and what `file_stat` said of each then."""
    file = _record_file(key)
    arrays = load_arrays(file, "found_paths", "found_stats", "found_kinds")
    try:
        if arrays is not None:
            parts = (unpack(arrays[0]), arrays[1].tolist(), unpack(arrays[2]))
            found = list(zip(*parts, strict=True))
            return {path: (size, time) for path, (size, time), kind in found if kind == "bad"}
    except (ValueError, TypeError):
        pass  # damaged in a way that only its contents show
    if exists(file):
        _LOG.warning(
            "record of the last check %s is damaged and not used: run the check again", file
        )
    return {}


def load_excluded(key: Key) -> list[str]:
    """Paths of the files of a split that are left out by hand, sorted."""
    file = _excluded_file(key)
    arrays = load_arrays(file, "paths")
    try:
        if arrays is not None:
            return unpack(arrays[0])
    except ValueError:
        pass
    if exists(file):
        _LOG.warning("list of excluded files %s is damaged and not used: exclude them again", file)
    return []


def save_excluded(key: Key, paths: Iterable[str]) -> None:
    """Keeps the paths of the files of a split that are left out by hand.

    Raises:
        OSError: if the cache folder cannot be written.
    """
    save_arrays(_excluded_file(key), paths=pack(sorted(paths)))


def _record_file(key: Key) -> Path:
    return cache_root() / "check" / f"{_name(key)}.npz"


def _excluded_file(key: Key) -> Path:
    return cache_root() / "check" / f"{_name(key)}-excluded.npz"


def _name(key: Key) -> str:
    """The same however the path of a folder is spelt, or the pattern that names archives."""
    if isinstance(key, tuple):
        folder = os.path.commonpath([os.path.dirname(file) for file in key])
        # Images go by their paths from the common folder; where those differ, so do the records.
        parts = [f"{os.path.realpath(file)}\0{os.path.relpath(file, folder)}" for file in key]
        text = "\0".join(parts)
    else:
        text = os.path.realpath(key)
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:32]


def pack(texts: Iterable[str]) -> np.ndarray:
    """Bytes of the texts, each with a zero behind it; numpy's own strings are as long as the
    longest one."""
    joined = "".join(text.replace("\0", "") + "\0" for text in texts)
    return np.frombuffer(joined.encode("utf-8", "surrogatepass"), dtype=np.uint8)


def unpack(packed: np.ndarray) -> list[str]:
    """The texts that `pack` was given.

    Raises:
        ValueError: if the bytes are no text.
    """
    return packed.tobytes().decode("utf-8", "surrogatepass").split("\0")[:-1]
