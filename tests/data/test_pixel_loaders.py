"""The loaders of segmentation: what a batch holds, that backends agree, ranks, and bad files."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from helpers import make_pair_folder
from rsfast.data import Batch, Loader, open_pairs, prefetch, train_loader, val_loader
from rsfast.data.exclusion import exclude
from rsfast.data.masks import nearest

RESOLUTIONS = (48, 32, 24)
PIXELS = sum(r * r for r in RESOLUTIONS)
MEAN = (124, 116, 104)  # ImageNet's, in bytes
FORK_WARNING = "ignore:This process .* is multi-threaded:DeprecationWarning"  # Python 3.12


def training(root: Path | None, backend: str, batch_size: int = 4, **arguments) -> Loader:
    arguments = {"resolutions": RESOLUTIONS, "workers": 0, "seed": 5, **arguments}
    return train_loader(
        root, batch_size=batch_size, backend=backend, task="segmentation", **arguments
    )


def validation(root: Path | None, backend: str, batch_size: int = 3, **arguments) -> Loader:
    arguments = {"resolutions": RESOLUTIONS, "workers": 0, **arguments}
    return val_loader(
        root, batch_size=batch_size, backend=backend, task="segmentation", **arguments
    )


BOTH = pytest.mark.parametrize("make", [training, validation], ids=["train", "val"])


def same(ours: list[Batch], other: list[Batch], *, images: bool = True) -> bool:
    """Bit for bit; labels and masks only, or images, too."""
    return len(ours) == len(other) and all(
        (not images or torch.equal(a.images.rows, b.images.rows))
        and torch.equal(a.labels, b.labels)
        and torch.equal(a.indices, b.indices)
        and all(torch.equal(*two) for two in zip(a.masks or (), b.masks or (), strict=True))
        for a, b in zip(ours, other, strict=True)
    )


def stored_mask(loader: Loader, position: int) -> Tensor:
    return torch.from_numpy(np.array(Image.open(loader.plan.masks.path(position))))


def test_a_training_batch_keeps_the_contract(backend: str, pair_root: Path) -> None:
    loader = training(pair_root, backend)
    assert loader.class_names == ("0", "1", "2", "3")
    assert (loader.num_images, len(loader), loader.resolutions) == (9, 3, RESOLUTIONS)
    batches = list(loader)
    for batch in batches:
        assert batch.images.sizes == tuple((r, r) for r in RESOLUTIONS)
        assert (batch.images.rows.shape, batch.images.rows.dtype) == (
            (4 * PIXELS, 3),
            torch.float32,
        )
        assert (batch.labels.shape, batch.labels.dtype) == ((4, 48, 48), torch.uint8)
        assert batch.labels.is_contiguous()
        assert batch.masks is None
        assert batch.mix is None
    assert {*torch.cat([batch.labels for batch in batches]).unique().tolist()} == {0, 1, 2, 3, 255}
    seen = torch.cat([batch.indices for batch in batches])
    assert sorted(seen[:9].tolist()) == list(range(9))


def test_a_validation_batch_has_masks_as_they_are_stored(backend: str, pair_root: Path) -> None:
    loader = validation(pair_root, backend)
    batches = list(loader)
    assert [len(batch.indices) for batch in batches] == [3, 3, 1]
    for batch in batches:
        assert (batch.labels.shape, batch.labels.dtype) == ((0,), torch.uint8)
        assert batch.masks is not None
        for position, mask in zip(batch.indices.tolist(), batch.masks, strict=True):
            assert mask.dtype == torch.uint8
            assert torch.equal(mask, stored_mask(loader, position))
    assert same(list(loader), batches)  # in the next epoch too


@BOTH
def test_backends_agree_on_each_label_and_but_for_rounding_on_images(
    make: Callable[..., Loader], pair_root: Path
) -> None:
    """Also where they reach beyond the image, and whichever way round they are."""
    pytest.importorskip("nvidia.dali", reason="the dali loader needs NVIDIA DALI")
    for _ in range(2):
        ours, other = (make(pair_root, name, normalize="none") for name in ("dali", "pil"))
        batches = [(list(ours), list(other)), (list(ours), list(other))]
    for dali, pillow in batches:
        assert same(dali, pillow, images=False)
        for a, b in zip(dali, pillow, strict=True):
            apart = ((a.images.rows - b.images.rows).abs() * 255).round()
            for level in a.images.with_rows(apart).levels():
                inner = level[..., 1:-1, 1:-1]  # without the outermost ring: see test_pixels.py
                assert inner.max() <= 2
                assert inner.mean() <= 0.3


def flat_scenes(root: Path) -> Path:
    """A data set whose images are the colours of their labels, 40 times the label in grey."""
    make_pair_folder(root, train=6, val=4, size=(110, 140))
    for mask in root.glob("*annot/**/*.png"):
        labels = np.array(Image.open(mask))
        labels[labels == 255] = 4
        split, *inner = mask.relative_to(root).parts
        image = root.joinpath(split.removesuffix("annot"), *inner)
        for extension in (".jpg", ".jpeg"):
            image.with_suffix(extension).unlink(missing_ok=True)
        Image.fromarray(40 * (1 + labels)).convert("RGB").save(image)
    return root


def test_images_and_labels_have_the_same_window_and_flip(backend: str, tmp_path: Path) -> None:
    """Colours tell labels; only pixels at borders between them are of two."""
    root = flat_scenes(tmp_path)
    loader = training(root, backend, normalize="none", batch_size=6)
    for _ in range(5):
        for batch in loader:
            grey = (255 * batch.images.level(0)[:, 0]).round()
            labels = batch.labels.float()
            labels[(labels == 255) & (grey > 100)] = 4.0  # ignored, and within the image
            labels[labels == 255] = -1.0  # beyond it, in black
            agree = ((grey - 40 * (1 + labels)).abs() < 15).float().mean((1, 2))
            assert agree.min() > 0.75, agree


def test_beyond_the_image_pixels_are_the_mean_and_labels_ignored(
    backend: str, pair_root: Path
) -> None:
    loader = training(pair_root, backend, scale=(0.5, 0.5), ignore_label=255)
    for batch in loader:
        ignored = (batch.labels == 255).float().mean((1, 2))
        assert (ignored > 0.74).all()
        for level in batch.images.levels():
            black = (level.abs().amax(1) < 0.01).float().mean((1, 2))
            assert ((black > 0.6) & (black < 0.8)).all()


@pytest.mark.parametrize(
    ("normalize", "border"),
    [("imagenet", MEAN), ("none", (0, 0, 0)), (((0.5, 0.2, 1.0), (1.0, 1.0, 1.0)), (128, 51, 255))],
    ids=["imagenet", "none", "given"],
)
def test_the_border_is_the_mean_of_the_normalisation(
    pair_root: Path, normalize: object, border: tuple[int, int, int]
) -> None:
    assert training(pair_root, "pil", normalize=normalize).plan.border == border


def test_at_scale_one_the_image_is_squashed_as_in_validation(backend: str, pair_root: Path) -> None:
    whole = training(pair_root, backend, scale=(1.0, 1.0), flip="none", batch_size=9)
    (batch,) = whole
    squashed = validation(pair_root, backend, batch_size=9, split="train")
    (other,) = squashed
    place = other.indices.argsort()[batch.indices]
    for ours, theirs in zip(batch.images.levels(), other.images.levels(), strict=True):
        assert torch.equal(ours, theirs[place])
    for labels, position in zip(batch.labels, batch.indices.tolist(), strict=True):
        size = (48, 48)
        image = Image.open(whole.plan.masks.path(position)).resize(size, Image.Resampling.NEAREST)
        assert (labels.numpy() == np.asarray(image)).all()


def test_a_class_that_is_a_low_number_may_be_ignored(backend: str, tmp_path: Path) -> None:
    root = make_pair_folder(tmp_path, num_classes=3, ignore_label=3)
    loader = training(root, backend, ignore_label=3, scale=(0.5, 0.5))
    assert loader.class_names == ("0", "1", "2")
    labels = next(iter(loader)).labels
    assert {*labels.unique().tolist()} == {0, 1, 2, 3}
    assert (labels == 3).float().mean() > 0.74
    assert training(root, backend).class_names == ("0", "1", "2", "3")


def test_images_of_a_pixel_or_a_row_are_cut_and_resized(backend: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for size in ((1, 1), (1, 5), (7, 1), (3, 2), (65, 33)):
        for split in ("train", "val"):
            for folder, shape in ((split, (*size, 3)), (f"{split}annot", size)):
                (tmp_path / folder).mkdir(exist_ok=True)
                pixels = rng.integers(0, 3, shape, dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / folder / f"{size[0]}_{size[1]}.png")
    loader = training(tmp_path, backend, scale=(0.25, 4.0), num_classes=3)
    for _ in range(4):
        for step, batch in enumerate(loader):
            planned = loader.plan.batch(loader.epoch, step)
            for n, position in enumerate(batch.indices.tolist()):
                expected = nearest(
                    stored_mask(loader, position).numpy(),
                    tuple(planned.windows[0, n].tolist()),
                    RESOLUTIONS[0],
                    flip=bool(planned.flips[0, n]),
                    fill=255,
                )
                assert np.array_equal(batch.labels[n].numpy(), expected)
    loader = validation(tmp_path, backend, num_classes=3)
    for batch in loader:
        for position, mask in zip(batch.indices.tolist(), batch.masks, strict=True):
            assert torch.equal(mask, stored_mask(loader, position))


def test_what_a_mask_says_of_light_and_transparency_changes_no_class(
    backend: str, pairs: Path
) -> None:
    before = list(validation(pairs, backend))
    about = PngInfo()
    about.add(b"gAMA", (100_000).to_bytes(4, "big"))
    for file in (pairs / "valannot").rglob("*.png"):
        mask = Image.fromarray(np.array(Image.open(file)))
        mask.save(file, pnginfo=about, transparency=1)
    assert same(list(validation(pairs, backend)), before)


@pytest.mark.parametrize("world_size", [2, 8])
def test_ranks_together_validate_every_image_once(
    backend: str, pair_root: Path, world_size: int
) -> None:
    loader = validation(pair_root, backend)
    seen = []
    for rank in range(world_size):  # with 8 ranks the last one has no image
        for batch in validation(pair_root, backend, rank=rank, world_size=world_size):
            seen += batch.indices.tolist()
            for position, mask in zip(batch.indices.tolist(), batch.masks, strict=True):
                assert torch.equal(mask, stored_mask(loader, position))
    assert sorted(seen) == list(range(7))


def test_two_ranks_train_on_the_pictures_of_one_rank_with_twice_the_batch(
    backend: str, pair_root: Path
) -> None:
    whole = list(training(pair_root, backend, batch_size=6))
    ranks = [training(pair_root, backend, batch_size=3, rank=n, world_size=2) for n in (0, 1)]
    for batch, *parts in zip(whole, *ranks, strict=True):
        assert torch.equal(torch.cat([part.labels for part in parts]), batch.labels)
        assert torch.cat([part.indices for part in parts]).tolist() == batch.indices.tolist()
        for level in range(len(RESOLUTIONS)):
            joined = torch.cat([part.images.level(level) for part in parts])
            assert torch.equal(joined, batch.images.level(level))


def test_an_epoch_goes_on_at_any_step(backend: str, pair_root: Path) -> None:
    loader = training(pair_root, backend)
    epochs = [list(loader), list(loader)]
    assert not same(epochs[0], epochs[1])
    fresh = training(pair_root, backend)
    fresh.epoch, fresh.first_step = 1, 2
    assert same(list(fresh), epochs[1][2:])


def test_a_batch_larger_than_the_data_set_repeats_it(backend: str, pairs: Path) -> None:
    (batch,) = training(pairs, backend, batch_size=8)
    assert batch.indices.tolist()[6:] == batch.indices.tolist()[:2]
    assert batch.labels.shape == (8, 48, 48)


@BOTH
@pytest.mark.filterwarnings(FORK_WARNING)
def test_workers_do_not_change_the_batches(
    make: Callable[..., Loader], backend: str, pair_root: Path
) -> None:
    few, more = (list(make(pair_root, backend, workers=count)) for count in (0, 2))
    assert same(few, more)


@BOTH
def test_a_network_may_be_fed_another_type(make: Callable[..., Loader], pair_root: Path) -> None:
    fed = make(pair_root, "pil").feed(torch.float16, 4, "torch")
    plain = list(make(pair_root, "pil"))
    fetched = list(prefetch(fed, torch.device("cpu")))
    assert same(fetched, plain, images=False)
    assert fetched[0].images.rows.dtype == torch.float16


@BOTH
def test_synthetic_batches_have_labels_too(make: Callable[..., Loader]) -> None:
    loader = make(None, "synthetic", batch_size=4, num_images=10, num_classes=7)
    batches = list(loader)
    assert loader.class_names == tuple("0123456")
    for batch in batches:
        pixels = batch.labels if make is training else torch.stack(batch.masks)
        assert pixels.shape[1:] == ((48, 48) if make is training else (256, 256))
        assert {*pixels.unique().tolist()} == set(range(7))
    assert len(make(None, "synthetic", num_images=10).class_names) == 40


def test_a_limit_takes_images_with_their_masks(backend: str, pair_root: Path) -> None:
    loader = validation(pair_root, backend, limit=3)
    assert loader.num_images == 3
    (batch,) = loader
    for position, mask in enumerate(batch.masks):
        assert torch.equal(mask, stored_mask(loader, position))
    assert [Path(path).stem for path in loader.plan.index.paths] == ["0000", "0006", "0005"]


@BOTH
@pytest.mark.parametrize("what", ["image", "mask"])
def test_a_file_that_is_damaged_under_way_is_named(
    make: Callable[..., Loader], what: str, backend: str, pairs: Path, cache: Path
) -> None:
    loader = make(pairs, backend, batch_size=2)
    plan = loader.plan
    file = Path((plan.index if what == "image" else plan.masks).path(3))
    file.write_bytes(file.read_bytes()[:-60])
    cannot = "cannot decode mask" if what == "mask" else "cannot decode"
    with pytest.raises(RuntimeError, match=re.escape(f"{cannot} {file}: ")) as raised:
        list(loader)
    assert f"python -m rsfast.data exclude {pairs} {plan.index.path(3)}" in str(raised.value)


@BOTH
def test_a_mask_that_goes_under_way_is_named(
    make: Callable[..., Loader], backend: str, pairs: Path, cache: Path
) -> None:
    loader = make(pairs, backend, batch_size=2)
    file = Path(loader.plan.masks.path(3))
    file.unlink()
    with pytest.raises(RuntimeError, match=re.escape(f"{file} is gone")):
        list(loader)


@BOTH
def test_a_mask_of_another_size_than_it_was_is_named(
    make: Callable[..., Loader], backend: str, pairs: Path, cache: Path
) -> None:
    loader = make(pairs, backend, batch_size=2)
    file = Path(loader.plan.masks.path(3))
    Image.new("L", (30, 20)).save(file)
    with pytest.raises(RuntimeError, match=re.escape(f"{file} has changed since")):
        list(loader)


def test_what_is_excluded_by_hand_is_no_longer_trained_on(pairs: Path, cache: Path) -> None:
    assert training(pairs, "pil").num_images == 6
    exclude(pairs, [str(pairs / "train" / "0002.jpeg"), str(pairs / "val/town/0001.jpg")])
    names = open_pairs(pairs, "train").images.paths
    assert training(pairs, "pil").num_images == 5
    assert validation(pairs, "pil").num_images == 3
    assert "0002.jpeg" not in names


def turned_folder(root: Path, orientation: int) -> Path:
    """Images with EXIF, and masks of the size that these are shown at, all of one label."""
    make_pair_folder(root, train=2, val=2, num_classes=1)
    exif = Image.Exif()
    exif[0x0112] = orientation
    for image in list(root.glob("*/0000.jpg")):
        Image.open(image).save(image, exif=exif)
        mask = root / f"{image.parent.name}annot" / "0000.png"
        if orientation >= 5:
            Image.open(mask).transpose(Image.Transpose.ROTATE_90).save(mask)
    return root


@BOTH
def test_masks_are_not_turned_and_must_fit_the_image_as_it_is_shown(
    make: Callable[..., Loader], backend: str, tmp_path: Path, cache: Path
) -> None:
    root = turned_folder(tmp_path / "turned", 6)
    stored, shown = make(root, backend, batch_size=2), make(root, backend, 2, exif="honour")
    assert [loader.num_images for loader in (stored, shown)] == [1, 2]
    (batch,) = shown
    if batch.masks is not None:
        for position, mask in zip(batch.indices.tolist(), batch.masks, strict=True):
            assert torch.equal(mask, stored_mask(shown, position))
            assert tuple(mask.shape) == tuple(shown.plan.index.sizes[position].tolist())


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"task": "detection"}, r"^task must be one of \('classification', 'segmentation'\), got"),
        ({"ignore_label": 256}, r"^ignore_label must be in \[0, 256\), got 256$"),
        ({"num_classes": 0}, r"^num_classes must be in \[1, 255\], got 0$"),
        ({"num_classes": 256}, r"^num_classes must be in \[1, 255\], got 256$"),
        (
            {"crop_area": (0.5, 1.0)},
            r"^crop_area is of classification; segmentation has scale, got",
        ),
    ],
)
def test_a_bad_argument_is_named(arguments: dict, rule: str, pair_root: Path) -> None:
    with pytest.raises(ValueError, match=rule):
        train_loader(pair_root, RESOLUTIONS, 4, **{"task": "segmentation", **arguments})


def test_a_list_of_labels_is_refused(pair_root: Path) -> None:
    with pytest.raises(ValueError, match=r"^labels of segmentation are masks and no list, got a$"):
        validation(pair_root, "pil", labels="a")
