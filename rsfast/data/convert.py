"""`python -m rsfast.data convert`: the same images, to shards or to class folders.

An image is copied byte by byte, never encoded again. Every file appears under its own name only
once it is whole and was read back, so that an interrupted conversion goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsfast.data.dataset import list_members
from rsfast.data.folder import EXTENSIONS, list_split
from rsfast.data.index import printable
from rsfast.data.manifest import load_manifest, save_manifest
from rsfast.data.source import Source, check_flat, open_source
from rsfast.data.splits import find_splits, split_at
from rsfast.data.walking import is_hidden
from rsfast.files.progress import progress

__all__ = ["FORMS", "Converted", "convert", "parse_size"]

FORMS = ("shards", "folder")
SHARD_BYTES = 256 * 2**20
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Converted:
    """What became of one split.

    Attributes:
        folder: that it was written to.
        images: that it has.
        written: files that were written; the others were there already.
        files: shards, or images where they are files of their own.
        same_order: the index of the result has the images in the order of the source, so the same
            seed trains on the same batches.
        left_out: images of the source that are excluded by hand, and so are not in the result.
        unreadable: paths of those that cannot be opened, and so are not either.
    """

    folder: Path
    images: int
    written: int
    files: int
    same_order: bool
    left_out: int
    unreadable: Sequence[str] = ()


def parse_size(text: str) -> int:
    """Bytes of "256MB", "1GiB" or "1000000"; prefixes are powers of 1024.

    Raises:
        ValueError: if the text is something else.
    """
    match = _SIZE.fullmatch(text.strip())
    if not match or not float(match[1]):
        raise ValueError(f"--shard-size must look like 256MB, got {text[:40]!r}")
    return int(float(match[1]) * 1024 ** "_kmgt".index(match[2].lower() or "_"))


def convert(
    source: str | Path,
    target: str | Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    images_per_shard: int | None = None,
    to: str | None = None,
    val_list: str | Path | None = None,
) -> list[Converted]:
    """Writes the splits of a data set in another form.

    Args:
        source: folder of the data set, or a pattern of archives of one split.
        target: folder to write to; gets train/ and val/, or the one split. It may hold what an
            interrupted conversion has written.
        shard_bytes: of images that a shard holds at most, unless one image is larger.
        images_per_shard: end a shard after so many images instead.
        to: "shards" or "folder"; None for what is not the source: tar shards become a folder, class
            folders and Parquet files become shards.
        val_list: labels of validation images that lie in one folder, as
            :func:`rsfast.data.open_split` takes them.

    Raises:
        ValueError: naming what is wrong with the source or the target.
        OSError: if a file cannot be written.
    """
    target = Path(target).absolute()
    if images_per_shard is not None and images_per_shard < 1:
        raise ValueError(f"--images-per-shard must be at least 1, got {images_per_shard}")
    splits = find_splits(source)
    if os.path.realpath(source) in map(os.path.realpath, (target, *target.parents)):
        raise ValueError(f"DST must be a folder apart from SRC, got {target}")
    check_flat(splits, val_list)
    alone = len(splits) == 1 and splits[0].name not in ("train", "val", "validation")
    planned = []  # all splits are looked at before the first byte is written
    for split in splits:
        folder = target if alone else target / ("train" if split.name == "train" else "val")
        if folder == split.root or folder in split.root.parents or split.root in folder.parents:
            raise ValueError(f"DST must be a folder apart from SRC, got {target}")
        from_tar = bool(split.files) and split.files[0].endswith(".tar")
        form = to or ("folder" if from_tar else "shards")
        planned.append((open_source(split, val_list), folder, form))
    done = []
    for found, folder, form in planned:
        if form == "folder":
            done.append(_to_folder(found, folder))
        else:
            done.append(_to_shards(found, folder, shard_bytes, images_per_shard))
    return done


def _to_shards(
    source: Source, folder: Path, shard_bytes: int, images_per_shard: int | None
) -> Converted:
    """Shards in the order of the index, beside classes.txt and a manifest."""
    settings = _about(source)
    settings["shard_bytes"] = None if images_per_shard else shard_bytes
    settings["images_per_shard"] = images_per_shard
    known = {shard["name"]: shard for shard in _prepare(folder, settings)}
    (folder / "classes.txt").write_text("".join(f"{n}\n" for n in source.class_names), "utf-8")
    prefix = source.name if source.name.isalnum() else "shard"
    names = _keys(source)
    shards: list[dict[str, Any]] = []
    at = written = 0
    with progress(total=len(source.paths), desc=f"writing {source.name}", unit="img") as bar:
        while at < len(source.paths):
            file = folder / f"{prefix}-{len(shards):05d}.tar"
            shard = known.get(file.name)
            if shard is None or not _is_whole(file, shard):
                shard = _write_shard(source, names, at, file, shard_bytes, images_per_shard)
                written += 1
                known[file.name] = shard
                _note(folder, settings, known, complete=False)
            shards.append(shard)
            bar.update(shard["images"])
            at += shard["images"]
    _note(folder, settings, known, complete=True)
    same_order = _keeps_order(source, folder, names)
    return Converted(
        folder, at, written, len(shards), same_order, source.left_out, source.unreadable
    )


def _about(source: Source) -> dict[str, Any]:
    """By which a conversion is known to be the same one."""
    digest = hashlib.sha256(os.fsencode("\0".join(source.paths)))
    digest.update(source.labels.tobytes() + source.stats.tobytes())
    return {
        "images": len(source.paths),
        "classes": list(source.class_names),
        "source": digest.hexdigest()[:32],
    }


def _prepare(folder: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Makes the folder; returns the shards that an interrupted conversion has written.

    Raises:
        ValueError: if the folder holds anything else.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"DST must be a folder that can be written: {error}") from error
    old = load_manifest(folder)
    if old is not None and {name: old.get(name) for name in settings} != settings:
        raise ValueError(
            f"DST {folder} must be empty or hold a part of the same conversion, got one of other "
            f"images or settings"
        )
    if old is None and (others := [e.name for e in os.scandir(folder) if not is_hidden(e.name)]):
        raise ValueError(f"DST {folder} must be empty, got a folder with {sorted(others)[0]}")
    shards = [] if old is None else old["shards"]
    save_manifest(folder, {**settings, "complete": False, "shards": shards})
    return shards


def _note(
    folder: Path, settings: dict[str, Any], shards: dict[str, dict[str, Any]], complete: bool
) -> None:
    listed = [shards[name] for name in sorted(shards)]
    save_manifest(folder, {**settings, "complete": complete, "shards": listed})


def _keys(source: Source) -> list[str]:
    """Names of the members: class and name of the image, without dots but the last."""
    names = []
    seen: set[str] = set()
    for path, label in zip(source.paths, source.labels.tolist(), strict=True):
        within = os.path.basename(path)
        if source.archive is None and os.sep in path:  # sub-folders of a class stay part of the key
            within = path.split(os.sep, 1)[1].replace(os.sep, "/")
        stem, extension = _parts(within)
        folder, _, base = stem.rpartition("/")
        base = base.replace(".", "_") or "_"
        stem = "/".join(filter(None, (_safe(source.class_names[label]), folder, base)))
        names.append(_apart(stem, seen) + extension.lower())
    return names


def _parts(name: str) -> tuple[str, str]:
    """A name without its extension, and one by which an index knows images."""
    stem, extension = os.path.splitext(name)
    return (stem, extension) if extension.lower() in EXTENSIONS else (name, ".jpg")


def _apart(stem: str, seen: set[str]) -> str:
    """The text, with a number behind it if there is one like it."""
    name, number = stem, 1
    while name in seen:
        number += 1
        name = f"{stem}__{number}"
    seen.add(name)
    return name


def _safe(name: str) -> str:
    """A class's name as one part of a path."""
    return printable(name).replace("/", "_").strip(". ") or "_"


