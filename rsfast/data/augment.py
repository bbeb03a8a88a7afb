"""What is drawn for training images beyond window and flip: pure functions of generator and count.

Everything is drawn once per image, in shares of its sides, and serves all its resolutions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rsfast.data.operations import LARGEST_MAGNITUDE

__all__ = [
    "MOST_OPERATIONS",
    "NOTHING",
    "Augment",
    "Blends",
    "draw_blends",
    "draw_colour_shifts",
    "draw_erasures",
    "partners",
]

MOST_OPERATIONS = 10  # per image: DALI's graph grows with them
_TRIES = 10
_ERASED = (0.02, 1 / 3)  # shares of the area, uniform
# Of the colours of ImageNet's pixels, of values in [0, 1]: what fb.resnet.torch publishes.
_PRINCIPAL_VALUES = np.array([0.2175, 0.0188, 0.0045])
_PRINCIPAL_COLOURS = np.array(  # a row for each of red, green and blue, a column for each value
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
)
_ERASED_LOG_RATIO = (math.log(0.3), math.log(3.3))  # of height to width, uniform


@dataclass(frozen=True, kw_only=True, slots=True)
class Augment:
    """What happens to training images beyond window and flip; by default nothing.

    Attributes:
        mixup: alpha of Beta(alpha, alpha), of which the share of an image in its mixture with
            another one is drawn; 0 for no mixtures.
        cutmix: alpha of Beta(alpha, alpha), of which the share of an image that another one's box
            leaves visible is drawn; 0 for no boxes. With both, each image gets one of the two,
            either with probability 1/2.
        rand_augment: how many of RandAugment's operations each image gets, from 1 to 10, and their
            magnitude, from 0 to 30.
        random_erasing: probability that a rectangle of an image is erased, in [0, 1].
        lighting: standard deviation of the three normal numbers by which the colours of an image
            are moved along the principal components of ImageNet's, as AlexNet's were; 0 for none.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    rand_augment: tuple[int, int] | None = None
    random_erasing: float = 0.0
    lighting: float = 0.0

    def __post_init__(self) -> None:
        for name in ("mixup", "cutmix", "lighting"):
            value = getattr(self, name)
            if not 0.0 <= value < np.inf:
                raise ValueError(f"{name} must be a finite number of at least 0, got {value}")
        if not 0.0 <= self.random_erasing <= 1.0:
            raise ValueError(f"random_erasing must be in [0, 1], got {self.random_erasing}")
        if self.rand_augment is not None:
            number, magnitude = self.rand_augment
            if not (1 <= number <= MOST_OPERATIONS and 0 <= magnitude <= LARGEST_MAGNITUDE):
                raise ValueError(
                    f"rand_augment must be 1 to {MOST_OPERATIONS} operations of a magnitude from 0 "
                    f"to {LARGEST_MAGNITUDE}, got {number} of {magnitude}"
                )

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with others, so that labels become soft."""
        return bool(self.mixup or self.cutmix)


NOTHING = Augment()


class Blends(NamedTuple):
    """How images are mixed with their partners: within a box, so much of the own image is kept.

    Mixup's box is the whole image, and CutMix keeps nothing within the box.

    Attributes:
        boxes: [N, 4] float32 top, left, bottom, right in shares of the sides, within [0, 1].
        kept: [N] float32 share of the own image within the box, in [0, 1].
    """

    boxes: np.ndarray
    kept: np.ndarray

    @property
    def share(self) -> np.ndarray:
        """[N] float32 of the own image in the whole picture, and so of its label."""
        height, width = (self.boxes[:, 2:] - self.boxes[:, :2]).T
        return 1.0 - height * width * (1.0 - self.kept)


def draw_blends(rng: np.random.Generator, count: int, mixup: float, cutmix: float) -> Blends:
    """Draws for `count` images, as timm does with a share for each image.

    A CutMix box has the sides sqrt(1 - share), its centre is anywhere in the image, and what lies
    outside the image is cut off, so that the share that is left visible grows.

    Args:
        rng: moved on.
        count: of images.
        mixup, cutmix: as in :class:`Augment`, not both 0.
    """
    cuts = np.full(count, not mixup)
    if mixup and cutmix:
        cuts = rng.random(count) < 0.5
    shares = np.where(
        cuts,
        rng.beta(cutmix, cutmix, count) if cutmix else 0.0,
        rng.beta(mixup, mixup, count) if mixup else 0.0,
    )
    centres = rng.random((count, 2))
    half = np.sqrt(1.0 - shares)[:, None] / 2.0
    boxes = np.concatenate([centres - half, centres + half], axis=1).clip(0.0, 1.0)
    boxes[~cuts] = (0.0, 0.0, 1.0, 1.0)
    return Blends(boxes.astype(np.float32), np.where(cuts, 0.0, shares).astype(np.float32))


def partners(count: int) -> np.ndarray:
    """[count] int64: of each image of a batch, the one that it is mixed with.

    Neighbours are each other's partners. So batches of an even number of images hold the same
    pictures however many ranks a step is spread over. The last image of an odd number takes the
    first one.
    """
    own = np.arange(count)
    other = own ^ 1
    other[other == count] = 0
    return other


def draw_erasures(rng: np.random.Generator, count: int, probability: float) -> np.ndarray:
    """Draws what is erased of `count` images, as torchvision and timm do, in shares of the sides.

    The area is uniform in [0.02, 1/3], the ratio of the sides log-uniform in [0.3, 3.3], the place
    anywhere; ten tries to fit the rectangle into the image.

    Returns:
        [count, 4] float32 top, left, bottom, right; all 0 where nothing is erased.
    """
    chosen = rng.random(count) < probability
    areas = rng.uniform(*_ERASED, (count, _TRIES))
    ratios = np.exp(rng.uniform(*_ERASED_LOG_RATIO, (count, _TRIES)))
    places = rng.random((count, 2))
    tried = np.stack([np.sqrt(areas * ratios), np.sqrt(areas / ratios)], axis=2)
    fits = np.all(tried < 1.0, axis=2)
    sides = np.take_along_axis(tried, fits.argmax(axis=1)[:, None, None], axis=1)[:, 0]
    corners = places * (1.0 - sides)
    boxes = np.concatenate([corners, corners + sides], axis=1)
    boxes[~(chosen & np.any(fits, axis=1))] = 0.0
    return boxes.astype(np.float32)


def draw_colour_shifts(rng: np.random.Generator, count: int, deviation: float) -> np.ndarray:
    """Draws what is added to the colours of `count` images, as fb.resnet.torch does.

    It is sum_k a_k * l_k * v_k over the three principal components of ImageNet's colours, with a_k
    normal with mean 0 and this deviation, l_k the component's value and v_k its direction. Nothing
    is cut off at black or white.

    Returns:
        [count, 3] float32, RGB, to values in [0, 1].
    """
    amounts = deviation * rng.standard_normal((count, 3)) * _PRINCIPAL_VALUES
    return (amounts @ _PRINCIPAL_COLOURS.T).astype(np.float32)
