"""Which formats belong to a data set, and that both loaders decode them to the same pixels."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers import FOR_DALI, JPEG, PICTURE, encoded, make_image_folder
from rsfast.data import comparing, index_folder, judging, val_loader
from rsfast.data.check import check_split
from rsfast.data.formats import unread
from rsfast.files.pictures import as_rgb

# Python 3.12 says so of every fork beside a thread; the workers of the check only decode.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")


def segment_of(jpeg: bytes, name: bytes) -> slice:
    """Where the segment of a JPEG lies that has this name in it."""
    start = jpeg.index(name) - 4
    return slice(start, start + 2 + int.from_bytes(jpeg[start + 2 : start + 4], "big"))


ADOBE = encoded(PICTURE.convert("CMYK"), "JPEG", quality=95)
PLAIN = bytearray(encoded(Image.eval(PICTURE.convert("CMYK"), lambda v: 255 - v), "JPEG"))
del PLAIN[segment_of(PLAIN, b"Adobe")]
GREY = PICTURE.convert("L")
SUPPORTED = {
    "a.jfif": JPEG,
    "a.jpe": JPEG,
    "adobe.jpg": ADOBE,
    "no_adobe.jpg": bytes(PLAIN),
    "rgb.tif": encoded(PICTURE, "TIFF"),
    "lzw.tiff": encoded(PICTURE, "TIFF", compression="tiff_lzw"),
    "jpeg.tif": encoded(PICTURE, "TIFF", compression="jpeg", quality=95),
    "grey.tif": encoded(GREY, "TIFF"),
    "palette.tif": encoded(PICTURE.quantize(200), "TIFF"),
    "alpha.tif": encoded(PICTURE.convert("RGBA"), "TIFF"),
    "rgb.ppm": encoded(PICTURE, "PPM"),
    "grey.pgm": encoded(GREY, "PPM"),
    "text.pnm": b"P3\n2 1\n255\n1 2 3 200 100 50\n",
    "bits.pbm": encoded(GREY.convert("1"), "PPM"),
}
turned = Image.Exif()
turned[0x0112] = 6
REFUSED = {
    "bits.tif": encoded(GREY.convert("1"), "TIFF"),
    "float.tif": encoded(GREY.convert("F"), "TIFF"),
    "grey_alpha.tif": encoded(PICTURE.convert("LA"), "TIFF"),
    "turned.tif": encoded(PICTURE, "TIFF", exif=turned),
    "four_bits.ppm": b"P6\n2 1\n15\n" + bytes([1, 2, 3, 15, 14, 13]),
    "two_bytes.pgm": b"P5\n2 1\n65535\n" + bytes([1, 2, 200, 15]),
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RSFAST_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_image_folder(tmp_path / "set", classes=("cat",), train=1, val=1)


@pytest.mark.parametrize("name", SUPPORTED)
def test_a_supported_image_looks_the_same_to_both_loaders(name: str, root: Path) -> None:
    pytest.importorskip("nvidia.dali", reason="the dali loader needs NVIDIA DALI")
    (root / "val" / "cat" / "0000.jpg").unlink()
    file = root / "val" / "cat" / name
    file.write_bytes(SUPPORTED[name])
    seen = []
    for backend in ("pil", "dali"):
        (batch,) = val_loader(root, (64,), 1, backend=backend, workers=0, normalize="none")
        seen.append(batch.images.rows.numpy().reshape(64, 64, 3)[1:-1, 1:-1] * 255)
    assert np.abs(seen[0] - seen[1]).max() <= 3
    assert np.abs(seen[0] - seen[1]).mean() < 1


def test_a_cmyk_jpeg_is_a_negative_only_where_it_says_so() -> None:
    want = np.asarray(PICTURE.convert("CMYK").convert("RGB")).astype(int)
    for name in ("adobe.jpg", "no_adobe.jpg"):
        path = Path(os.environ["RSFAST_CACHE"]).parent / name
        path.write_bytes(SUPPORTED[name])
        with Image.open(path) as image:
            assert np.abs(np.asarray(as_rgb(image)).astype(int) - want).mean() < 6


def test_supported_images_are_no_finding_and_others_are_bad(root: Path) -> None:
    for name, content in {**SUPPORTED, **REFUSED}.items():
        (root / "train" / "cat" / name).write_bytes(content)
    expected = {f"cat/{name}" for name in SUPPORTED} | {"cat/0000.jpg"}
    assert set(index_folder(root / "train").paths) == expected
    findings = {path: (kind, reason) for kind, path, reason in check_split(root / "train").findings}
    bad = {path for path, (kind, _) in findings.items() if kind == "bad"}
    assert bad == {f"cat/{name}" for name in REFUSED}
    for path in bad:
        assert re.fullmatch(
            r"(TIFF|PPM) image in mode \S+, which the loaders do not decode", findings[path][1]
        )


def test_images_that_not_every_loader_reads_are_counted_at_the_start(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    index_folder(root / "train")
    assert not caplog.messages
    for name in ("a.gif", "b.GIF", "c.avif", "notes.txt"):
        (root / "train" / "cat" / name).write_bytes(b"")
    index_folder(root / "train")
    (said,) = caplog.messages
    assert said.endswith(
        f"images in {root / 'train'} that not every loader reads are no part of the data set: "
        "2 .gif, 1 .avif; to use them, convert them to PNG or JPEG"
    )
    assert unread(["a.jp2", "b.jp2", "c.txt", "d.heic"]) == "2 .jp2, 1 .heic"


def test_files_of_any_name_are_read(backend: str, root: Path) -> None:
    before = index_folder(root / "val")
    (root / "val" / "cat" / os.fsdecode(b"\xff\n.jpg")).write_bytes(JPEG)
    loader = val_loader(root, (32,), 2, backend=backend, workers=0)
    (batch,) = loader
    assert loader.num_images == len(before) + 1 == batch.images.num_images
    assert check_split(root / "val").findings == []


def test_a_class_folder_whose_name_is_no_text_is_named_with_the_rule(root: Path) -> None:
    (root / "val" / os.fsdecode(b"caf\xe9")).mkdir()
    with pytest.raises(
        ValueError, match=r"class folder .*/val/caf\\udce9 must have a name in UTF-8"
    ):
        index_folder(root / "val")


@pytest.fixture
def static_rules_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "_check_for_dali", lambda *_: None)


@pytest.mark.parametrize("name", ["without_end.png", "exif.webp"])
def test_the_check_asks_dali_itself(name: str, root: Path, static_rules_pass: None) -> None:
    pytest.importorskip("nvidia.dali", reason="the check compares only where DALI is")
    (root / "val" / "cat" / name).write_bytes(FOR_DALI[name][0])
    (root / "val" / "cat" / "sound.png").write_bytes(encoded(PICTURE, "PNG"))
    ((kind, path, reason),) = check_split(root / "val").findings
    assert (kind, path) == ("bad", f"cat/{name}")
    assert re.match("DALI cannot decode it: .+", reason)


@pytest.mark.parametrize(
    ("picture", "reason"),
    [
        (
            np.full((60, 80, 3), 255, np.uint8),
            "Pillow and DALI decode it differently, by .* of 255",
        ),
        (np.zeros((80, 60, 3), np.uint8), "DALI decodes it to 80 x 60 pixels"),
        (np.asarray(PICTURE), "^$"),
    ],
    ids=["other_pixels", "other_size", "the_same"],
)
def test_what_dali_decodes_is_compared(picture: np.ndarray, reason: str) -> None:
    pytest.importorskip("nvidia.dali", reason="the check compares only where DALI is")
    assert re.search(reason, comparing.compare(encoded(PICTURE, "PNG"), picture))


def test_a_decoder_that_ends_its_process_is_told_and_started_again() -> None:
    pytest.importorskip("nvidia.dali", reason="the check compares only where DALI is")
    file = encoded(PICTURE, "PNG")
    assert comparing.compare(file, np.asarray(PICTURE)) == ""
    comparing._child.kill()
    assert comparing.compare(file, np.asarray(PICTURE)) == "crashes DALI"
    assert comparing.compare(file, np.asarray(PICTURE)) == ""


def test_without_dali_the_rules_hold_and_a_check_with_it_looks_again(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("nvidia.dali", reason="the check compares only where DALI is")
    monkeypatch.setattr(comparing, "is_available", lambda: False)
    (root / "val" / "cat" / "exif.webp").write_bytes(FOR_DALI["exif.webp"][0])
    first = check_split(root / "val")
    assert [finding.reason[:9] for finding in first.findings] == ["cannot be"]
    assert check_split(root / "val").decoded == 0
    monkeypatch.undo()
    monkeypatch.setenv("RSFAST_CACHE", str(root.parent / "cache"))
    assert check_split(root / "val").decoded == 2
    assert check_split(root / "val").decoded == 0
    monkeypatch.setattr(comparing, "is_available", lambda: False)
    assert check_split(root / "val").decoded == 0  # what more was looked for does no harm