def _write_shard(
    source: Source,
    names: Sequence[str],
    first: int,
    file: Path,
    shard_bytes: int,
    images_per_shard: int | None,
) -> dict[str, Any]:
    """One shard, under a hidden name until it was read back; returns its line of the manifest."""
    partial = file.with_name(f".{file.name}.partial")
    digests: list[str] = []
    filled = 0
    try:
        with tarfile.open(partial, "w", format=tarfile.PAX_FORMAT) as tar:
            for row in range(first, len(names)):
                content = source.read(row)
                full = filled + len(content) > shard_bytes and filled
                if len(digests) >= images_per_shard if images_per_shard else full:
                    break
                filled += len(content)
                stem, _ = os.path.splitext(names[row])
                _add(tar, names[row], content)
                _add(tar, f"{stem}.cls", str(source.labels[row]).encode())
                digests.append(hashlib.sha256(content).hexdigest())
        _verify(partial, names[first : first + len(digests)], digests)
        digest, size = _sha256(partial), partial.stat().st_size
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
    return {"name": file.name, "images": len(digests), "bytes": size, "sha256": digest}


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)  # owner and time stay 0: the same images make the same shard
    tar.addfile(member, io.BytesIO(content))


def _verify(file: Path, names: Sequence[str], digests: Sequence[str]) -> None:
    """Reads a shard back and compares every image."""
    expected = dict(zip(names, digests, strict=True))
    with tarfile.open(file, "r:") as tar:
        for member in tar:
            if member.name in expected:
                stream = tar.extractfile(member)
                assert stream is not None
                if hashlib.sha256(stream.read()).hexdigest() != expected.pop(member.name):
                    raise OSError(f"{member.name} in {file} was not read back as it was written")
    if expected:
        raise OSError(f"{len(expected)} images of {file} were not read back")


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _is_whole(file: Path, shard: dict[str, Any]) -> bool:
    """Whether a shard is what the manifest says."""
    is_there = file.is_file() and file.stat().st_size == shard["bytes"]
    return is_there and _sha256(file) == shard["sha256"]


