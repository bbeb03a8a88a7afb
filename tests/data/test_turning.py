"""EXIF's orientation: read alike by both loaders, and honoured only where that is asked for."""

from __future__ import annotations

import builtins
import errno
import io
import os
import shlex
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from archives import samples_of, write_tar
from helpers import encoded, smooth_image
from rsfast.data import Loader, index_folder, open_split, reading, train_loader, val_loader
from rsfast.data.__main__ import main
from rsfast.data.archive import OffsetArchive
from rsfast.data.convert import convert
from rsfast.data.index import decode
from rsfast.data.turning import turned
from rsfast.files.orientation import orientation, upright

PICTURE = smooth_image(60, 90, np.random.default_rng(3))
RESOLUTIONS = (48, 32)
FORMATS = {"JPEG": {"quality": 95}, "PNG": {}, "WEBP": {"quality": 95}}
SUFFIX = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


def exif_of(value: int, order: str = "<", kind: int = 3, prefix: bytes = b"Exif\0\0") -> bytes:
    """EXIF with nothing but an orientation, of TIFF's type SHORT, or another."""
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", 8)
    stored = {1: "Bxxx", 3: "Hxx", 4: "I"}[kind]
    entry = struct.pack(f"{order}HHI", 0x0112, kind, 1) + struct.pack(order + stored, value)
    return prefix + head + struct.pack(f"{order}H", 1) + entry + bytes(4)


def png_with(exif: bytes, behind: bool) -> bytes:
    """With a chunk before the pixels or behind them."""
    plain = encoded(PICTURE, "PNG")
    checksum = struct.pack(">I", zlib.crc32(b"eXIf" + exif))
    chunk = struct.pack(">I", len(exif)) + b"eXIf" + exif + checksum
    at = len(plain) - 12 if behind else plain.index(b"IDAT") - 4
    return plain[:at] + chunk + plain[at:]


def jpeg_with(*segments: bytes) -> bytes:
    plain = encoded(PICTURE, "JPEG", quality=95)
    parts = (b"\xff\xe1" + struct.pack(">H", len(s) + 2) + s for s in segments)
    return plain[:2] + b"".join(parts) + plain[2:]


XMP = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta><r tiff:Orientation="6"/></x:xmpmeta>'
TIFF = exif_of(6, prefix=b"")
# What files that few programs write say, and how it is taken.
ODD: dict[str, tuple[bytes, int]] = {
    "jpeg_big_endian": (jpeg_with(exif_of(6, ">")), 6),
    "jpeg_long": (jpeg_with(exif_of(6, "<", 4)), 6),
    "jpeg_big_endian_long": (jpeg_with(exif_of(6, ">", 4)), 1),
    "jpeg_byte": (jpeg_with(exif_of(6, "<", 1)), 6),
    "jpeg_big_endian_byte": (jpeg_with(exif_of(6, ">", 1)), 1),
    "jpeg_0": (jpeg_with(exif_of(0)), 1),
    "jpeg_9": (jpeg_with(exif_of(9)), 1),
    "jpeg_65": (jpeg_with(exif_of(65)), 1),
    "jpeg_cut_off": (jpeg_with(exif_of(6)[:-12]), 1),
    "jpeg_junk": (jpeg_with(b"Exif\0\0xxxxxxxxxxxx"), 1),
    "jpeg_empty": (jpeg_with(b"Exif\0\0"), 1),
    "jpeg_twice": (jpeg_with(exif_of(6), exif_of(6)), 6),
    "jpeg_xmp": (jpeg_with(XMP), 1),
    "jpeg_xmp_and_exif": (jpeg_with(XMP, exif_of(6)), 6),
    "png_before": (png_with(TIFF, behind=False), 6),
    "png_behind": (png_with(TIFF, behind=True), 6),
    "png_with_prefix": (png_with(exif_of(6), behind=False), 1),
    "grey_jpeg": (encoded(PICTURE.convert("L"), "JPEG", exif=exif_of(6)), 6),
    "cmyk_jpeg": (encoded(PICTURE.convert("CMYK"), "JPEG", exif=exif_of(6)), 6),
    "palette_png": (encoded(PICTURE.quantize(64), "PNG", exif=exif_of(8)), 8),
    "bmp": (encoded(PICTURE, "BMP"), 1),
}


def write(root: Path, files: dict[str, bytes]) -> Path:
    for split in ("train", "val"):
        folder = root / split / "only"
        folder.mkdir(parents=True)
        for name, content in files.items():
            (folder / name).write_bytes(content)
    return root


