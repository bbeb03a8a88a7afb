"""Images in Parquet files, as Hugging Face stores them. The only import of pyarrow.

A file has a column `image`, of bytes or of a struct with the field `bytes`, and an integer column
`label`. Where the bytes of an image lie in the file as they are (pages that are not compressed),
they are found while the file is indexed, and read with one seek. Otherwise a whole row group is
read and decompressed for any image of it.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from rsfast.data.archive import (
    Contents,
    OffsetArchive,
    check_unchanged,
    header_size,
    load_contents,
    save_contents,
    stats_of,
)
from rsfast.data.damage import DamagedArchivesError
from rsfast.data.index import printable
from rsfast.files.progress import progress
from rsfast.runtime.distributed import is_first

try:
    import pyarrow as arrow
    import pyarrow.parquet as parquet
except ImportError as error:
    raise ImportError(
        "Parquet files need pyarrow: pip install -e '.[parquet]' in the clone (or pip install "
        "pyarrow)"
    ) from error

__all__ = ["RowGroupArchive", "index_parquet", "open_parquet"]

_LOG = logging.getLogger(__name__)
_MOST_OPEN = 16  # files per process; each keeps its footer
_PROBES = 8  # images of a row group that are not found as they are before the others are not sought
_GROUPS_KEPT = 4  # row groups per process, of some 10 MB each where Hugging Face wrote them


def open_parquet(contents: Contents, *, advise: bool = True) -> OffsetArchive | RowGroupArchive:
    """The reader of indexed files.

    Args:
        contents: of the files.
        advise: have rank 0 warn if whole row groups are read, and say what to do about it.
    """
    groups = contents.offsets < 0
    if not groups.any():
        return OffsetArchive(contents)
    if not (advise and is_first()):
        return RowGroupArchive(contents)
    others = len(contents.files) - 1
    _LOG.warning(
        "%d of %d images in %s are compressed by Parquet, and each read in "
        "random order costs a whole row group; python -m rsfast.data convert to shards makes it "
        "one seek",
        int(groups.sum()),
        len(groups),
        contents.files[0] + (f" and {others} more files" if others else ""),
    )
    return RowGroupArchive(contents)


def index_parquet(
    files: Sequence[str],
    *,
    cache: bool = True,
    name: str = "Parquet files",
    thorough: bool = False,
) -> Contents:
    """Lists the images of Parquet files: reads all of them once, and verifies each offset.

    Args:
        files: absolute paths, in the order that the images shall have.
        cache: keep what was found, and use it again while no file changes.
        name: what the progress bar says is indexed.
        thorough: look at all files before a damaged one is an error.

    Raises:
        ValueError: naming the file and what is wrong with it: it is damaged, has no columns `image`
            and `label`, or an image or label is missing. If thorough, it is a
            DamagedArchivesError, which names all such files.
    """
    stats = stats_of(files)
    if cache and (known := load_contents(files, stats)) is not None:
        return known
    columns: dict[str, list] = {
        name: [] for name in ("file_of", "names", "offsets", "lengths", "places", "labels", "sizes")
    }
    class_names: tuple[str, ...] | None = None
    damaged: dict[str, str] = {}
    bar = progress(files, desc=f"indexing {name}", unit="file", disable=len(files) < 9)
    for number, path in enumerate(bar):
        try:
            with _opened(path) as file:
                names = _class_names(file.schema_arrow)
                if class_names not in (None, names):
                    raise ValueError(f"Parquet file {path} must have the class names of {files[0]}")
                class_names = names
                for row in _rows(file, path):
                    columns["file_of"].append(number)
                    for name, value in row.items():
                        columns[name].append(value)
        except ValueError as error:
            if not thorough:
                raise
            damaged[path] = str(error)
    if damaged:
        raise DamagedArchivesError(damaged)
    contents = Contents(
        files=tuple(files),
        stats=stats,
        file_of=np.array(columns["file_of"], dtype=np.int32),
        names=tuple(columns["names"]),
        offsets=np.array(columns["offsets"], dtype=np.int64),
        lengths=np.array(columns["lengths"], dtype=np.int64),
        places=np.array(columns["places"], dtype=np.int32).reshape(-1, 2),
        labels=np.array(columns["labels"], dtype=np.int64),
        sizes=np.array(columns["sizes"], dtype=np.int32).reshape(-1, 2),
        class_names=class_names or (),
    )
    if cache:
        save_contents(contents)
    return contents


def _opened(path: str) -> parquet.ParquetFile:
    try:
        file = parquet.ParquetFile(path, memory_map=False, pre_buffer=False)
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(f"Parquet file {path} is cut off or damaged: {_line(error)}") from error
    try:
        _check_columns(file.schema_arrow, path)
    except ValueError:
        file.close()
        raise
    return file


def _check_columns(schema: arrow.Schema, path: str) -> None:
    kinds = {name: schema.field(name).type for name in schema.names}
    image = kinds.get("image")
    if image is not None and arrow.types.is_struct(image):
        image = {part.name: part.type for part in image}.get("bytes")
    if image is None or not _is_bytes(image):
        raise ValueError(
            f"Parquet file {path} must have a column image, of bytes or of a struct with bytes, "
            f"got the columns {', '.join(schema.names)}"
        )
    if "label" not in kinds or not arrow.types.is_integer(kinds["label"]):
        raise ValueError(
            f"Parquet file {path} must have a column label of whole numbers, "
            f"got {kinds.get('label', 'none')}"
        )


def _is_bytes(kind: arrow.DataType) -> bool:
    return arrow.types.is_binary(kind) or arrow.types.is_large_binary(kind)


def _class_names(schema: arrow.Schema) -> tuple[str, ...]:
    """Those that Hugging Face keeps in the schema; empty where there are none."""
    try:
        about = json.loads((schema.metadata or {})[b"huggingface"])
        return tuple(map(str, about["info"]["features"]["label"]["names"]))
    except (KeyError, TypeError, ValueError):
        return ()


def _rows(file: parquet.ParquetFile, path: str) -> Iterator[dict[str, Any]]:
    """What `Contents` holds of each image of one file."""
    seen: set[str] = set()
    for group in range(file.metadata.num_row_groups):
        try:
            table = file.read_row_group(group, columns=["image", "label"], use_threads=False)
        except (arrow.ArrowException, OSError) as error:
            raise ValueError(
                f"Parquet file {path} is damaged in row group {group}: {_line(error)}"
            ) from error
        values, stored = _values(table)
        labels = table.column("label").to_pylist()
        start, chunk = _column_chunk(file, path, group)
        at = misses = 0
        for row, (value, name, label) in enumerate(zip(values, stored, labels, strict=True)):
            where = f"row {row} of row group {group} of Parquet file {path}"
            if value is None:
                raise ValueError(f"{where} must hold an image, got null")
            if label is None or label < 0:
                raise ValueError(f"{where} must have a class number from 0, got {label}")
            # Compressed pages may hold images as they are; a group that starts otherwise does not.
            place = -1 if misses >= _PROBES else _find(chunk, value, at)
            misses += place < 0
            at = at if place < 0 else place + len(value)
            yield {
                # Parquet needs no names: two images may have the same, or none.
                "names": _name(name, group, row, seen),
                "offsets": -1 if place < 0 else start + place,
                "lengths": len(value),
                "places": (group, row),
                "labels": label,
                "sizes": header_size(value),
            }


def _values(table: arrow.Table) -> tuple[list[bytes | None], list[str | None]]:
    """Bytes and stored names of a row group's images."""
    column = table.column("image")
    if not arrow.types.is_struct(column.type):
        return column.to_pylist(), [None] * len(column)
    rows = column.to_pylist()
    values = [None if row is None else row["bytes"] for row in rows]
    return values, [None if row is None else row.get("path") for row in rows]


