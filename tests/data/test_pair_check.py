"""The check of images with masks, by its command: what it names, and what training leaves out."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers import make_image_folder
from rsfast.data import mask_survey, open_pairs, train_loader
from rsfast.data.__main__ import main
from rsfast.data.splits import find_splits

# Python 3.12 says so of every fork beside a thread; the workers of the check only decode.
pytestmark = [
    pytest.mark.usefixtures("cache"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded"),
]
MASK = "trainannot/0002.png"
IMAGE = "train/0002.jpeg"


def checked(
    root: Path, capsys: pytest.CaptureFixture[str], *arguments: str, code: int | None = None
) -> str:
    """What the check of a data set prints."""
    found = main(["check", str(root), *arguments])
    said = capsys.readouterr()
    assert code is None or found == code, said
    return said.out + said.err


def left(root: Path, **arguments) -> list[str]:
    """Images that training uses."""
    return [*open_pairs(root, "train", **arguments).images.paths]


def edit(root: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    with Image.open(root / MASK) as mask:
        labels = np.array(mask)
    Image.fromarray(change(labels)).save(root / MASK)


def as_mode(mode: str) -> Callable[[Path], None]:
    def convert(root: Path) -> None:
        with Image.open(root / MASK) as mask:
            mask.convert(mode).save(root / MASK)

    return convert


def sixteen_bits(root: Path) -> None:
    edit(root, lambda labels: labels.astype(np.uint16))


def two_bits(root: Path) -> None:
    with Image.open(root / MASK) as mask:
        size = mask.size
    Image.new("1", size).save(root / MASK)


def label_seven(root: Path) -> None:
    (root / "classes.txt").write_text("sky\nroad\ntree\ncar\n")
    edit(root, lambda labels: np.where(labels == 3, 7, labels).astype(np.uint8))


def jpeg(root: Path) -> None:
    with Image.open(root / MASK) as mask:
        mask.save((root / MASK).with_suffix(".jpg"))
    (root / MASK).unlink()


def as_text(root: Path) -> None:
    (root / MASK).write_text("not a mask")


def cut_off(root: Path) -> None:
    (root / MASK).write_bytes((root / MASK).read_bytes()[:-30])


GREY = r"must be class numbers in 8-bit grey: python -m rsfast.data masks SRC DST"
BROKEN = {
    "missing": (lambda root: (root / MASK).unlink(), r"no mask trainannot/0002\.png"),
    "jpeg": (jpeg, r"no mask trainannot/0002\.png"),
    "another_size": (
        lambda root: edit(root, lambda labels: labels[:, 2:]),
        r"its mask has \d+ x \d+ pixels, and the image \d+ x \d+",
    ),
    "palette": (as_mode("P"), rf"its mask: palette PNG, {GREY}\n"),
    "colours": (as_mode("RGB"), rf"its mask: RGB PNG, {GREY} --colors FILE\n"),
    "alpha": (as_mode("LA"), rf"its mask: grey with alpha PNG, {GREY}\n"),
    "sixteen_bits": (sixteen_bits, rf"its mask: grey PNG of 16 bits, {GREY}\n"),
    "one_bit": (two_bits, rf"its mask: grey PNG of 1 bit, {GREY}\n"),
    "label": (
        label_seven,
        r"its mask has label 7, which must be below 4, the number of classes, or 255, the label of",
    ),
    "text": (as_text, r"its mask: no PNG file, which alone keeps class numbers as they are"),
    "cut_off": (cut_off, r"its mask: cannot be decoded: .*truncated"),
    "empty": (lambda root: (root / MASK).write_bytes(b""), r"its mask: empty file"),
}


def test_a_sound_data_set_has_no_findings_and_a_table_of_its_classes(
    pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pairs / "classes.txt").write_text("sky\nroad\ntree\ncar\n")
    said = checked(pairs, capsys, code=0)
    assert "train: 6 images, 0 bad, 0 odd, 0 unused, 0 excluded; 6 decoded" in said
    assert "val: 4 images, 0 bad, 0 odd, 0 unused, 0 excluded; 4 decoded" in said
    counts = np.zeros(256)
    for file in (pairs / "trainannot").rglob("*.png"):
        counts += np.bincount(np.asarray(Image.open(file)).ravel(), minlength=256)
    for label, name in enumerate(("sky", "road", "tree", "car")):
        share = 100 * counts[label] / counts[:4].sum()
        assert re.search(rf"^ +{label} +{name} +{share:.2f} +6 ", said, re.MULTILINE), said
    share = 100 * counts[255] / counts.sum()
    assert re.search(rf"^ +255 +ignored, of all pixels +{share:.2f} +6 ", said, re.MULTILINE)


@pytest.mark.parametrize(("break_it", "reason"), BROKEN.values(), ids=BROKEN)
def test_a_mask_that_cannot_be_used_is_named_and_its_image_left_out(
    break_it: Callable[[Path], object],
    reason: str,
    pairs: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert IMAGE.removeprefix("train/") in left(pairs)
    break_it(pairs)
    said = checked(pairs, capsys, code=1)
    assert re.search(rf"^bad       {re.escape(IMAGE)}  {reason}", said, re.MULTILINE), said
    assert "train: 6 images, 1 bad, 0 odd" in said
    assert IMAGE.removeprefix("train/") not in left(pairs)
    assert len(left(pairs)) == 5
    assert f"1 of 6 images in {pairs / 'train'} are left out for their masks" in caplog.text
    assert "0002.jpeg (" in caplog.text
    assert f"python -m rsfast.data check {pairs}" in caplog.text
    with pytest.raises(ValueError, match=r"must have a mask .* when strict, found 1 without, the"):
        open_pairs(pairs, "train", strict=True)


def test_a_run_without_a_check_finds_the_same(pairs: Path) -> None:
    label_seven(pairs)
    loader = train_loader(pairs, (32,), 5, backend="pil", workers=0, task="segmentation")
    assert loader.num_images == 5
    assert loader.class_names == ("sky", "road", "tree", "car")


def test_a_mended_mask_is_used_again(pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (pairs / MASK).read_bytes()
    as_text(pairs)
    checked(pairs, capsys, code=1)
    (pairs / MASK).write_bytes(before)
    assert len(left(pairs)) == 6
    assert "0 decoded" in checked(pairs, capsys, code=0)


def test_masks_are_decoded_once(pairs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(left(pairs)) == 6
    (pairs / MASK).touch()
    decoded = []
    form = mask_survey._form
    monkeypatch.setattr(mask_survey, "_form", lambda content: decoded.append(1) or form(content))
    assert len(left(pairs)) == 6
    assert len(decoded) == 1
    assert len(left(pairs)) == 6
    assert len(decoded) == 1


def test_a_damaged_survey_is_made_anew(pairs: Path, cache: Path) -> None:
    assert len(left(pairs)) == 6
    for file in (cache / "masks").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    assert len(left(pairs)) == 6


def test_masks_without_an_image_are_unused(pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (pairs / IMAGE).unlink()
    (pairs / "trainannot" / "notes.txt").write_text("no mask")
    said = checked(pairs, capsys, code=0)
    assert f"unused    {MASK}  no image has its path without the extension" in said
    assert "notes" not in said


def test_two_images_cannot_share_a_mask(pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Image.open(pairs / IMAGE) as image:
        image.save(pairs / "train" / "0002.jpg")
    said = checked(pairs, capsys, code=1)
    assert "bad       train/0002.jpg  its mask is that of 0002.jpeg, too: rename one of" in said
    assert left(pairs).count("0002.jpeg") == 1
    assert "0002.jpg" not in left(pairs)


def test_a_bad_image_is_named_once_and_left_out_with_its_mask(
    pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pairs / IMAGE).write_bytes((pairs / IMAGE).read_bytes()[:200])
    as_text(pairs)
    said = checked(pairs, capsys, code=1)
    assert said.count(IMAGE) == 1
    assert "train: 6 images, 1 bad" in said
    assert len(left(pairs)) == 5


@pytest.mark.parametrize("ignored", [255, 3])
def test_the_ignored_label_is_no_class(
    ignored: int, pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for mask in pairs.glob("*annot/**/*.png"):
        labels = np.array(Image.open(mask))
        Image.fromarray(np.where(labels == 255, ignored, labels).astype(np.uint8)).save(mask)
    said = checked(pairs, capsys, "--ignore-label", str(ignored), code=0)
    names = open_pairs(pairs, "val", ignore_label=ignored).images.class_names
    assert names == ("0", "1", "2", "3")[: 3 if ignored == 3 else 4]
    assert f"{ignored}  ignored, of all pixels" in said


def test_255_is_no_class_whatever_is_ignored(
    pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = checked(pairs, capsys, "--ignore-label", "3", code=1)
    assert said.count("its mask has label 255, which must be below 3, the number of classes, or 3")
    with pytest.raises(ValueError, match=r"must have a mask that can be used for one image") as no:
        open_pairs(pairs, "train", ignore_label=3)
    assert str(no.value).endswith(f"python -m rsfast.data check {pairs} --ignore-label 3")


def test_the_training_masks_tell_the_classes_of_both_splits(
    pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask = pairs / "valannot" / "0000.png"
    labels = np.array(Image.open(mask))
    labels[0, 0] = 9
    Image.fromarray(labels).save(mask)
    said = checked(pairs, capsys, code=1)
    assert "bad       val/0000.jpg  its mask has label 9, which must be below 4" in said
    assert len(open_pairs(pairs, "val").images) == 3
    assert len(open_pairs(pairs, "val", num_classes=10).images.class_names) == 10


def test_masks_of_which_none_can_be_used_are_named_although_no_class_is_known(
    pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for mask in pairs.glob("trainannot/**/*.png"):
        Image.open(mask).convert("P").save(mask)
    said = checked(pairs, capsys, code=1)
    assert said.count("its mask: palette PNG") == 6
    assert "must hold a class besides the ignored label 255, found none in 6 masks" in said
    with pytest.raises(ValueError, match=r"must hold a class besides the ignored label 255"):
        open_pairs(pairs, "train")


@pytest.mark.parametrize(
    ("lines", "rule"),
    [
        ("sky\nsky\n", "must name each class once, one per line, got 2 lines with 1 names"),
        ("\n".join(map(str, range(256))), "must name at most 255 classes, got 256"),
    ],
)
def test_wrong_names_of_classes_are_refused(
    lines: str, rule: str, pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pairs / "classes.txt").write_text(lines)
    assert rule in checked(pairs, capsys, code=2)


def test_names_must_be_as_many_as_the_classes_that_are_asked_for(pairs: Path) -> None:
    (pairs / "classes.txt").write_text("sky\nroad\ntree\ncar\n")
    assert open_pairs(pairs, "val", num_classes=4).images.class_names[3] == "car"
    with pytest.raises(ValueError, match=r"must name 5 classes, one per line, got 4"):
        open_pairs(pairs, "train", num_classes=5)


def test_an_ignored_label_that_no_pixel_can_have_is_refused(
    pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = checked(pairs, capsys, "--ignore-label", "256", code=2)
    assert said == "rsfast.data: error: ignore_label must be in [0, 256), got 256\n"


@pytest.mark.parametrize("orientation", [3, 6])
def test_images_that_exif_turns_are_odd(
    orientation: int, pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = pairs / "train" / "0000.jpg"
    Image.open(image).save(image, exif=exif)
    said = checked(pairs, capsys, code=0)
    assert "odd       train/0000.jpg  EXIF turns it, and its mask fits it as it is stored" in said
    if orientation == 6:
        assert [len(left(pairs, exif=mode)) for mode in ("ignore", "honour")] == [6, 5]
        mask = pairs / "trainannot" / "0000.png"
        Image.open(mask).transpose(Image.Transpose.ROTATE_90).save(mask)
        said = checked(pairs, capsys, code=0)
        assert "odd       train/0000.jpg  its mask fits it only as EXIF turns it: left out" in said
        assert [len(left(pairs, exif=mode)) for mode in ("ignore", "honour")] == [5, 6]


def test_one_split_may_be_checked_alone(pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    as_text(pairs)
    assert "train: 6 images, 1 bad" in checked(pairs / "train", capsys, code=1)
    said = checked(pairs / "val", capsys, code=0)
    assert "val: 4 images, 0 bad" in said
    assert "train:" not in said


@pytest.mark.parametrize("gone", ["valannot", "trainannot"])
def test_a_split_without_masks_is_all_bad(
    gone: str, pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(pairs / gone)
    said = checked(pairs, capsys, code=1)
    assert f"no mask {gone}/0000.png" in said
    with pytest.raises(ValueError, match=rf"{gone} does not exist; segmentation needs it with a"):
        open_pairs(pairs, gone.removesuffix("annot"))


def test_findings_are_listed_with_paths_from_the_data_set(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    as_text(pairs)
    (pairs / "valannot" / "lost.png").write_bytes((pairs / "valannot" / "0000.png").read_bytes())
    checked(pairs, capsys, "--list", str(tmp_path / "list.tsv"), code=1)
    lines = [line.split("\t")[:2] for line in (tmp_path / "list.tsv").read_text().splitlines()]
    assert lines == [["bad", IMAGE], ["unused", "valannot/lost.png"]]


def test_what_is_excluded_is_said_and_left_out(
    pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    as_text(pairs)
    for undo, codes in (([], 0), (["--undo"], 1)):
        assert main(["exclude", str(pairs), str(pairs / IMAGE), *undo]) == 0
        said = checked(pairs, capsys, code=codes)
        assert ("0 bad, 0 odd, 0 unused, 1 excluded" in said) is not bool(undo)
        assert len(left(pairs)) == 5
    assert main(["exclude", str(pairs), str(pairs / MASK)]) == 2
    assert f"file must be an image of the data set, got {pairs / MASK}" in capsys.readouterr().err


def test_a_split_without_an_image_is_refused(
    pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(pairs / "val")
    (pairs / "val").mkdir()
    assert f"data folder {pairs / 'val'} must hold images" in checked(pairs, capsys, code=2)


def test_a_pattern_and_a_conversion_to_shards_are_refused(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=r"^segmentation needs a folder with train and trainannot"):
        open_pairs("/data/*.tar", "train")
    assert main(["convert", str(pairs), str(tmp_path / "shards")]) == 2
    assert "SRC must be a data set of classification, because shards" in capsys.readouterr().err


def test_classification_finds_its_splits_as_before(tmp_path: Path, pairs: Path) -> None:
    assert all(split.masks is None for split in find_splits(make_image_folder(tmp_path / "a")))
    assert [split.masks for split in find_splits(pairs)] == [
        pairs / "trainannot",
        pairs / "valannot",
    ]


def test_folders_and_links_are_walked_once(pairs: Path) -> None:
    (pairs / "train" / "town" / "back").symlink_to(pairs / "train")
    (pairs / "train" / ".hidden").mkdir()
    shutil.copy(pairs / IMAGE, pairs / "train" / ".hidden" / "0009.jpeg")
    assert len(left(pairs)) == 6
