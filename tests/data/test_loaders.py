"""The contract of the loaders: what a batch holds, epochs, ranks, broken files."""

from __future__ import annotations

import gc
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import make_image_folder
from rsfast.data import Batch, Loader, index_folder, prefetch, train_loader, val_loader
from rsfast.data.builtin import builtin_root
from rsfast.data.check import check_split

RESOLUTIONS = (48, 32, 24)
PIXELS = sum(r * r for r in RESOLUTIONS)
FORK_WARNING = "ignore:This process .* is multi-threaded:DeprecationWarning"  # Python 3.12


def training(root: Path | None, backend: str, batch_size: int = 4, **arguments) -> Loader:
    arguments = {"resolutions": RESOLUTIONS, "workers": 0, "seed": 5, **arguments}
    return train_loader(root, batch_size=batch_size, backend=backend, **arguments)


def validation(root: Path | None, backend: str, batch_size: int = 3, **arguments) -> Loader:
    arguments = {"resolutions": RESOLUTIONS, "workers": 0, **arguments}
    return val_loader(root, batch_size=batch_size, backend=backend, **arguments)


def same(ours: list[Batch], other: list[Batch]) -> bool:
    """Bit for bit."""
    return len(ours) == len(other) and all(
        torch.equal(a.images.rows, b.images.rows)
        and torch.equal(a.labels, b.labels)
        and torch.equal(a.indices, b.indices)
        for a, b in zip(ours, other, strict=True)
    )


def assert_contract(batch: Batch, count: int, labels: np.ndarray) -> None:
    images = batch.images
    assert images.sizes == tuple((r, r) for r in RESOLUTIONS)
    assert images.num_images == count
    assert images.banks is None
    assert images.rows.shape == (count * PIXELS, 3)
    assert images.rows.dtype == torch.float32
    assert images.rows.is_contiguous()
    assert images.rows.isfinite().all()
    assert (batch.labels.shape, batch.labels.dtype) == ((count,), torch.int64)
    assert (batch.indices.shape, batch.indices.dtype) == ((count,), torch.int64)
    assert batch.indices.device.type == "cpu"
    assert batch.labels.tolist() == labels[batch.indices.numpy()].tolist()


def test_a_training_batch_keeps_the_contract(backend: str, image_root: Path) -> None:
    loader = training(image_root, backend, batch_size=5)
    index = index_folder(image_root / "train")
    assert loader.num_images == 12
    assert loader.class_names == ("cat", "dog")
    assert loader.resolutions == RESOLUTIONS
    batches = list(loader)
    assert len(batches) == len(loader) == 3
    for batch in batches:
        assert_contract(batch, 5, index.labels)
    seen = torch.cat([batch.indices for batch in batches])
    assert sorted(seen[:12].tolist()) == list(range(12))
    assert seen[12:].tolist() == seen[:3].tolist()


def test_the_last_validation_batch_may_be_smaller(backend: str, image_root: Path) -> None:
    loader = validation(image_root, backend, batch_size=3)
    index = index_folder(image_root / "val")
    batches = list(loader)
    assert len(batches) == len(loader) == 3
    for batch, count in zip(batches, (3, 3, 2), strict=True):
        assert_contract(batch, count, index.labels)
    assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(8))
    assert same(list(loader), batches)  # in the next epoch too


def test_validation_takes_resolutions_in_any_order(backend: str, image_root: Path) -> None:
    (down,) = validation(image_root, backend, batch_size=8)
    (up,) = validation(image_root, backend, batch_size=8, resolutions=(24, 48))
    assert torch.equal(up.images.level(0), down.images.level(2))
    assert torch.equal(up.images.level(1), down.images.level(0))


@pytest.mark.parametrize("world_size", [2, 3, 9])
def test_ranks_together_validate_every_image_once(
    backend: str, image_root: Path, world_size: int
) -> None:
    (whole,) = validation(image_root, backend, batch_size=8)
    seen = []
    for rank in range(world_size):  # with 9 ranks the last one has no image
        loader = validation(image_root, backend, rank=rank, world_size=world_size)
        batches = list(loader)
        assert len(batches) == len(loader)
        for batch in batches:
            seen += batch.indices.tolist()
            for level in range(len(RESOLUTIONS)):
                expected = whole.images.level(level)[batch.indices]
                assert torch.equal(batch.images.level(level), expected)
    assert sorted(seen) == list(range(8))