def _to_folder(source: Source, folder: Path) -> Converted:
    """An image per file in the folder of its class, beside a manifest."""
    safe = [_safe(name) for name in source.class_names]
    width = len(str(len(safe) - 1))
    if sorted(safe) != safe or len({*safe}) != len(safe):
        # The order of class folders is that of their names: numbers keep it.
        safe = [f"{number:0{width}d}_{name}" for number, name in enumerate(safe)]
    written = 0
    targets = []
    seen: set[str] = set()
    for path, label in zip(source.paths, source.labels.tolist(), strict=True):
        stem, extension = _parts(os.path.basename(path))
        targets.append(_apart(f"{safe[label]}/{stem}", seen) + extension)
    settings = _about(source)
    _prepare(folder, settings)
    for name in safe:
        (folder / name).mkdir(exist_ok=True)
    digest = hashlib.sha256()  # of all images, one behind the other
    for row in progress(range(len(targets)), desc=f"writing {source.name}", unit="img"):
        content = source.read(row)
        digest.update(content)
        written += _write_image(content, folder / targets[row])
    save_manifest(
        folder, {**settings, "complete": True, "shards": [], "sha256": digest.hexdigest()}
    )
    count, same_order = len(targets), _keeps_order(source, folder, targets)
    return Converted(folder, count, written, count, same_order, source.left_out, source.unreadable)


def _write_image(content: bytes, file: Path) -> bool:
    """Whether a file had to be written; it is read back before it gets its name."""
    if file.is_file() and file.stat().st_size == len(content) and file.read_bytes() == content:
        return False
    partial = file.with_name(f".{file.name}.partial")
    partial.write_bytes(content)
    if partial.read_bytes() != content:
        raise OSError(f"{file} was not read back as it was written")
    os.replace(partial, file)
    return True


def _keeps_order(source: Source, folder: Path, names: Sequence[str]) -> bool:
    """Whether the index of the result has the images in the order of the source."""
    split = split_at(folder)
    if split.files:
        return list_members(split).contents.names == tuple(names)
    return list_split(folder).paths == list(names)
