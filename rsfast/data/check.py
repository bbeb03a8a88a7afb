"""Decodes every image of a data set once, before a training run stumbles over a broken one.

What it finds out is recorded in the cache folder per split. `index_folder` leaves the bad images
out, and the next check looks only at files that are new or have changed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import io
import itertools
import logging
import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rsfast.data import cache, comparing
from rsfast.data.damage import DamagedArchivesError
from rsfast.data.dataset import Members, list_members, open_archive
from rsfast.data.folder import Listing, list_split, listing_of, save_sizes
from rsfast.data.index import Archive
from rsfast.data.judging import UNREAD, judge_content, judge_image, judge_other
from rsfast.data.manifest import MANIFEST, changed_shards
from rsfast.data.pairs import list_images
from rsfast.data.splits import Split
from rsfast.data.val_list import flat_images
from rsfast.files.progress import progress

__all__ = ["KINDS", "Finding", "Report", "check_split"]

_LOG = logging.getLogger(__name__)
# bad: left out of the index; odd: used all the same; unused: no part of the data set as it is;
# excluded: left out by hand.
KINDS = ("bad", "odd", "unused", "excluded")
_CHUNK = 32  # files per message to a worker
_BLOCK = 1024  # messages under way at once; many more may deadlock (CPython issue 105829)
_RULES = "2"  # raise it when judges look for more, so that a next check looks at every file again
_WITH_DALI = " and DALI"
_NEW = -2  # in place of the size of a file that no check has seen


class Finding(NamedTuple):
    """Something to say about a file or class folder; the path is relative to the split."""

    kind: str
    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class Report:
    """What a check of one split has found.

    Attributes:
        findings: about files and class folders, in the order of KINDS, then of the listing.
        images: files that are images by name.
        decoded: those of them that had to be decoded.
        seconds: that decoding took.
        is_good: there is no bad file and no class folder without an image to use.
    """

    findings: list[Finding]
    images: int
    decoded: int
    seconds: float
    is_good: bool


class _Verdict(NamedTuple):
    """What a worker says of one file; kind and reason are empty where all is well."""

    stat: tuple[int, int]
    size: tuple[int, int]
    kind: str
    reason: str


class _Task(NamedTuple):
    """What workers inherit when they are forked."""

    root: str
    paths: Sequence[str]
    known: np.ndarray  # [n, 2] int64, `file_stat` of each file when it was looked at last
    images: int  # so many of the first paths are images by name
    members: Members | None = None  # where they lie in archives
    archive: Archive | None = None


def check_split(source: str | Path | Split, *, workers: int | None = None) -> Report:
    """Decodes the images of one split that are new or have changed since the last check.

    The findings go into the record in the cache folder, and the sizes of the images into the
    index. A check that is interrupted keeps what it has found out.

    Args:
        source: a folder with one sub-folder per class, or a split with archives.
        workers: processes; None for one per CPU this process may use.

    Raises:
        ValueError: if the folder does not exist or has no class folders, or workers is below 1.
        DamagedArchivesError: naming all archives that cannot be used.
    """
    if workers is None:
        workers = len(os.sched_getaffinity(0))
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    members, changed = None, list[Finding]()
    if isinstance(source, Split) and source.files:
        members, changed = _members(source, workers)
    if members is not None:
        listing = Listing(
            members.split.place, members.class_names, list(members.paths), [], digest=""
        )
    elif isinstance(source, Split) and source.masks:
        listing = list_images(source.root)
    elif isinstance(source, Split) and source.is_flat:
        listing = listing_of(source.root, flat_images(source.root), (source.name,))
    else:
        listing = list_split(source.root if isinstance(source, Split) else source)
    key = listing.root if members is None else members.split.key
    record = _known(listing, key)
    task = _Task(
        str(listing.root),
        record.paths,
        _trusted(record),
        len(listing.paths),
        members,
        None if members is None else open_archive(members, advise=False),
    )
    start, decoded = time.perf_counter(), 0
    try:
        with (
            contextlib.closing(_examine_all(task, workers)) as verdicts,
            progress(total=task.images, desc=f"checking {listing.root.name}", unit="img") as bar,
        ):
            for row, verdict in enumerate(verdicts):
                bar.update(row < task.images)
                if verdict is not None:
                    decoded += row < task.images
                    _put_down(record, row, verdict)
    finally:
        _save(key, record)
    seconds = time.perf_counter() - start
    if members is None:
        save_sizes(listing, record.sizes[: task.images])
        classes = [path.split(os.sep, 1)[0] for path in listing.paths]
        if len(listing.class_names) == 1:  # of a folder without class folders, or with one
            classes = [*listing.class_names] * len(classes)
    else:
        classes = [members.class_names[label] for label in members.contents.labels.tolist()]
    excluded = set(cache.load_excluded(key))
    report = _report(listing, classes, record, excluded, decoded, seconds)
    if not changed:
        return report
    return dataclasses.replace(report, findings=[*changed, *report.findings], is_good=False)


def _members(split: Split, workers: int) -> tuple[Members, list[Finding]]:
    """What the archives hold, and which of them are not what their manifest says."""
    changed = changed_shards(split.root, split.files, workers=workers)
    said = f"its SHA-256 is not that in {split.root / MANIFEST}: get it anew, or convert again"
    try:
        members = list_members(split, thorough=True)
    except DamagedArchivesError as error:
        others = {file: f"shard {file} is damaged: {said}" for file in changed}
        raise DamagedArchivesError({**others, **error.reasons}) from error
    return members, [Finding("bad", os.path.relpath(file, split.root), said) for file in changed]


def _known(listing: Listing, key: cache.Key) -> cache.Record:
    """A record of the listed files, with what the last check found out about each."""
    paths = [*listing.paths, *listing.others]
    stats = np.full((len(paths), 2), _NEW, dtype=np.int64)
    sizes = np.zeros((len(paths), 2), dtype=np.int32)
    rules = _RULES + (_WITH_DALI if comparing.is_available() else "")
    old = cache.load_record(key)
    if old is None or old.rules not in (rules, _RULES + _WITH_DALI):
        return cache.Record(paths, stats, sizes, {}, rules)
    row_of = {path: row for row, path in enumerate(old.paths)}
    findings = {}
    for row, path in enumerate(paths):
        if (old_row := row_of.get(path)) is None:
            continue
        stats[row], sizes[row] = old.stats[old_row], old.sizes[old_row]
        if path in old.findings:
            findings[path] = old.findings[path]
    return cache.Record(paths, stats, sizes, findings, rules)


def _trusted(record: cache.Record) -> np.ndarray:
    """[n, 2] the stats by which a file is known; not those of files that could not be read."""
    known = record.stats.copy()
    for row, path in enumerate(record.paths) if record.findings else ():
        if path in record.findings and record.findings[path][1].startswith(UNREAD):
            known[row] = _NEW
    return known


def _put_down(record: cache.Record, row: int, verdict: _Verdict) -> None:
    record.stats[row], record.sizes[row] = verdict.stat, verdict.size
    record.findings.pop(record.paths[row], None)
    if verdict.kind:
        record.findings[record.paths[row]] = (verdict.kind, verdict.reason)


def _save(key: cache.Key, record: cache.Record) -> None:
    """Keeps the part of a record that some check has come to."""
    seen = record.stats[:, 0] != _NEW
    paths = [path for path, was in zip(record.paths, seen, strict=True) if was]
    part = cache.Record(
        paths, record.stats[seen], record.sizes[seen], record.findings, record.rules
    )
    try:
        cache.save_record(key, part)
    except OSError as error:
        _LOG.warning("record of the check not kept, bad images will not be left out: %s", error)


def _report(
    listing: Listing,
    classes: Sequence[str],
    record: cache.Record,
    excluded: set[str],
    decoded: int,
    seconds: float,
) -> Report:
    findings = []
    usable = dict.fromkeys(listing.class_names, 0)
    for path, name in zip(listing.paths, classes, strict=True):
        kind, reason = record.findings.get(path, ("", ""))
        if path in excluded:
            kind, reason = "excluded", f"by hand; {kind}: {reason}" if kind else "by hand"
        if kind not in ("bad", "excluded"):
            usable[name] += 1
        if kind:
            findings.append(Finding(kind, path, reason))
    for path in listing.others:
        if path in record.findings:
            findings.append(Finding(record.findings[path][0], path, record.findings[path][1]))
    empty = [name for name, count in usable.items() if not count]
    findings += (Finding(*note) for note in listing.notes)
    findings += (Finding("unused", name, "class folder without an image to use") for name in empty)
    findings.sort(key=lambda finding: KINDS.index(finding.kind))
    is_good = not empty and not any(finding.kind == "bad" for finding in findings)
    return Report(findings, len(listing.paths), decoded, seconds, is_good)


# Of a worker process, which is forked: paths and stats of a million files need not be sent to it.
_task: _Task


def _start_worker(task: _Task) -> None:
    global _task
    _task = task
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends the pool


def _pool(task: _Task, workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("fork"),
        initializer=_start_worker,
        initargs=(task,),
    )


def _examine_all(task: _Task, workers: int) -> Generator[_Verdict | None]:
    """A verdict on each file in order; None for one that is as it was."""
    count = len(task.paths)
    chunks = [range(first, min(first + _CHUNK, count)) for first in range(0, count, _CHUNK)]
    # What workers inherit, perhaps of threads that they do not have, is not theirs to clean up.
    gc.freeze()
    try:
        yield from _examine_chunks(task, workers, chunks)
    finally:
        gc.unfreeze()


def _examine_chunks(
    task: _Task, workers: int, chunks: Sequence[range]
) -> Generator[_Verdict | None]:
    done = 0
    while done < len(chunks):
        pool = _pool(task, min(workers, len(chunks) - done))
        try:
            blocks = (chunks[first : first + _BLOCK] for first in range(done, len(chunks), _BLOCK))
            for verdicts in itertools.chain.from_iterable(pool.map(_examine, b) for b in blocks):
                done += 1
                yield from verdicts
        except BrokenProcessPool:
            # A decoder has crashed, on a file of this chunk or of one that was under way with it.
            for row in chunks[done]:
                yield _examine_alone(task, row)
            done += 1
        finally:
            pool.shutdown(cancel_futures=True)


def _examine_alone(task: _Task, row: int) -> _Verdict | None:
    """Takes a file that kills its process for a bad one."""
    with _pool(task, 1) as pool:
        try:
            (verdict,) = pool.submit(_examine, range(row, row + 1)).result()
        except BrokenProcessPool:
            now = _stat(task, row)
            return _Verdict(now, (0, 0), "bad", "crashes its decoder, or needs too much memory")
    return verdict


def _examine(rows: range) -> list[_Verdict | None]:
    verdicts: list[_Verdict | None] = []
    for row in rows:
        now = _stat(_task, row)  # before it is read: a change while it is must not be missed
        if now == tuple(_task.known[row].tolist()):
            verdicts.append(None)
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the verdict says it
            verdicts.append(_Verdict(now, *_judge(_task, row)))
    return verdicts


def _stat(task: _Task, row: int) -> tuple[int, int]:
    """By which a file is known; of an image in an archive, that of the archive."""
    if task.members is not None:
        return task.members.stat(row)
    return cache.file_stat(os.path.join(task.root, task.paths[row]))


def _judge(task: _Task, row: int) -> tuple[tuple[int, int], str, str]:
    path = os.path.join(task.root, task.paths[row])
    if task.archive is None:
        return judge_image(path) if row < task.images else judge_other(path)
    try:
        content = task.archive.read(row)
    except OSError as error:
        return (0, 0), "bad", f"{UNREAD}: {error.strerror or error}"
    if not content:
        return (0, 0), "bad", "empty file"
    return judge_content(path, io.BytesIO(content))