def test_two_ranks_train_on_the_pictures_of_one_rank_with_twice_the_batch(
    backend: str, image_root: Path
) -> None:
    whole = list(training(image_root, backend, batch_size=6))
    ranks = [
        list(training(image_root, backend, batch_size=3, rank=rank, world_size=2))
        for rank in (0, 1)
    ]
    for batch, first, second in zip(whole, *ranks, strict=True):
        assert torch.cat([first.indices, second.indices]).tolist() == batch.indices.tolist()
        for level in range(len(RESOLUTIONS)):
            joined = torch.cat([first.images.level(level), second.images.level(level)])
            assert torch.equal(joined, batch.images.level(level))


def test_each_iteration_is_the_next_epoch_and_the_epoch_can_be_set(
    backend: str, image_root: Path
) -> None:
    loader = training(image_root, backend)
    epochs = []
    for number in range(3):
        assert loader.epoch == number
        epochs.append(list(loader))
    assert not same(epochs[0], epochs[1])
    orders = {tuple(torch.cat([b.indices for b in batches]).tolist()) for batches in epochs}
    assert len(orders) == 3
    for number in (0, 2, 1):
        loader.epoch = number
        assert same(list(loader), epochs[number])
    fresh = training(image_root, backend)
    fresh.epoch = 2  # as a resumed run does, without the epochs before
    assert same(list(fresh), epochs[2])


def test_another_seed_has_other_batches(backend: str, image_root: Path) -> None:
    one, other = (list(training(image_root, backend, seed=seed)) for seed in (0, 1))
    assert not same(one, other)


def test_a_loop_left_early_starts_the_same_epoch_again(backend: str, image_root: Path) -> None:
    expected = training(image_root, backend, batch_size=2)
    epochs = [list(expected), list(expected)]
    loader = training(image_root, backend, batch_size=2)
    for stop in (1, 3):
        taken = [batch for _, batch in zip(range(stop), loader, strict=False)]
        assert same(taken, epochs[0][:stop])
        assert loader.epoch == 0
    assert same(list(loader), epochs[0])
    assert same([next(iter(loader))], epochs[1][:1])  # also after a whole epoch
    assert same(list(loader), epochs[1])


def test_two_loops_over_one_loader_do_not_disturb_each_other(
    backend: str, image_root: Path
) -> None:
    expected = list(training(image_root, backend, batch_size=2))
    loader = training(image_root, backend, batch_size=2)
    pairs = list(zip(iter(loader), iter(loader), strict=True))
    assert same([first for first, _ in pairs], expected)
    assert same([second for _, second in pairs], expected)


def test_batches_stay_as_they_are_while_the_loader_goes_on(backend: str, image_root: Path) -> None:
    loader = training(image_root, backend, batch_size=2, resolutions=(32,))
    copies, batches = [], []
    for batch in loader:
        copies.append(batch.images.rows.clone())
        batches.append(batch)
    for batch, copy in zip(batches, copies, strict=True):
        assert torch.equal(batch.images.rows, copy)


@pytest.mark.parametrize(("max_steps", "steps"), [(0, 6), (1, 1), (4, 4), (99, 6)])
def test_max_steps_cuts_the_epoch(
    backend: str, image_root: Path, max_steps: int, steps: int
) -> None:
    whole = training(image_root, backend, batch_size=2)
    epochs = [list(whole), list(whole)]
    loader = training(image_root, backend, batch_size=2, max_steps=max_steps)
    assert len(loader) == steps
    assert same(list(loader), epochs[0][:steps])
    assert same(list(loader), epochs[1][:steps])


