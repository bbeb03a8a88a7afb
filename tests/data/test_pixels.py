"""What the loaders paint: window, flip and levels of each image, and that the backends agree.

Pillow renormalises a resize kernel that sticks out of the image, DALI repeats the border pixel.
Only the outermost ring of an output can see that; all other values differ by rounding.
"""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from helpers import smooth_image
from rsfast.data import Batch, Loader, train_loader, val_loader
from rsfast.data.plan import TrainBatch, TrainPlan

RESOLUTIONS = (96, 64, 48)
PUBLISHED = (224, 192, 160, 128, 96)
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def training(root: Path, backend: str, **arguments) -> Loader:
    """Values from 0 to 1."""
    arguments = {"resolutions": RESOLUTIONS, "batch_size": 6, "seed": 1, **arguments}
    return train_loader(root, backend=backend, normalize="none", workers=0, **arguments)


def validation(root: Path, backend: str, **arguments) -> Loader:
    """Values from 0 to 1."""
    arguments = {"resolutions": RESOLUTIONS, "batch_size": 3, **arguments}
    return val_loader(root, backend=backend, normalize="none", workers=0, **arguments)


def pictures(batches: list[Batch]) -> list[Tensor]:
    """Per level [N, 3, r, r] of all batches, as the integers from 0 to 255 they were."""
    levels = zip(*(batch.images.levels() for batch in batches), strict=True)
    return [(255 * torch.cat(level)).round() for level in levels]


def assert_dali_agrees_with_pillow(make: Callable[..., Loader], root: Path, **arguments) -> None:
    """Rounding apart; measured mean differences are 0.10 to 0.17 steps of 255."""
    pytest.importorskip("nvidia.dali", reason="the dali loader needs NVIDIA DALI")
    ring = 0 if arguments["crop"] == "center" else 1  # the centre lies clear of the border
    count = total = above_two = 0
    loaders = (make(root, name, **arguments) for name in ("dali", "pil"))
    for ours, other in zip(*loaders, strict=True):
        assert ours.indices.tolist() == other.indices.tolist()
        assert ours.labels.tolist() == other.labels.tolist()
        rows = (ours.images.rows - other.images.rows).abs_().mul_(255).round_()
        for level in ours.images.with_rows(rows).levels():
            inner = slice(ring, level.shape[-1] - ring)
            assert level[..., inner, inner].max() <= 2
        count += rows.numel()
        total += rows.sum(dtype=torch.float64).item()
        above_two += torch.count_nonzero(rows > 2).item()
    assert total <= 0.3 * count
    assert above_two <= 0.005 * count


def mismatch_of_levels(images: list[Tensor]) -> Tensor:
    """[L - 1, N] mean difference between a level and the largest one brought to its size."""
    return torch.stack(
        [
            (F.interpolate(images[0], level.shape[2:], mode="bilinear", antialias=True) - level)
            .abs()
            .mean((1, 2, 3))
            for level in images[1:]
        ]
    )


# Two resizes blur more than one: up to 1.9 steps of 255 on these images; another window or the
# mirror image differs by 30 to 90.
SAME, DIFFERENT = 4.0, 20.0


@pytest.mark.parametrize("flip", ["shared", "none"])
def test_all_levels_show_one_window_and_one_flip(backend: str, flip: str, image_root: Path) -> None:
    images = pictures(list(training(image_root, backend, flip=flip)))
    assert mismatch_of_levels(images).max() < SAME


def test_levels_of_multi_crops_show_windows_of_their_own(backend: str, image_root: Path) -> None:
    images = pictures(list(training(image_root, backend, crop="multi", flip="none")))
    mismatch = mismatch_of_levels(images)
    assert (mismatch > DIFFERENT).double().mean() > 0.9
    assert mismatch.mean() > DIFFERENT


def test_levels_with_independent_flips_show_one_window_mirrored_or_not(
    backend: str, image_root: Path
) -> None:
    loader = training(image_root, backend, batch_size=12, flip="independent")
    flips = torch.from_numpy(loader.plan.batch(0, 0).flips)
    images = pictures(list(loader))
    mirrored = flips[1:] != flips[0]
    assert 4 < mirrored.sum() < 20  # of 24
    mismatch = mismatch_of_levels(images)
    assert mismatch[mirrored].min() > DIFFERENT
    assert mismatch[~mirrored].max() < SAME
    upright = [
        torch.where(flip[:, None, None, None], level.flip(3), level)
        for flip, level in zip(flips, images, strict=True)
    ]
    assert mismatch_of_levels(upright).max() < SAME


