"""Masks as they are published, by the command that converts them, and by the one that checks."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers import encoded, environment
from rsfast.data import open_pairs
from rsfast.data.__main__ import main

pytestmark = pytest.mark.usefixtures("cache")
LABELS = np.array([[0, 1, 2, 3], [3, 2, 1, 255]], dtype=np.uint8)
COLORS = {"sky": (128, 128, 128), "road": (128, 64, 128), "tree": (128, 128, 0), "void": (0, 0, 0)}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    (folder / "town").mkdir(parents=True)
    return folder


def converted(source: Path, *arguments: str) -> np.ndarray:
    """The labels of a.png, which is in the folder `town` of the source."""
    target = source.parent / "target"
    assert main(["masks", str(source), str(target), *arguments]) == 0
    with Image.open(target / "town" / "a.png") as mask:
        assert (mask.format, mask.mode) == ("PNG", "L")
        return np.array(mask)


def refused(source: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["masks", str(source), str(source.parent / "target"), *arguments]) == 2
    return capsys.readouterr().err


def palette(labels: np.ndarray) -> Image.Image:
    image = Image.fromarray(labels).convert("P")
    image.putdata(labels.ravel().tolist())
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    return image


def test_a_palette_keeps_its_numbers(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    palette(LABELS).save(source / "town" / "a.png")
    assert (converted(source) == LABELS).all()
    said = "1 masks written, with the labels 0, 1, 2, 3, 255\n"
    assert capsys.readouterr().out.endswith(said)


@pytest.mark.parametrize("bits", [1, 2, 4, 16])
def test_grey_of_any_depth_keeps_its_numbers(bits: int, source: Path) -> None:
    labels = (LABELS % min(4, 2**bits)).astype(np.uint16)
    file = source / "town" / "a.png"
    if bits == 16:
        Image.fromarray(labels).save(file)
    elif bits == 1:
        Image.fromarray(labels.astype(bool)).save(file)
    else:
        write_packed(file, labels, bits)
    assert (converted(source) == labels).all()


def write_packed(file: Path, labels: np.ndarray, bits: int) -> None:
    """A grey PNG of so many bits, which Pillow does not write: a palette's without the palette."""
    image = palette(labels.astype(np.uint8))
    image.save(file, bits=bits)
    content = bytearray(file.read_bytes())
    assert (content[24], content[25]) == (bits, 3)
    content[25] = 0
    start = content.index(b"PLTE") - 4
    del content[start : start + 12 + int.from_bytes(content[start : start + 4], "big")]
    content[29:33] = crc_of(bytes(content[12:29]))
    file.write_bytes(content)


def crc_of(chunk: bytes) -> bytes:
    return zlib.crc32(chunk).to_bytes(4, "big")


def test_a_shift_makes_the_unlabelled_ignored(source: Path) -> None:
    Image.fromarray(LABELS).save(source / "town" / "a.png")
    assert converted(source, "--shift=-1").tolist() == [[255, 0, 1, 2], [2, 1, 0, 255]]


def test_labels_may_be_mapped(source: Path) -> None:
    Image.fromarray(LABELS).save(source / "town" / "a.png")
    found = converted(source, "--map", "3=0", "--map", "0=255", "--shift", "1")
    assert found.tolist() == [[255, 2, 3, 0], [0, 3, 2, 255]]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colours_become_the_numbers_of_their_lines(mode: str, source: Path) -> None:
    colors = np.array([*COLORS.values()], dtype=np.uint8)
    picture = Image.fromarray(colors[LABELS % 4])
    picture = picture.quantize(16) if mode == "P" else picture.convert(mode)
    picture.save(source / "town" / "a.png")
    table = source.parent / "colors.txt"
    lines = ("{} {} {}\t{}".format(*color, name) for name, color in COLORS.items())
    table.write_text("# of a street\n\n" + "\n".join(lines))
    found = converted(source, "--colors", str(table), "--map", "3=255")
    assert found.tolist() == np.where(LABELS % 4 == 3, 255, LABELS % 4).tolist()