def test_normalisation_is_imagenets_or_none_or_given(backend: str, image_root: Path) -> None:
    plain, imagenet, given = (
        next(iter(training(image_root, backend, normalize=normalize))).images.rows
        for normalize in ("none", "imagenet", ((0.5, 0.25, 0.0), (0.1, 1.0, 2.0)))
    )
    assert 0 <= plain.min() < plain.max() <= 1
    torch.testing.assert_close(plain * 255, (plain * 255).round(), rtol=0, atol=1e-4)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(imagenet, (plain - mean) / std, rtol=0, atol=1e-5)
    mean, std = torch.tensor([0.5, 0.25, 0.0]), torch.tensor([0.1, 1.0, 2.0])
    torch.testing.assert_close(given, (plain - mean) / std, rtol=0, atol=1e-5)


def test_imagenet_is_the_default_and_the_loader_tells_the_normalisation(image_root: Path) -> None:
    for make in (train_loader, val_loader):
        loader = make(image_root, RESOLUTIONS, 4, backend="pil", workers=0)
        assert loader.mean == (0.485, 0.456, 0.406)
        assert loader.std == (0.229, 0.224, 0.225)
    loader = training(image_root, "pil", normalize="none")
    assert (loader.mean, loader.std) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def test_a_network_may_be_fed_another_type_and_padded_channels(image_root: Path) -> None:
    plain = list(training(image_root, "pil"))
    fed = training(image_root, "pil").feed(torch.float16, 4, "torch")
    for batch, want in zip(prefetch(fed, torch.device("cpu")), plain, strict=True):
        assert batch.images.rows.dtype == torch.float16
        assert torch.equal(batch.images.rows[:, :3], want.images.rows.half())
        assert not batch.images.rows[:, 3:].any()
        assert torch.equal(batch.labels, want.labels)


@pytest.mark.filterwarnings(FORK_WARNING)
def test_pillow_workers_give_the_batches_of_this_process(image_root: Path) -> None:
    assert same(
        list(training(image_root, "pil", workers=2)), list(training(image_root, "pil", workers=0))
    )
    assert same(
        list(validation(image_root, "pil", workers=2)),
        list(validation(image_root, "pil", workers=0)),
    )