@pytest.mark.parametrize("crop", ["single", "multi"])
def test_a_flip_is_the_mirror_image(
    backend: str, crop: str, image_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = TrainPlan.batch

    def all_flipped(plan: TrainPlan, epoch: int, step: int) -> TrainBatch:
        batch = planned(plan, epoch, step)
        return dataclasses.replace(batch, flips=np.ones_like(batch.flips))

    upright = pictures(list(training(image_root, backend, crop=crop, flip="none")))
    monkeypatch.setattr(TrainPlan, "batch", all_flipped)
    flipped = pictures(list(training(image_root, backend, crop=crop, flip="none")))
    for here, there in zip(upright, flipped, strict=True):
        assert (here - there.flip(3)).abs().max() <= (0 if backend == "pil" else 1)
        assert (here - there).abs().mean() > DIFFERENT


@pytest.fixture(scope="module")
def ramp_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lossless images that say where a pixel comes from: red is its column, green its row."""
    root = tmp_path_factory.mktemp("ramps")
    for split in ("train", "val"):
        (root / split / "ramp").mkdir(parents=True)
        for number, (height, width) in enumerate([(200, 250), (250, 200), (120, 240), (230, 229)]):
            rows, columns = np.mgrid[:height, :width]
            pixels = np.stack([columns, rows, np.full_like(rows, 7)], axis=-1)
            image = Image.fromarray(pixels.astype(np.uint8))
            image.save(root / split / "ramp" / f"{number}.png")
    return root


def assert_shows(picture: Tensor, top: float, left: float, height: float, width: float) -> None:
    """That [3, r, r] is the window of a ramp, to a fraction of a pixel; mirrored if width < 0."""
    side = picture.shape[-1]
    centres = (torch.arange(side) + 0.5) / side
    inner = slice(2, -2)  # clear of the borders, where a resize has no pixel to look at
    for channel, start, extent in ((0, left, width), (1, top, height)):
        expected = start + extent * centres - 0.5
        values = picture[channel] if channel == 0 else picture[channel].T
        error = (values - expected)[inner, inner]
        assert error.abs().max() < 1.0
        assert error.mean().abs() < 0.25
    assert (picture[2] == 7).all()


@pytest.mark.parametrize(
    ("crop", "flip"),
    [("single", "shared"), ("single", "independent"), ("multi", "shared"), ("multi", "none")],
)
def test_training_pixels_come_from_the_planned_window(
    backend: str, crop: str, flip: str, ramp_root: Path
) -> None:
    loader = training(ramp_root, backend, batch_size=4, crop=crop, flip=flip)
    for epoch in range(3):
        (batch,) = loader
        plan = loader.plan.batch(epoch, 0)
        for level, images in enumerate(pictures([batch])):
            for n, picture in enumerate(images):
                top, left, height, width = plan.windows[level, n].tolist()
                if plan.flips[level, n]:
                    left, width = left + width, -width
                assert_shows(picture, top, left, height, width)


def test_validation_pixels_come_from_the_centre(backend: str, ramp_root: Path) -> None:
    loader = validation(ramp_root, backend, batch_size=4, resolutions=(128, 96))
    (batch,) = loader
    for shorter, images in zip((146, 109), pictures([batch]), strict=True):
        for picture, size in zip(images, loader.plan.index.sizes.tolist(), strict=True):
            window = []
            for side in size:
                resized = shorter * side // min(size)
                scale = side / resized
                corner = round((resized - images.shape[-1]) / 2)
                window.append((corner * scale, images.shape[-1] * scale))
            (top, height), (left, width) = window
            assert_shows(picture, top, left, height, width)


def test_crop_none_shows_the_whole_image(backend: str, ramp_root: Path) -> None:
    loader = validation(ramp_root, backend, batch_size=4, crop="none")
    for images in pictures(list(loader)):
        for picture, (height, width) in zip(images, loader.plan.index.sizes.tolist(), strict=True):
            assert_shows(picture, 0, 0, height, width)


@pytest.mark.parametrize(("crop", "flip"), [("single", "shared"), ("multi", "independent")])
def test_dali_and_pillow_agree_on_training_pixels(crop: str, flip: str, image_root: Path) -> None:
    assert_dali_agrees_with_pillow(training, image_root, crop=crop, flip=flip)


@pytest.mark.parametrize("crop", ["center", "none"])
def test_dali_and_pillow_agree_on_validation_pixels(crop: str, image_root: Path) -> None:
    assert_dali_agrees_with_pillow(validation, image_root, crop=crop)


def rotated_by_exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def with_alpha(image: Image.Image) -> Image.Image:
    return Image.merge("RGBA", [*image.split(), Image.linear_gradient("L").resize(image.size)])


def in_16_bits(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(image.convert("L"), dtype=np.uint16) * 257)


# What becomes of an RGB picture, the suffix, and how it is saved.
KINDS: dict[str, tuple[Callable[[Image.Image], Image.Image], str, dict]] = {
    "greyscale_jpeg": (lambda image: image.convert("L"), ".jpg", {}),
    "cmyk_jpeg": (lambda image: image.convert("CMYK"), ".jpg", {}),
    "progressive_jpeg": (Image.Image.copy, ".jpg", {"progressive": True}),
    "jpeg_rotated_by_exif": (Image.Image.copy, ".jpg", {"exif": rotated_by_exif()}),
    "png": (Image.Image.copy, ".png", {}),
    "greyscale_png": (lambda image: image.convert("L"), ".png", {}),
    "transparent_png": (with_alpha, ".png", {}),
    "palette_png": (lambda image: image.quantize(64), ".png", {}),
    "16_bit_png": (in_16_bits, ".png", {}),
    "png_called_jpg": (Image.Image.copy, ".jpg", {"format": "PNG"}),
    "jpeg_called_png": (Image.Image.copy, ".png", {"format": "JPEG"}),
    "webp": (Image.Image.copy, ".webp", {"lossless": True}),
    "bmp": (Image.Image.copy, ".bmp", {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_loads_as_the_rgb_picture_it_shows(
    kind: str, backend: str, tmp_path: Path
) -> None:
    change, suffix, options = KINDS[kind]
    original = smooth_image(150, 200, np.random.default_rng(0))
    stored = change(original)
    folder = tmp_path / "val" / "only"
    folder.mkdir(parents=True)
    stored.save((folder / "image").with_suffix(suffix), **{"quality": 95, **options})
    shown = original.convert("L") if kind == "16_bit_png" else stored  # Pillow clips 16 bits
    expected = shown.convert("RGB").resize((64, 64), Image.Resampling.BILINEAR)
    (batch,) = validation(tmp_path, backend, crop="none", resolutions=(64,))
    (picture,) = pictures([batch])[0]
    error = picture.permute(1, 2, 0) - torch.from_numpy(np.array(expected, dtype=np.float32))
    assert error.abs().mean() < (2.5 if "jpeg" in kind else 0.5)


@pytest.fixture(scope="module")
def imagenette(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs of 224 x 224 pixels from all ten classes: 20 for training, 20 for validation."""
    archive = SHARED / "imagenette224_60mb.zip"
    if not archive.exists():
        pytest.skip(f"needs the photographs of {archive}")
    root = tmp_path_factory.mktemp("imagenette")
    with zipfile.ZipFile(archive) as stored:
        for split in ("train", "val"):
            names = [name for name in stored.namelist() if name.startswith(f"{split}/")]
            names = [name for name in names if name.endswith(".JPEG")]
            stored.extractall(root, names[:: len(names) // 20][:20])
    return root


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every tenth of 200 ImageNet photographs as they came, and the four greyscale ones."""
    archive = SHARED / "imagenet_jpeg_200.zip"
    if not archive.exists():
        pytest.skip(f"needs the photographs of {archive}")
    root = tmp_path_factory.mktemp("originals")
    (root / "train" / "all").mkdir(parents=True)
    (root / "val").mkdir()
    with zipfile.ZipFile(archive) as stored:
        for number, name in enumerate(stored.namelist()):
            with stored.open(name) as stream, Image.open(stream) as image:
                wanted = number % 10 == 0 or image.mode == "L"
            if wanted:
                (root / "train" / "all" / Path(name).name).write_bytes(stored.read(name))
    (root / "val" / "all").symlink_to(root / "train" / "all")
    return root


@pytest.mark.parametrize("photographs", ["imagenette", "originals"])
@pytest.mark.parametrize(
    ("make", "modes"),
    [
        pytest.param(training, {"crop": "single", "flip": "shared"}, id="train_single_shared"),
        pytest.param(training, {"crop": "multi", "flip": "independent"}, id="train_multi"),
        pytest.param(validation, {"crop": "center"}, id="val_center"),
        pytest.param(validation, {"crop": "none"}, id="val_none"),
    ],
)
def test_dali_and_pillow_agree_on_photographs(
    photographs: str, make: Callable[..., Loader], modes: dict, request: pytest.FixtureRequest
) -> None:
    root = request.getfixturevalue(photographs)
    assert_dali_agrees_with_pillow(make, root, resolutions=PUBLISHED, **modes)