def _name(stored: str | None, group: int, row: int, seen: set[str]) -> str:
    base = printable(os.path.basename(stored or ""))
    number = f"{group:05d}-{row:05d}"
    name = base if base and base not in seen else f"{number}-{base}" if base else f"{number}.jpg"
    seen.add(name)
    return name


def _column_chunk(file: parquet.ParquetFile, path: str, group: int) -> tuple[int, bytes]:
    """Where the pages of a row group's images start in the file, and their bytes."""
    about = file.metadata.row_group(group)
    for number in range(about.num_columns):
        column = about.column(number)
        if column.path_in_schema in ("image", "image.bytes"):
            start = column.data_page_offset
            if column.has_dictionary_page and column.dictionary_page_offset:
                start = min(start, column.dictionary_page_offset)
            with open(path, "rb") as raw:
                raw.seek(start)
                return start, raw.read(column.total_compressed_size)
    return 0, b""


def _find(chunk: bytes, value: bytes, start: int) -> int:
    """Where a value lies in its pages; -1 if it does not. Values follow one another."""
    if not value:
        return -1
    place = chunk.find(value, start)
    return place if place >= 0 or not start else chunk.find(value, 0, start)


def _line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


class _OpenGroups:
    """What one process has open of Parquet files: files, and the row groups read last."""

    def __init__(self, contents: Contents) -> None:
        self.process = os.getpid()
        self._contents = contents
        self._files: OrderedDict[int, parquet.ParquetFile] = OrderedDict()
        self._groups: OrderedDict[tuple[int, int], arrow.ChunkedArray] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, number: int, group: int) -> arrow.ChunkedArray:
        """The images of a row group. One thread at a time reads, which others may then share."""
        with self._lock:
            rows = self._groups.pop((number, group), None)
            if rows is None:
                try:
                    file = self._file(number)
                    rows = file.read_row_group(group, columns=["image"], use_threads=False)["image"]
                except (OSError, arrow.ArrowException):
                    self._drop(number)
                    raise
            self._groups[number, group] = rows
            if len(self._groups) > _GROUPS_KEPT:
                self._groups.popitem(last=False)
            return rows

    def _file(self, number: int) -> parquet.ParquetFile:
        path = self._contents.files[number]
        check_unchanged(path, os.stat(path), self._contents.stats[number])
        file = self._files.pop(number, None)
        if file is None:
            file = parquet.ParquetFile(path, memory_map=False, pre_buffer=False)
        self._files[number] = file
        if len(self._files) > _MOST_OPEN:
            self._files.popitem(last=False)[1].close()
        return file

    def _drop(self, number: int) -> None:
        """Has a file opened anew when it is wanted next: a handle that is stale remains so."""
        file = self._files.pop(number, None)
        for key in [key for key in self._groups if key[0] == number]:
            del self._groups[key]
        if file is not None:
            file.close()