@pytest.fixture(scope="module")
def all_ways(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture under each of the eight orientations, in every format that knows them."""
    files = {
        f"{kind}_{way}.{SUFFIX[kind]}": encoded(PICTURE, kind, exif=exif_of(way), **options)
        for kind, options in FORMATS.items()
        for way in range(1, 9)
    }
    return write(tmp_path_factory.mktemp("ways"), files)


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    suffix = {name: "jpg" if "jpeg" in name else name.split("_")[-1] for name in ODD}
    suffix |= {name: "png" for name in ODD if "png" in name}
    files = {f"{name}.{suffix[name]}": content for name, (content, _) in ODD.items()}
    return write(tmp_path_factory.mktemp("odd"), files)


def validation(root: Path, backend: str, **arguments) -> Loader:
    arguments = {"exif": "honour", "crop": "none", **arguments}
    return val_loader(
        root, RESOLUTIONS, 8, backend=backend, normalize="none", workers=0, **arguments
    )


def rows_of(loader: Loader) -> torch.Tensor:
    return (255 * torch.cat([batch.images.rows for batch in loader])).round()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("way", range(1, 9))
def test_a_picture_is_turned_as_pillow_turns_it(kind: str, way: int) -> None:
    stream = io.BytesIO(encoded(PICTURE, kind, exif=exif_of(way), **FORMATS[kind]))
    with Image.open(stream) as image:
        assert orientation(image) == way
        expected = ImageOps.exif_transpose(image)
        found = upright(image)
        assert np.array_equal(np.asarray(found), np.asarray(expected))
        assert upright(found) is found  # not a second time


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
@pytest.mark.parametrize("name", ODD)
def test_odd_exif_is_read_by_one_rule(name: str) -> None:
    content, expected = ODD[name]
    with Image.open(io.BytesIO(content)) as image:
        assert orientation(image) == expected
        image.load()
        assert orientation(image) == expected


def test_sizes_are_turned_and_the_digest_tells(all_ways: Path) -> None:
    index = index_folder(all_ways / "val")
    honoured = turned(index)
    for path, stored, shown in zip(index.paths, index.sizes, honoured.sizes, strict=True):
        way = int(path.rpartition("_")[2][0])
        assert stored.tolist() == [60, 90]
        assert shown.tolist() == ([90, 60] if way >= 5 else [60, 90])
    assert honoured.digest != index.digest
    assert honoured.take(np.arange(3)).exif == "honour"


def test_orientations_are_read_once_until_the_folder_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = encoded(PICTURE, "JPEG", exif=exif_of(6))
    root = write(tmp_path, {"a.jpg": content, "b.jpg": content}) / "val"
    read: list[int] = []
    real = orientation
    monkeypatch.setattr("rsfast.data.turning.orientation", lambda i: read.append(1) or real(i))
    for _ in range(2):
        assert turned(index_folder(root)).sizes.tolist() == [[90, 60]] * 2
    assert len(read) == 2
    (root / "only" / "c.jpg").write_bytes(encoded(PICTURE, "JPEG"))
    assert turned(index_folder(root)).sizes.tolist() == [[90, 60], [90, 60], [60, 90]]
    assert len(read) == 5


def test_a_check_finds_an_orientation_that_was_written_in_place(tmp_path: Path) -> None:
    root = write(tmp_path, {"a.jpg": encoded(PICTURE, "JPEG", exif=exif_of(6))})
    assert len(list(validation(root, "pil"))) == 1
    (root / "val" / "only" / "a.jpg").write_bytes(encoded(PICTURE, "JPEG", exif=exif_of(1)))
    with pytest.raises(RuntimeError, match="has changed since .*; run the check") as caught:
        list(validation(root, "pil"))
    command = shlex.split(str(caught.value).rpartition(": ")[2])
    assert main(command[3:]) == 0
    assert len(list(validation(root, "pil"))) == 1


@pytest.mark.parametrize("archived", [False, True], ids=["folder", "shards"])
def test_what_cannot_be_read_for_a_moment_is_waited_for_and_is_no_orientation(
    archived: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write(tmp_path / "set", {"a.jpg": encoded(PICTURE, "JPEG", exif=exif_of(6))}) / "val"
    if archived:
        root = convert(root, tmp_path / "shards")[0].folder
    index = open_split(root.parent, "val")
    monkeypatch.setattr(reading, "_PAUSES_S", (0.0, 0.0))
    failures: list[int] = []
    real = builtins.open, os.pread

    def failing(number: int):
        def read(*arguments, **options):
            if (number or str(arguments[0]).endswith("a.jpg")) and len(failures) < failing.most:
                failures.append(1)
                raise OSError(errno.EIO, "Input/output error")
            return real[number](*arguments, **options)

        return read

    monkeypatch.setattr(builtins, "open", failing(0))
    monkeypatch.setattr(os, "pread", failing(1))
    failing.most = 3
    with pytest.raises(RuntimeError, match=r"cannot read .*a\.jpg: Input/output error, 3 times"):
        turned(index)
    failures.clear()
    failing.most = 2
    assert turned(index).sizes.tolist() == [[90, 60]]
    assert len(failures) == 2


def test_of_jpeg_images_in_archives_the_beginning_is_enough(
    all_ways: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = convert(all_ways / "val", tmp_path / "shards")[0].folder
    long = jpeg_with(*[b"Exif2" + bytes(60_000)] * 2, exif_of(8))  # EXIF far behind the beginning
    stored = [*samples_of(all_ways / "val"), ("only/z.jpg", long), ("only/z.cls", b"0")]
    write_tar(next(root.glob("*.tar")), stored)
    (root / "manifest.json").unlink()
    index = open_split(root.parent, "val")
    whole: list[str] = []
    real = OffsetArchive.read
    monkeypatch.setattr(
        OffsetArchive, "read", lambda self, row: whole.append(index.paths[row]) or real(self, row)
    )
    sizes = turned(index).sizes
    for path, size in zip(index.paths, sizes.tolist(), strict=True):
        lies = path.endswith("z.jpg") or int(path.rpartition("_")[2][0]) >= 5
        assert size == ([90, 60] if lies else [60, 90]), path
    assert all(path.endswith(("z.jpg", ".png", ".webp")) for path in whole)
    assert any(path.endswith("z.jpg") for path in whole)


def test_all_files_of_a_picture_show_the_same_when_they_are_turned_back(
    backend: str, all_ways: Path
) -> None:
    """Of each format: the picture as it is stored, turned by the loader and compared."""
    loader = validation(all_ways, backend)
    images = torch.cat([batch.images.level(0) for batch in loader])
    index = loader.plan.index
    for position, path in enumerate(index.paths):
        way = int(path.rpartition("_")[2][0])
        with Image.open(index.path(position)) as image:
            shown = ImageOps.exif_transpose(image).convert("RGB")
        assert (shown.size == (60, 90)) == (way >= 5)
        expected = shown.resize((48, 48), Image.Resampling.BILINEAR)
        found = 255 * images[position].permute(1, 2, 0).numpy()
        assert np.abs(found - np.asarray(expected, dtype=np.float32)).mean() < 0.4, path


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
@pytest.mark.parametrize("files", ["all_ways", "odd"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_both_loaders_turn_the_same_files(
    files: str, split: str, request: pytest.FixtureRequest
) -> None:
    pytest.importorskip("nvidia.dali", reason="the dali loader needs NVIDIA DALI")
    root = request.getfixturevalue(files)
    common = {"exif": "honour", "normalize": "none", "workers": 0}
    more = {"crop": "center"} if split == "val" else {"seed": 3}
    make = val_loader if split == "val" else train_loader
    loaders = (
        make(root, RESOLUTIONS, 4, backend=name, **common, **more) for name in ("dali", "pil")
    )
    for ours, other in zip(*loaders, strict=True):
        assert ours.indices.tolist() == other.indices.tolist()
        error = 255 * (ours.images.rows - other.images.rows).abs()
        assert error.mean() < 0.5  # another turn differs by dozens


def test_nothing_is_turned_unless_it_is_asked_for(backend: str, all_ways: Path) -> None:
    plain = validation(all_ways, backend, exif="ignore")
    levels = torch.cat([batch.images.level(0) for batch in plain])
    for kind in range(3):
        same = levels[8 * kind : 8 * kind + 8]
        assert (same == same[0]).all()
    assert not torch.equal(rows_of(plain), rows_of(validation(all_ways, backend)))


def test_an_index_that_honours_exif_decodes_so(all_ways: Path) -> None:
    index = index_folder(all_ways / "val")
    position = index.paths.index("only/PNG_6.png")
    assert decode(index, position).size == (90, 60)
    assert decode(turned(index), position).size == (60, 90)


def test_exif_that_contradicts_itself_is_refused_before_dali_sees_it(
    backend: str, tmp_path: Path
) -> None:
    content = jpeg_with(exif_of(3), exif_of(6))
    root = write(tmp_path, {"a.jpg": encoded(PICTURE, "JPEG"), "b.jpg": content})
    for _ in range(2):  # also from the cache
        with pytest.raises(ValueError, match=r"only/b\.jpg must have one orientation .* exclude "):
            validation(root, backend)
    shards = tmp_path / "my shards"
    write_tar(shards / "val" / "0.tar", samples_of(root / "val"))
    pattern = str(shards / "val" / "*.tar")
    for data in (root, pattern):
        with pytest.raises(ValueError, match="must have one orientation") as caught:
            open_split(data, "val", exif="honour")
        assert main(shlex.split(str(caught.value).rpartition(": ")[2])[3:]) == 0
        assert len(open_split(data, "val", exif="honour")) == 1
        assert main([*shlex.split(str(caught.value).rpartition(": ")[2])[3:], "--undo"]) == 0
    assert len(list(validation(root, backend, exif="ignore"))) == 1


def test_a_split_is_opened_as_a_run_sees_it(all_ways: Path) -> None:
    plain, honoured = (open_split(all_ways, "val", exif=exif) for exif in ("ignore", "honour"))
    assert plain.digest == index_folder(all_ways / "val").digest
    assert honoured.digest == validation(all_ways, "pil").plan.index.digest != plain.digest
    assert (honoured.sizes != plain.sizes).any()
    with pytest.raises(ValueError, match=r"^exif must be one of \('ignore', 'honour'\), got 'x'$"):
        open_split(all_ways, "val", exif="x")


def test_another_word_is_refused(all_ways: Path) -> None:
    with pytest.raises(ValueError, match=r"^exif must be one of \('ignore', 'honour'\), got 'x'$"):
        validation(all_ways, "pil", exif="x")
