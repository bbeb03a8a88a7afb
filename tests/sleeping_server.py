"""The example server with a network that sleeps: `python -m sleeping_server OBJECTIVE_MS`.

Sleeping takes the same time on a machine that tests share. Prints its port.
"""

from __future__ import annotations

import sys
import time

import numpy as np
from PIL import Image

from rsfast.deploy.chooser import Chooser
from rsfast.deploy.manifest import Manifest
from rsfast.deploy.server import create_server, make_app
from rsfast.deploy.table import Row, Table

SLEEPS_MS = {224: 80.0, 160: 40.0, 96: 16.0}
TABLE = Table(tuple(Row(r, t, 1.05 * t, None) for r, t in SLEEPS_MS.items()))
MANIFEST = Manifest(
    arch=None,
    resolutions=tuple(SLEEPS_MS),
    sizes=(32, 448),
    between="interpolate",
    num_classes=6,
    class_names=("ant", "bee", "cat", "dog", "elk", "fox"),
    input_dtype="float32",
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    crop="none",
    scale=0.875,
    filter="bilinear",
    calibration_images=0,
    checkpoint="none",
    checkpoint_sha256="",
    versions={},
)


class SleepingNet:
    """Logits are the mean colour, red, green and blue for the first three classes."""

    manifest = MANIFEST

    def preprocess(self, images: list[Image.Image], resolution: int) -> np.ndarray:
        pixels = [np.asarray(i.convert("RGB").resize((resolution, resolution))) for i in images]
        return np.stack(pixels).transpose(0, 3, 1, 2).astype(np.float32) / 255

    def __call__(self, images: np.ndarray) -> np.ndarray:
        time.sleep(SLEEPS_MS[images.shape[2]] / 1000)
        colour = 10 * images.mean((2, 3))
        return np.concatenate([colour, np.full_like(colour, -1)], axis=1)


def main() -> None:
    chooser = Chooser(TABLE, float(sys.argv[1]))
    server = create_server(make_app(SleepingNet(), chooser), chooser, "127.0.0.1", 0)
    print(server.effective_port, flush=True)
    server.run()


if __name__ == "__main__":
    main()
