"""The same photographs as class folders, tar shards and Parquet files."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np

from rsfast.data import index_folder
from rsfast.data.archive import Contents, save_contents, stats_of
from rsfast.data.convert import convert

__all__ = ["make_forms", "make_large_index", "unpack"]

_ROWS_PER_GROUP = 100  # as Hugging Face writes images
_SHARDS = 1024
_SHARD_BYTES = 140 * 2**20
_CLASSES = 1000


def unpack(archive: Path, folder: Path, copies: int) -> Path:
    """The photographs of a zip file in class folders, so many copies of each.

    Args:
        archive: whose files are called wnid_word.JPEG, one of each class.
        folder: to fill; gets train/ and val/.
        copies: of each photograph, so that they are more than caches keep.
    """
    with zipfile.ZipFile(archive) as stored:
        for name in stored.namelist():
            if not name.lower().endswith((".jpeg", ".jpg")):
                continue
            content = stored.read(name)
            stem = Path(name).stem.partition("_")[0]
            for split, count in (("train", copies), ("val", 1)):
                (folder / split / stem).mkdir(parents=True, exist_ok=True)
                for number in range(count):
                    (folder / split / stem / f"{stem}_{number}.JPEG").write_bytes(content)
    return folder


def make_forms(folder: Path, place: Path) -> dict[str, Path]:
    """Form -> a data set that has the training images in that form, in the same order."""
    convert(folder, place / "shards", shard_bytes=64 * 2**20)
    forms = {"folder": folder, "shards": place / "shards"}
    for name, compression in (("parquet", "none"), ("parquet-snappy", "snappy")):
        _write_parquet(folder, place / name, compression)
        forms[name] = place / name
    return forms


def _write_parquet(folder: Path, to: Path, compression: str) -> None:
    import pyarrow
    from pyarrow import parquet

    index = index_folder(folder / "train")
    (to / "train").mkdir(parents=True)
    (to / "train" / "classes.txt").write_text("\n".join(index.class_names) + "\n")
    schema = pyarrow.schema(
        {
            "image": pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()}),
            "label": pyarrow.int64(),
        }
    )
    file = to / "train" / "train-00000-of-00001.parquet"
    with parquet.ParquetWriter(file, schema, compression=compression) as writer:
        for start in range(0, len(index), _ROWS_PER_GROUP):
            rows = range(start, min(start + _ROWS_PER_GROUP, len(index)))
            images = [{"bytes": index.read(row), "path": index.paths[row]} for row in rows]
            columns = {"image": images, "label": index.labels[rows.start : rows.stop].tolist()}
            writer.write_table(pyarrow.table(columns, schema=schema))


def make_large_index(folder: Path, entries: int) -> Path:
    """A data set of shards without content, with an index of so many images in the cache.

    The names are as long as ImageNet's, and the shards as many as in timm's copy of it.
    """
    train = folder / "train"
    train.mkdir(parents=True)
    files = [str(train / f"imagenet1k-train-{number:04d}.tar") for number in range(_SHARDS)]
    for file in files:
        with open(file, "wb") as stream:
            os.truncate(stream.fileno(), _SHARD_BYTES)
    rng = np.random.default_rng(0)
    labels = np.arange(entries) % _CLASSES
    sizes = rng.integers(200, 600, (entries, 2)).astype(np.int32)
    lengths = rng.integers(50_000, 170_000, entries)
    contents = Contents(
        files=tuple(files),
        stats=stats_of(files),
        file_of=(np.arange(entries) * _SHARDS // entries).astype(np.int32),
        names=tuple(f"n{label:08d}_{n}.jpg" for n, label in enumerate(labels.tolist())),
        offsets=np.cumsum(lengths),
        lengths=lengths,
        places=np.zeros((entries, 2), dtype=np.int32),
        labels=labels,
        sizes=sizes,
        class_names=tuple(map(str, range(_CLASSES))),
    )
    save_contents(contents)
    return folder
