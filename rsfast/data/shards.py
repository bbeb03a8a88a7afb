"""WebDataset's shards: tar files whose members are images, and labels beside them.

A sample is all members of one key, which is a member's name up to the first dot of its last part;
what is behind that dot is the field. Of each sample the image (`jpg`, `jpeg`, `png`, `webp` or
`bmp`) and its label are used: a number in `cls`, or `label` in `json`.
"""

from __future__ import annotations

import json
import logging
import os
import posixpath
import shlex
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from rsfast.data.archive import (
    Contents,
    header_size_at,
    load_contents,
    save_contents,
    stats_of,
)
from rsfast.data.damage import DamagedArchivesError
from rsfast.data.folder import EXTENSIONS
from rsfast.data.index import printable
from rsfast.files.progress import progress

__all__ = ["index_shards", "label_number"]

_LOG = logging.getLogger(__name__)
_IMAGE_FIELDS = tuple(extension[1:] for extension in EXTENSIONS)
# How files begin that were compressed, the program that undoes it, and the ending it asks for.
_COMPRESSED = {
    b"\x1f\x8b": ("gunzip", ".gz"),
    b"BZh": ("bunzip2", ".bz2"),
    b"\xfd7zXZ": ("unxz", ".xz"),
    b"\x28\xb5\x2f\xfd": ("unzstd --rm", ".zst"),
}
_LARGEST_LABEL = 1_000_000


class _Member(NamedTuple):
    name: str
    offset: int
    length: int


@dataclass(slots=True)
class _Sample:
    """What a shard holds of one key: the image, and texts of its other fields."""

    image: _Member | None = None
    fields: dict[str, bytes] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)


class _Row(NamedTuple):
    """One image of a shard."""

    member: _Member
    label: int
    size: tuple[int, int]
    class_name: str


def index_shards(
    files: Sequence[str],
    *,
    workers: int = 8,
    cache: bool = True,
    name: str = "shards",
    thorough: bool = False,
) -> Contents:
    """Lists the images of tar files, and reads the header of each.

    Args:
        files: absolute paths, in the order that the images shall have.
        workers: threads, each with a file at a time.
        cache: keep what was found, and use it again while no file changes.
        name: what the progress bar says is indexed.
        thorough: look at all files before a damaged one is an error.

    Raises:
        ValueError: naming the file and what is wrong with it: it is cut off, damaged or compressed,
            has two members of the same name, or an image without a label. If thorough, it is a
            DamagedArchivesError, which names all such files.
    """
    stats = stats_of(files)
    if cache and (known := load_contents(files, stats)) is not None:
        return known
    damaged: dict[str, str] = {}

    def index_one(path: str) -> list[_Row]:
        try:
            return _index_shard(path)
        except ValueError as error:
            if not thorough:
                raise
            damaged[path] = str(error)
            return []

    with ThreadPoolExecutor(workers) as pool:
        shards = list(
            progress(
                pool.map(index_one, files),
                total=len(files),
                desc=f"indexing {name}",
                unit="shard",
                disable=len(files) < 20,
            )
        )
    if damaged:
        raise DamagedArchivesError({path: damaged[path] for path in files if path in damaged})
    rows = [row for shard in shards for row in shard]
    count = len(rows)
    contents = Contents(
        files=tuple(files),
        stats=stats,
        file_of=np.repeat(np.arange(len(files), dtype=np.int32), [len(shard) for shard in shards]),
        names=tuple(row.member.name for row in rows),
        offsets=np.array([row.member.offset for row in rows], dtype=np.int64),
        lengths=np.array([row.member.length for row in rows], dtype=np.int64),
        places=np.zeros((count, 2), dtype=np.int32),
        labels=np.array([row.label for row in rows], dtype=np.int64),
        sizes=np.array([row.size for row in rows], dtype=np.int32).reshape(-1, 2),
        class_names=_class_names(rows),
    )
    if cache:
        save_contents(contents)
    return contents


def label_number(text: str, where: str) -> int:
    """A label as a number from 0.

    Raises:
        ValueError: naming the place, if the text is none.
    """
    text = text.strip()
    if not (text.isascii() and text.isdecimal() and int(text) <= _LARGEST_LABEL):
        raise ValueError(f"{where} must be a class number from 0, got {text[:40]!r}")
    return int(text)


def _index_shard(path: str) -> list[_Row]:
    try:
        with open(path, "rb") as file:
            _refuse_compressed(file, path)
            samples = _samples(file, path)
            rows = []
            for key, sample in samples.items():
                if sample.image is None:
                    _say_unused(path, key, sample)
                    continue
                label, class_name = _label(path, sample)
                size = header_size_at(file.fileno(), path, *sample.image[1:])
                rows.append(_Row(sample.image, label, size, class_name))
            return rows
    except OSError as error:
        raise ValueError(f"shard {path} must be readable: {error.strerror or error}") from error


