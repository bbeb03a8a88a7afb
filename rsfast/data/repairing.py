"""Copies of cut-off images, decoded as far as they go.

A copy is lossless, so that all loaders show the same pixels of it, and a GPU's decoder never sees
the damaged file. What is missing is what Pillow leaves there: black, or grey within a block.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image, ImageFile

from rsfast.data.cache import cache_root, file_stat, load_record
from rsfast.data.index import check_command
from rsfast.files.pictures import as_rgb

__all__ = ["repair"]

_LOG = logging.getLogger(__name__)


def repair(root: Path, bad: Sequence[str]) -> dict[str, str]:
    """Path -> absolute path of the copy, of those bad files that are cut off and can be decoded.

    Only those count that the last check has found to be truncated. Copies lie in the cache folder,
    by path, size and modification time of the file, and are made once.

    Args:
        root: of the split.
        bad: paths relative to root, of files that are as the last check has found them.

    Raises:
        ValueError: if the split was never checked, or the cache folder cannot be written.
    """
    record = load_record(root)
    if record is None:
        raise ValueError(
            f"tolerate_truncated needs to know which images of {root} are cut off: "
            f"{check_command(root)}"
        )
    reasons = {path: record.findings.get(path, ("", ""))[1] for path in bad}
    copies = {}
    try:
        for path in (path for path in bad if "truncated" in reasons[path].lower()):
            if copy := _copy(root / path):
                copies[path] = str(copy)
    except OSError as error:
        raise ValueError(
            f"cache folder {cache_root()} must be writable for tolerate_truncated: {error}"
        ) from error
    if copies:
        _LOG.warning(
            "%d cut-off images in %s are used as far as they can be decoded", len(copies), root
        )
    return copies


def _copy(file: Path) -> Path | None:
    """The file's copy, made if it is not there; None if nothing can be decoded."""
    name = hashlib.sha256(os.fsencode(f"{os.path.realpath(file)}\0{file_stat(file)}"))
    copy = cache_root().absolute() / "repaired" / f"{name.hexdigest()[:32]}.png"
    if copy.exists():
        return copy
    try:
        with _tolerance(), Image.open(file) as image:
            exif = image.info.get("exif", b"")
            picture = as_rgb(image)
    except Exception:  # Pillow's decoders raise nearly anything on damaged content
        return None
    copy.parent.mkdir(parents=True, exist_ok=True)
    partial = copy.with_name(f".{copy.stem}.{os.getpid()}-{secrets.token_hex(4)}.png")
    try:
        picture.save(partial, compress_level=1, **({"exif": exif} if exif else {}))
        os.replace(partial, copy)
    finally:
        partial.unlink(missing_ok=True)
    return copy


@contextlib.contextmanager
def _tolerance() -> Iterator[None]:
    """Pillow's switch is one for the whole process, which must find it as it was."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before
