"""That pictures become the very pixels that validation has seen."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from deploy_helpers import manifest, small_network
from helpers import smooth_image
from rsfast.data import val_loader
from rsfast.deploy import Manifest
from rsfast.deploy.preprocess import preprocess
from rsfast.files.orientation import EXIF_MODES
from rsfast.files.pictures import LEVEL_MODES, VAL_CROPS
from rsfast.kernels import normalize_reference

RESOLUTIONS = (65, 48, 33)


def in_16_bits(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(image.convert("L"), dtype=np.uint16) * 257)


def with_alpha(image: Image.Image) -> Image.Image:
    return Image.merge("RGBA", [*image.split(), Image.linear_gradient("L").resize(image.size)])


# Height and width, the suffix, and what becomes of an RGB picture.
KINDS: dict[str, tuple[tuple[int, int], str, Callable[[Image.Image], Image.Image]]] = {
    "rgb": ((97, 131), "png", Image.Image.copy),
    "upright": ((201, 75), "png", Image.Image.copy),
    "smaller": ((21, 30), "png", Image.Image.copy),
    "thin": ((3, 400), "png", Image.Image.copy),
    "grey": ((97, 131), "png", lambda image: image.convert("L")),
    "grey_in_16_bits": ((97, 131), "png", in_16_bits),
    "palette": ((97, 131), "png", lambda image: image.quantize(64)),
    "alpha": ((97, 131), "png", with_alpha),
    "cmyk": ((97, 131), "jpg", lambda image: image.convert("CMYK")),
    "rotated_by_exif": ((97, 131), "jpg", Image.Image.copy),
}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of one picture of each kind."""
    root = tmp_path_factory.mktemp("kinds")
    folder = root / "val" / "only"
    folder.mkdir(parents=True)
    for number, (name, (size, suffix, change)) in enumerate(KINDS.items()):
        picture = change(smooth_image(*size, np.random.default_rng(number)))
        exif = Image.Exif()
        if name == "rotated_by_exif":
            exif[0x0112] = 6
        picture.save(folder / f"{name}.{suffix}", exif=exif)
    return root


@pytest.fixture(scope="module")
def contract() -> Manifest:
    return manifest(small_network())


@pytest.mark.parametrize("resolution", RESOLUTIONS)
@pytest.mark.parametrize("crop", VAL_CROPS)
@pytest.mark.parametrize("exif", EXIF_MODES)
@pytest.mark.parametrize(
    ("levels", "picked_from"), [*((m, None) for m in LEVEL_MODES), ("nearest", 80)]
)
def test_pixels_are_those_of_the_validation_loader(
    levels: str,
    picked_from: int | None,
    exif: str,
    crop: str,
    resolution: int,
    photographs: Path,
    contract: Manifest,
) -> None:
    loader = val_loader(
        photographs,
        (resolution,),
        len(KINDS),
        backend="pil",
        normalize=(contract.mean, contract.std),
        crop=crop,
        exif=exif,
        levels=levels,
        picked_from=picked_from or contract.resolutions[0],
        workers=0,
    )
    (batch,) = loader
    pictures = []
    for path in loader.plan.index.paths:
        with Image.open(loader.plan.index.root / path) as file:
            file.load()
            pictures.append(file)
    changes = {"crop": crop, "exif": exif, "levels": levels, "picked_from": picked_from}
    contract = dataclasses.replace(contract, **changes)
    found = preprocess(pictures, resolution, contract)
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    assert np.array_equal(found, batch.images.level(0).numpy())


def test_a_graph_that_normalises_is_given_the_stored_values(contract: Manifest) -> None:
    picture = smooth_image(90, 70, np.random.default_rng(3))
    stored = preprocess([picture], 48, dataclasses.replace(contract, input_dtype="uint8"))
    assert stored.dtype == np.uint8
    assert stored.flags.c_contiguous
    rows = torch.from_numpy(stored.transpose(0, 2, 3, 1).reshape(-1, 3).copy())
    expected = normalize_reference(rows, contract.mean, contract.std).reshape(1, 48, 48, 3)
    floats = preprocess([picture], 48, contract)
    assert np.array_equal(floats, expected.permute(0, 3, 1, 2).numpy())


@pytest.mark.parametrize(
    ("name", "value", "meant"),
    [
        ("exif", "honour", "ignore"),
        ("levels", "nearest", "resize"),
        ("picked_from", 224, None),
        ("weight_bits", 2, 32),
        ("activation_bits", 2, 32),
    ],
)
def test_a_manifest_that_says_nothing_of_a_younger_entry_means_its_default(
    name: str, value: Any, meant: Any, contract: Manifest
) -> None:
    content = json.loads(dataclasses.replace(contract, **{name: value}).text())
    assert getattr(Manifest.parse(json.dumps(content), "a"), name) == value
    del content[name]
    assert getattr(Manifest.parse(json.dumps(content), "a"), name) == meant


def test_the_scale_of_the_crop_is_the_manifests(contract: Manifest) -> None:
    picture = smooth_image(90, 70, np.random.default_rng(3))
    whole = preprocess([picture], 70, dataclasses.replace(contract, scale=1.0, input_dtype="uint8"))
    assert np.array_equal(whole[0].transpose(1, 2, 0), np.asarray(picture)[10:80])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "at least one, got none"),
        ("cat.jpg", "must be a list of pictures of Pillow, at least one, got str"),
        (Path("cat.jpg"), "must be a list of pictures"),
        (Image.new("RGB", (8, 8)), "must be a list of pictures of Pillow, at least one, got Image"),
        (["cat.jpg"], "must be pictures of Pillow, which .* got 'cat.jpg'"),
        ([np.zeros((8, 8, 3), np.uint8)], "must be pictures of Pillow"),
    ],
    ids=["none", "path", "pathlib", "no_list", "paths", "arrays"],
)
def test_what_is_no_picture_is_refused(images, message: str, contract: Manifest) -> None:
    with pytest.raises(ValueError, match=message):
        preprocess(images, 48, contract)