def test_grey_with_an_alpha_that_says_nothing_is_grey(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grey = Image.fromarray(LABELS)
    Image.merge("LA", (grey, Image.new("L", grey.size, 255))).save(source / "town" / "a.png")
    assert converted(source).tolist() == LABELS.tolist()
    Image.merge("LA", (grey, Image.new("L", grey.size, 9))).save(source / "town" / "a.png")
    assert main(["masks", str(source), str(source.parent / "other")]) != 0
    assert "has pixels of mode LA" in capsys.readouterr().err


def test_a_list_and_an_end_of_names_choose_masks(source: Path) -> None:
    for name in ("a_trainIds", "b_trainIds", "a_color", "c_trainIds"):
        Image.fromarray(LABELS).save(source / "town" / f"{name}.png")
    (source / "town" / "a_polygons.json").write_text("{}")
    converted(source, "--stem", "_trainIds=")
    target = source.parent / "target" / "town"
    assert sorted(path.name for path in target.iterdir()) == ["a.png", "b.png", "c.png"]
    listed = source.parent / "train.txt"
    listed.write_text("a_trainIds\nc_trainIds 1\n")
    other = source.parent / "other"
    assert main(["masks", str(source), str(other), "--list", str(listed)]) == 0
    assert sorted(path.name for path in (other / "town").iterdir()) == [
        "a_trainIds.png",
        "c_trainIds.png",
    ]


@pytest.mark.parametrize(
    ("content", "arguments", "said"),
    [
        (Image.new("RGB", (4, 4)), [], "has pixels of mode RGB, must have class numbers; --colors"),
        (Image.new("I;16", (4, 4), 300), [], "must have labels from 0 to 255, has 300"),
        (
            encoded(Image.fromarray(np.array([[9, -3, -7]], dtype=np.int32)), "tiff"),
            [],
            "must have labels from 0 to 255, has -3",
        ),
        (Image.new("L", (4, 4), 250), ["--shift=7"], "has label 250, which --shift moves beyond"),
        (Image.new("RGB", (4, 4), (1, 2, 3)), ["--colors", "{colors}"], "has the colour 1 2 3, wh"),
        (b"\x89PNG damaged", [], "cannot be decoded"),
    ],
    ids=["colours", "large", "negative", "shifted", "strange", "damaged"],
)
def test_a_mask_without_numbers_is_named(
    content: Image.Image | bytes,
    arguments: list[str],
    said: str,
    source: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = source / "town" / "a.png"
    file.write_bytes(content) if isinstance(content, bytes) else content.save(file)
    (source / "colors").write_text("0 0 0\n9 9 9\n")
    arguments = [text.format(colors=source / "colors") for text in arguments]
    error = refused(source, capsys, *arguments)
    assert error.startswith(f"rsfast.data: error: mask {file} ")
    assert said in error
    assert not list((source.parent / "target").rglob("*.png"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--map", "1"], "--map must be two labels from 0 to 255, as in 0=255, got 1"),
        (["--map", "1=256"], "--map must be two labels from 0 to 255, as in 0=255, got 1=256"),
        (["--stem", "x"], "--stem must be two ends of names, as in _labels=_image, got x"),
        (["--stem", "_x="], "SRC must hold masks (.png .bmp .tif .tiff .gif), found none in"),
        (["--colors", "none.txt"], "none.txt must be a text file that can be read"),
        (["--colors", "{bad}"], "must have a colour of its own in each line, as `red green blue`"),
        (["--list", "{bad}"], "found none of 1 of them, the first is 0"),
    ],
)
def test_a_bad_argument_is_named(
    arguments: list[str], said: str, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(LABELS).save(source / "town" / "a.png")
    bad = source.parent / "bad.txt"
    bad.write_text("0 0 300\n" if "--colors" in arguments else "town/a\n0\n")
    assert said in refused(source, capsys, *(text.format(bad=bad) for text in arguments))


@pytest.mark.parametrize("where", ["source", "source/town", "source/new", "."])
def test_masks_are_not_written_over_their_source(
    where: str, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(LABELS).save(source / "town" / "a.png")
    assert main(["masks", str(source), str(source.parent / where)]) == 2
    assert "DST must be a folder apart from SRC" in capsys.readouterr().err


def test_the_command_that_the_check_names_mends_a_data_set(
    pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for mask in pairs.glob("trainannot/**/*.png"):
        palette(np.array(Image.open(mask))).save(mask)
    (pairs / "trainannot").rename(pairs / "palettes")
    (pairs / "trainannot").mkdir()
    assert main(["masks", str(pairs / "palettes"), str(pairs / "trainannot")]) == 0
    found = open_pairs(pairs, "train", strict=True)
    assert (len(found.images), found.images.class_names) == (6, ("0", "1", "2", "3"))


def published(root: Path, images: str, masks: str, labels: np.ndarray | None = None) -> None:
    """An image and its mask, in 8-bit grey or, where their names say so, as a palette."""
    labels = LABELS if labels is None else labels
    for path in (images, masks):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", labels.shape[::-1], (9, 99, 199)).save(root / images)
    (palette(labels) if "voc" in masks else Image.fromarray(labels)).save(root / masks)


def test_the_documented_recipes_make_data_sets(tmp_path: Path) -> None:
    """Of files that lie as those of the published data sets do."""
    for split, long, stem in (("train", "training", "a"), ("val", "validation", "b")):
        published(tmp_path, f"voc/JPEGImages/{stem}.jpg", f"voc/SegmentationClass/{stem}.png")
        published(tmp_path, f"nyu/image/{stem}.jpg", f"nyu/label40/{stem}.png")
        published(tmp_path, f"ade/images/{long}/1.jpg", f"ade/annotations/{long}/1.png")
        published(
            tmp_path,
            f"city/leftImg8bit/{split}/ulm/{stem}_leftImg8bit.png",
            f"city/gtFine/{split}/ulm/{stem}_gtFine_labelTrainIds.png",
        )
        (tmp_path / f"city/gtFine/{split}/ulm/{stem}_gtFine_color.png").write_bytes(b"colours")
        lists = tmp_path / "voc/ImageSets/Segmentation"
        lists.mkdir(parents=True, exist_ok=True)
        for folder in (lists, tmp_path / "nyu"):
            (folder / f"{split}.txt").write_text(f"{stem}\n")
    docs = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text()
    recipes = docs.partition("<!-- recipes -->")[2].partition("<!-- end of recipes -->")[0]
    script = "\n".join(re.findall(r"```bash\n(.*?)```", recipes, re.DOTALL))
    made = tmp_path / "made"
    made.mkdir()
    variables = {"VOC": "voc", "ADE": "ade", "CITYSCAPES": "city", "NYU": "nyu"}
    subprocess.run(
        ["bash", "-euc", script.replace("python -m", f"{shlex.quote(sys.executable)} -m")],
        cwd=made,
        env={**environment(), **{name: str(tmp_path / path) for name, path in variables.items()}},
        check=True,
    )
    for name, count in (("voc", 4), ("ade", 3), ("cityscapes", 4), ("nyu", 3)):
        for split in ("train", "val"):
            found = open_pairs(made / name, split, strict=True)
            assert (len(found.images), len(found.images.class_names)) == (1, count)
            shifted = np.where(LABELS % 255 == 0, 255, LABELS - 1) if count == 3 else LABELS
            assert (np.asarray(Image.open(found.masks.path(0))) == shifted).all()