class RowGroupArchive:
    """Images of Parquet files; those that are compressed are read with their whole row group.

    It may be read from several threads, and be inherited by forked processes or pickled.

    Args:
        contents: what to read.
    """

    def __init__(self, contents: Contents) -> None:
        self._contents = contents
        self._plain = OffsetArchive(contents)
        self._open: _OpenGroups | None = None

    def __getstate__(self) -> Contents:
        return self._contents

    def __setstate__(self, contents: Contents) -> None:
        self.__init__(contents)  # type: ignore[misc]

    def read(self, row: int) -> bytes:
        """An image as it was encoded.

        Raises:
            OSError: if its file cannot be read, or has changed since it was indexed.
        """
        contents = self._contents
        if contents.offsets[row] >= 0:
            return self._plain.read(row)
        files = self._open
        if files is None or files.process != os.getpid():
            files = self._open = _OpenGroups(contents)
        group, place = contents.places[row].tolist()
        number = int(contents.file_of[row])
        try:
            value = files.get(number, group)[place]
        except arrow.ArrowException as error:
            raise OSError(f"{contents.files[number]} is damaged: {_line(error)}") from error
        image = value.as_py()
        return image["bytes"] if isinstance(image, dict) else image

    def head(self, row: int, most: int) -> bytes:
        """At most so many of its first bytes, with the same errors."""
        if self._contents.offsets[row] >= 0:
            return self._plain.head(row, most)
        return self.read(row)[:most]