def test_dali_threads_do_not_change_the_batches(image_root: Path) -> None:
    pytest.importorskip("nvidia.dali", reason="the dali loader needs NVIDIA DALI")
    one, three = (list(training(image_root, "dali", workers=count)) for count in (1, 3))
    assert same(one, three)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_truncated_jpeg_ends_in_an_error_that_names_the_file(
    backend: str, split: str, tmp_path: Path
) -> None:
    make_image_folder(tmp_path, train=4, val=4)
    broken = tmp_path / split / "dog" / "0002.jpg"
    content = broken.read_bytes()
    broken.write_bytes(content[: len(content) // 2])
    with Image.open(broken) as image:  # the header is intact, so the index keeps it
        assert image.height > 0
    if split == "train":  # the whole image, so that no window misses the damage
        loader = training(tmp_path, backend, batch_size=2, crop_area=(1.0, 1.0))
    else:
        loader = validation(tmp_path, backend, batch_size=2)
    with pytest.raises(RuntimeError, match=re.escape(f"cannot decode {broken}")):
        list(loader)


def test_a_file_that_only_dali_cannot_decode_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GIF files do not pass the index, so the index is made to let one through."""
    pytest.importorskip("nvidia.dali", reason="the dali loader needs NVIDIA DALI")
    monkeypatch.setattr("rsfast.data.formats._WHOLLY", {"JPEG", "GIF"})
    make_image_folder(tmp_path, train=2, val=2)
    odd = tmp_path / "val" / "dog" / "0001.jpg"
    Image.new("RGB", (40, 30)).save(odd, format="GIF")
    with pytest.raises(RuntimeError, match=re.escape(str(odd))):
        list(validation(tmp_path, "dali", batch_size=2))


@pytest.mark.parametrize(("make", "split"), [(training, "train"), (validation, "val")])
def test_a_folder_that_was_never_checked_is_said_once(
    make, split: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = make_image_folder(tmp_path / "images", train=1, val=1)
    for _ in range(2):
        make(root, "pil")
    assert caplog.text.count(f"{root / split} was never checked: ") == 1
    assert f"python -m rsfast.data check {root}" in caplog.text
    check_split(root / split, workers=1)
    (tmp_path / "same").symlink_to(root)
    caplog.clear()
    make(tmp_path / "same", "pil")
    assert not caplog.records


def test_the_built_in_set_needs_no_check(caplog: pytest.LogCaptureFixture) -> None:
    root = builtin_root(num_train=10, num_val=10)
    training(root, "pil")
    validation(root, "pil")
    assert not caplog.records


def test_synthetic_repeats_one_random_batch(tmp_path: Path) -> None:
    loader = training(tmp_path, "synthetic", batch_size=4, num_images=10, num_classes=3)
    assert loader.num_images == 10
    assert loader.class_names == ("0", "1", "2")
    batches = [*loader, *loader]
    assert len(batches) == 2 * len(loader) == 6
    for batch in batches:
        assert_contract(batch, 4, np.arange(10) % 3)
        assert torch.equal(batch.images.rows, batches[0].images.rows)
    assert batches[0].images.rows.std() > 0.5
    assert {label for batch in batches for label in batch.labels.tolist()} == {0, 1, 2}


def test_the_last_synthetic_validation_batch_holds_the_head_of_the_others() -> None:
    loader = validation(None, "synthetic", batch_size=4, num_images=10, num_classes=3)
    first, _, last = loader
    assert_contract(last, 2, np.arange(10) % 3)
    for level in range(len(RESOLUTIONS)):
        assert torch.equal(last.images.level(level), first.images.level(level)[:2])


def test_synthetic_has_the_size_of_imagenet_unless_told() -> None:
    train = train_loader(None, (8,), 256, backend="synthetic")
    val = val_loader(None, (8,), 256, backend="synthetic")
    assert (train.num_images, len(train)) == (1_281_167, 5005)  # as published
    assert (val.num_images, len(val)) == (50_000, 196)
    assert len(train.class_names) == len(val.class_names) == 1000


class CollectingBatches(torch.utils.data.Dataset):
    """Batches whose workers collect garbage first."""

    def __init__(self, batches: torch.utils.data.Dataset) -> None:
        self.batches = batches

    def __getitem__(self, at: tuple[int, int]) -> torch.Tensor:
        gc.collect()
        return self.batches[at]


@pytest.mark.filterwarnings(FORK_WARNING)
def test_workers_do_not_clean_up_what_they_inherit(image_root: Path, tmp_path: Path) -> None:
    class Cycle:
        """Garbage, like a DALI pipeline that was left: its end waits for threads of its process."""

        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            (tmp_path / str(os.getpid())).touch()

    loader = training(image_root, "pil", workers=2)
    loader._decoder._batches = CollectingBatches(loader._decoder._batches)
    gc.disable()
    try:
        Cycle()
        assert len(list(loader)) == len(loader)
        assert not list(tmp_path.iterdir())
    finally:
        gc.enable()
    gc.collect()
    assert [path.name for path in tmp_path.iterdir()] == [str(os.getpid())]


def test_copies_of_a_resolution_are_alike_in_one_crop_and_differ_in_many(
    backend: str, image_root: Path
) -> None:
    for crop, flip, alike in (("single", "shared", True), ("multi", "none", False)):
        loader = training(image_root, backend, resolutions=(32, 24), copies=2, crop=crop, flip=flip)
        images = next(iter(loader)).images
        assert images.sizes == ((32, 32), (32, 32), (24, 24), (24, 24))
        assert torch.equal(images.level(0), images.level(1)) is alike
        assert torch.equal(images.level(2), images.level(3)) is alike


def test_a_limit_takes_images_evenly_from_all_classes(backend: str, image_root: Path) -> None:
    whole = validation(image_root, backend)
    part = validation(image_root, backend, limit=4)
    assert part.num_images == 4
    assert part.class_names == whole.class_names
    labels = torch.cat([batch.labels for batch in part]).tolist()
    assert labels == sorted(labels)
    assert len(set(labels)) == len(whole.class_names)
    assert validation(image_root, backend, limit=10**6).num_images == whole.num_images


def test_training_images_can_be_prepared_as_in_validation(backend: str, image_root: Path) -> None:
    loader = validation(image_root, backend, split="train")
    assert loader.num_images == training(image_root, backend).num_images
    indices = torch.cat([batch.indices for batch in loader])
    assert indices.tolist() == list(range(loader.num_images))
