"""Tar shards and Parquet files of the images of a folder."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from rsfast.data import index_folder

__all__ = ["Member", "archived", "samples_of", "write_parquet", "write_tar"]

Member = tuple[str, bytes]


def write_tar(file: Path, members: Iterable[Member], **options) -> Path:
    """A tar file of these members, in this order."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w", **options) as tar:
        for name, content in members:
            about = tarfile.TarInfo(name)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))
    return file


def samples_of(root: Path) -> list[Member]:
    """What a shard holds of the images of class folders: image and .cls of each."""
    index = index_folder(root)
    members = []
    for position, path in enumerate(index.paths):
        stem = path.rpartition(".")[0]
        members.append((path, index.read(position)))
        members.append((f"{stem}.cls", str(index.labels[position]).encode()))
    return members


def write_parquet(
    file: Path,
    images: Sequence[bytes | None],
    labels: Sequence[int | None],
    names: Sequence[str | None] | None = None,
    classes: Sequence[str] | None = None,
    **options,
) -> Path:
    """A Parquet file as Hugging Face writes them: image = struct{bytes, path}, label = int64.

    Args:
        file: to write.
        images, labels, names: of each row; without names the column holds bytes.
        classes: their names, for the schema's metadata.
        options: of pyarrow's writer.
    """
    import pyarrow
    from pyarrow import parquet

    file.parent.mkdir(parents=True, exist_ok=True)
    column = images
    if names is not None:
        column = [{"bytes": b, "path": n} for b, n in zip(images, names, strict=True)]
    table = pyarrow.table({"image": column, "label": pyarrow.array(labels, pyarrow.int64())})
    if classes is not None:
        features = {"image": {"_type": "Image"}, "label": {"names": [*classes]}}
        about = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": about})
    parquet.write_table(table, file, **options)
    return file


def archived(folder: Path, to: Path, form: str) -> Path:
    """The same images, in the same order, two archives per split; the path must be quoted."""
    for split in ("train", "val"):
        index = index_folder(folder / split)
        half = len(index) // 2
        for number, rows in enumerate((range(half), range(half, len(index)))):
            name = f"{split}-{number:05d}-of-00002"
            if form == "shards":
                members = samples_of(folder / split)[2 * rows.start : 2 * rows.stop]
                write_tar(to / split / f"{name}.tar", members)
                (to / split / "classes.txt").write_text("cat\ndog\neel\n")
                continue
            write_parquet(
                to / split / f"{name}.parquet",
                [index.read(row) for row in rows],
                index.labels[rows].tolist(),
                [index.paths[row] for row in rows],
                index.class_names,
                compression="none" if form == "parquet" else "gzip",
                row_group_size=2,
                write_statistics=False,  # which would hold two images as they are
            )
    return to
