"""Pyramids: the images of all resolutions as one object that speaks torch."""

from rsfast.pyramid import elementwise, functions, spatial  # noqa: F401  (they fill the table)
from rsfast.pyramid.batchnorm import SwitchableBatchNorm2d, moved_by_forward
from rsfast.pyramid.dispatch import function
from rsfast.pyramid.extent import Extent
from rsfast.pyramid.pyramid import Pyramid, check_resolutions

__all__ = [
    "Extent",
    "Pyramid",
    "SwitchableBatchNorm2d",
    "check_resolutions",
    "function",
    "moved_by_forward",
]