def _refuse_compressed(file: BinaryIO, path: str) -> None:
    start = file.read(6)
    for magic, (program, ending) in _COMPRESSED.items():
        if start.startswith(magic):
            name, packed = shlex.quote(path), shlex.quote(path + ending)
            raise ValueError(
                f"shard {path} must be a plain tar file, in which any image is one seek, got a "
                f"compressed one; unpack it: mv {name} {packed} && {program} {packed}"
            )
    file.seek(0)


def _samples(file: BinaryIO, path: str) -> dict[str, _Sample]:
    """Key -> sample, in the order of the first member of each."""
    samples: dict[str, _Sample] = {}
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.isfile():
                    _add(samples, tar, member, path)
                elif not member.isdir():
                    raise ValueError(
                        f"shard {path} must hold plain files only, got the link or device "
                        f"{printable(member.name)}"
                    )
            end = tar.offset
    except tarfile.TarError as error:
        raise ValueError(f"shard {path} is cut off or damaged ({error}): get it anew") from error
    # The library takes the first header that it cannot read for the end of the file.
    file.seek(end)
    block = file.read(tarfile.BLOCKSIZE)
    if block != bytes(tarfile.BLOCKSIZE):
        state = "damaged" if len(block) == tarfile.BLOCKSIZE else "cut off"
        raise ValueError(
            f"shard {path} is {state} at byte {end} of {os.path.getsize(path)}, behind "
            f"{len(samples)} samples: get it anew"
        )
    return samples


def _add(
    samples: dict[str, _Sample], tar: tarfile.TarFile, member: tarfile.TarInfo, path: str
) -> None:
    folder, base = posixpath.split(member.name)
    if base.startswith("."):  # what some systems add, as ._cat.jpg
        return
    stem, _, kind = base.partition(".")
    kind = kind.lower()
    sample = samples.setdefault(posixpath.join(folder, stem), _Sample())
    if kind in sample.fields or kind in sample.others:
        _refuse_second(path, member.name)
    if kind in _IMAGE_FIELDS:
        if sample.image is not None:
            _refuse_second(path, member.name)
        if member.issparse():
            raise ValueError(
                f"shard {path} must hold plain files only, got the sparse {member.name}"
            )
        sample.image = _Member(member.name, member.offset_data, member.size)
    elif kind in ("cls", "json"):
        stream = tar.extractfile(member)
        assert stream is not None
        sample.fields[kind] = stream.read()
    else:
        sample.others.append(kind)


def _refuse_second(path: str, name: str) -> None:
    raise ValueError(
        f"shard {path} must have one image and one label per key, got another one: "
        f"{printable(name)}"
    )


def _say_unused(path: str, key: str, sample: _Sample) -> None:
    """A sample without an image; one whose name holds a dot too many is an error."""
    for kind in sample.others:
        if kind.endswith(EXTENSIONS):
            name = printable(f"{key}.{kind}")
            raise ValueError(
                f"shard {path} must have no dot in a key: WebDataset splits {name} at its first "
                f"dot, into the key {printable(key)!r} and the field {kind!r}; rename the member"
            )
    _LOG.warning("shard %s has no image of the key %s", path, printable(key))


def _label(path: str, sample: _Sample) -> tuple[int, str]:
    """Number and name of the class; the name is empty where the shard does not say."""
    assert sample.image is not None
    where = f"the label of {printable(sample.image.name)} in shard {path}"
    numbers = []
    if (text := sample.fields.get("cls")) is not None:
        numbers.append(label_number(text.decode("ascii", "replace"), where))
    about = _parsed(sample.fields.get("json"), where)
    if "label" in about:
        numbers.append(label_number(str(about["label"]), where))
    if not numbers:
        raise ValueError(f"{where} must lie beside it, as .cls or in .json, found none")
    if numbers[0] != numbers[-1]:
        raise ValueError(f"{where} must be the same in .cls and .json, got {numbers}")
    return numbers[0], _class_name(about)


def _parsed(text: bytes | None, where: str) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        about = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} must be JSON in the .json beside it: {error}") from error
    return about if isinstance(about, dict) else {}


def _class_name(about: dict[str, Any]) -> str:
    """By the name of its class, or the folder that the image came from."""
    name = about.get("class_name") or posixpath.dirname(str(about.get("filename", "")))
    return posixpath.basename(str(name))


def _class_names(rows: Sequence[_Row]) -> tuple[str, ...]:
    """In the order of the labels; nothing unless every label has one name of its own."""
    name_of: dict[int, str] = {}
    for row in rows:
        if name_of.setdefault(row.label, row.class_name) != row.class_name:
            return ()
    names = tuple(name_of[label] for label in sorted(name_of))
    whole = sorted(name_of) == list(range(len(names)))
    return names if whole and all(names) and len({*names}) == len(names) else ()
